"""What one round hands to the next, `DecodeState`; and what it holds after the target's pass, `Verified`."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from s2d_jax.decode.row_groups import ROWS
from s2d_jax.draft.guard import GuardState
from s2d_jax.model.kv_cache import KVCache


class DecodeState(flax.struct.PyTreeNode):
    """What the loop carries; donated from call to call.

    Attributes:
        tokens_BC: int32, prompt then emitted tokens; garbage at and beyond `length_B`.
        origin_BC: int8, who chose each token: 0 for the prompt and the target, `i + 1` for exit i of the draft.
        length_B: int32, tokens of each row so far. The last one has not been through the target yet.
        target_cache: holds `length_B - 1` positions of each row.
        draft_state: the drafter's own state.
        done_B: bool, rows that have ended.
        draft_length_B: int32, tokens that each row may draft in its next round.
        rounds_B: int32, target passes of each row after prefill.
        drafted_BG: int32, rounds that drafted at least 1, 2, ... G tokens.
        accepted_BG: int32, rounds that accepted at least 1, 2, ... G tokens.
        proposed_BE: int32, tokens that were drafted and verified, by the exit that drafted them.
        guard: what speculation has saved in each row.
    """

    tokens_BC: jax.Array
    origin_BC: jax.Array
    length_B: jax.Array
    target_cache: KVCache
    draft_state: Any
    done_B: jax.Array
    draft_length_B: jax.Array
    rounds_B: jax.Array
    drafted_BG: jax.Array
    accepted_BG: jax.Array
    proposed_BE: jax.Array
    guard: GuardState

    def shardings(self, mesh: Mesh, *, split_draft: bool = False) -> DecodeState:
        """Where prefill leaves it: rows over the data axis, and the target's keys and values by heads over the tensor axis.

        Args:
            mesh: that of the target's parameters.
            split_draft: the draft's parameters are split over it as well, and so are its keys and values.
        """
        rows, heads = (
            NamedSharding(mesh, ROWS),
            NamedSharding(mesh, PartitionSpec("data", "tensor")),
        )

        def place(part):
            if not isinstance(part, KVCache):
                return rows
            split = (heads,) * len(part.keys)
            return jax.tree.map(lambda _: rows, part).replace(keys=split, values=split)

        both_split = jax.tree.map(place, self, is_leaf=lambda part: isinstance(part, KVCache))
        if split_draft:
            return both_split
        return both_split.replace(draft_state=jax.tree.map(lambda _: rows, self.draft_state))


class Verified(flax.struct.PyTreeNode):
    """A round after the target's pass, before acceptance."""

    proposal: Any
    logits_BTV: jax.Array
    key_B: jax.Array
