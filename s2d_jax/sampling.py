"""From logits to probabilities to tokens, with parameters per row and without sorting the vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from s2d_jax.backends import forms
from s2d_jax.config.sampling import SamplingParams

# Non-negative floats order like their bit patterns, and a probability is at most 1.0 = 0x3F800000:
# its 30 bits are found exactly.
_ONE_BITS = 0x3F800000
_THRESHOLD_BITS = 30
# Entries per block of `top_k`.
_BLOCK = 128


def probabilities(
    logits_BTV: Float[Array, "B T V"], sampling: SamplingArrays
) -> Float[Array, "B T V"]:
    """The distribution that tokens are drawn from: softmax after temperature, then top-k, top-p, min-p.

    The order and the meaning are those of Hugging Face generation. Tokens that tie with the last one kept are kept as well.
    The maximum is taken away before the division: the other way round, a compiler that fuses the two rounds only one of them,
    and at temperatures below 1e-8 the difference is no longer 0 at the maximum, but may overflow.

    Args:
        logits_BTV: f32 `[B, T, V]`.
        sampling: one entry per row.

    Returns:
        f32 `[B, T, V]`; each distribution sums to 1. A row of temperature 0 is one-hot at its argmax (lowest index on ties).
    """
    greedy_B = sampling.temperature_B == 0.0
    temperature_B = jnp.where(greedy_B, 1.0, sampling.temperature_B)
    below_BTV = logits_BTV - jnp.max(logits_BTV, axis=-1, keepdims=True)
    probs_BTV = jax.nn.softmax(below_BTV / temperature_B[:, None, None], axis=-1)
    probs_BTV = _keep_top_k(probs_BTV, jnp.where(greedy_B, 0, sampling.top_k_B))
    probs_BTV = _keep_top_p(probs_BTV, jnp.where(greedy_B, 1.0, sampling.top_p_B))
    floor_BT1 = sampling.min_p_B[:, None, None] * jnp.max(probs_BTV, axis=-1, keepdims=True)
    probs_BTV = _renormalise(jnp.where(probs_BTV >= floor_BT1, probs_BTV, 0.0))
    mode_BTV = one_hot(jnp.argmax(logits_BTV, axis=-1), logits_BTV.shape[-1])
    return jnp.where(greedy_B[:, None, None], mode_BTV, probs_BTV)


def one_hot(tokens: Int[Array, "*batch"], vocab_size: int) -> Float[Array, "*batch {vocab_size}"]:
    """f32 `[..., V]` with 1 at each token."""
    return jax.nn.one_hot(tokens, vocab_size, dtype=jnp.float32)


def _renormalise(probs: jax.Array) -> jax.Array:
    return probs / jnp.sum(probs, axis=-1, keepdims=True)


def _keep_top_k(probs_BTV, top_k_B):
    on_B = (top_k_B > 0) & (top_k_B < probs_BTV.shape[-1])
    goal_B = jnp.where(on_B, top_k_B, 0).astype(jnp.float32)
    return _keep_above(probs_BTV, jnp.ones_like(probs_BTV), goal_B, on_B)


def _keep_top_p(probs_BTV, top_p_B):
    return _keep_above(probs_BTV, probs_BTV, top_p_B, top_p_B < 1.0)


def _keep_above(probs_BTV, weight_BTV, goal_B, on_B):
    """Keeps, where `on_B`, the tokens at or above the largest probability t with `sum(weight[p >= t]) >= goal`.

    Finds the bits of t from the highest on, as many at a time as the backend's form says; nothing is searched if no row asks.
    """
    bits_BTV = jax.lax.bitcast_convert_type(probs_BTV, jnp.int32)
    goal_BT1 = jnp.broadcast_to(goal_B[:, None], probs_BTV.shape[:2])[:, :, None]
    at_a_time = forms().search_bits
    numbers = jnp.arange(1, 1 << at_a_time, dtype=jnp.int32)[None, None, :]

    def find_bits(i, low_BT):
        step = jnp.int32(1) << (_THRESHOLD_BITS - at_a_time * (i + 1))
        thresholds = low_BT[:, :, None] + numbers * step
        above = bits_BTV[:, :, None] >= thresholds[..., None]
        weights = jnp.sum(jnp.where(above, weight_BTV[:, :, None], 0.0), axis=-1)
        # The weight at or above a higher threshold is never larger, so those that reach the goal come first.
        reached_BT = jnp.sum(weights >= goal_BT1, axis=-1, dtype=jnp.int32)
        return low_BT + reached_BT * step

    nothing_BT = jnp.zeros(probs_BTV.shape[:2], jnp.int32)
    asked, passes = jnp.any(on_B), _THRESHOLD_BITS // at_a_time
    if forms().search == "loop":
        low_BT = jax.lax.fori_loop(0, jnp.where(asked, passes, 0), find_bits, nothing_BT)
    else:

        def search(low_BT):
            return functools.reduce(lambda low_BT, i: find_bits(i, low_BT), range(passes), low_BT)

        low_BT = jax.lax.cond(asked, search, lambda low_BT: low_BT, nothing_BT)
    kept_BTV = jnp.where(bits_BTV >= low_BT[:, :, None], probs_BTV, 0.0)
    return jnp.where(on_B[:, None, None], _renormalise(kept_BTV), probs_BTV)


def top_k(
    x: Float[Array, "*batch V"], k: int
) -> tuple[Float[Array, "*batch {k}"], Int[Array, "*batch {k}"]]:
    """The k largest entries of each vector and their indices, as `jax.lax.top_k` has them (descending, ties by index).

    They all lie in the k blocks with the largest maxima, so where the form is "blocks", only these are searched.
    """
    V = x.shape[-1]
    if forms().top_k == "whole" or k * _BLOCK >= V:
        values, at = jax.lax.top_k(x, k)
        return values, at
    widths = [(0, 0)] * (x.ndim - 1) + [(0, -V % _BLOCK)]
    blocks = jnp.pad(x, widths, constant_values=-jnp.inf).reshape(*x.shape[:-1], -1, _BLOCK)
    _, chosen = jax.lax.top_k(jnp.max(blocks, axis=-1), k)
    chosen = jnp.sort(chosen, axis=-1)  # so that ties still go to the lower index
    entries = jnp.take_along_axis(blocks, chosen[..., None], axis=-2)
    values, at = jax.lax.top_k(entries.reshape(*x.shape[:-1], -1), k)
    block = jnp.take_along_axis(chosen, at // _BLOCK, axis=-1)
    return values, block * _BLOCK + at % _BLOCK


def fold_in(key_B: Key[Array, "B"], data_B: Int[Array, "B"]) -> Key[Array, "B"]:
    """One new key per row from that row's key and number alone, so that the other rows do not matter."""
    return jax.vmap(jax.random.fold_in)(key_B, data_B)


