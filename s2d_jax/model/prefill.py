"""Runs a prompt of any length through a model of static width, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from s2d_jax.model.kv_cache import KVCache, read_window

# Takes W tokens and a cache; gives the tokens' states, and the cache with the tokens written but its length unchanged.
Forward = Callable[[Int[Array, "B W"], KVCache], tuple[Float[Array, "B W D"], KVCache]]


def run_chunks(
    forward: Forward,
    cache: KVCache,
    nothing_BD: Float[Array, "B D"],
    tokens_BC: Int[Array, "B C"],
    end_B: Int[Array, "B"],
    width: int,
) -> tuple[Float[Array, "B D"], KVCache]:
    """Runs the model until the cache holds `end_B` positions of each row, `width` at a time.

    A row that already holds as many keeps its length; what is written behind it is overwritten later.

    Args:
        forward: one pass over `width` positions.
        cache: holds a prefix of each row of `tokens_BC`.
        nothing_BD: zeros, of the model's width and dtype.
        tokens_BC: int32; C must hold the last chunk to its end, `end_B + width` at most.
        end_B: int32.
        width: static.

    Returns:
        The state at position `end_B - 1` (zeros in rows that did not move), and the cache.
    """

    def run_chunk(carry):
        cache, last_B1D = carry
        h_BWD, written = forward(read_window(tokens_BC, cache.length_B, width), cache)
        last_B1D = states_at_end(h_BWD, cache.length_B, end_B, last_B1D)
        return written.advance_to(reached(cache.length_B, width, end_B)), last_B1D

    def behind(carry):
        return jnp.any(carry[0].length_B < end_B)

    cache, last_B1D = jax.lax.while_loop(behind, run_chunk, (cache, nothing_BD[:, None]))
    return last_B1D[:, 0], cache


def reached(length_B: Int[Array, "B"], width: int, end_B: Int[Array, "B"]) -> Int[Array, "B"]:
    """int32: how many positions each row holds after a chunk of `width` behind `length_B`: up to `end_B`, never fewer."""
    return jnp.maximum(length_B, jnp.minimum(length_B + width, end_B))


def states_at_end(
    h_BWD: Float[Array, "B W D"],
    length_B: Int[Array, "B"],
    end_B: Int[Array, "B"],
    last_BTD: Float[Array, "B T D"],
) -> Float[Array, "B T D"]:
    """The states at the last T positions before `end_B`: from the chunk behind `length_B` if it has them, else `last_BTD`."""
    (_, W, _), T = h_BWD.shape, last_BTD.shape[1]
    index_BT = (end_B - T - length_B)[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
    inside_BT = (index_BT >= 0) & (index_BT < W)
    found_BTD = jnp.take_along_axis(h_BWD, jnp.clip(index_BT, 0, W - 1)[:, :, None], axis=1)
    return jnp.where(inside_BT[:, :, None], found_BTD, last_BTD)
