"""Prefill, then rounds of draft -> verify -> accept -> rewind inside one `lax.while_loop`.

Everything is an array with a batch axis and its own length per row. The target and the drafter are injected, so nothing here
knows how many layers or exits they have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from s2d_jax.acceptance import accept_greedy, accept_sampled
from s2d_jax.kv_cache import KVCache, write_window
from s2d_jax.model import Transformer
from s2d_jax.proposal import Drafter, Proposal, Request, is_stop
from s2d_jax.sampling import fold_in, probabilities, sample, split


@flax.struct.dataclass
class DecodeState:
    """What the loop carries; donated from call to call.

    Attributes:
        tokens_BC: int32, prompt then emitted tokens; at and beyond `length_B` anything.
        length_B: int32, tokens of each row so far. The last one has not been through the target yet.
        target_cache: holds `length_B - 1` positions of each row.
        draft_state: the drafter's own.
        done_B: bool, rows that have ended.
        draft_length_B: int32, tokens that each row drafts in its next round.
        rounds_B: int32, target passes of each row after prefill.
        drafted_BG: int32, rounds that drafted at least 1, 2, ... G tokens.
        accepted_BG: int32, rounds that accepted at least 1, 2, ... G tokens.
    """

    tokens_BC: jax.Array
    length_B: jax.Array
    target_cache: KVCache
    draft_state: Any
    done_B: jax.Array
    draft_length_B: jax.Array
    rounds_B: jax.Array
    drafted_BG: jax.Array
    accepted_BG: jax.Array


@flax.struct.dataclass
class Verified:
    """A round between the target's pass and its end."""

    proposal: Proposal
    logits_BTV: jax.Array
    key_B: jax.Array


