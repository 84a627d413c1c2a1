"""Any model of the same vocabulary as the draft, at its full depth."""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from s2d_jax.draft.chain import ChainConfig, propose_chain
from s2d_jax.draft.logits import fit_draft_logits
from s2d_jax.model.conditional import run_if
from s2d_jax.model.kv_cache import KVCache, read_window
from s2d_jax.model.prefill import run_chunks
from s2d_jax.model.transformer import Transformer


@flax.struct.dataclass
class IndependentState:
    """What the independent drafter remembers.

    Attributes:
        cache: of all layers of the draft.
        drafted_B: int32, tokens drafted by each row.
        passes: int32, how often the draft was run (prefill left out).
    """

    cache: KVCache
    drafted_B: jax.Array
    passes: jax.Array


@dataclasses.dataclass(frozen=True)
class IndependentDrafter:
    """Drafts with a whole model.

    Attributes:
        model: the draft.
        chain: what every chain drafter needs.
        return_width: positions that one pass takes in when a row drafts again after plain rounds; 0 if rows never pause.
    """

    model: Transformer
    chain: ChainConfig
    return_width: int = 0

    @property
    def width(self) -> int:
        return self.chain.width

    @property
    def margin(self) -> int:
        return self.chain.width + max(1, self.return_width)

    def _apply(self, params, method, *args):
        return self.model.apply({"params": params}, *args, method=method)

    def _run(self, params, cache, tokens_BT):
        h_BTD = self._apply(params, "embed", tokens_BT)
        depth = self.model.config.num_layers
        return self._apply(params, "run_blocks", h_BTD, cache, 0, depth)

    def init(self, params, tokens_BC, length_B, prompt_width):
        c, (B, capacity) = self.model.config, tokens_BC.shape
        cache = KVCache.create(
            *(c.num_layers, B, c.num_kv_heads, capacity, c.head_dim), dtype=self.model.dtype
        )
        state = IndependentState(cache, jnp.zeros(B, jnp.int32), jnp.int32(0))
        return self.extend(params, state, tokens_BC, length_B, prompt_width)

    def extend(self, params, state, tokens_BC, length_B, width):
        cache = self._take_in(params, state.cache, tokens_BC, length_B, width)
        return IndependentState(cache, jnp.zeros_like(length_B), jnp.int32(0))

    def _take_in(self, params, cache, tokens_BC, end_B, width) -> KVCache:
        """The cache with at least `end_B` positions of each row, computed `width` at a time."""

        def forward(chunk_BW, cache):
            return self._run(params, cache, chunk_BW)

        nothing_BD = self.model.no_states(len(end_B))
        _, cache = run_chunks(forward, cache, nothing_BD, tokens_BC, end_B, width)
        return cache

    def grow(self, state, capacity):
        return state.replace(cache=state.cache.grow(capacity))

    def _pass(self, params, state: IndependentState, tokens_BC, moving_B):
        """Runs the next token of every row, and counts it in the rows that move. Returns its state `[B, D]`."""
        cache = state.cache
        h_B1D, cache = self._run(params, cache, read_window(tokens_BC, cache.length_B, 1))
        cache = cache.advance_to(cache.length_B + moving_B.astype(jnp.int32))
        return h_B1D[:, 0], state.replace(cache=cache, passes=state.passes + 1)

    def _return(self, params, state: IndependentState, tokens_BC, end_B):
        """Takes in what the target emitted in plain rounds, up to `end_B` positions of each row."""
        behind = jnp.max(end_B - state.cache.length_B)
        passes = jnp.maximum(0, -(-behind // self.return_width))
        cache = self._take_in(params, state.cache, tokens_BC, end_B, self.return_width)
        return state.replace(cache=cache, passes=state.passes + passes)

    def propose(self, params, state, tokens_BC, length_B, num_draft_B, key_B, request):
        def step(state, tokens_BC, end_B, live_B):
            last_BD, state = self._pass(params, state, tokens_BC, live_B)
            logits_BK = self._apply(params, "logits", last_BD, self.model.config.num_layers)
            drafted_B = state.drafted_B + live_B.astype(jnp.int32)
            logits_BK = fit_draft_logits(logits_BK, self.chain.vocab_size, request)
            return logits_BK, jnp.zeros_like(drafted_B), state.replace(drafted_B=drafted_B)

        if self.return_width:
            # All but the last two positions: those are waiting after any round, and go one by one.
            end_B = jnp.where(num_draft_B > 0, length_B - 2, 0)
            state = self._return(params, state, tokens_BC, end_B)
        # After a round whose tokens were all accepted two tokens wait: the last drafted one, and the bonus token.
        behind_B = (state.cache.length_B < length_B - 1) & (num_draft_B > 0)
        state = run_if(
            jnp.any(behind_B),
            lambda state: self._pass(params, state, tokens_BC, behind_B)[1],
            state,
        )
        return propose_chain(
            *(self.chain, step, state, tokens_BC, length_B, num_draft_B, key_B, request)
        )

    def rewind(self, state, length_B):
        return state.replace(cache=state.cache.rewind(length_B))

    def stats(self, state):
        counts_B1 = state.drafted_B[:, None]
        return {
            "exit_counts": counts_B1,
            "step_counts": counts_B1,
            "segment_passes": state.passes[None],
        }
