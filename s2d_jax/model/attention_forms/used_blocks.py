"""A kernel for TPUs that reads only the used part of a cache, block by block: for decoding, verifying and prefill.

The softmax is computed block by block (Dao et al. 2022, algorithm 1): a block rescales what was summed before it.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from s2d_jax.model.attention_forms.request import Causal, Request
from s2d_jax.sharding import free_axes

_BLOCKS = (512, 256, 128)
# Bytes of a block of keys, and of a block's scores. Two blocks of keys and of values are in fast memory at a time, beside
# queries, sums and scores; with a megabyte each, all fit into the 16 MiB that the compiler gives a kernel.
_BLOCK_BYTES = _SCORE_BYTES = 1 << 20
_LEAST = float(jnp.finfo(jnp.float32).min)


def takes(request: Request) -> bool:
    """Passes over a cache, whose heads divide over the mesh, and of so few queries that their scores fit."""
    if isinstance(request.looks, Causal):
        return False
    tensor = 1 if request.mesh is None else request.mesh.shape["tensor"]
    return request.k_BKSH.shape[1] % tensor == 0 and _block_size(request) is not None


def attend(request: Request) -> Float[Array, "B T N H"]:
    """Where a query may look at nothing, its result is some finite mix of what was read."""
    block = _block_size(request)
    assert block is not None
    first_B, used_B = request.reach
    run = functools.partial(_run, block=block, factor=request.factor, soft_cap=request.soft_cap)
    arrays = (
        request.q_BTNH,
        request.k_BKSH,
        request.v_BKSH,
        request.mask_BTS,
        first_B // block,
        used_B,
    )
    if request.mesh is None:
        return run(*arrays)
    # The compiler cannot split a kernel: each device runs it on its own heads.
    heads, keys, whole = (
        PartitionSpec(None, None, "tensor"),
        PartitionSpec(None, "tensor"),
        PartitionSpec(),
    )
    specs = (heads, keys, keys, whole, whole, whole)
    split = jax.shard_map(
        run,
        mesh=request.mesh,
        axis_names=set(free_axes(request.mesh)),
        in_specs=specs,
        out_specs=heads,
        check_vma=False,
    )
    return split(*arrays)


def _block_size(request: Request) -> int | None:
    """Positions of a block; None if no block is small enough."""
    T, N, H = request.q_BTNH.shape[1:]
    K = request.k_BKSH.shape[1]
    size = request.k_BKSH.dtype.itemsize
    for block in _BLOCKS:
        keys, scores = K * block * max(H, 128) * size, N * T * block * 4
        if keys <= _BLOCK_BYTES and scores <= _SCORE_BYTES:
            return block
    return None


def block_read(row, step, first_B, used_B, *, block: int) -> jax.Array:
    """The number of the block of keys that a step of a row has before it.

    Behind the last used block it is that one again: a block that is there already is not fetched.
    """
    # `//` would ask JAX's default device for its kind, which is a CPU where programs are compiled ahead.
    return jnp.minimum(first_B[row] + step, jax.lax.div(used_B[row] - 1, block))


@dataclasses.dataclass(frozen=True)
class _Sums:
    """What a row has summed over the blocks so far, in f32: the largest score, the weights, the mixed values."""

    largest_KA1: jax.Array
    weight_KA1: jax.Array
    mixed_KAH: jax.Array


def _kernel(
    first_ref, used_ref, q_ref, k_ref, v_ref, mask_ref, out_ref, *sums, block, factor, soft_cap
):
    """One block of one row: q [K, A, H], keys and values [K, block, H], mask [A, block]."""
    row, step = pl.program_id(0), pl.program_id(1)
    sums = _Sums(*sums)
    used = used_ref[row]
    number = first_ref[row] + step

    @pl.when(step == 0)
    def _():
        sums.largest_KA1[...] = jnp.full_like(sums.largest_KA1, _LEAST)
        sums.weight_KA1[...] = jnp.zeros_like(sums.weight_KA1)
        sums.mixed_KAH[...] = jnp.zeros_like(sums.mixed_KAH)

    @pl.when(number * block < used)
    def _():
        q_KAH = q_ref[...]
        k_KSH, v_KSH = k_ref[...].astype(q_KAH.dtype), v_ref[...].astype(q_KAH.dtype)
        over_heads = ((0,), (0,))
        scores_KAS = jax.lax.dot_general(
            q_KAH, k_KSH, (((2,), (2,)), over_heads), preferred_element_type=jnp.float32
        )
        scores_KAS = scores_KAS * factor
        if soft_cap is not None:
            scores_KAS = soft_cap * jnp.tanh(scores_KAS / soft_cap)
        at = number * block
        at_1S = at + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1)
        seen_AS = (mask_ref[...].astype(jnp.int32) != 0) & (at_1S < used)
        scores_KAS = jnp.where(seen_AS[None], scores_KAS, _LEAST)
        # Behind the used part, and behind the end of the cache, lies anything; a weight of zero would not undo a NaN.
        at_S1 = at + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0)
        v_KSH = jnp.where((at_S1 < used)[None], v_KSH, jnp.zeros_like(v_KSH))
        before_KA1 = sums.largest_KA1[...]
        largest_KA1 = jnp.maximum(before_KA1, jnp.max(scores_KAS, axis=-1, keepdims=True))
        weights_KAS = jnp.exp(scores_KAS - largest_KA1)
        kept_KA1 = jnp.exp(before_KA1 - largest_KA1)
        mixed_KAH = jax.lax.dot_general(
            weights_KAS.astype(v_KSH.dtype),
            v_KSH,
            (((2,), (1,)), over_heads),
            preferred_element_type=jnp.float32,
        )
        sums.largest_KA1[...] = largest_KA1
        weight_KA1 = jnp.sum(weights_KAS, axis=-1, keepdims=True)
        sums.weight_KA1[...] = kept_KA1 * sums.weight_KA1[...] + weight_KA1
        sums.mixed_KAH[...] = kept_KA1 * sums.mixed_KAH[...] + mixed_KAH

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = (sums.mixed_KAH[...] / sums.weight_KA1[...]).astype(out_ref.dtype)


def _run(
    q_BTNH: Float[Array, "B T N H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    mask_BTS: Array,
    first_B: Int[Array, "B"],
    used_B: Int[Array, "B"],
    *,
    block: int,
    factor: float,
    soft_cap: float | None,
) -> Float[Array, "B T N H"]:
    (B, T, N, H), (K, S) = q_BTNH.shape, k_BKSH.shape[1:3]
    Q = N // K
    A = Q * T
    q_BKAH = q_BTNH.reshape(B, T, K, Q, H).transpose(0, 2, 3, 1, 4).reshape(B, K, A, H)
    # Of one byte each: Mosaic would widen bool to four.
    mask_BAS = jnp.tile(mask_BTS.astype(jnp.int8), (1, Q, 1))

    number = functools.partial(block_read, block=block)
    whole = pl.BlockSpec((None, K, A, H), lambda row, *_: (row, 0, 0, 0))
    keys = pl.BlockSpec((None, K, block, H), lambda row, *rest: (row, 0, number(row, *rest), 0))
    mask = pl.BlockSpec((None, A, block), lambda row, *rest: (row, 0, number(row, *rest)))
    f32 = functools.partial(pltpu.VMEM, dtype=jnp.float32)
    mixed_BKAH = pl.pallas_call(
        functools.partial(_kernel, block=block, factor=factor, soft_cap=soft_cap),
        out_shape=jax.ShapeDtypeStruct((B, K, A, H), q_BTNH.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, math.ceil(S / block)),
            in_specs=[whole, keys, keys, mask],
            out_specs=whole,
            scratch_shapes=[f32((K, A, 1)), f32((K, A, 1)), f32((K, A, H))],
        ),
        name="attention_over_used_blocks",
    )(first_B, used_B, q_BKAH, k_BKSH, v_BKSH, mask_BAS)
    return mixed_BKAH.reshape(B, K, Q, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
