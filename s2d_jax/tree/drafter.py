"""Drafting a tree, level by level, with a draft of any number of exits; one exit is a fixed exit, or a whole model.

The nodes that a level expands lie behind the text in the draft's caches, one level after the other, in *slots*. A level goes
through the exits as one step. A deeper segment first catches up on the earlier levels that it has not seen, whole levels at a
time, so every ancestor of a node that goes deeper has been there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from s2d_jax.draft.drafter import TargetStates
from s2d_jax.draft.logits import num_entries
from s2d_jax.draft.request import Request
from s2d_jax.draft.segments import SegmentedDrafter, Segments, Slots, SortedState
from s2d_jax.model.kv_cache import write_window
from s2d_jax.sampling import fold_in
from s2d_jax.tree.growth import Candidates, Growth
from s2d_jax.tree.nodes import Tree

# After a round at most two tokens wait for the first segment: the last accepted one, if it was a leaf, and the bonus token.
_WAITING = 2


class TreeProposal(flax.struct.PyTreeNode):
    """A drafted tree per row.

    Attributes:
        tree: its nodes.
        num_draft_B: int32, how many levels each row may have; 0 drafts nothing.
        draft_probs_BLU: f32, the q that the children of the node in each slot (0: the root) were drawn from, over the entries
            of the draft's logits; None when children are not drawn.
    """

    tree: Tree
    num_draft_B: jax.Array
    draft_probs_BLU: jax.Array | None


class _Growing(flax.struct.PyTreeNode):
    """A tree between two levels.

    Attributes:
        tokens_BC: int32, the text and behind it the slots.
        ancestors_BLL: bool, as in `Slots`.
    """

    state: SortedState
    tokens_BC: jax.Array
    ancestors_BLL: jax.Array
    found: Candidates
    draft_probs_BLU: jax.Array | None


@dataclasses.dataclass(frozen=True)
class TreeDrafter(SegmentedDrafter):
    """Drafts a tree in every round.

    Attributes:
        segments: the draft.
        growth: which tree.
        catch_up_width: positions that one pass of a deeper segment takes in, where the text is behind.
        return_width: the same for the first segment, when a row drafts again after plain rounds; 0 if rows never pause.
    """

    segments: Segments
    growth: Growth
    catch_up_width: int
    return_width: int = 0

    @property
    def width(self) -> int:
        return self.growth.depth

    @property
    def margin(self) -> int:
        level_width = max(self.growth.width, self.catch_up_width)
        return self.growth.num_slots + max(level_width, _WAITING, self.return_width)

    def propose(
        self,
        params: Any,
        state: SortedState,
        tokens_BC: Int[Array, "B C"],
        length_B: Int[Array, "B"],
        num_draft_B: Int[Array, "B"],
        key_B: Key[Array, "B"],
        request: Request,
        seen: TargetStates,
    ) -> tuple[TreeProposal, SortedState]:
        segments, growth = self.segments, self.growth
        if self.return_width:
            end_B = jnp.where(num_draft_B > 0, length_B - _WAITING, 0)
            state, _ = segments.catch_up(params, state, 0, tokens_BC, end_B, self.return_width)
        B, L = len(length_B), growth.num_slots
        probs_BLU = None
        if growth.sampled:
            U = num_entries(segments.vocab_size, request)
            probs_BLU = jnp.zeros((B, 1 + L, U), jnp.float32)
        nothing_BLL = jnp.zeros((B, L, L), bool)
        growing = _Growing(state, tokens_BC, nothing_BLL, growth.start(B), probs_BLU)
        inputs = params, length_B, num_draft_B, key_B, request

        def level(carry):
            level, growing = carry
            return level + 1, self._level(*inputs, level, growing)

        def goes_on(carry):
            return carry[0] <= jnp.max(num_draft_B)

        growing = self._root(*inputs, growing)
        if growth.depth > 1:
            _, growing = jax.lax.while_loop(goes_on, level, (jnp.int32(2), growing))
        root_token_B = jnp.take_along_axis(tokens_BC, length_B[:, None] - 1, axis=1)[:, 0]
        grown = growth.finish(growing.found, root_token_B, num_draft_B)
        return TreeProposal(grown, num_draft_B, growing.draft_probs_BLU), growing.state

    def _root(self, params, length_B, limit_B, key_B, request, growing: _Growing) -> _Growing:
        """Level 1: the children of the last emitted token."""
        live_B1 = (limit_B > 0)[:, None]
        widths = _WAITING, self.catch_up_width
        once = not self.return_width  # with a guard, rounds may go by in which no row drafts
        left = self.segments.step(
            params,
            growing.state,
            growing.tokens_BC,
            length_B,
            live_B1,
            widths,
            request,
            once=once,
            some_live=once,
        )
        nothing_B1 = jnp.zeros(live_B1.shape, jnp.float32)
        children = self.growth.children(
            left.logits_BTU, nothing_B1, live_B1, fold_in(key_B, jnp.ones_like(length_B)), request
        )
        parent_B1 = jnp.full(live_B1.shape, -1, jnp.int32)
        found = self.growth.add(growing.found, 1, children, parent_B1, left.exit_BT)
        return growing.replace(
            state=left.state,
            found=found,
            draft_probs_BLU=_put(growing.draft_probs_BLU, children.probs_BJU, 0),
        )

    def _level(
        self, params, length_B, limit_B, key_B, request, level, growing: _Growing
    ) -> _Growing:
        """Expands the beam of the level before `level` (int32 scalar, from 2)."""
        found, J = growing.found, self.growth.width
        beam_BJ = jax.lax.dynamic_index_in_dim(found.beams_BYJ, level - 2, axis=1, keepdims=False)

        def of_beam(values_BX):
            return jnp.take_along_axis(values_BX, beam_BJ, axis=1)

        live_BJ = (level <= limit_B)[:, None] & (of_beam(found.priority_BX) > -jnp.inf)
        live_BJ &= self.growth.in_use(level - 1)[None, :]
        first_slot = (level - 2) * J
        growing = self._enter(length_B, growing, beam_BJ, live_BJ, first_slot)
        slots = Slots(length_B, growing.ancestors_BLL, J)
        widths = J, max(J, self.catch_up_width)
        end_B = length_B + first_slot + J
        left = self.segments.step(
            params,
            growing.state,
            growing.tokens_BC,
            end_B,
            live_BJ,
            widths,
            request,
            slots,
            once=True,
        )
        score_BJ = of_beam(found.score_BX)
        own_key_B = fold_in(key_B, jnp.full_like(length_B, level))
        children = self.growth.children(left.logits_BTU, score_BJ, live_BJ, own_key_B, request)
        found = self.growth.add(growing.found, level, children, beam_BJ, left.exit_BT)
        return growing.replace(
            state=left.state,
            found=found,
            draft_probs_BLU=_put(growing.draft_probs_BLU, children.probs_BJU, 1 + first_slot),
        )

    def _enter(self, length_B, growing: _Growing, beam_BJ, live_BJ, first_slot) -> _Growing:
        """Gives the beam its slots: `first_slot` (int32 scalar, from 0) and those behind it."""
        found, (B, L, _) = growing.found, growing.ancestors_BLL.shape
        entered_BJ = jnp.where(
            live_BJ, beam_BJ, self.growth.num_candidates
        )  # beyond the last: none
        J = beam_BJ.shape[1]
        slot_J = first_slot + jnp.arange(J, dtype=jnp.int32)
        parent_BJ = jnp.take_along_axis(found.parent_BX, beam_BJ, axis=1)
        parent_slot_BJ = jnp.take_along_axis(found.slot_BX, jnp.maximum(parent_BJ, 0), axis=1)
        at_BJ1 = jnp.maximum(parent_slot_BJ - 1, 0)[:, :, None]
        above_BJL = jnp.take_along_axis(growing.ancestors_BLL, at_BJ1, axis=1)
        above_BJL &= (parent_BJ >= 0)[:, :, None]
        own_JL = slot_J[:, None] == jnp.arange(L, dtype=jnp.int32)[None, :]
        token_BJ = jnp.take_along_axis(found.tokens_BX, beam_BJ, axis=1)
        rows_B1 = jnp.arange(B)[:, None]
        return growing.replace(
            tokens_BC=write_window(growing.tokens_BC, token_BJ, length_B + first_slot, axis=1),
            ancestors_BLL=jax.lax.dynamic_update_slice_in_dim(
                growing.ancestors_BLL, above_BJL | own_JL[None], first_slot, 1
            ),
            found=found.replace(
                slot_BX=found.slot_BX.at[rows_B1, entered_BJ].set(1 + slot_J, mode="drop")
            ),
        )

    def keep_path(
        self, state: SortedState, length_B: Int[Array, "B"], slot_BY: Int[Array, "B Y"]
    ) -> SortedState:
        """Keeps the path through these slots of the tree behind `length_B` tokens; see `Segments.keep_path`."""
        return self.segments.keep_path(state, length_B, slot_BY, 1 + self.growth.num_slots)


def _put(probs_BLU, new_BJU, slot):
    """Writes the q of expanded nodes from `slot` on; None stays None."""
    if probs_BLU is None:
        return None
    return jax.lax.dynamic_update_slice_in_dim(probs_BLU, new_BJU, slot, 1)
