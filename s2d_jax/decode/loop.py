"""Prefill, then rounds of draft -> verify -> accept -> rewind inside one `lax.while_loop`.

Everything is an array with a batch axis and its own length per row. The target and the drafter are injected, so nothing here
knows how many layers or exits they have.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from s2d_jax.decode.acceptance import accept_greedy, accept_sampled
from s2d_jax.decode.state import DecodeState, Verified
from s2d_jax.decode.target import Target
from s2d_jax.draft.drafter import Drafter
from s2d_jax.draft.guard import GuardState, affordable_length, charge, settle
from s2d_jax.draft.length import next_length
from s2d_jax.draft.request import Request, is_stop
from s2d_jax.model.conditional import at_width
from s2d_jax.model.kv_cache import grow_axis, write_window
from s2d_jax.model.prefill import run_chunks
from s2d_jax.sampling import fold_in, probabilities, sample, split


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The compiled shape of decoding with chains (`TreeDecoder` is that with trees): every field is static.

    Attributes:
        target: the verifying model.
        drafter: how tokens are drafted.
        greedy: every row has temperature 0, so no probabilities are computed.
        widths: how many positions a target pass may compute, ascending; the last is the drafter's width and one. A round takes
            the smallest that holds its longest chain.
    """

    target: Target
    drafter: Drafter
    greedy: bool
    widths: tuple[int, ...]

    @property
    def margin(self) -> int:
        """Positions that a round may write beyond the last token that will be kept."""
        return max(self.drafter.width + 1, self.drafter.margin)

    def prefill(self, params, request: Request, tokens_BC, length_B, prompt_width: int):
        """Runs the prompts through target and draft, and emits the first token of each row.

        Args:
            params: `{"target": ..., "draft": ...}`.
            request: per-row parameters.
            tokens_BC: int32 `[B, C]`, prompts on the left; C is the capacity of all caches.
            length_B: int32, prompt lengths.
            prompt_width: static; positions that one pass computes. Longer prompts take several passes, behind the caches.

        Returns:
            The first `DecodeState`.
        """
        cache = self.target.new_cache(*tokens_BC.shape)
        draft_state = self.drafter.init(params["draft"], tokens_BC, length_B, prompt_width)
        inputs = (tokens_BC, length_B, prompt_width)
        return self._first_state(params, request, cache, draft_state, *inputs)

    def extend(self, params, request: Request, state, tokens_BC, length_B, kept_B, width: int):
        """The same as `prefill` for prompts whose first `kept_B` tokens the caches of `state` already hold.

        Args:
            params, request, tokens_BC, length_B: as for `prefill`; C is the capacity of the state.
            state: what an earlier call left.
            kept_B: int32, less than `length_B` and `state.length_B`.
            width: static; positions that one pass computes.
        """
        cache = state.target_cache.rewind(kept_B)
        draft_state = self.drafter.rewind(state.draft_state, kept_B)
        inputs = (tokens_BC, length_B, width)
        draft_state = self.drafter.extend(params["draft"], draft_state, *inputs)
        return self._first_state(params, request, cache, draft_state, *inputs)

    def _first_state(self, params, request, cache, draft_state, tokens_BC, length_B, width):
        """The target's pass over the prompt behind `cache`, and what follows from it."""
        last_BD, cache = run_chunks(
            *(lambda *args: self.target.forward(params["target"], *args), cache),
            *(self.target.model.no_states(len(length_B)), tokens_BC, length_B, width),
        )
        logits_B1V = self.target.logits(params["target"], last_BD[:, None])
        token_B = self._sample(logits_B1V, request, fold_in(request.key_B, length_B))
        zeros_B = jnp.zeros_like(length_B)
        counts_BG = jnp.zeros((len(length_B), self.drafter.width), jnp.int32)
        return DecodeState(
            tokens_BC=write_window(tokens_BC, token_B[:, None], length_B, axis=1),
            length_B=length_B + 1,
            target_cache=cache,
            draft_state=draft_state,
            done_B=(length_B + 1 >= request.max_length_B) | is_stop(token_B, request.stop_ids_BN),
            draft_length_B=request.drafting.first_B,
            rounds_B=zeros_B,
            drafted_BG=counts_BG,
            accepted_BG=counts_BG,
            proposed_B=zeros_B,
            guard=GuardState.create(request.drafting),
        )

    def grow(self, state: DecodeState, capacity: int) -> DecodeState:
        """The same state with room for `capacity` positions in each row."""
        return state.replace(
            tokens_BC=grow_axis(state.tokens_BC, capacity, axis=1),
            target_cache=state.target_cache.grow(capacity),
            draft_state=self.drafter.grow(state.draft_state, capacity),
        )

    def _sample(self, logits_B1V, request: Request, key_B) -> jax.Array:
        if self.greedy:
            return jnp.argmax(logits_B1V[:, 0], axis=-1).astype(jnp.int32)
        return sample(probabilities(logits_B1V, request.sampling)[:, 0], key_B)

    def run(self, params, request: Request, state: DecodeState) -> DecodeState:
        """Rounds until every row is done, `request.max_rounds` are over, or a row lacks room for one more: one loop."""

        def goes_on(carry):
            state, rounds = carry
            return (rounds < request.max_rounds) & ~jnp.all(state.done_B) & self.has_room(state)

        def round(carry):
            state, rounds = carry
            proposal, state = self.propose(params, request, state)
            verified, state = self.verify(params, request, state, proposal)
            return self.accept(request, state, verified), rounds + 1

        return jax.lax.while_loop(goes_on, round, (state, jnp.int32(0)))[0]

    def has_room(self, state: DecodeState) -> jax.Array:
        """bool: whether another round stays within the caches. Rows that are done are written behind as well."""
        return jnp.all(state.length_B + self.margin <= state.tokens_BC.shape[1])

    def propose(self, params, request: Request, state: DecodeState):
        """Drafts; a row never drafts more than it may still emit beside the target's own token."""
        budget_B = request.max_length_B - state.length_B
        affordable_B = affordable_length(state.guard, request.drafting)
        num_draft_B = jnp.minimum(jnp.minimum(state.draft_length_B, affordable_B), budget_B - 1)
        num_draft_B = jnp.where(state.done_B, 0, num_draft_B)
        draft_key_B, _ = self._round_keys(request, state)
        proposal, draft_state = self.drafter.propose(
            *(params["draft"], state.draft_state, state.tokens_BC, state.length_B),
            *(num_draft_B, draft_key_B, request),
        )
        if "step_counts" in (after := self.drafter.stats(draft_state)):
            steps_BE = after["step_counts"] - self.drafter.stats(state.draft_state)["step_counts"]
            charged_BE = self._charged(steps_BE)
            state = state.replace(guard=charge(state.guard, request.drafting, charged_BE))
        return proposal, state.replace(draft_state=draft_state)

    def verify(self, params, request: Request, state: DecodeState, proposal):
        """One target pass over the last emitted token and the drafted ones."""
        window_BT, place = self._window(state, proposal)
        B, T = window_BT.shape

        def forward(width, carry):
            cache, logits_BTV = carry
            h_BTD, cache = self.target.forward(
                params["target"],
                window_BT[:, :width],
                cache,
                jax.tree.map(lambda each: each[:, :width], place),
            )
            own_BTV = self.target.logits(params["target"], h_BTD)
            if width == T:
                return cache, own_BTV
            return cache, jax.lax.dynamic_update_slice(logits_BTV, own_BTV, (0, 0, 0))

        nothing_BTV = jnp.zeros((B, T, self.target.model.config.vocab_size), jnp.float32)
        carry = state.target_cache, nothing_BTV
        cache, logits_BTV = at_width(self.widths, self._needed_width(proposal), forward, carry)
        _, accept_key_B = self._round_keys(request, state)
        verified = Verified(proposal, logits_BTV, accept_key_B)
        return verified, state.replace(target_cache=cache)

    def accept(self, request: Request, state: DecodeState, verified: Verified) -> DecodeState:
        """Emits the accepted tokens and one more, rewinds both caches, and checks the stop conditions."""
        proposal, live_B = verified.proposal, ~state.done_B
        emitted_BT, num_accepted_B, state = self._judge(request, state, verified)
        num_emitted_B, stopped_B = _until_stop(emitted_BT, num_accepted_B + 1, request.stop_ids_BN)
        num_emitted_B = jnp.where(live_B, num_emitted_B, 0)
        length_B = state.length_B + num_emitted_B
        depth_1G = jnp.arange(self.drafter.width, dtype=jnp.int32)[None, :]

        def reached_BG(count_B):
            return (live_B[:, None] & (depth_1G < count_B[:, None])).astype(jnp.int32)

        return state.replace(
            tokens_BC=write_window(state.tokens_BC, emitted_BT, state.length_B, axis=1),
            length_B=length_B,
            target_cache=state.target_cache.advance_to(length_B - 1),
            draft_state=self.drafter.rewind(state.draft_state, length_B - 1),
            done_B=state.done_B | stopped_B | (length_B >= request.max_length_B),
            draft_length_B=next_length(
                *(request.drafting, state.draft_length_B, proposal.num_draft_B, num_accepted_B)
            ),
            rounds_B=state.rounds_B + live_B.astype(jnp.int32),
            drafted_BG=state.drafted_BG + reached_BG(proposal.num_draft_B),
            # A tree may hold tokens behind a stop token; they are not emitted.
            accepted_BG=state.accepted_BG + reached_BG(jnp.minimum(num_accepted_B, num_emitted_B)),
            proposed_B=state.proposed_B + jnp.where(live_B, self._num_proposed(proposal), 0),
            guard=settle(
                *(state.guard, request.drafting, proposal.num_draft_B, num_emitted_B, live_B)
            ),
        )

    def _window(self, state: DecodeState, proposal):
        """The tokens that the target computes, and their place if they are not a text."""
        last_B1 = jnp.take_along_axis(state.tokens_BC, state.length_B[:, None] - 1, axis=1)
        return jnp.concatenate([last_B1, proposal.tokens_BG], axis=1), None

    def _needed_width(self, proposal) -> jax.Array:
        """int32 scalar: positions that this round's target pass has to compute."""
        return jnp.max(proposal.num_draft_B) + 1

    def _charged(self, steps_BE: jax.Array) -> jax.Array:
        """int32 `[B, E]`: the steps by exit that the guard charges a round with, from those that it made."""
        return steps_BE

    def _num_proposed(self, proposal) -> jax.Array:
        """int32 `[B]`: drafted tokens that the target verifies."""
        return proposal.num_draft_B

    def _judge(self, request: Request, state: DecodeState, verified: Verified):
        """What a round emits: `[B, G + 1]` tokens, of which `num_accepted_B` and one count, and the state that holds them."""
        proposal = verified.proposal

        def judge(width, _):
            logits_BTV, drafted = verified.logits_BTV[:, :width], proposal.first(width - 1)
            if self.greedy:
                return accept_greedy(drafted, logits_BTV)
            target_probs_BTV = probabilities(logits_BTV, request.sampling)
            return accept_sampled(drafted, target_probs_BTV, verified.key_B)

        carry = (jnp.zeros_like(state.length_B),) * 2
        needed = self._needed_width(proposal)
        num_accepted_B, next_token_B = at_width(self.widths, needed, judge, carry)
        return append_next(proposal.tokens_BG, num_accepted_B, next_token_B), num_accepted_B, state

    def _round_keys(self, request: Request, state: DecodeState):
        """A row's length grows every round, so its keys never repeat and never depend on other rows."""
        return split(fold_in(request.key_B, state.length_B), 2)


def _until_stop(emitted_BT, num_emitted_B, stop_ids_BN):
    """Cuts what is emitted after the first stop token; whether there was one."""
    index_T = jnp.arange(emitted_BT.shape[1], dtype=jnp.int32)[None, :]
    stop_BT = is_stop(emitted_BT, stop_ids_BN) & (index_T < num_emitted_B[:, None])
    first_stop_B = jnp.argmax(stop_BT, axis=1).astype(jnp.int32)
    stopped_B = jnp.any(stop_BT, axis=1)
    return jnp.where(stopped_B, first_stop_B + 1, num_emitted_B), stopped_B


def append_next(tokens_BG, num_accepted_B, next_token_B) -> jax.Array:
    """int32 `[B, G + 1]`: the accepted tokens, and the next one behind them."""
    emitted_BT = jnp.pad(tokens_BG, ((0, 0), (0, 1)))
    return write_window(emitted_BT, next_token_B[:, None], num_accepted_B, axis=1)
