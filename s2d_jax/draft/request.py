"""What one call of decoding asks for, row by row."""

from __future__ import annotations

import flax.struct
import jax
from jaxtyping import Array, Bool, Int

from s2d_jax.draft.length import DraftingArrays
from s2d_jax.sampling import SamplingArrays


class Request(flax.struct.PyTreeNode):
    """What one call asks for, per row. Arrays only: nothing here compiles anything anew.

    Attributes:
        sampling: temperature and filters.
        key_B: one random key per row.
        max_length_B: int32, the most tokens of prompt and answer together.
        stop_ids_BZ: int32, token ids that end a row; -1 where there are fewer.
        exit_threshold_E: f32, one per exit in use.
        max_rounds: int32 scalar, rounds after which the loop returns to the host.
        drafting: what decides how many tokens each row drafts.
        vocabulary_U: int32, ascending: the ids that a draft with a trimmed head is read over; None for all.
    """

    sampling: SamplingArrays
    key_B: jax.Array
    max_length_B: jax.Array
    stop_ids_BZ: jax.Array
    exit_threshold_E: jax.Array
    max_rounds: jax.Array
    drafting: DraftingArrays
    vocabulary_U: jax.Array | None = None


def is_stop(tokens: Int[Array, "B *T"], stop_ids_BZ: Int[Array, "B Z"]) -> Bool[Array, "B *T"]:
    """bool, like `tokens`: whether each is one of its row's stop tokens."""
    stops = stop_ids_BZ if tokens.ndim == 1 else stop_ids_BZ[:, None, :]
    return (tokens[..., None] == stops).any(axis=-1)
