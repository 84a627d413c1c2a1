"""Passes without a cache on a GPU: JAX's own kernel of causal attention, compiled by Triton."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import attention as kernels
from jaxtyping import Array, Float

from s2d_jax.model.attention_forms.over_devices import divides, over_devices
from s2d_jax.model.attention_forms.request import Causal, Request

_BLOCK = 128
# Nobody has timed the kernel here. What it saves grows with the square of the length: from here on, dense scores and their
# gradient take gigabytes (docs/experiments.md), and below, products of the vendor's library are the smaller risk.
LEAST_LENGTH = 2048


def takes(request: Request) -> bool:
    """Long causal rows of whole blocks, without window and cap, split evenly over the mesh."""
    return (
        isinstance(request.looks, Causal)
        and request.window is None
        and request.soft_cap is None
        and request.q_BTNH.shape[1] >= LEAST_LENGTH
        and request.q_BTNH.shape[1] % _BLOCK == 0
        and divides(request)
    )


def attend(request: Request) -> Float[Array, "B T N H"]:
    """Keys and values are repeated for the query heads that share them."""
    return over_devices(functools.partial(_run, factor=request.factor), request)


def _run(
    q_BTNH: Float[Array, "B T N H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    segment_ids_BT: jax.Array | None,
    *,
    factor: float,
) -> Float[Array, "B T N H"]:
    shared = q_BTNH.shape[2] // k_BKSH.shape[1]
    k_BSNH, v_BSNH = (
        jnp.repeat(x.astype(q_BTNH.dtype), shared, axis=1).swapaxes(1, 2) for x in (k_BKSH, v_BKSH)
    )
    return kernels.mha(q_BTNH, k_BSNH, v_BSNH, segment_ids_BT, sm_scale=factor, causal=True)
