"""A draft's logits over the target's vocabulary: models pad their tables differently, and a trimmed head lists only some ids.

While drafting, U stands for the entries of the draft's logits: the target's vocabulary, or the list of a trimmed head.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from s2d_jax.draft.request import Request


def fit_vocabulary(
    logits: Float[Array, "*batch U"], vocab_size: int
) -> Float[Array, "*batch {vocab_size}"]:
    """Cuts logits to `vocab_size`, or gives ids the draft lacks no probability."""
    missing = vocab_size - logits.shape[-1]
    if missing > 0:
        widths = [(0, 0)] * (logits.ndim - 1) + [(0, missing)]
        return jnp.pad(logits, widths, constant_values=-jnp.inf)
    return logits[..., :vocab_size]


def num_entries(vocab_size: int, request: Request) -> int:
    """U, how many entries the draft's logits have."""
    return vocab_size if request.vocabulary_U is None else len(request.vocabulary_U)


def fit_draft_logits(
    logits: Float[Array, "*batch U"], vocab_size: int, request: Request
) -> Float[Array, "*batch _"]:
    """The logits that drafting works on: listed ids that the target lacks get no probability."""
    ids_U = request.vocabulary_U
    if ids_U is None:
        return fit_vocabulary(logits, vocab_size)
    return jnp.where(ids_U < vocab_size, logits, -jnp.inf)


def token_ids(index: Int[Array, "*batch"], request: Request) -> Int[Array, "*batch"]:
    """The token ids that entries of the draft's logits stand for."""
    return index if request.vocabulary_U is None else request.vocabulary_U[index]


def over_all_ids(
    values: Float[Array, "*batch U"],
    ids_U: Int[Array, "U"] | None,
    vocab_size: int,
    unlisted: float = 0.0,
) -> Float[Array, "*batch {vocab_size}"]:
    """f32 over all ids: `unlisted` at ids that are not listed; the array itself if all are listed (`ids_U` None)."""
    if ids_U is None:
        return values
    filled = jnp.full((*values.shape[:-1], vocab_size), unlisted, jnp.float32)
    return filled.at[..., ids_U].set(
        values, indices_are_sorted=True, unique_indices=True, mode="drop"
    )
