"""Grouped-query attention for decoding, prefill and training: one function, and the choice of its form."""

from __future__ import annotations

import importlib
from types import ModuleType

from jaxtyping import Array, Bool, Float, Int

from s2d_jax.backends import forms
from s2d_jax.model.attention_forms.request import Causal, Request
from s2d_jax.sharding import mesh_in_use

# Each is a module beside this one with `takes(request)`, whether the form has what is asked for, and `attend(request)`.
FORMS = ("dense", "flash_gpu", "flash_tpu", "used_blocks", "used_splits")


def form_named(name: str) -> ModuleType:
    """The module of one of FORMS, loaded when it is first named: a CPU needs no kernels, and loads half a second sooner."""
    return importlib.import_module(f"s2d_jax.model.attention_forms.{name}")


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    looks: Bool[Array, "B T S"] | Causal,
    *,
    used_B: Int[Array, "B"] | None = None,
    positions_BT: Int[Array, "B T"] | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
) -> Float[Array, "B T N*H"]:
    """Each query's mix of the values that it looks at; softmax in f32.

    The first form is used that the backend names (`Forms.attention` for passes without a cache, `Forms.cached_attention` for
    those with a mask) and that takes what is asked for.

    Args:
        q_BTNH: queries, N a multiple of K.
        k_BKSH, v_BKSH: keys and values, converted to the dtype of the queries where they have another.
        looks: what a query looks at: a mask, True where it may look, or `Causal`, for which S is T. The result of a query that
            may look at nothing is finite, and differs from form to form.
        used_B: int32, no query of the row looks at a key from there on, whatever the mask says; None: all S are in use. A
            form may leave the rest unread, and may also read it.
        positions_BT: int32, where each query stands among the keys; only a window over a mask needs them.
        window: a query sees the `window` keys up to its position, itself included, of those that it looks at (Beltagy et al.
            2020, section 3.1). Keys count by where they lie: nodes of a tree lie behind their place in the text, so that a
            window wider than the tree is deep hides none of them.
        soft_cap: scores become `soft_cap * tanh(score / soft_cap)` before they are masked (Gemma Team 2024, section 2).
        scale: scores are multiplied with it; None is `1 / sqrt(H)`.

    Returns:
        The mixed values of all heads, in the dtype of the queries.

    Raises:
        ValueError: for a window over a mask without positions, or where no named form takes what is asked for.
    """
    request = Request(
        q_BTNH, k_BKSH, v_BKSH, looks, used_B, positions_BT, window, soft_cap, scale, mesh_in_use()
    )
    causal = isinstance(looks, Causal)
    names = forms().attention if causal else forms().cached_attention
    for name in names:
        form = form_named(name)
        if form.takes(request):
            mixed_BTNH = form.attend(request)
            return mixed_BTNH.reshape(*mixed_BTNH.shape[:2], -1)
    raise ValueError(
        f"none of {', '.join(names)} takes queries {q_BTNH.shape}, keys {k_BKSH.shape}"
    )
