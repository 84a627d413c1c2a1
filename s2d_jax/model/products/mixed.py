"""The product of mixed-precision training: bf16 activations with f32 master weights, and its gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from s2d_jax.backends import forms
from s2d_jax.model.products.forms import plain
from s2d_jax.model.products.weight_formats import Matrix

# XLA's CPU library multiplies bf16 twice as fast as f32, but not if the product contracts the first axis of its first operand.
_TRANSPOSED_ROWS = 16


@jax.custom_vjp
def mixed_product(x_AI: Float[Array, "A I"], w_OI: Matrix) -> Float[Array, "A O"]:
    """`x @ w.T`, the weight rounded to the dtype of `x`; sums in f32.

    Its gradients are products of the same precision (Micikevicius et al. 2018, section 3): the gradient of the result is
    rounded to the dtype of `x`, sums are in f32, and the gradient of the master weight stays f32. Differentiation of the
    plain product would widen both operands instead.

    Args:
        x_AI: activations, bf16.
        w_OI: a master weight, f32.

    Returns:
        f32.
    """
    return plain(x_AI, w_OI.astype(x_AI.dtype))


def _forward(x_AI, w_OI):
    return mixed_product(x_AI, w_OI), (x_AI, w_OI)


def _backward(saved, dy_AO):
    x_AI, w_OI = saved
    dy_AO = dy_AO.astype(x_AI.dtype)
    dx_AI = jnp.matmul(dy_AO, w_OI.astype(x_AI.dtype), preferred_element_type=jnp.float32)
    form = _transposed_first if forms().weight_gradient == "transposed_first" else _contract_rows
    dw_OI = form(dy_AO, x_AI)
    return dx_AI.astype(x_AI.dtype), dw_OI.astype(w_OI.dtype)


mixed_product.defvjp(_forward, _backward)


def _contract_rows(dy_AO: jax.Array, x_AI: jax.Array) -> jax.Array:
    """`dy.T @ x`, f32 `[O, I]`."""
    rows = (((0,), (0,)), ((), ()))
    return jax.lax.dot_general(dy_AO, x_AI, rows, preferred_element_type=jnp.float32)


def _transposed_first(dy_AO: jax.Array, x_AI: jax.Array) -> jax.Array:
    """The same, from a transposed copy of `dy`.

    XLA sees through a plain transposition and widens the operands. It does not see through one that is cut in two with a
    barrier, and then takes the bf16 product. The cut makes few long pieces: rows that are split over up to as many devices
    stay split, which many short pieces do not where their number does not divide.
    """
    missing = -dy_AO.shape[0] % _TRANSPOSED_ROWS
    dy_AO, x_AI = (jnp.pad(a, ((0, missing), (0, 0))) for a in (dy_AO, x_AI))
    rows, channels = dy_AO.shape
    blocks = dy_AO.reshape(_TRANSPOSED_ROWS, rows // _TRANSPOSED_ROWS, channels)
    dy_OA = jax.lax.optimization_barrier(blocks.transpose(2, 0, 1)).reshape(channels, rows)
    return jnp.matmul(dy_OA, x_AI, preferred_element_type=jnp.float32)
