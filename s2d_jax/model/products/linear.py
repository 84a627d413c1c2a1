"""How a product with a weight is computed: the form is chosen here, by backend, weight format and rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from s2d_jax import backends
from s2d_jax.model.products.forms import blocked, plain, scaled, two_digits, weight_first
from s2d_jax.model.products.mixed import mixed_product
from s2d_jax.model.products.weight_formats import Int8Weight, Weight

Form = Callable[[Float[Array, "A I"], Any], Float[Array, "A O"]]

_FORMS: dict[str, Form] = {
    form.__name__: form for form in (blocked, plain, scaled, two_digits, weight_first)
}


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
    return form_of(backends.forms(), stored, x_AI.shape[0])(x_AI, w)


def format_of(w: Weight) -> str:
    """The weight format of a matrix, or of activations, that `linear` takes."""
    if isinstance(w, Int8Weight):
        return "int8"
    return "bf16" if w.dtype == jnp.bfloat16 else "f32"


def form_of(chosen: backends.Forms, weight_format: str, rows: int) -> Form:
    """The form that `linear` uses.

    Args:
        chosen: of a backend.
        weight_format: "f32", "bf16" or "int8".
        rows: how many rows the activations have.
    """
    names = chosen.products[weight_format]
    return _FORMS[next(name for most, name in names if most is None or rows <= most)]
