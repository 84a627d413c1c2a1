"""How a product with a weight is computed. Every backend-dependent choice of form lives here."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

# Above this many rows a product is bound by arithmetic, and the operand order hardly matters.
_FEW_ROWS = 32
_CONTRACT_LAST = (((1,), (1,)), ((), ()))
# The weight-first product of 5 to 7 rows costs more than that of 8, and that of 9 to 15 more than that of 16.
_ROUND_ROWS_UP_TO = (8, 16)


def linear(x: jax.Array, w_OI: jax.Array, out_dtype: Any = None) -> jax.Array:
    """Multiplies the last axis of `x` by a weight stored as PyTorch stores it.

    Args:
        x: `[..., I]`, f32 or bf16.
        w_OI: `[O, I]`, cast to the dtype of `x`.
        out_dtype: of the result; None is the dtype of `x`.

    Returns:
        `[..., O]`; sums are accumulated in f32.
    """
    x_MI = x.reshape(-1, x.shape[-1])
    w_OI = w_OI.astype(x.dtype)
    if x_MI.shape[0] <= _FEW_ROWS:
        out_MO = jax.lax.platform_dependent(x_MI, w_OI, cpu=_weight_first, default=_plain)
    else:
        out_MO = _plain(x_MI, w_OI)
    return out_MO.astype(out_dtype or x.dtype).reshape(*x.shape[:-1], w_OI.shape[0])


def _plain(x_MI: jax.Array, w_OI: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x_MI, w_OI, _CONTRACT_LAST, preferred_element_type=jnp.float32)


def _weight_first(x_MI: jax.Array, w_OI: jax.Array) -> jax.Array:
    """XLA's CPU library packs its second operand on every call, so it must get the small one.

    The barrier keeps XLA from rewriting `dot(w, x).T` back into `dot(x, w)`.
    """
    rows = x_MI.shape[0]
    padding = _padded_rows(rows) - rows
    x_MI = jnp.pad(x_MI, ((0, padding), (0, 0)))
    out_OM = jax.lax.dot_general(w_OI, x_MI, _CONTRACT_LAST, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(out_OM).T[:rows]


def _padded_rows(rows: int) -> int:
    return next((r for r in _ROUND_ROWS_UP_TO if r // 2 < rows <= r), rows)
