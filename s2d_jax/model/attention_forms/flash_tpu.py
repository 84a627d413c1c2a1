"""Passes without a cache on a TPU: JAX's own kernel "splash attention", which skips blocks that nobody looks at."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float

from s2d_jax.model.attention_forms.over_devices import divides, over_devices
from s2d_jax.model.attention_forms.request import Causal, Request

_BLOCKS = (512, 256, 128)


def takes(request: Request) -> bool:
    """Causal rows of whole blocks, split evenly over the mesh."""
    return (
        isinstance(request.looks, Causal)
        and request.q_BTNH.shape[1] % _BLOCKS[-1] == 0
        and divides(request)
    )


def attend(request: Request) -> Float[Array, "B T N H"]:
    """The queries are scaled before the product with the keys, in their own dtype."""
    run = functools.partial(
        _run, window=request.window, soft_cap=request.soft_cap, factor=request.factor
    )
    return over_devices(run, request)


def _run(
    q_BTNH: Float[Array, "B T N H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    segment_ids_BT: jax.Array | None,
    *,
    window: int | None,
    soft_cap: float | None,
    factor: float,
) -> Float[Array, "B T N H"]:
    T, N = q_BTNH.shape[1:3]
    block = next(size for size in _BLOCKS if T % size == 0)
    # How many keys a query sees before its own position (None: all); none behind it.
    before = None if window is None else window - 1
    mask = masks.LocalMask((T, T), window_size=(before, 0), offset=0)
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * N),
        block_sizes=_sizes(block),
        attn_logits_soft_cap=soft_cap,
        head_shards=1,
        q_seq_shards=1,
    )
    q_BNTH = (q_BTNH * factor).astype(q_BTNH.dtype).swapaxes(1, 2)
    k_BKSH, v_BKSH = (x.astype(q_BTNH.dtype) for x in (k_BKSH, v_BKSH))
    # Its declared result is what it gives with residuals as well.
    each_row = cast(Callable[..., jax.Array], jax.vmap(kernel))
    if segment_ids_BT is None:
        mixed_BNTH = each_row(q_BNTH, k_BKSH, v_BKSH)
    else:
        ids = kernels.SegmentIds(segment_ids_BT, segment_ids_BT)
        mixed_BNTH = each_row(q_BNTH, k_BKSH, v_BKSH, ids)
    return mixed_BNTH.swapaxes(1, 2)


def _sizes(block: int) -> kernels.BlockSizes:
    forward = dict.fromkeys(("block_q", "block_kv", "block_kv_compute"), block)
    keys = dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"), block)
    queries = dict.fromkeys(("block_q_dq", "block_kv_dq"), block)
    return kernels.BlockSizes(**forward, **keys, **queries)
