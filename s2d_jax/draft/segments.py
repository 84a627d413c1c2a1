"""A sorted draft in parts: a token leaves at the first exit that is confident enough; deeper layers catch up later, exactly.

The layers between two exits are a *segment*. Segment s has its own cache, whose length says how many positions it has computed;
a deeper segment never holds more than a shallower one. The state that enters segment s > 0 is kept for every position in a
buffer, so when a token needs segment s, the positions that left earlier are run through it first, in chunks. Prefill is the
same with wide chunks.

The positions behind the text may be the *slots* of a tree: level by level, in the order in which the draft runs them. Then
`Slots` says where a slot stands in the text and what it may look at; all else stays the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from s2d_jax.draft.drafter import Counters, TargetStates
from s2d_jax.draft.length import confidence
from s2d_jax.draft.logits import fit_draft_logits, num_entries
from s2d_jax.draft.request import Request
from s2d_jax.model import tree_mask
from s2d_jax.model.kv_cache import KVCache, grow_axis, keep_path, read_window, write_caches
from s2d_jax.model.place import Place
from s2d_jax.model.prefill import reached, states_at_end
from s2d_jax.model.transformer import Transformer, apply_model
from s2d_jax.sharding import gathered_last, mesh_in_use


class SortedState(flax.struct.PyTreeNode):
    """What a sorted draft remembers.

    Attributes:
        segments: one cache per segment; its lengths are the positions that it has computed.
        entries: the state before each segment but the first, `[B, C, D]`, valid below the length of the segment before it.
        exit_counts_BE: int32, tokens that were run, by the exit they left at.
        step_counts_BE: int32, steps (a step runs one token of a chain, or a level of a tree) by the deepest exit.
        segment_passes_E: int32, how often each segment was run (prefill left out). Where a mesh splits the rows, the
            host sees the counts of all groups, one group after the other.
    """

    segments: tuple[KVCache, ...]
    entries: tuple[jax.Array, ...]
    exit_counts_BE: jax.Array
    step_counts_BE: jax.Array
    segment_passes_E: jax.Array


class Slots(flax.struct.PyTreeNode):
    """The tree behind the text of each row.

    Attributes:
        length_B: int32, tokens of the text, the root included; slot i is position `length + i`.
        ancestors_BLL: bool, which of the L slots each slot descends from, itself included.
        width: slots per level (static).
    """

    length_B: jax.Array
    ancestors_BLL: jax.Array
    width: int = flax.struct.field(pytree_node=False)

    def place(self, start_B: Int[Array, "B"], width: int, capacity: int) -> Place:
        """The place of the `width` positions from `start_B` on, in a cache of `capacity`."""
        text = Place.of_text(start_B, width, capacity)
        slot_BT = text.positions_BT - self.length_B[:, None]
        rotary_BT = jnp.where(
            slot_BT < 0, text.positions_BT, self.length_B[:, None] + slot_BT // self.width
        )
        at_BT1 = jnp.clip(slot_BT, 0, self.ancestors_BLL.shape[1] - 1)[:, :, None]
        ancestors_BTL = jnp.take_along_axis(self.ancestors_BLL, at_BT1, axis=1)
        in_tree_BTS = tree_mask.mask(ancestors_BTL, self.length_B, capacity)
        mask_BTS = jnp.where((slot_BT < 0)[:, :, None], text.mask_BTS, in_tree_BTS)
        return Place(rotary_BT, mask_BTS)


class Step(flax.struct.PyTreeNode):
    """The tokens of one step on their way through the exits.

    Attributes:
        state: the draft's state.
        logits_BTU: f32, logits of the exit that each token left at.
        exit_BT: int32, index of that exit.
        undecided_BT: bool, tokens that have not left yet.
    """

    state: SortedState
    logits_BTU: jax.Array
    exit_BT: jax.Array
    undecided_BT: jax.Array


@dataclasses.dataclass(frozen=True)
class Segments:
    """A draft that can be left at several layers.

    Attributes:
        model: the draft.
        exit_layers: ascending layer counts at which tokens may leave.
        vocab_size: the target's; the draft's logits are cut or padded to it.
        together: all tokens of a step leave as soon as one of them is confident; if false, each leaves on its own.
    """

    model: Transformer
    exit_layers: tuple[int, ...]
    vocab_size: int
    together: bool = False

    def _bounds(self, s: int) -> tuple[int, int]:
        return (0, *self.exit_layers)[s], self.exit_layers[s]

    def init(
        self,
        params: Any,
        tokens_BC: Int[Array, "B C"],
        length_B: Int[Array, "B"],
        prompt_width: int,
    ) -> SortedState:
        """As `Drafter.init`."""
        c, dtype, (B, capacity) = self.model.config, self.model.dtype, tokens_BC.shape
        segments = tuple(
            KVCache.create(stop - start, B, c.num_kv_heads, capacity, c.head_dim, dtype=dtype)
            for start, stop in map(self._bounds, range(len(self.exit_layers)))
        )
        entry = jnp.zeros((B, capacity, c.embed_dim), dtype)
        counts_BE = jnp.zeros((B, len(self.exit_layers)), jnp.int32)
        entries = (entry,) * (len(segments) - 1)
        state = SortedState(segments, entries, counts_BE, counts_BE, counts_BE[0])
        return self.extend(params, state, tokens_BC, length_B, prompt_width)

    def extend(
        self,
        params: Any,
        state: SortedState,
        tokens_BC: Int[Array, "B C"],
        length_B: Int[Array, "B"],
        width: int,
    ) -> SortedState:
        """As `Drafter.extend`."""
        for s in range(len(state.segments)):
            state, _ = self.catch_up(params, state, s, tokens_BC, length_B, width)
        return state.replace(
            exit_counts_BE=jnp.zeros_like(state.exit_counts_BE),
            step_counts_BE=jnp.zeros_like(state.step_counts_BE),
            segment_passes_E=jnp.zeros_like(state.segment_passes_E),
        )

    def grow(self, state: SortedState, capacity: int) -> SortedState:
        """As `Drafter.grow`."""
        return state.replace(
            segments=tuple(cache.grow(capacity) for cache in state.segments),
            entries=tuple(grow_axis(entry, capacity, axis=1) for entry in state.entries),
        )

    def catch_up(
        self,
        params: Any,
        state: SortedState,
        s: int,
        tokens_BC: Int[Array, "B C"],
        end_B: Int[Array, "B"],
        width: int,
        slots: Slots | None = None,
        count: int = 1,
    ) -> tuple[SortedState, Float[Array, "B {count} D"]]:
        """Runs segment `s` until it has computed `end_B` positions of each row, `width` at a time.

        Args:
            params: of the draft.
            state: segment `s - 1` has computed at least `end_B` positions.
            s: the segment.
            tokens_BC: int32, what segment 0 reads.
            end_B: int32; a row that has computed as many already keeps its length.
            width: static chunk width.
            slots: the tree behind the text; None if there is only text.
            count: static; how many positions' output is wanted.

        Returns:
            The state, and the output of segment `s` at the last `count` positions before `end_B`; zeros
            where they were not computed here.
        """
        nothing_BTD = self._nothing(tokens_BC.shape[0], count)

        def behind(carry):
            return jnp.any(carry[0].segments[s].length_B < end_B)

        def run_chunk(carry):
            state, last_BTD = carry
            return self._run_chunk(params, state, last_BTD, s, tokens_BC, end_B, width, slots)

        return jax.lax.while_loop(behind, run_chunk, (state, nothing_BTD))

    def _nothing(self, batch: int, count: int) -> jax.Array:
        return jnp.zeros((batch, count, self.model.config.embed_dim), self.model.dtype)

    def _run_chunk(self, params, state, last_BTD, s, tokens_BC, end_B, width, slots):
        """One pass of segment `s` over `width` positions of each row."""
        start, stop = self._bounds(s)
        cache = state.segments[s]
        source = tokens_BC if s == 0 else state.entries[s - 1]
        chunk = read_window(source, cache.length_B, width)
        h_BWD = apply_model(self.model, params, "embed", chunk) if s == 0 else chunk
        place = None if slots is None else slots.place(cache.length_B, width, source.shape[1])
        h_BWD, written = apply_model(
            self.model, params, "run_blocks", h_BWD, cache, start, stop, place
        )
        entries = list(state.entries)
        if s < len(entries):
            (entries[s],) = write_caches((entries[s],), (h_BWD,), cache.length_B, axis=1)
        last_BTD = states_at_end(h_BWD, cache.length_B, end_B, last_BTD)
        segments = list(state.segments)
        segments[s] = written.advance_to(reached(cache.length_B, width, end_B))
        state = state.replace(
            segments=tuple(segments),
            entries=tuple(entries),
            segment_passes_E=state.segment_passes_E.at[s].add(1),
        )
        return state, last_BTD

    def step(
        self,
        params: Any,
        state: SortedState,
        tokens_BC: Int[Array, "B C"],
        end_B: Int[Array, "B"],
        live_BT: Bool[Array, "B T"],
        widths: tuple[int, int],
        request: Request,
        slots: Slots | None = None,
        once: bool = False,
        some_live: bool = True,
    ) -> Step:
        """Takes the last T positions before `end_B` through the exits. Segments that no row needs are skipped.

        Args:
            params, state, tokens_BC, slots: as for `catch_up`.
            end_B: int32.
            live_BT: bool, positions whose logits are wanted.
            widths: static; positions per pass, for the first segment and for deeper ones.
            request: thresholds and the listed tokens of a trimmed head.
            once: static; the first segment lacks no more positions than its pass is wide, and some row lacks some.
            some_live: static; some position is live in every call, so the first exit is read without a condition.
        """
        (B, T), E = live_BT.shape, len(self.exit_layers)
        step = Step(
            state=state,
            logits_BTU=jnp.zeros((B, T, num_entries(self.vocab_size, request)), jnp.float32),
            exit_BT=jnp.zeros((B, T), jnp.int32),
            undecided_BT=live_BT,
        )
        for s in range(E):
            # Rows that need no more have nothing to catch up on: where no row does, the segment makes no pass.
            target_B = jnp.where(jnp.any(step.undecided_BT, axis=1), end_B, 0)
            inputs = tokens_BC, target_B, widths[s > 0], slots
            with jax.named_scope(f"exit_{self.exit_layers[s]}"):
                state, last_BTD = self._reach(params, step.state, s, *inputs, count=T, once=once)
                # The state stays outside of the condition, which would copy the caches.
                step = step.replace(state=None)
                read = self._reader(params, s, last_BTD, live_BT, request)
                if s == 0 and some_live:
                    step = read(step)
                else:
                    needed = jnp.any(step.undecided_BT)
                    step = jax.lax.cond(needed, read, lambda step: step, step)
            step = step.replace(state=state)
        exit_BT = step.exit_BT
        left_BTE = jax.nn.one_hot(exit_BT, E, dtype=jnp.int32) * live_BT[:, :, None].astype(
            jnp.int32
        )
        deepest_B = jnp.max(jnp.where(live_BT, exit_BT, -1), axis=1)
        state = step.state.replace(
            exit_counts_BE=step.state.exit_counts_BE + jnp.sum(left_BTE, axis=1),
            step_counts_BE=step.state.step_counts_BE
            + jax.nn.one_hot(deepest_B, E, dtype=jnp.int32),
        )
        return step.replace(state=state)

    def _reach(self, params, state, s, tokens_BC, end_B, width, slots, *, count: int, once: bool):
        """As `catch_up`; if `once`, the first segment makes exactly one pass, which is wide enough."""
        if not (once and s == 0):
            return self.catch_up(params, state, s, tokens_BC, end_B, width, slots, count)
        last_BTD = self._nothing(tokens_BC.shape[0], count)
        return self._run_chunk(params, state, last_BTD, s, tokens_BC, end_B, width, slots)

    def _reader(self, params, s: int, last_BTD, live_BT, request) -> Callable[[Step], Step]:
        """Reads the exit of segment `s` for the undecided tokens; the confident ones stay."""
        last = s == len(self.exit_layers) - 1  # it always accepts

        def read(step):
            logits_BTU = apply_model(self.model, params, "logits", last_BTD, self.exit_layers[s])
            # Gathered once. Drawing from parts of them would send between neighbours (collective-permute), for which XLA
            # takes the devices of all groups together, and groups have different numbers of rounds.
            logits_BTU = gathered_last(logits_BTU, mesh_in_use())
            logits_BTU = fit_draft_logits(logits_BTU, self.vocab_size, request)
            sure_BT = jnp.bool_(last) | (confidence(logits_BTU) > request.exit_threshold_E[s])
            if self.together:
                sure_BT = jnp.any(sure_BT & live_BT, axis=1, keepdims=True)
            undecided_BT = step.undecided_BT
            return step.replace(
                logits_BTU=jnp.where(undecided_BT[:, :, None], logits_BTU, step.logits_BTU),
                exit_BT=jnp.where(undecided_BT, s, step.exit_BT),
                undecided_BT=undecided_BT & ~sure_BT,
            )

        return read

    def rewind(self, state: SortedState, length_B: Int[Array, "B"]) -> SortedState:
        """As `Drafter.rewind`."""
        return state.replace(segments=tuple(cache.rewind(length_B) for cache in state.segments))

    def keep_path(
        self,
        state: SortedState,
        length_B: Int[Array, "B"],
        slot_BY: Int[Array, "B Y"],
        num_slots: int,
    ) -> SortedState:
        """Keeps one path of the tree behind the text, as text.

        Args:
            length_B: int32, tokens of the text, the root included.
            slot_BY: int32, the path's slots in ascending order, counted from the root, which comes first and is 0; -1 beyond
                the path's end.
            num_slots: how many there are, the root's included.
        """
        root_B, index_BY = length_B - 1, jnp.maximum(slot_BY, 0)
        segments, entries = [], []
        for cache in state.segments:
            kept_BY = (slot_BY >= 0) & (root_B[:, None] + slot_BY < cache.length_B[:, None])
            kept_B = root_B + jnp.sum(kept_BY, axis=1, dtype=jnp.int32)
            # A segment that has not come to the root has no tree.
            new_length_B = jnp.where(cache.length_B < length_B, cache.length_B, kept_B)
            segments.append(cache.keep_path(root_B, index_BY, num_slots).advance_to(new_length_B))
        for entry in state.entries:
            entries.append(keep_path(entry, root_B, index_BY, num_slots, axis=1))
        return state.replace(segments=tuple(segments), entries=tuple(entries))

    def stats(self, state: SortedState) -> Counters:
        """As `Drafter.stats`."""
        return {
            "exit_counts": state.exit_counts_BE,
            "step_counts": state.step_counts_BE,
            "segment_passes": state.segment_passes_E,
        }


class SegmentedDrafter:
    """What drafters on `segments` have in common: the methods of `s2d_jax.draft.drafter.Drafter` that only pass calls on."""

    segments: Segments

    @property
    def target_states(self) -> tuple[str, ...]:
        return ()

    def init(
        self,
        params: Any,
        tokens_BC: Int[Array, "B C"],
        length_B: Int[Array, "B"],
        prompt_width: int,
        seen: TargetStates,
    ) -> SortedState:
        return self.segments.init(params, tokens_BC, length_B, prompt_width)

    def extend(
        self,
        params: Any,
        state: SortedState,
        tokens_BC: Int[Array, "B C"],
        length_B: Int[Array, "B"],
        width: int,
        seen: TargetStates,
    ) -> SortedState:
        return self.segments.extend(params, state, tokens_BC, length_B, width)

    def grow(self, state: SortedState, capacity: int) -> SortedState:
        return self.segments.grow(state, capacity)

    def rewind(self, state: SortedState, length_B: Int[Array, "B"]) -> SortedState:
        return self.segments.rewind(state, length_B)

    def stats(self, state: SortedState) -> Counters:
        return self.segments.stats(state)
