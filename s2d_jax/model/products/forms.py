"""The forms in which a product with a weight can be written. All compute `x @ w.T`; XLA makes very different code of them.

A form takes `x_AI` in the compute dtype and a weight `[O, I]` (an array, or an `Int8Weight`), and returns f32 `[A, O]`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from s2d_jax.model.products.weight_formats import Int8Weight, Matrix, Weight

_CONTRACT_LAST = (((1,), (1,)), ((), ()))
# The weight-first product of 5 to 7 rows costs more than that of 8, and that of 9 to 15 more than that of 16.
_ROUND_ROWS_UP_TO = (8, 16)
# Weights per converted block: small enough for the shared cache, large enough that starting two kernels for it costs little.
_BLOCK = 1 << 20
# int16 activations as two int8 digits of base 256: 127 * 256 is the largest number whose first digit fits.
_LARGEST_DIGITS = 127 * 256


def _dot(a, b, out_dtype) -> jax.Array:
    return jax.lax.dot_general(a, b, _CONTRACT_LAST, preferred_element_type=out_dtype)


def plain(x_AI: Float[Array, "A I"], w_OI: Matrix) -> Float[Array, "A O"]:
    """One dot, the activations first."""
    return _dot(x_AI, w_OI, jnp.float32)


def weight_first(x_AI: Float[Array, "A I"], w_OI: Matrix) -> Float[Array, "A O"]:
    """XLA's CPU library packs its second operand on every call, so it must get the small one.

    The barrier keeps XLA from rewriting `dot(w, x).T` back into `dot(x, w)`.
    """
    rows = x_AI.shape[0]
    x_AI = jnp.pad(x_AI, ((0, _padded_rows(rows) - rows), (0, 0)))
    return jax.lax.optimization_barrier(_dot(w_OI, x_AI, jnp.float32)).T[:rows]


def _padded_rows(rows: int) -> int:
    return next((r for r in _ROUND_ROWS_UP_TO if r // 2 < rows <= r), rows)


def scaled(x_AI: Float[Array, "A I"], w: Int8Weight) -> Float[Array, "A O"]:
    """int8 values as numbers of the compute dtype (they fit exactly), one dot, then the scales."""
    return plain(x_AI, w.values.astype(x_AI.dtype)) * w.scale[None, :]


def blocked(x_AI: Float[Array, "A I"], w: Weight) -> Float[Array, "A O"]:
    """Weights become f32 a block at a time, inside a loop, so that no f32 copy of a matrix exists.

    Without the loop XLA hoists the conversion out of the decoding loop: a conversion of weights is loop-invariant.
    """
    values = w.values if isinstance(w, Int8Weight) else w
    channels, columns = values.shape
    x_AI = x_AI.astype(jnp.float32)
    # At least two blocks: XLA unrolls a loop of one trip, and hoists its conversion despite the barrier.
    rows = min(max(1, -(-channels // 2)), max(1, _BLOCK // columns))

    def one_block(i, out_OA):
        # XLA's CPU backend would convert a whole bf16 weight before it slices it. Tied to the block's index, the conversion
        # cannot leave the loop; there, slice and conversion become one kernel that converts the slice only.
        tied, start = jax.lax.optimization_barrier((values, i * rows))
        # Both slices are clamped alike at the end: the last block overlaps the one before.
        block_OI = jax.lax.dynamic_slice(tied, (start, 0), (rows, columns)).astype(jnp.float32)
        block_OA = _dot(block_OI, x_AI, jnp.float32)
        return jax.lax.dynamic_update_slice(out_OA, block_OA, (start, 0))

    empty_OA = jnp.zeros((channels, x_AI.shape[0]), jnp.float32)
    out_AO = jax.lax.fori_loop(0, -(-channels // rows), one_block, empty_OA).T
    return out_AO * w.scale[None, :] if isinstance(w, Int8Weight) else out_AO


def _two_digits(x_AI: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows rounded to integers of at most 127 * 256: int8 `[2 A, I]` (first digits, then last), and f32 steps `[A, 1]`."""
    x_AI = x_AI.astype(jnp.float32)
    largest_A1 = jnp.max(jnp.abs(x_AI), axis=1, keepdims=True)
    step_A1 = jnp.maximum(largest_A1, jnp.finfo(jnp.float32).tiny) / _LARGEST_DIGITS
    whole_AI = jnp.round(x_AI / step_A1).astype(jnp.int32)
    first_AI = (whole_AI + 128) >> 8
    last_AI = whole_AI - (first_AI << 8)
    return jnp.concatenate([first_AI, last_AI]).astype(jnp.int8), step_A1


def two_digits(x_AI: Float[Array, "A I"], w: Int8Weight) -> Float[Array, "A O"]:
    """Integer products: activations rounded to 16 bits, as two int8 digits that share one pass over the int8 weights.

    The sums are exact, so a row's result does not depend on how many rows there are. Rounding moves an activation by at most
    1 / 65024 of its row's largest.
    """
    digits, step_A1 = _two_digits(x_AI)
    # Tied to the activations, the weights are not loop-invariant, so XLA cannot hoist their conversion.
    values, digits = jax.lax.optimization_barrier((w.values, digits))
    sums_OA = jax.lax.optimization_barrier(_dot(values, digits, jnp.int32))
    first_AO, last_AO = jnp.split(sums_OA.T.astype(jnp.float32), 2)
    return (first_AO * 256 + last_AO) * step_A1 * w.scale[None, :]
