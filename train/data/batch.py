"""One batch of rows, as arrays."""

from __future__ import annotations

import flax.struct
import jax


class TopK(flax.struct.PyTreeNode):
    """The k most probable tokens of a teacher at every position.

    Attributes:
        ids_BTk: int32.
        log_probs_BTk: f32, of the teacher's whole distribution.
    """

    ids_BTk: jax.Array
    log_probs_BTk: jax.Array


class Batch(flax.struct.PyTreeNode):
    """Packed rows.

    Attributes:
        tokens_BT: int32.
        targets_BT: int32, the token that follows each position.
        weights_BT: f32, 1 where that token is an assistant's.
        positions_BT: int32, counted within each document.
        segment_ids_BT: int32, 1, 2, ... for the documents of a row, 0 for padding.
        top_k: what was stored of each teacher's distributions; empty where teachers run in the step.
    """

    tokens_BT: jax.Array
    targets_BT: jax.Array
    weights_BT: jax.Array
    positions_BT: jax.Array
    segment_ids_BT: jax.Array
    top_k: tuple[TopK, ...] = ()
