"""A draft's logits over the target's vocabulary: models pad their tables differently, and a trimmed head lists only some ids.

While drafting, K stands for the entries of the draft's logits: the target's vocabulary, or the list of a trimmed head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from s2d_jax.draft.request import Request


def fit_vocabulary(logits: jax.Array, vocab_size: int) -> jax.Array:
    """Cuts logits `[..., V']` to `vocab_size`, or gives ids the draft lacks no probability."""
    missing = vocab_size - logits.shape[-1]
    if missing > 0:
        widths = [(0, 0)] * (logits.ndim - 1) + [(0, missing)]
        return jnp.pad(logits, widths, constant_values=-jnp.inf)
    return logits[..., :vocab_size]


def num_entries(vocab_size: int, request: Request) -> int:
    """K, how many entries the draft's logits have."""
    return vocab_size if request.vocabulary_K is None else len(request.vocabulary_K)


def fit_draft_logits(logits: jax.Array, vocab_size: int, request: Request) -> jax.Array:
    """The logits `[..., K]` that drafting works on: listed ids that the target lacks get no probability."""
    ids_K = request.vocabulary_K
    if ids_K is None:
        return fit_vocabulary(logits, vocab_size)
    return jnp.where(ids_K < vocab_size, logits, -jnp.inf)


def token_ids(index: jax.Array, request: Request) -> jax.Array:
    """The ids of entries of the draft's logits, of any shape."""
    return index if request.vocabulary_K is None else request.vocabulary_K[index]


def over_all_ids(
    values: jax.Array, ids_K: jax.Array | None, vocab_size: int, unlisted: float = 0.0
) -> jax.Array:
    """f32 `[..., K]` -> `[..., V]`: `unlisted` at ids that are not listed; the same array if all are (`ids_K` None)."""
    if ids_K is None:
        return values
    filled = jnp.full((*values.shape[:-1], vocab_size), unlisted, jnp.float32)
    return filled.at[..., ids_K].set(
        values, indices_are_sorted=True, unique_indices=True, mode="drop"
    )
