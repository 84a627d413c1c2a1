"""The sorted drafter: a token leaves at the first exit that is confident enough; deeper layers catch up later, exactly.

The layers between two exits are a *segment*. Segment s has its own cache, whose length says how many positions it has computed;
deeper never exceeds shallower. The state that enters segment s > 0 is kept for every position in a buffer, so when a token
needs segment s, the positions that left earlier are run through it first, in chunks. Prefill is the same with wide chunks.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from s2d_jax.chunks import reached, state_at_end
from s2d_jax.control import run_if
from s2d_jax.draft_length import confidence
from s2d_jax.drafters.chain import ChainConfig, fit_draft_logits, num_entries, propose_chain
from s2d_jax.kv_cache import KVCache, grow_axis, read_window, write_window
from s2d_jax.model import Transformer


@flax.struct.dataclass
class SortedState:
    """What the sorted drafter remembers.

    Attributes:
        segments: one cache per segment; its lengths are the positions that it has computed.
        entries: the state before each segment but the first, `[B, S, D]`, valid below the length of the segment before it.
        exit_counts_BE: int32, drafted tokens by the exit they left at.
        segment_passes_E: int32, how often each segment was run (prefill left out).
    """

    segments: tuple[KVCache, ...]
    entries: tuple[jax.Array, ...]
    exit_counts_BE: jax.Array
    segment_passes_E: jax.Array


@flax.struct.dataclass
class _Leaving:
    """The tokens of one step on their way through the exits."""

    state: SortedState
    logits_BK: jax.Array
    exit_B: jax.Array
    undecided_B: jax.Array


@dataclasses.dataclass(frozen=True)
class SortedDrafter:
    """Drafts with the exits `exit_layers` of one model; a single exit is the fixed-exit policy.

    Attributes:
        model: the draft.
        exit_layers: ascending layer counts at which tokens may leave.
        chain: what every chain drafter needs.
        catch_up_width: positions that one pass of a deeper segment takes in.
        return_width: the same for the first segment, when a row drafts again after plain rounds; 0 if rows never pause.
    """

    model: Transformer
    exit_layers: tuple[int, ...]
    chain: ChainConfig
    catch_up_width: int
    return_width: int = 0

    @property
    def width(self) -> int:
        return self.chain.width

    @property
    def margin(self) -> int:
        return self.chain.width + max(self.catch_up_width, self.return_width)

    def _bounds(self, s: int) -> tuple[int, int]:
        return (0, *self.exit_layers)[s], self.exit_layers[s]

    def init(self, params, tokens_BC, length_B, prompt_width):
        c, (B, capacity) = self.model.config, tokens_BC.shape
        segments = tuple(
            KVCache.create(
                *(stop - start, B, c.num_kv_heads, capacity, c.head_dim), dtype=self.model.dtype
            )
            for start, stop in map(self._bounds, range(len(self.exit_layers)))
        )
        entry = jnp.zeros((B, capacity, c.embed_dim), self.model.dtype)
        counts_BE = jnp.zeros((B, len(self.exit_layers)), jnp.int32)
        state = SortedState(segments, (entry,) * (len(segments) - 1), counts_BE, counts_BE[0])
        return self.extend(params, state, tokens_BC, length_B, prompt_width)

    def extend(self, params, state, tokens_BC, length_B, width):
        for s in range(len(state.segments)):
            state, _ = self.catch_up(params, state, s, tokens_BC, length_B, width)
        return state.replace(
            exit_counts_BE=jnp.zeros_like(state.exit_counts_BE),
            segment_passes_E=jnp.zeros_like(state.segment_passes_E),
        )

    def grow(self, state, capacity):
        return state.replace(
            segments=tuple(cache.grow(capacity) for cache in state.segments),
            entries=tuple(grow_axis(entry, capacity, axis=1) for entry in state.entries),
        )

    def catch_up(self, params, state: SortedState, s: int, tokens_BC, end_B, width: int):
        """Runs segment `s` until it has computed `end_B` positions of each row, `width` at a time.

        Args:
            params: of the draft.
            state: segment `s - 1` has computed at least `end_B` positions.
            s: the segment.
            tokens_BC: int32, what segment 0 reads.
            end_B: int32; a row that has computed as many already keeps its length.
            width: static chunk width.

        Returns:
            The state, and the output `[B, D]` of segment `s` at position `end_B - 1` (zeros in rows that did not move).
        """
        start, stop = self._bounds(s)

        def apply(method, *args):
            return self.model.apply({"params": params}, *args, method=method)

        def run_chunk(carry):
            state, last_BD = carry
            cache = state.segments[s]
            source = tokens_BC if s == 0 else state.entries[s - 1]
            chunk = read_window(source, cache.length_B, width)
            h_BWD = apply("embed", chunk) if s == 0 else chunk
            h_BWD, written = apply("run_blocks", h_BWD, cache, start, stop)
            entries = list(state.entries)
            if s < len(entries):
                entries[s] = write_window(entries[s], h_BWD, cache.length_B, axis=1)
            last_BD = state_at_end(h_BWD, cache.length_B, end_B, last_BD)
            segments = list(state.segments)
            segments[s] = written.advance_to(reached(cache.length_B, width, end_B))
            state = state.replace(
                segments=tuple(segments),
                entries=tuple(entries),
                segment_passes_E=state.segment_passes_E.at[s].add(1),
            )
            return state, last_BD

        def behind(carry):
            return jnp.any(carry[0].segments[s].length_B < end_B)

        nothing_BD = jnp.zeros((tokens_BC.shape[0], self.model.config.embed_dim), self.model.dtype)
        return jax.lax.while_loop(behind, run_chunk, (state, nothing_BD))

    def propose(self, params, state, tokens_BC, length_B, num_draft_B, key_B, request):
        def step(state, tokens_BC, end_B, live_B):
            return self._step(params, state, tokens_BC, end_B, live_B, request)

        if self.return_width:
            # All but the last two positions: those are waiting after any round, and go one by one.
            end_B = jnp.where(num_draft_B > 0, length_B - 2, 0)
            state, _ = self.catch_up(params, state, 0, tokens_BC, end_B, self.return_width)
        return propose_chain(
            *(self.chain, step, state, tokens_BC, length_B, num_draft_B, key_B, request)
        )

    def _step(self, params, state, tokens_BC, end_B, live_B, request):
        """The logits that follow `end_B` tokens, and the exit of each row. Segments that no row needs are skipped."""
        B = tokens_BC.shape[0]
        leaving = _Leaving(
            state=state,
            logits_BK=jnp.zeros((B, num_entries(self.chain, request)), jnp.float32),
            exit_B=jnp.zeros(B, jnp.int32),
            undecided_B=live_B,
        )
        for s in range(len(self.exit_layers)):

            def try_exit(leaving, s=s):
                return self._try_exit(params, leaving, s, tokens_BC, end_B, request)

            leaving = run_if(jnp.any(leaving.undecided_B), try_exit, leaving)
        counts_BE = leaving.state.exit_counts_BE
        counts_BE += jax.nn.one_hot(leaving.exit_B, counts_BE.shape[1], dtype=jnp.int32) * (
            live_B[:, None].astype(jnp.int32)
        )
        state = leaving.state.replace(exit_counts_BE=counts_BE)
        return leaving.logits_BK, leaving.exit_B, state

    def _try_exit(self, params, leaving: _Leaving, s, tokens_BC, end_B, request):
        """Takes the undecided rows through segment `s` and reads its exit; those that are confident stay."""
        undecided_B = leaving.undecided_B
        target_B = jnp.where(undecided_B, end_B, 0)
        # The first segment sees every token as it comes: nearly always just one waits for it.
        width = 1 if s == 0 else self.catch_up_width
        state, last_BD = self.catch_up(params, leaving.state, s, tokens_BC, target_B, width)
        logits_BK = self.model.apply(
            {"params": params}, last_BD, self.exit_layers[s], method="logits"
        )
        logits_BK = fit_draft_logits(self.chain, logits_BK, request)
        last = s == len(self.exit_layers) - 1  # it always accepts
        unsure_B = jnp.bool_(not last) & (confidence(logits_BK) <= request.exit_threshold_E[s])
        return _Leaving(
            state=state,
            logits_BK=jnp.where(undecided_B[:, None], logits_BK, leaving.logits_BK),
            exit_B=jnp.where(undecided_B, s, leaving.exit_B),
            undecided_B=undecided_B & unsure_B,
        )

    def rewind(self, state, length_B):
        segments = tuple(cache.rewind(length_B) for cache in state.segments)
        return state.replace(segments=segments)

    def stats(self, state):
        return {
            "exit_counts": state.exit_counts_BE,
            "segment_passes": state.segment_passes_E,
        }
