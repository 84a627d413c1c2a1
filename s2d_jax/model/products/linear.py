"""How a product with a weight is computed: the form is chosen here, by backend, weight format and rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from s2d_jax.model.products.forms import blocked, plain, scaled, two_digits, weight_first
from s2d_jax.model.products.mixed import mixed_product
from s2d_jax.model.products.weight_formats import Int8Weight, Weight

# Above this many rows a product is bound by arithmetic, and the operand order hardly matters.
_FEW_ROWS = 32
# Above this many rows, XLA's CPU library multiplies bf16 as it is. For one row it makes an f32 copy, and hoists that.
_FEW_BF16_ROWS = 4
# Above this many rows, two int8 digits per activation cost more arithmetic than converting the weights.
_FEW_DIGIT_ROWS = 8

Form = Callable[[Float[Array, "A I"], Any], Float[Array, "A O"]]


def linear(
    x: Float[Array, "*batch I"], w: Weight, out_dtype: Any = None
) -> Float[Array, "*batch O"]:
    """Multiplies the last axis of `x` by a weight stored as PyTorch stores it.

    Args:
        x: f32 or bf16.
        w: an array, cast to the dtype of `x`, or an `Int8Weight`.
        out_dtype: the dtype of the result; None is that of `x`.

    Returns:
        Sums that were accumulated in f32, or exactly.
    """
    out_AO = _product(x.reshape(-1, x.shape[-1]), w)
    return out_AO.astype(out_dtype or x.dtype).reshape(*x.shape[:-1], w.shape[0])


def _product(x_AI: jax.Array, w: Weight) -> jax.Array:
    """f32 `[A, O]`."""
    stored, computed = format_of(w), format_of(x_AI)
    if (stored, computed) == ("f32", "bf16"):
        return mixed_product(x_AI, w)
    if not isinstance(w, Int8Weight):
        w, stored = w.astype(x_AI.dtype), computed
    forms = {platform: form_of(platform, stored, x_AI.shape[0]) for platform in ("cpu", "tpu")}
    if forms["cpu"] is forms["tpu"]:
        return forms["cpu"](x_AI, w)
    return jax.lax.platform_dependent(x_AI, w, cpu=forms["cpu"], default=forms["tpu"])


def format_of(w: Weight) -> str:
    """The weight format of a matrix, or of activations, that `linear` takes."""
    if isinstance(w, Int8Weight):
        return "int8"
    return "bf16" if w.dtype == jnp.bfloat16 else "f32"


def form_of(platform: str, weight_format: str, rows: int) -> Form:
    """The form that `linear` uses; measured on CPU (docs/experiments.md), plain dots elsewhere.

    Args:
        platform: "cpu", "gpu", "tpu".
        weight_format: "f32", "bf16" or "int8".
        rows: how many rows the activations have.
    """
    if platform != "cpu":
        return scaled if weight_format == "int8" else plain
    if weight_format == "int8":
        return two_digits if rows <= _FEW_DIGIT_ROWS else blocked
    if weight_format == "bf16":
        return blocked if rows <= _FEW_BF16_ROWS else plain
    return weight_first if rows <= _FEW_ROWS else plain
