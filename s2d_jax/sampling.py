"""From logits to probabilities to tokens, with parameters per row and without sorting the vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from s2d_jax.proposal import SamplingArrays

# Non-negative floats order like their bit patterns, and a probability is at most 1.0 = 0x3F800000:
# 30 halvings find a threshold exactly.
_ONE_BITS = 0x3F800000
_HALVINGS = 30
# Entries per block of `top_k`.
_BLOCK = 128


def probabilities(
    logits_BTV: Float[Array, "B T V"], sampling: SamplingArrays
) -> Float[Array, "B T V"]:
    """The distribution that tokens are drawn from: softmax after temperature, then top-k, top-p, min-p.

    The order and the meaning are those of Hugging Face generation. Tokens that tie with the last one kept are kept as well.

    Args:
        logits_BTV: f32 `[B, T, V]`.
        sampling: one entry per row.

    Returns:
        f32 `[B, T, V]`; each distribution sums to 1. A row of temperature 0 is one-hot at its argmax (lowest index on ties).
    """
    greedy_B = sampling.temperature_B == 0.0
    temperature_B = jnp.where(greedy_B, 1.0, sampling.temperature_B)
    probs_BTV = jax.nn.softmax(logits_BTV / temperature_B[:, None, None], axis=-1)
    probs_BTV = _keep_top_k(probs_BTV, jnp.where(greedy_B, 0, sampling.top_k_B))
    probs_BTV = _keep_top_p(probs_BTV, jnp.where(greedy_B, 1.0, sampling.top_p_B))
    floor_BT1 = sampling.min_p_B[:, None, None] * jnp.max(probs_BTV, axis=-1, keepdims=True)
    probs_BTV = _renormalise(jnp.where(probs_BTV >= floor_BT1, probs_BTV, 0.0))
    mode_BTV = one_hot(jnp.argmax(logits_BTV, axis=-1), logits_BTV.shape[-1])
    return jnp.where(greedy_B[:, None, None], mode_BTV, probs_BTV)


def one_hot(tokens: Int[Array, "*B"], vocab_size: int) -> Float[Array, "*B {vocab_size}"]:
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

    Halves the range of bit patterns; no trip at all when no row asks for it.
    """
    bits_BTV = jax.lax.bitcast_convert_type(probs_BTV, jnp.int32)
    goal_BT = jnp.broadcast_to(goal_B[:, None], probs_BTV.shape[:2])

    def halve(_, bounds):
        low_BT, high_BT = bounds  # the weight at low reaches the goal, that at high does not
        middle_BT = (low_BT + high_BT) // 2
        kept_BTV = jnp.where(bits_BTV >= middle_BT[:, :, None], weight_BTV, 0.0)
        reached_BT = jnp.sum(kept_BTV, axis=-1) >= goal_BT
        low_BT = jnp.where(reached_BT, middle_BT, low_BT)
        return low_BT, jnp.where(reached_BT, high_BT, middle_BT)

    start = (jnp.zeros_like(goal_BT, jnp.int32), jnp.full_like(goal_BT, _ONE_BITS + 1, jnp.int32))
    trips = jnp.where(jnp.any(on_B), _HALVINGS, 0)
    low_BT, _ = jax.lax.fori_loop(0, trips, halve, start)
    kept_BTV = jnp.where(bits_BTV >= low_BT[:, :, None], probs_BTV, 0.0)
    return jnp.where(on_B[:, None, None], _renormalise(kept_BTV), probs_BTV)


def top_k(x: Float[Array, "*B V"], k: int) -> tuple[Float[Array, "*B {k}"], Int[Array, "*B {k}"]]:
    """The k largest entries of each vector and their indices, as `jax.lax.top_k` has them (descending, ties by index).

    An entry among them lies in one of the k blocks with the largest maxima, so only these are searched: in a loop on a CPU,
    with k = 10 of 49,152, that takes a ninth of the time.
    """
    V = x.shape[-1]
    if k * _BLOCK >= V:
        return tuple(jax.lax.top_k(x, k))
    widths = [(0, 0)] * (x.ndim - 1) + [(0, -V % _BLOCK)]
    blocks = jnp.pad(x, widths, constant_values=-jnp.inf).reshape(*x.shape[:-1], -1, _BLOCK)
    _, chosen = jax.lax.top_k(jnp.max(blocks, axis=-1), k)
    chosen = jnp.sort(chosen, axis=-1)  # so that ties still go to the lower index
    entries = jnp.take_along_axis(blocks, chosen[..., None], axis=-2)
    values, at = jax.lax.top_k(entries.reshape(*x.shape[:-1], -1), k)
    block = jnp.take_along_axis(chosen, at // _BLOCK, axis=-1)
    return values, block * _BLOCK + at % _BLOCK


def fold_in(key_B: Key[Array, "B"], data_B: Int[Array, "B"]) -> Key[Array, "B"]:
    """One new key per row from that row's key and number alone, so that neighbours change nothing."""
    return jax.vmap(jax.random.fold_in)(key_B, data_B)


def split(key_B: Key[Array, "B"], count: int) -> tuple[Key[Array, "B"], ...]:
    """`count` independent keys per row, each `[B]`."""
    keys_BN = jax.vmap(lambda key: jax.random.split(key, count))(key_B)
    return tuple(keys_BN[:, i] for i in range(count))


def uniform(key_B: Key[Array, "B"], count: int) -> Float[Array, "B {count}"]:
    """f32 `[B, count]` in [0, 1), each row from its own key."""
    return jax.vmap(lambda key: jax.random.uniform(key, (count,)))(key_B)


def sample(probs_BV: Float[Array, "B V"], key_B: Key[Array, "B"]) -> Int[Array, "B"]:
    """Draws one token per row from `probs_BV` with that row's key; int32 `[B]`. Never a token of probability 0."""
    draw = jax.vmap(jax.random.categorical)
    return draw(key_B, jnp.log(probs_BV)).astype(jnp.int32)
