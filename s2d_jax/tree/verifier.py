"""Verification of trees: the target's pass covers the tree, and the accepted path stays in the caches."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from s2d_jax.decode.state import DecodeState, Verified
from s2d_jax.decode.verifier import Judged, Window, append_next, origins
from s2d_jax.draft.guard import Steps
from s2d_jax.draft.request import Request
from s2d_jax.model import tree_mask
from s2d_jax.model.place import Place
from s2d_jax.tree import acceptance
from s2d_jax.tree import nodes as trees
from s2d_jax.tree.drafter import TreeDrafter, TreeProposal


@dataclasses.dataclass(frozen=True)
class TreeVerifier:
    """The `Verifier` of what a `TreeDrafter` proposes.

    Attributes:
        greedy, widths: as for every `Verifier`; the last width is that of the whole tree.
        drafter: drafts the trees; its caches keep the accepted path as the target's do.
    """

    greedy: bool
    widths: tuple[int, ...]
    drafter: TreeDrafter

    def window(self, state: DecodeState, proposal: TreeProposal) -> Window:
        tree = proposal.tree
        above_BMM = trees.ancestors(tree.parent_BM, self.drafter.width)
        capacity = state.tokens_BC.shape[1]
        mask_BMS = tree_mask.mask(above_BMM, state.length_B - 1, capacity)
        place = Place(trees.positions(tree.depth_BM, state.length_B), mask_BMS)
        return Window(tree.tokens_BM, place)

    def needed_width(self, proposal: TreeProposal) -> Int[Array, ""]:
        drafts = jnp.any(proposal.num_draft_B > 0)
        return jnp.where(drafts, self.widths[-1], 1)

    def proposed(self, proposal: TreeProposal) -> tuple[Int[Array, "B Y"], Bool[Array, "B Y"]]:
        tree = proposal.tree  # the first node is the root, which nobody drafted
        return tree.exit_BM[:, 1:], tree.valid_BM[:, 1:]

    def charged(self, steps_BE: Steps) -> Steps:
        """Every level counts as one at the deepest exit of the round: a level that goes there takes earlier levels along."""
        E = steps_BE.shape[1]
        deepest_B = E - 1 - jnp.argmax(steps_BE[:, ::-1] > 0, axis=1)
        levels_B1 = jnp.sum(steps_BE, axis=1, keepdims=True)
        return levels_B1 * jax.nn.one_hot(deepest_B, E, dtype=steps_BE.dtype)

    def judge(self, request: Request, state: DecodeState, verified: Verified) -> Judged:
        tree, depth = verified.proposal.tree, self.drafter.width
        node_B, next_token_B = self._accepted(request, verified)
        num_accepted_B = _at(tree.depth_BM, node_B[:, None])[:, 0]
        path_BY = trees.path(tree.parent_BM, tree.depth_BM, node_B, depth)
        tokens_BG = _at(tree.tokens_BM, path_BY[:, 1:])
        emitted_BY = append_next(tokens_BG, num_accepted_B, next_token_B)
        origin_BY = origins(_at(tree.exit_BM, path_BY[:, 1:]), num_accepted_B)
        state = self._keep_path(state, tree, path_BY, num_accepted_B)
        return Judged(emitted_BY, origin_BY, num_accepted_B, state)

    def _accepted(self, request: Request, verified: Verified):
        proposal, logits_BMV = verified.proposal, verified.logits_BTV
        if self.greedy:
            return acceptance.accept_greedy(proposal.tree, logits_BMV)
        inputs = logits_BMV, request.sampling, verified.key_B
        if proposal.draft_probs_BLU is None:
            return acceptance.accept_target_only(proposal.tree, *inputs)
        return acceptance.accept_without_replacement(
            proposal.tree, proposal.draft_probs_BLU, *inputs, request.vocabulary_U
        )

    def _keep_path(self, state: DecodeState, tree: trees.Tree, path_BY, num_accepted_B):
        """Moves the accepted path right behind the text in both caches."""
        root_B = state.length_B - 1
        depth_1Y = jnp.arange(path_BY.shape[1], dtype=jnp.int32)[None, :]
        slot_BY = _at(tree.slot_BM, path_BY)
        on_path_BY = depth_1Y <= num_accepted_B[:, None]
        # Slots ascend along the path; the first that is missing ends it.
        slot_BY = jnp.where(on_path_BY, slot_BY, -1)

        return state.replace(
            target_cache=state.target_cache.keep_path(root_B, path_BY, tree.tokens_BM.shape[1]),
            draft_state=self.drafter.keep_path(state.draft_state, state.length_B, slot_BY),
        )


def _at(values_BM, index_BY) -> jax.Array:
    return jnp.take_along_axis(values_BM, index_BY, axis=1)
