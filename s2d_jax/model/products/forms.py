"""The forms in which a product with a weight can be written. All compute `x @ w.T`; XLA makes very different code of them.

A form takes `x_MI` in the compute dtype and a weight `[O, I]` (an array, or an `Int8Weight`), and returns f32 `[M, O]`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from s2d_jax.model.products.weight_formats import Int8Weight, Matrix, Weight

_CONTRACT_LAST = (((1,), (1,)), ((), ()))
# The weight-first product of 5 to 7 rows costs more than that of 8, and that of 9 to 15 more than that of 16.
_ROUND_ROWS_UP_TO = (8, 16)
# Weights in a converted block: small enough for the shared cache, large enough that starting two kernels for it costs little.
_BLOCK = 1 << 20
# int16 activations as two int8 digits of base 256: 127 * 256 is the largest number whose first digit fits.
_LARGEST_DIGITS = 127 * 256


def _dot(a, b, out_dtype) -> jax.Array:
    return jax.lax.dot_general(a, b, _CONTRACT_LAST, preferred_element_type=out_dtype)


def plain(x_MI: Float[Array, "M I"], w_OI: Matrix) -> Float[Array, "M O"]:
    """One dot, the activations first."""
    return _dot(x_MI, w_OI, jnp.float32)


def weight_first(x_MI: Float[Array, "M I"], w_OI: Matrix) -> Float[Array, "M O"]:
    """XLA's CPU library packs its second operand on every call, so it must get the small one.

    The barrier keeps XLA from rewriting `dot(w, x).T` back into `dot(x, w)`.
    """
    rows = x_MI.shape[0]
    x_MI = jnp.pad(x_MI, ((0, _padded_rows(rows) - rows), (0, 0)))
    return jax.lax.optimization_barrier(_dot(w_OI, x_MI, jnp.float32)).T[:rows]


def _padded_rows(rows: int) -> int:
    return next((r for r in _ROUND_ROWS_UP_TO if r // 2 < rows <= r), rows)


def scaled(x_MI: Float[Array, "M I"], w: Int8Weight) -> Float[Array, "M O"]:
    """int8 values as numbers of the compute dtype (they fit exactly), one dot, then the scales."""
    return plain(x_MI, w.values.astype(x_MI.dtype)) * w.scale[None, :]


def blocked(x_MI: Float[Array, "M I"], w: Weight) -> Float[Array, "M O"]:
    """Weights become f32 a block at a time, inside a loop, so that no f32 copy of a matrix exists.

    Without the loop XLA hoists the conversion out of the decoding loop: a conversion of weights is loop-invariant.
    """
    values = w.values if isinstance(w, Int8Weight) else w
    channels, columns = values.shape
    x_MI = x_MI.astype(jnp.float32)
    # At least two blocks: XLA unrolls a loop of one trip, and hoists its conversion whatever ties it.
    rows = min(max(1, -(-channels // 2)), max(1, _BLOCK // columns))

    def one_block(i, out_OM):
        # XLA's CPU backend turns round the slice and the conversion of a bf16 weight. Tied to the block, the conversion
        # cannot leave the loop, and inside it the two become one kernel that converts the slice only.
        tied, start = jax.lax.optimization_barrier((values, i * rows))
        # Both slices are clamped alike at the end: the last block overlaps the one before.
        w_RI = jax.lax.dynamic_slice(tied, (start, 0), (rows, columns)).astype(jnp.float32)
        out_RM = _dot(w_RI, x_MI, jnp.float32)
        return jax.lax.dynamic_update_slice(out_OM, out_RM, (start, 0))

    empty_OM = jnp.zeros((channels, x_MI.shape[0]), jnp.float32)
    out_MO = jax.lax.fori_loop(0, -(-channels // rows), one_block, empty_OM).T
    return out_MO * w.scale[None, :] if isinstance(w, Int8Weight) else out_MO


def _two_digits(x_MI: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows rounded to integers of at most 127 * 256: int8 `[2 M, I]` (first digits, then last), and f32 steps `[M, 1]`."""
    x_MI = x_MI.astype(jnp.float32)
    largest_M1 = jnp.max(jnp.abs(x_MI), axis=1, keepdims=True)
    step_M1 = jnp.maximum(largest_M1, jnp.finfo(jnp.float32).tiny) / _LARGEST_DIGITS
    whole_MI = jnp.round(x_MI / step_M1).astype(jnp.int32)
    first_MI = (whole_MI + 128) >> 8
    last_MI = whole_MI - (first_MI << 8)
    return jnp.concatenate([first_MI, last_MI]).astype(jnp.int8), step_M1


def two_digits(x_MI: Float[Array, "M I"], w: Int8Weight) -> Float[Array, "M O"]:
    """Integer products: activations rounded to 16 bits, as two int8 digits that share one pass over the int8 weights.

    The sums are exact, so a row's result does not depend on how many rows there are. Rounding moves an activation by at most
    1 / 65024 of its row's largest.
    """
    digits, step_M1 = _two_digits(x_MI)
    # Tied to the activations, nothing about the weights is loop-invariant that XLA could hoist.
    values, digits = jax.lax.optimization_barrier((w.values, digits))
    sums_OM = jax.lax.optimization_barrier(_dot(values, digits, jnp.int32))
    first_MO, last_MO = jnp.split(sums_OM.T.astype(jnp.float32), 2)
    return (first_MO * 256 + last_MO) * step_M1 * w.scale[None, :]
