"""A draft's logits over the target's vocabulary: models pad their tables differently, and a trimmed head lists only some ids.

While drafting, K stands for the entries of the draft's logits: the target's vocabulary, or the list of a trimmed head.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from s2d_jax.draft.request import Request


def fit_vocabulary(
    logits: Float[Array, "*B K"], vocab_size: int
) -> Float[Array, "*B {vocab_size}"]:
    """Cuts logits to `vocab_size`, or gives ids the draft lacks no probability."""
    missing = vocab_size - logits.shape[-1]
    if missing > 0:
        widths = [(0, 0)] * (logits.ndim - 1) + [(0, missing)]
        return jnp.pad(logits, widths, constant_values=-jnp.inf)
    return logits[..., :vocab_size]


def num_entries(vocab_size: int, request: Request) -> int:
    """K, how many entries the draft's logits have."""
    return vocab_size if request.vocabulary_K is None else len(request.vocabulary_K)


def fit_draft_logits(
    logits: Float[Array, "*B K"], vocab_size: int, request: Request
) -> Float[Array, "*B _"]:
    """The logits that drafting works on: listed ids that the target lacks get no probability."""
    ids_K = request.vocabulary_K
    if ids_K is None:
        return fit_vocabulary(logits, vocab_size)
    return jnp.where(ids_K < vocab_size, logits, -jnp.inf)


def token_ids(index: Int[Array, "*B"], request: Request) -> Int[Array, "*B"]:
    """The ids of entries of the draft's logits."""
    return index if request.vocabulary_K is None else request.vocabulary_K[index]


def over_all_ids(
    values: Float[Array, "*B K"],
    ids_K: Int[Array, "K"] | None,
    vocab_size: int,
    unlisted: float = 0.0,
) -> Float[Array, "*B {vocab_size}"]:
    """f32, of all ids: `unlisted` at ids that are not listed; the same array if all are (`ids_K` None)."""
    if ids_K is None:
        return values
    filled = jnp.full((*values.shape[:-1], vocab_size), unlisted, jnp.float32)
    return filled.at[..., ids_K].set(
        values, indices_are_sorted=True, unique_indices=True, mode="drop"
    )