@dataclasses.dataclass(frozen=True)
class Target:
    """The verifying model, as the loop sees it.

    Attributes:
        model: its architecture and compute dtype.
        mesh: where its parameters and caches are split; None for one device.
    """

    model: Transformer
    mesh: Any = None

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache of all layers, in the compute dtype, split over the mesh if there is one."""
        c, dtype = self.model.config, self.model.dtype
        shape = (c.num_layers, batch, c.num_kv_heads, capacity, c.head_dim)
        return KVCache.create(*shape, dtype=dtype, mesh=self.mesh)

    def forward(self, params, tokens_BT, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """The state `[B, T, D]` after the last layer for T tokens behind the cache, and the cache with them written."""
        apply = lambda method, *args: self.model.apply({"params": params}, *args, method=method)  # noqa: E731
        h_BTD = apply("embed", tokens_BT)
        return apply("run_blocks", h_BTD, cache, 0, self.model.config.num_layers)

    def logits(self, params, h: jax.Array) -> jax.Array:
        """`[..., D]` -> f32 `[..., V]`."""
        return self.model.apply({"params": params}, h, method="logits")


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The compiled shape of decoding: every field is static.

    Attributes:
        target: the verifying model.
        drafter: how tokens are drafted.
        greedy: every row has temperature 0, so no probabilities are computed.
        next_draft_length: `(draft_length_B, num_draft_B, num_accepted_B) -> draft_length_B` of the next round.
        first_draft_length: tokens drafted in the first round.
    """

    target: Target
    drafter: Drafter
    greedy: bool
    next_draft_length: Callable[..., jax.Array]
    first_draft_length: int

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
            length_B: int32, prompt lengths, at most `prompt_width`.
            prompt_width: static; columns of `tokens_BC` that are computed.

        Returns:
            The first `DecodeState`.
        """
        B, capacity = tokens_BC.shape
        cache = self.target.new_cache(B, capacity)
        h_BTD, cache = self.target.forward(params["target"], tokens_BC[:, :prompt_width], cache)
        last_B1D = jnp.take_along_axis(h_BTD, length_B[:, None, None] - 1, axis=1)
        logits_B1V = self.target.logits(params["target"], last_B1D)
        token_B = self._sample(logits_B1V, request, fold_in(request.key_B, length_B))
        draft_state = self.drafter.init(params["draft"], tokens_BC, length_B, prompt_width)
        zeros_B = jnp.zeros(B, jnp.int32)
        counts_BG = jnp.zeros((B, self.drafter.width), jnp.int32)
        return DecodeState(
            tokens_BC=write_window(tokens_BC, token_B[:, None], length_B, axis=1),
            length_B=length_B + 1,
            target_cache=cache.advance_to(length_B),
            draft_state=draft_state,
            done_B=(length_B + 1 >= request.max_length_B) | is_stop(token_B, request.stop_ids_BN),
            draft_length_B=jnp.full((B,), self.first_draft_length, jnp.int32),
            rounds_B=zeros_B,
            drafted_BG=counts_BG,
            accepted_BG=counts_BG,
        )

    def _sample(self, logits_B1V, request: Request, key_B) -> jax.Array:
        if self.greedy:
            return jnp.argmax(logits_B1V[:, 0], axis=-1).astype(jnp.int32)
        return sample(probabilities(logits_B1V, request.sampling)[:, 0], key_B)

    def run(self, params, request: Request, state: DecodeState) -> DecodeState:
        """Rounds until every row is done: one loop on the device."""

        def round(state):
            proposal, state = self.propose(params, request, state)
            verified, state = self.verify(params, request, state, proposal)
            return self.accept(request, state, verified)

        return jax.lax.while_loop(lambda state: ~jnp.all(state.done_B), round, state)

    def propose(self, params, request: Request, state: DecodeState):
        """Drafts; a row never drafts more than it may still emit beside the target's own token."""
        budget_B = request.max_length_B - state.length_B
        num_draft_B = jnp.minimum(state.draft_length_B, budget_B - 1)
        num_draft_B = jnp.where(state.done_B, 0, num_draft_B)
        draft_key_B, _ = self._round_keys(request, state)
        proposal, draft_state = self.drafter.propose(
            *(params["draft"], state.draft_state, state.tokens_BC, state.length_B),
            *(num_draft_B, draft_key_B, request),
        )
        return proposal, state.replace(draft_state=draft_state)

    def verify(self, params, request: Request, state: DecodeState, proposal: Proposal):
        """One target pass over the last emitted token and the drafted ones."""
        last_B1 = jnp.take_along_axis(state.tokens_BC, state.length_B[:, None] - 1, axis=1)
        window_BT = jnp.concatenate([last_B1, proposal.tokens_BG], axis=1)
        h_BTD, cache = self.target.forward(params["target"], window_BT, state.target_cache)
        logits_BTV = self.target.logits(params["target"], h_BTD)
        _, accept_key_B = self._round_keys(request, state)
        verified = Verified(proposal, logits_BTV, accept_key_B)
        return verified, state.replace(target_cache=cache)

    def accept(self, request: Request, state: DecodeState, verified: Verified) -> DecodeState:
        """Emits the accepted tokens and one more, rewinds both caches, and checks the stop conditions."""
        proposal, live_B = verified.proposal, ~state.done_B
        if self.greedy:
            num_accepted_B, next_token_B = accept_greedy(proposal, verified.logits_BTV)
        else:
            target_probs_BTV = probabilities(verified.logits_BTV, request.sampling)
            num_accepted_B, next_token_B = accept_sampled(
                proposal, target_probs_BTV, verified.key_B
            )
        emitted_BT = jnp.pad(proposal.tokens_BG, ((0, 0), (0, 1)))
        emitted_BT = write_window(emitted_BT, next_token_B[:, None], num_accepted_B, axis=1)
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
            draft_length_B=self.next_draft_length(
                state.draft_length_B, proposal.num_draft_B, num_accepted_B
            ),
            rounds_B=state.rounds_B + live_B.astype(jnp.int32),
            drafted_BG=state.drafted_BG + reached_BG(proposal.num_draft_B),
            accepted_BG=state.accepted_BG + reached_BG(num_accepted_B),
        )

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


def fixed_length(draft_length_B, num_draft_B, num_accepted_B):
    """The same number of drafted tokens in every round."""
    return draft_length_B


@dataclasses.dataclass(frozen=True)
class HeuristicLength:
    """Hugging Face's schedule: two more when all drafted tokens were accepted, else one fewer, within 1..maximum."""

    maximum: int

    def __call__(self, draft_length_B, num_draft_B, num_accepted_B):
        change_B = jnp.where(num_accepted_B == num_draft_B, 2, -1).astype(jnp.int32)
        return jnp.clip(draft_length_B + change_B, 1, self.maximum)
