"""Prefill, then rounds of draft -> verify -> accept -> rewind inside one `lax.while_loop`.

Everything is an array with a batch axis and its own length per row. The target and the drafter are injected, so nothing here
knows how many layers or exits they have.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from s2d_jax.decode.state import DecodeState, Verified
from s2d_jax.decode.target import Target
from s2d_jax.decode.verifier import Verifier
from s2d_jax.draft.drafter import Drafter
from s2d_jax.draft.guard import GuardState, affordable_length, charge, settle
from s2d_jax.draft.length import next_length
from s2d_jax.draft.request import Request, is_stop
from s2d_jax.model.conditional import at_width
from s2d_jax.model.kv_cache import KVCache, grow_axis, write_window
from s2d_jax.model.prefill import run_chunks
from s2d_jax.sampling import fold_in, probabilities, sample, split


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The compiled shape of decoding: every field is static.

    Attributes:
        target: the verifying model.
        drafter: how tokens are drafted.
        verifier: how drafts are verified: chains or trees.
    """

    target: Target
    drafter: Drafter
    verifier: Verifier

    @property
    def margin(self) -> int:
        """Positions that a round may write beyond the last token that will be kept."""
        return max(self.verifier.widths[-1], self.drafter.margin)

    def prefill(
        self,
        params: Any,
        request: Request,
        tokens_BC: Int[Array, "B C"],
        length_B: Int[Array, "B"],
        prompt_width: int,
    ) -> DecodeState:
        """Runs the prompts through target and draft, and emits the first token of each row.

        Args:
            params: `{"target": ..., "draft": ...}`.
            request: per-row parameters.
            tokens_BC: int32, prompts on the left; C is the capacity of all caches.
            length_B: int32, prompt lengths.
            prompt_width: static; positions that one pass computes. Longer prompts take several passes, behind the caches.

        Returns:
            The first `DecodeState`.
        """
        inputs = tokens_BC, length_B, prompt_width
        cache = self.target.new_cache(*tokens_BC.shape)
        last_BD, cache = self._read_prompt(params, cache, *inputs)
        draft_state = self.drafter.init(params["draft"], *inputs, cache.states)
        return self._first_state(params, request, tokens_BC, length_B, last_BD, cache, draft_state)

    def extend(
        self,
        params: Any,
        request: Request,
        state: DecodeState,
        tokens_BC: Int[Array, "B C"],
        length_B: Int[Array, "B"],
        kept_B: Int[Array, "B"],
        width: int,
    ) -> DecodeState:
        """As `prefill`, for prompts whose first `kept_B` tokens are already in the caches of `state`.

        Args:
            params, request, tokens_BC, length_B: as for `prefill`; C is the capacity of the state.
            state: what an earlier call left.
            kept_B: int32, less than `length_B` and `state.length_B`.
            width: static; positions that one pass computes.
        """
        inputs = tokens_BC, length_B, width
        cache = state.target_cache.rewind(kept_B)
        last_BD, cache = self._read_prompt(params, cache, *inputs)
        draft_state = self.drafter.rewind(state.draft_state, kept_B)
        draft_state = self.drafter.extend(params["draft"], draft_state, *inputs, cache.states)
        return self._first_state(params, request, tokens_BC, length_B, last_BD, cache, draft_state)

    def _read_prompt(self, params, cache: KVCache, tokens_BC, length_B, width: int):
        """Runs the target over the part of the prompt that `cache` lacks; the last token's state `[B, D]`, and the cache."""

        def forward(chunk_BW, cache):
            return self.target.forward(params["target"], chunk_BW, cache)

        nothing_BD = self.target.model.no_states(len(length_B))
        return run_chunks(forward, cache, nothing_BD, tokens_BC, length_B, width)

    def _first_state(self, params, request, tokens_BC, length_B, last_BD, cache, draft_state):
        """The state after the first emitted token, which follows from the prompt's last state."""
        logits_B1V = self.target.logits(params["target"], last_BD[:, None])
        token_B = self._sample(logits_B1V, request, fold_in(request.key_B, length_B))
        zeros_B = jnp.zeros_like(length_B)
        counts_BG = jnp.zeros((len(length_B), self.drafter.width), jnp.int32)
        return DecodeState(
            tokens_BC=write_window(tokens_BC, token_B[:, None], length_B, axis=1),
            origin_BC=jnp.zeros_like(tokens_BC, jnp.int8),
            length_B=length_B + 1,
            target_cache=cache,
            draft_state=draft_state,
            done_B=(length_B + 1 >= request.max_length_B) | is_stop(token_B, request.stop_ids_BZ),
            draft_length_B=request.drafting.first_B,
            rounds_B=zeros_B,
            drafted_BG=counts_BG,
            accepted_BG=counts_BG,
            proposed_BE=jnp.zeros((len(length_B), len(request.exit_threshold_E)), jnp.int32),
            guard=GuardState.create(request.drafting),
        )

    def grow(self, state: DecodeState, capacity: int) -> DecodeState:
        """The same state with room for `capacity` positions in each row."""
        return state.replace(
            tokens_BC=grow_axis(state.tokens_BC, capacity, axis=1),
            origin_BC=grow_axis(state.origin_BC, capacity, axis=1),
            target_cache=state.target_cache.grow(capacity),
            draft_state=self.drafter.grow(state.draft_state, capacity),
        )

    def _sample(self, logits_B1V, request: Request, key_B) -> jax.Array:
        if self.verifier.greedy:
            return jnp.argmax(logits_B1V[:, 0], axis=-1).astype(jnp.int32)
        return sample(probabilities(logits_B1V, request.sampling)[:, 0], key_B)

    def run(self, params: Any, request: Request, state: DecodeState) -> DecodeState:
        """Runs rounds, in one loop, until every row is done, `request.max_rounds` are over, or a row lacks room for another."""

        def goes_on(carry):
            state, rounds = carry
            return (rounds < request.max_rounds) & ~jnp.all(state.done_B) & self.has_room(state)

        def round(carry):
            state, rounds = carry
            # The names are those that profilers show.
            with jax.named_scope("draft"):
                proposal, state = self.propose(params, request, state)
            with jax.named_scope("verify"):
                verified, state = self.verify(params, request, state, proposal)
            with jax.named_scope("accept"):
                return self.accept(request, state, verified), rounds + 1

        return jax.lax.while_loop(goes_on, round, (state, jnp.int32(0)))[0]

    def has_room(self, state: DecodeState) -> Bool[Array, ""]:
        """Whether another round stays within the caches. Rows that are done are written to as well, so they count."""
        return jnp.all(state.length_B + self.margin <= state.tokens_BC.shape[1])

    def propose(self, params: Any, request: Request, state: DecodeState) -> tuple[Any, DecodeState]:
        """Drafts; a row never drafts more than it may still emit beside the target's own token."""
        budget_B = request.max_length_B - state.length_B
        affordable_B = affordable_length(state.guard, request.drafting)
        num_draft_B = jnp.minimum(jnp.minimum(state.draft_length_B, affordable_B), budget_B - 1)
        num_draft_B = jnp.where(state.done_B, 0, num_draft_B)
        draft_key_B, _ = self._round_keys(request, state)
        proposal, draft_state = self.drafter.propose(
            params["draft"],
            state.draft_state,
            state.tokens_BC,
            state.length_B,
            num_draft_B,
            draft_key_B,
            request,
            state.target_cache.states,
        )
        if "step_counts" in (after := self.drafter.stats(draft_state)):
            steps_BE = after["step_counts"] - self.drafter.stats(state.draft_state)["step_counts"]
            charged_BE = self.verifier.charged(steps_BE)
            state = state.replace(guard=charge(state.guard, request.drafting, charged_BE))
        return proposal, state.replace(draft_state=draft_state)

    def verify(
        self, params: Any, request: Request, state: DecodeState, proposal: Any
    ) -> tuple[Verified, DecodeState]:
        """One target pass over the last emitted token and the drafted ones."""
        tokens_BT, place = self.verifier.window(state, proposal)
        B, T = tokens_BT.shape

        def forward(width, carry):
            cache, logits_BTV = carry
            h_BTD, cache = self.target.forward(
                params["target"],
                tokens_BT[:, :width],
                cache,
                None if place is None else place.first(width),
            )
            own_BTV = self.target.logits(params["target"], h_BTD)
            if width == T:
                return cache, own_BTV
            return cache, jax.lax.dynamic_update_slice(logits_BTV, own_BTV, (0, 0, 0))

        nothing_BTV = jnp.zeros((B, T, self.target.model.config.vocab_size), jnp.float32)
        carry = state.target_cache, nothing_BTV
        cache, logits_BTV = at_width(
            self.verifier.widths, self.verifier.needed_width(proposal), forward, carry
        )
        _, accept_key_B = self._round_keys(request, state)
        verified = Verified(proposal, logits_BTV, accept_key_B)
        return verified, state.replace(target_cache=cache)

    def accept(self, request: Request, state: DecodeState, verified: Verified) -> DecodeState:
        """Emits the accepted tokens and one more, rewinds both caches, and checks the stop conditions."""
        proposal, live_B = verified.proposal, ~state.done_B
        judged = self.verifier.judge(request, state, verified)
        emitted_BY, origin_BY, num_accepted_B, state = judged
        num_emitted_B, stopped_B = _until_stop(emitted_BY, num_accepted_B + 1, request.stop_ids_BZ)
        num_emitted_B = jnp.where(live_B, num_emitted_B, 0)
        length_B = state.length_B + num_emitted_B
        depth_1G = jnp.arange(self.drafter.width, dtype=jnp.int32)[None, :]

        def reached_BG(count_B):
            return (live_B[:, None] & (depth_1G < count_B[:, None])).astype(jnp.int32)

        return state.replace(
            tokens_BC=write_window(state.tokens_BC, emitted_BY, state.length_B, axis=1),
            origin_BC=write_window(state.origin_BC, origin_BY, state.length_B, axis=1),
            length_B=length_B,
            target_cache=state.target_cache.advance_to(length_B - 1),
            draft_state=self.drafter.rewind(state.draft_state, length_B - 1),
            done_B=state.done_B | stopped_B | (length_B >= request.max_length_B),
            draft_length_B=next_length(
                request.drafting, state.draft_length_B, proposal.num_draft_B, num_accepted_B
            ),
            rounds_B=state.rounds_B + live_B.astype(jnp.int32),
            drafted_BG=state.drafted_BG + reached_BG(proposal.num_draft_B),
            # A tree may hold tokens behind a stop token; they are not emitted.
            accepted_BG=state.accepted_BG + reached_BG(jnp.minimum(num_accepted_B, num_emitted_B)),
            proposed_BE=state.proposed_BE + self._proposed_by_exit(request, proposal, live_B),
            guard=settle(
                state.guard, request.drafting, proposal.num_draft_B, num_emitted_B, live_B
            ),
        )

    def _proposed_by_exit(
        self, request: Request, proposal: Any, live_B: Bool[Array, "B"]
    ) -> Int[Array, "B E"]:
        """int32: drafted tokens of rows that are live, by the exit that drafted each."""
        exit_BY, drafted_BY = self.verifier.proposed(proposal)
        exit_11E = jnp.arange(len(request.exit_threshold_E), dtype=jnp.int32)[None, None, :]
        drafted_BY &= live_B[:, None]
        counted_BYE = drafted_BY[:, :, None] & (exit_BY[:, :, None] == exit_11E)
        return jnp.sum(counted_BYE, axis=1, dtype=jnp.int32)

    def _round_keys(self, request: Request, state: DecodeState):
        """A row's length grows every round, so its keys never repeat and never depend on other rows."""
        return split(fold_in(request.key_B, state.length_B), 2)


def _until_stop(emitted_BY, num_emitted_B, stop_ids_BZ):
    """How many tokens are emitted if the first stop token is the last one, and whether there was one."""
    index_Y = jnp.arange(emitted_BY.shape[1], dtype=jnp.int32)[None, :]
    stop_BY = is_stop(emitted_BY, stop_ids_BZ) & (index_Y < num_emitted_B[:, None])
    first_stop_B = jnp.argmax(stop_BY, axis=1).astype(jnp.int32)
    stopped_B = jnp.any(stop_BY, axis=1)
    return jnp.where(stopped_B, first_stop_B + 1, num_emitted_B), stopped_B
