"""What differs between a round with chains and one with trees, as an object that the loop asks; and the object for chains."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from s2d_jax.decode.acceptance import accept_greedy, accept_sampled
from s2d_jax.decode.state import DecodeState, Verified
from s2d_jax.draft.drafter import Proposal
from s2d_jax.draft.guard import Steps
from s2d_jax.draft.request import Request
from s2d_jax.model.conditional import of_width
from s2d_jax.model.kv_cache import write_window
from s2d_jax.model.place import Place
from s2d_jax.sampling import probabilities


class Window(NamedTuple):
    """What the target computes in a round.

    Attributes:
        tokens_BT: int32; the first is the last emitted token.
        place: where these tokens stand; None where they continue the text.
    """

    tokens_BT: jax.Array
    place: Place | None


class Judged(NamedTuple):
    """What the target makes of a proposal.

    Attributes:
        emitted_BY: int32 `[B, G + 1]`, the accepted tokens and the target's own; garbage behind them.
        origin_BY: int32, who chose each of these, as in `DecodeState.origin_BC`.
        num_accepted_B: int32.
        state: its caches hold the accepted tokens behind the text, in order.
    """

    emitted_BY: jax.Array
    origin_BY: jax.Array
    num_accepted_B: jax.Array
    state: DecodeState


class Verifier(Protocol):
    """How proposals of one kind are verified.

    Attributes:
        greedy: every row has temperature 0, so no probabilities are computed.
        widths: how many positions a target pass may compute, ascending. A round takes the smallest that is wide enough.
    """

    @property
    def greedy(self) -> bool: ...

    @property
    def widths(self) -> tuple[int, ...]: ...

    def window(self, state: DecodeState, proposal: Any) -> Window:
        """What the target's pass computes."""
        ...

    def needed_width(self, proposal: Any) -> Int[Array, ""]:
        """int32: positions of the window that this round's pass has to compute."""
        ...

    def proposed(self, proposal: Any) -> tuple[Int[Array, "B Y"], Bool[Array, "B Y"]]:
        """The exit (int32, its index) that drafted each token of the proposal, and whether there is such a token."""
        ...

    def charged(self, steps_BE: Steps) -> Steps:
        """int32: the draft steps by exit that the guard charges, given the steps that the draft made."""
        ...

    def judge(self, request: Request, state: DecodeState, verified: Verified) -> Judged:
        """Applies the acceptance rule to the target's logits."""
        ...


@dataclasses.dataclass(frozen=True)
class ChainVerifier:
    """Verifies chains: the last emitted token and the drafted ones simply continue the text."""

    greedy: bool
    widths: tuple[int, ...]

    def window(self, state: DecodeState, proposal: Proposal) -> Window:
        last_B1 = jnp.take_along_axis(state.tokens_BC, state.length_B[:, None] - 1, axis=1)
        return Window(jnp.concatenate([last_B1, proposal.tokens_BG], axis=1), None)

    def needed_width(self, proposal: Proposal) -> Int[Array, ""]:
        return jnp.max(proposal.num_draft_B) + 1

    def proposed(self, proposal: Proposal) -> tuple[Int[Array, "B Y"], Bool[Array, "B Y"]]:
        depth_1G = jnp.arange(proposal.exit_BG.shape[1], dtype=jnp.int32)[None, :]
        return proposal.exit_BG, depth_1G < proposal.num_draft_B[:, None]

    def charged(self, steps_BE: Steps) -> Steps:
        return steps_BE

    def judge(self, request: Request, state: DecodeState, verified: Verified) -> Judged:
        proposal = verified.proposal

        def accept(width):
            logits_BTV, drafted = verified.logits_BTV[:, :width], proposal.first(width - 1)
            if self.greedy:
                return accept_greedy(drafted, logits_BTV)
            target_probs_BTV = probabilities(logits_BTV, request.sampling)
            return accept_sampled(drafted, target_probs_BTV, verified.key_B)

        needed = self.needed_width(proposal)
        num_accepted_B, next_token_B = of_width(self.widths, needed, accept)
        emitted_BY = append_next(proposal.tokens_BG, num_accepted_B, next_token_B)
        origin_BY = origins(proposal.exit_BG, num_accepted_B)
        return Judged(emitted_BY, origin_BY, num_accepted_B, state)


def append_next(
    tokens_BG: Int[Array, "B G"],
    num_accepted_B: Int[Array, "B"],
    next_token_B: Int[Array, "B"],
) -> Int[Array, "B G+1"]:
    """int32: the accepted tokens, and the next one behind them."""
    emitted_BY = jnp.pad(tokens_BG, ((0, 0), (0, 1)))
    return write_window(emitted_BY, next_token_B[:, None], num_accepted_B, axis=1)


def origins(exit_BG: Int[Array, "B G"], num_accepted_B: Int[Array, "B"]) -> Int[Array, "B G+1"]:
    """int32: who chose each token of `append_next`: the exit that drafted it, from 1, or 0 for the target."""
    return append_next(exit_BG + 1, num_accepted_B, jnp.zeros_like(num_accepted_B))
