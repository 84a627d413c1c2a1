"""Simulated acceptance: coins accept drafted tokens, so that weights without meaning show what a given acceptance is worth."""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from s2d_jax.decode.acceptance import leading
from s2d_jax.decode.state import DecodeState, Verified
from s2d_jax.decode.verifier import ChainVerifier, Judged, append_next, origins
from s2d_jax.draft.request import Request
from s2d_jax.sampling import split, uniform


class CoinRequest(Request):
    """A request that says how often coins accept; a field of its own, so that one program serves all.

    Attributes:
        acceptance_B: f32, the probability that a drafted token is accepted.
    """

    acceptance_B: jax.Array = flax.struct.field(kw_only=True)

    @classmethod
    def of(cls, request: Request, acceptance_B: jax.Array) -> CoinRequest:
        """The request with its coins."""
        return cls(**vars(request), acceptance_B=acceptance_B)


@dataclasses.dataclass(frozen=True)
class CoinVerifier(ChainVerifier):
    """Verifies as `ChainVerifier` does greedily, with the same target pass and argmax; but coins say what is accepted.

    Each drafted token is accepted with the probability in a `CoinRequest`, up to the first that is not. Coins follow from the
    row's seed and length. The text means nothing.
    """

    def judge(self, request: Request, state: DecodeState, verified: Verified) -> Judged:
        assert isinstance(request, CoinRequest)  # `Verifier` says any request
        proposal = verified.proposal
        choice_BT = jnp.argmax(verified.logits_BTV, axis=-1).astype(jnp.int32)
        coin_key_B, _ = split(verified.key_B, 2)
        coin_BG = uniform(coin_key_B, proposal.tokens_BG.shape[1])
        accept_BG = coin_BG < request.acceptance_B[:, None]
        num_accepted_B = leading(accept_BG, proposal.num_draft_B)
        next_token_B = jnp.take_along_axis(choice_BT, num_accepted_B[:, None], axis=1)[:, 0]
        emitted_BY = append_next(proposal.tokens_BG, num_accepted_B, next_token_B)
        origin_BY = origins(proposal.exit_BG, num_accepted_B)
        return Judged(emitted_BY, origin_BY, num_accepted_B, state)