def split(key_B: Key[Array, "B"], count: int) -> tuple[Key[Array, "B"], ...]:
    """`count` independent keys per row, each `[B]`."""
    keys = jax.vmap(lambda key: jax.random.split(key, count))(key_B)
    return tuple(keys[:, i] for i in range(count))


def uniform(key_B: Key[Array, "B"], count: int) -> Float[Array, "B {count}"]:
    """f32 `[B, count]` in [0, 1), each row from its own key."""
    return jax.vmap(lambda key: jax.random.uniform(key, (count,)))(key_B)


def sample(probs_BV: Float[Array, "B V"], key_B: Key[Array, "B"]) -> Int[Array, "B"]:
    """Draws one token per row from `probs_BV` with that row's key; int32 `[B]`. Never a token of probability 0."""
    return draw(probs_BV, key_B, 1)[:, 0]


def draw(
    probs: Float[Array, "B *rest V"], key_B: Key[Array, "B"], count: int
) -> Int[Array, "B *rest {count}"]:
    """Draws `count` entries of each vector without replacement: each draw is in proportion to the entries that are left.

    First a block, by the blocks' sums, then an entry of it, both by inverting the distribution function: the vocabulary is
    read once and a draw takes two random numbers. (Gumbel top-k draws from the same distribution, but takes a random number and
    two logarithms for every entry.)

    Args:
        probs: f32, not negative; need not sum to 1.
        key_B: one key per row, for all its vectors.
        count: static.

    Returns:
        int32, in the order drawn. Never an entry of probability 0 while one of positive probability is left.
    """
    *shape, V = probs.shape
    size = min(_BLOCK, V)
    padded = jnp.pad(probs, [(0, 0)] * len(shape) + [(0, -V % size)])
    blocks = padded.reshape(*shape, -1, size)
    u = jax.vmap(lambda key: jax.random.uniform(key, (*shape[1:], count, 2)))(key_B)
    sums, drawn = jnp.sum(blocks, axis=-1), []
    block_number, place = _numbers(sums), _numbers(blocks[..., 0, :])
    for i in range(count):
        block = _invert(sums, u[..., i, 0])
        entries = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
        for earlier in drawn:
            taken = (block * size)[..., None] + place == earlier[..., None]
            entries = jnp.where(taken, 0.0, entries)
        at = _invert(entries, u[..., i, 1])
        left = jnp.sum(jnp.where(place == at[..., None], 0.0, entries), axis=-1)
        sums = jnp.where(block_number == block[..., None], left[..., None], sums)
        drawn.append(block * size + at)
    return jnp.stack(drawn, axis=-1).astype(jnp.int32)


