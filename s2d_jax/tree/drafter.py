"""Drafting a tree, level by level, with a draft of any number of exits; one exit is a fixed exit, or a whole model.

The nodes that a level expands lie behind the text in the draft's caches, one level after the other, in *slots*. A level goes
through the exits as one step: what deeper segments have not seen of earlier levels is caught up first, whole levels at a time,
which includes every ancestor of a node that goes deeper.
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
from s2d_jax.model.conditional import run_if
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
        draft_probs_BSK: f32, the q that the children of the node in each slot (0: the root) were drawn from, over the entries
            of the draft's logits; None when children are not drawn.
    """

    tree: Tree
    num_draft_B: jax.Array
    draft_probs_BSK: jax.Array | None


class _Growing(flax.struct.PyTreeNode):
    """A tree between two levels.

    Attributes:
        tokens_BC: int32, the text and behind it the slots.
        ancestors_BLL: bool, of the L slots.
    """

    state: SortedState
    tokens_BC: jax.Array
    ancestors_BLL: jax.Array
    found: Candidates
    draft_probs_BSK: jax.Array | None


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
        probs_BSK = None
        if growth.sampled:
            K = num_entries(segments.vocab_size, request)
            probs_BSK = jnp.zeros((B, 1 + L, K), jnp.float32)
        nothing_BLL = jnp.zeros((B, L, L), bool)
        growing = _Growing(state, tokens_BC, nothing_BLL, growth.start(B), probs_BSK)
        inputs = params, length_B, num_draft_B, key_B, request

        def root(growing):
            return self._root(*inputs, growing)

        def level(carry):
            level, growing = carry
            return level + 1, self._level(*inputs, level, growing)

        def goes_on(carry):
            return carry[0] <= jnp.max(num_draft_B)

        growing = run_if(jnp.any(num_draft_B > 0), root, growing)
        if growth.depth > 1:
            _, growing = jax.lax.while_loop(goes_on, level, (jnp.int32(2), growing))
        root_token_B = jnp.take_along_axis(tokens_BC, length_B[:, None] - 1, axis=1)[:, 0]
        grown = growth.finish(growing.found, root_token_B, num_draft_B)
        return TreeProposal(grown, num_draft_B, growing.draft_probs_BSK), growing.state

    def _root(self, params, length_B, limit_B, key_B, request, growing: _Growing) -> _Growing:
        """Level 1: the children of the last emitted token."""
        live_B1 = (limit_B > 0)[:, None]
        widths = _WAITING, self.catch_up_width
        left = self.segments.step(
            params, growing.state, growing.tokens_BC, length_B, live_B1, widths, request
        )
        nothing_B1 = jnp.zeros(live_B1.shape, jnp.float32)
        children = self.growth.children(
            left.logits_BTK, nothing_B1, live_B1, fold_in(key_B, jnp.ones_like(length_B)), request
        )
        parent_B1 = jnp.full(live_B1.shape, -1, jnp.int32)
        found = self.growth.add(growing.found, 1, children, parent_B1, left.exit_BT)
        return growing.replace(
            state=left.state,
            found=found,
            draft_probs_BSK=_put(growing.draft_probs_BSK, children.probs_BRK, 0),
        )

    def _level(
        self, params, length_B, limit_B, key_B, request, level, growing: _Growing
    ) -> _Growing:
        """Expands the beam of the level before `level` (int32 scalar, from 2)."""
        found, W = growing.found, self.growth.width
        beam_BW = jax.lax.dynamic_index_in_dim(found.beams_BDW, level - 2, axis=1, keepdims=False)

        def of_beam(values_BN):
            return jnp.take_along_axis(values_BN, beam_BW, axis=1)

        live_BW = (level <= limit_B)[:, None] & (of_beam(found.priority_BN) > -jnp.inf)
        live_BW &= self.growth.in_use(level - 1)[None, :]
        first_slot = (level - 2) * W
        growing = self._enter(length_B, growing, beam_BW, live_BW, first_slot)
        slots = Slots(length_B, growing.ancestors_BLL, W)
        widths = W, max(W, self.catch_up_width)
        end_B = length_B + first_slot + W
        left = self.segments.step(
            params, growing.state, growing.tokens_BC, end_B, live_BW, widths, request, slots
        )
        score_BW = of_beam(found.score_BN)
        own_key_B = fold_in(key_B, jnp.full_like(length_B, level))
        children = self.growth.children(left.logits_BTK, score_BW, live_BW, own_key_B, request)
        found = self.growth.add(growing.found, level, children, beam_BW, left.exit_BT)
        return growing.replace(
            state=left.state,
            found=found,
            draft_probs_BSK=_put(growing.draft_probs_BSK, children.probs_BRK, 1 + first_slot),
        )

    def _enter(self, length_B, growing: _Growing, beam_BW, live_BW, first_slot) -> _Growing:
        """Gives the beam its slots: `first_slot` (int32 scalar, from 0) and those behind it."""
        found, (B, L, _) = growing.found, growing.ancestors_BLL.shape
        entered_BW = jnp.where(
            live_BW, beam_BW, self.growth.num_candidates
        )  # beyond the last: none
        W = beam_BW.shape[1]
        slot_W = first_slot + jnp.arange(W, dtype=jnp.int32)
        parent_BW = jnp.take_along_axis(found.parent_BN, beam_BW, axis=1)
        parent_slot_BW = jnp.take_along_axis(found.slot_BN, jnp.maximum(parent_BW, 0), axis=1)
        at_BW1 = jnp.maximum(parent_slot_BW - 1, 0)[:, :, None]
        above_BWL = jnp.take_along_axis(growing.ancestors_BLL, at_BW1, axis=1)
        above_BWL &= (parent_BW >= 0)[:, :, None]
        own_WL = slot_W[:, None] == jnp.arange(L, dtype=jnp.int32)[None, :]
        token_BW = jnp.take_along_axis(found.tokens_BN, beam_BW, axis=1)
        rows_B1 = jnp.arange(B)[:, None]
        return growing.replace(
            tokens_BC=write_window(growing.tokens_BC, token_BW, length_B + first_slot, axis=1),
            ancestors_BLL=jax.lax.dynamic_update_slice_in_dim(
                growing.ancestors_BLL, above_BWL | own_WL[None], first_slot, 1
            ),
            found=found.replace(
                slot_BN=found.slot_BN.at[rows_B1, entered_BW].set(1 + slot_W, mode="drop")
            ),
        )

    def keep_path(
        self, state: SortedState, length_B: Int[Array, "B"], slot_BT: Int[Array, "B T"]
    ) -> SortedState:
        """Of the tree behind `length_B` tokens keeps the path through these slots; see `Segments.keep_path`."""
        return self.segments.keep_path(state, length_B, slot_BT)


def _put(probs_BSK, new_BRK, slot):
    """Writes the q of expanded nodes from `slot` on; None stays None."""
    if probs_BSK is None:
        return None
    return jax.lax.dynamic_update_slice_in_dim(probs_BSK, new_BRK, slot, 1)
