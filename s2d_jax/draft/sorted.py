"""The sorted drafter: a chain of tokens, each of which leaves at the first exit that is confident enough."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from s2d_jax.draft.chain import ChainConfig, propose_chain
from s2d_jax.draft.drafter import Proposal, TargetStates
from s2d_jax.draft.request import Request
from s2d_jax.draft.segments import SegmentedDrafter, Segments, SortedState


@dataclasses.dataclass(frozen=True)
class SortedDrafter(SegmentedDrafter):
    """Drafts with several exits of one model; a single exit is the fixed-exit policy.

    Attributes:
        segments: the draft, cut at the exits at which tokens may leave.
        chain: what every chain drafter needs.
        catch_up_width: positions that one pass of a deeper segment takes in.
        return_width: the same for the first segment, when a row drafts again after plain rounds; 0 if rows never pause.
    """

    segments: Segments
    chain: ChainConfig
    catch_up_width: int
    return_width: int = 0

    @property
    def width(self) -> int:
        return self.chain.width

    @property
    def margin(self) -> int:
        return self.chain.width + max(self.catch_up_width, self.return_width)

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
    ) -> tuple[Proposal, SortedState]:
        segments = self.segments
        # The first segment sees every token as it comes: nearly always just one waits for it.
        widths = 1, self.catch_up_width

        def step(state, tokens_BC, end_B, live_B):
            left = segments.step(params, state, tokens_BC, end_B, live_B[:, None], widths, request)
            return left.logits_BTU[:, 0], left.exit_BT[:, 0], left.state

        if self.return_width:
            # All but the last two positions: those are waiting after any round, and go one by one.
            end_B = jnp.where(num_draft_B > 0, length_B - 2, 0)
            state, _ = segments.catch_up(params, state, 0, tokens_BC, end_B, self.return_width)
        return propose_chain(
            self.chain, step, state, tokens_BC, length_B, num_draft_B, key_B, request
        )
