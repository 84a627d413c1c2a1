"""A kernel for GPUs that reads only the used part of a cache, in parts side by side: for decoding and verifying.

Each program sums one part of the used positions for the queries of one key head; the parts are then put together, by the
same rule as blocks one after another (Dao et al. 2022, algorithm 1; the split is that of Dao et al. 2023, "Flash-Decoding").
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from s2d_jax.model.attention_forms.request import Causal, Request

_BLOCK = 64
# Triton multiplies tiles of 16 rows at least. The f32 sums of 128 rows fill a quarter of an H100 processor's registers.
_FEWEST_ROWS, _MOST_ROWS = 16, 128
# A row's used part is cut into so many; with 8 key heads and 2 rows, each of the 132 processors of an H100 has about one.
_PARTS = 8
_LEAST = float(jnp.finfo(jnp.float32).min)


def takes(request: Request) -> bool:
    """Passes over a cache on one device, of few queries, with heads of a power of two."""
    (T, N, H), K = request.q_BTNH.shape[1:], request.k_BKSH.shape[1]
    return (
        not isinstance(request.looks, Causal)
        and request.mesh is None
        and N // K * T <= _MOST_ROWS
        and H >= _FEWEST_ROWS
        and pl.next_power_of_2(H) == H
    )


def attend(request: Request) -> Float[Array, "B T N H"]:
    """Where a query may look at nothing, its result is some finite mix of what was read."""
    q_BTNH, (B, T, N, H), K = request.q_BTNH, request.q_BTNH.shape, request.k_BKSH.shape[1]
    Q = N // K
    first_B, used_B = request.reach
    q_BKAH = q_BTNH.reshape(B, T, K, Q, H).transpose(0, 2, 3, 1, 4).reshape(B, K, Q * T, H)
    A = max(_FEWEST_ROWS, pl.next_power_of_2(Q * T))
    more = (0, A - Q * T)
    run = functools.partial(_run, factor=request.factor, soft_cap=request.soft_cap)
    mixed_BKAH = run(
        jnp.pad(q_BKAH, ((0, 0), (0, 0), more, (0, 0))),
        request.k_BKSH,
        request.v_BKSH,
        jnp.pad(jnp.tile(request.mask_BTS, (1, Q, 1)), ((0, 0), more, (0, 0))),
        first_B,
        used_B,
    )[:, :, : Q * T]
    return mixed_BKAH.reshape(B, K, Q, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _kernel(
    first_ref,
    used_ref,
    q_ref,
    k_ref,
    v_ref,
    mask_ref,
    mixed_ref,
    largest_ref,
    weight_ref,
    *,
    factor,
    soft_cap,
):
    """One part of one row for one key head: q [A, H], keys and values [S, H], mask [A, S]."""
    part, used = pl.program_id(2), used_ref[...]
    first = first_ref[...] // _BLOCK
    blocks = (used + _BLOCK - 1) // _BLOCK - first
    each = (blocks + _PARTS - 1) // _PARTS
    q_AH = q_ref[...]
    A, H = q_AH.shape

    def add(number, sums):
        largest_A, weight_A, mixed_AH = sums
        at_S = number * _BLOCK + jnp.arange(_BLOCK)
        here = pl.ds(number * _BLOCK, _BLOCK)
        inside_S1, inside_1S = (at_S < used)[:, None], (at_S < used)[None, :]
        k_SH = plgpu.load(k_ref.at[here, :], mask=inside_S1, other=0.0).astype(q_AH.dtype)
        v_SH = plgpu.load(v_ref.at[here, :], mask=inside_S1, other=0.0).astype(q_AH.dtype)
        seen_AS = plgpu.load(mask_ref.at[:, here], mask=inside_1S, other=0) != 0
        scores_AS = plgpu.dot(q_AH, k_SH.T).astype(jnp.float32) * factor
        if soft_cap is not None:
            scores_AS = soft_cap * jnp.tanh(scores_AS / soft_cap)
        scores_AS = jnp.where(seen_AS & inside_1S, scores_AS, _LEAST)
        now_A = jnp.maximum(largest_A, jnp.max(scores_AS, axis=1))
        weights_AS = jnp.exp(scores_AS - now_A[:, None])
        kept_A = jnp.exp(largest_A - now_A)
        mixed_AH = kept_A[:, None] * mixed_AH + plgpu.dot(weights_AS.astype(v_SH.dtype), v_SH)
        return now_A, kept_A * weight_A + jnp.sum(weights_AS, axis=1), mixed_AH

    nothing = (
        jnp.full((A,), _LEAST, jnp.float32),
        jnp.zeros((A,), jnp.float32),
        jnp.zeros((A, H), jnp.float32),
    )
    begin = jnp.minimum(first + part * each, first + blocks)
    end = jnp.minimum(begin + each, first + blocks)
    largest_A, weight_A, mixed_AH = jax.lax.fori_loop(begin, end, add, nothing)
    largest_ref[...], weight_ref[...], mixed_ref[...] = largest_A, weight_A, mixed_AH


def _run(
    q_BKAH: Float[Array, "B K A H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    mask_BAS: Bool[Array, "B A S"],
    first_B: Int[Array, "B"],
    used_B: Int[Array, "B"],
    *,
    factor: float,
    soft_cap: float | None,
) -> Float[Array, "B K A H"]:
    (B, K, A, H), S = q_BKAH.shape, k_BKSH.shape[2]
    number = pl.BlockSpec((None,), lambda b, k, p: (b,))
    keys = pl.BlockSpec((None, None, S, H), lambda b, k, p: (b, k, 0, 0))
    sums = pl.BlockSpec((None, None, None, A), lambda b, k, p: (b, k, p, 0))
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    mixed, largest, weight = pl.pallas_call(
        functools.partial(_kernel, factor=factor, soft_cap=soft_cap),
        grid=(B, K, _PARTS),
        in_specs=[
            number,
            number,
            pl.BlockSpec((None, None, A, H), lambda b, k, p: (b, k, 0, 0)),
            keys,
            keys,
            pl.BlockSpec((None, A, S), lambda b, k, p: (b, 0, 0)),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, A, H), lambda b, k, p: (b, k, p, 0, 0)),
            sums,
            sums,
        ],
        out_shape=[f32((B, K, _PARTS, A, H)), f32((B, K, _PARTS, A)), f32((B, K, _PARTS, A))],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        name="attention_over_used_splits",
    )(first_B, used_B, q_BKAH, k_BKSH, v_BKSH, mask_BAS.astype(jnp.int8))
    scale = jnp.exp(largest - jnp.max(largest, axis=2, keepdims=True))
    total = jnp.sum(scale * weight, axis=2)
    return (jnp.sum(scale[..., None] * mixed, axis=2) / total[..., None]).astype(q_BKAH.dtype)