def _invert(weights: jax.Array, u: jax.Array) -> jax.Array:
    """int32 `[...]`: the entry of each vector of `weights` at which the running sum passes `u`, in [0, 1), times the total."""
    sums = jnp.cumsum(weights, axis=-1)
    # Rounding may let a running sum grow where the weight is 0.
    passed = (sums > u[..., None] * sums[..., -1:]) & (weights > 0.0)
    number = _numbers(weights)
    last = jnp.max(jnp.where(weights > 0.0, number, 0), axis=-1)
    return jnp.minimum(last, jnp.min(jnp.where(passed, number, weights.shape[-1]), axis=-1))


def _numbers(x: jax.Array) -> jax.Array:
    """int32 of the shape of `x`: the index of each entry in its vector."""
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)


class SamplingArrays(flax.struct.PyTreeNode):
    """`SamplingParams` of every row, as arrays, so that changing them compiles nothing.

    Attributes:
        temperature_B: f32; 0 is greedy.
        top_k_B: int32; 0 is off.
        top_p_B: f32; 1 is off.
        min_p_B: f32; 0 is off.
    """

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array

    @classmethod
    def stack(cls, params: Sequence[SamplingParams]) -> SamplingArrays:
        """The parameters of a batch, one row each."""

        def column(name, dtype, least, most):
            # Beyond the bounds of the dtype, the last number within means the same.
            values = [min(max(getattr(p, name), least), most) for p in params]
            return jnp.asarray(np.array(values, dtype))

        floats = np.finfo(np.float32)
        return cls(
            temperature_B=column("temperature", np.float32, 0.0, float(floats.max)),
            top_k_B=column("top_k", np.int32, 0, np.iinfo(np.int32).max),
            # Devices take what is below `tiny` for 0, and then no token would be kept.
            top_p_B=column("top_p", np.float32, float(floats.tiny), 1.0),
            min_p_B=column("min_p", np.float32, 0.0, 1.0),
        )


def keys_of(seeds: Sequence[int]) -> Key[Array, "B"]:
    """A random key per seed of up to 64 bits, in two words, with or without x64; for 32 bits the key of `jax.random.key`."""
    words_B2 = np.array([[seed >> 32, seed & 0xFFFFFFFF] for seed in seeds], np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(words_B2), impl="threefry2x32")
