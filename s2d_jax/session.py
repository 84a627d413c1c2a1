"""One batch on the device from call to call: its caches, what they hold, and the programs that move it on."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from s2d_jax import compilation
from s2d_jax.buckets import bucket, chunk_width
from s2d_jax.config import SamplingParams
from s2d_jax.decoder import Decoder, DecodeState
from s2d_jax.phases import timed_rounds
from s2d_jax.proposal import Request

UNLIMITED = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one call asks for, and how large its caches are made.

    Attributes:
        decoder: static.
        params: `{"target": ..., "draft": ...}`.
        request: per-row parameters, on the device.
        rows: the sampling parameters of each row.
        exits: of the draft, for the statistics.
        prompts: token ids of each row.
        context: positions that the target can take.
        prefill_chunk: positions that one pass over a prompt computes at most.
        initial_room: new tokens that the caches have room for at first.
        place: puts host arrays where the parameters are.
    """

    decoder: Decoder
    params: Any
    request: Request
    rows: list[SamplingParams]
    exits: tuple[int, ...]
    prompts: list[list[int]]
    context: int
    prefill_chunk: int
    initial_room: int
    place: Callable[[Any], Any]

    @property
    def margin(self) -> int:
        """Rounded up so that a width-matched reference has caches of the same capacity."""
        return -(-self.decoder.margin // 64) * 64

    @property
    def final_capacity(self) -> int:
        """Enough for every row at its limit."""
        kept = [0] * len(self.prompts)
        return self._room_for(kept, self.width(kept), UNLIMITED)

    def width(self, kept: Sequence[int]) -> int:
        """Positions of one pass over what is new in the prompts, of which the caches hold `kept` tokens."""
        new = max(len(ids) - held for ids, held in zip(self.prompts, kept, strict=True))
        return chunk_width(new, self.prefill_chunk)

    def capacity(self, kept: Sequence[int], width: int) -> int:
        """Room for the last chunk of the prompts to its end, and for the first new tokens."""
        return self._room_for(kept, width, self.initial_room)

    def _room_for(self, kept: Sequence[int], width: int, most_new: int) -> int:
        longest = max(len(ids) for ids in self.prompts)
        new = min(most_new, max(row.max_new_tokens for row in self.rows))
        if any(kept):  # chunks end up to a width behind the prompt
            begin, reached = longest, longest + width
        else:  # at a multiple of the width: where in its bucket a prompt lies changes nothing, so programs are found again
            begin = reached = -(-longest // width) * width
        return bucket(max(reached, min(begin + new, self.context)) + self.margin)

    def arrays(self, capacity: int) -> tuple[Any, Any]:
        """`tokens_BC` with the prompts on the left, and `length_B`, on the device."""
        tokens = np.zeros((len(self.prompts), capacity), np.int32)
        for row, ids in enumerate(self.prompts):
            tokens[row, : len(ids)] = ids
        lengths = np.array([len(ids) for ids in self.prompts], np.int32)
        return self.place((jnp.asarray(tokens), jnp.asarray(lengths)))


@dataclasses.dataclass(frozen=True)
class Look:
    """What the host sees: the state without its caches, and the drafter's counters, as NumPy arrays."""

    state: DecodeState
    counters: dict[str, np.ndarray]


class Session:
    """The state of one batch. `begin` a call, then `advance` until all rows are done; the next call may `begin` on the caches.

    Attributes:
        seconds: wall seconds of the present call: `compile`, `total` (without compile), and phases when they are timed.
        prefilled: tokens of each row's prompt that the present call had to compute.
    """

    def __init__(self):
        self._state: DecodeState | None = None
        self._look: Look | None = None
        self.seconds: dict[str, float] = {}
        self.prefilled: list[int] = []

    def begin(self, plan: Plan, *, wait: bool = False) -> None:
        """Runs what the caches do not hold of the prompts, and emits each row's first token; `wait` times it as `prefill`."""
        kept = self._kept(plan)
        self._plan, self.seconds = plan, {"compile": 0.0, "total": 0.0}
        phase = "prefill" if wait else None
        self.prefilled = [len(ids) - held for ids, held in zip(plan.prompts, kept, strict=True)]
        width = plan.width(kept)
        capacity = plan.capacity(kept, width)
        if any(kept):
            self._grow(max(capacity, self._capacity), phase)
            arrays = plan.arrays(self._capacity)
            kept_B = plan.place(jnp.asarray(kept, jnp.int32))
            inputs = (plan.params, plan.request, self._taken(), *arrays, kept_B)
            program, spent = compilation.extend_program(plan.decoder, width, inputs)
        else:
            self.release()
            inputs = (plan.params, plan.request, *plan.arrays(capacity))
            (program, _), spent = compilation.programs(plan.decoder, width, inputs)
        self.seconds["compile"] += spent
        started = time.perf_counter()
        state = program(*inputs)
        if wait:
            jax.block_until_ready(state)
        self._spend(started, phase)
        self._state, self._look = state, None

    def advance(self, rounds: int = UNLIMITED, *, phases: bool = False, wait: bool = False) -> Look:
        """Runs up to `rounds` rounds, fewer when all rows are done or the caches are full, and looks.

        Args:
            rounds: at most so many.
            phases: run the parts of each round as programs of their own, and time them as `draft`, `verify` and `rest`.
            wait: time the rounds as `decode`.
        """
        phase = "rest" if phases else "decode" if wait else None
        self._make_room(phase)
        inputs = (self._plan.params, self._request(rounds), self._taken())
        if phases:
            state, seconds, spent = timed_rounds(self._plan.decoder, *inputs, rounds)
            for name in seconds:
                self._add(seconds[name], name)
            started = time.perf_counter()
        else:
            program, spent = compilation.run_program(self._plan.decoder, inputs)
            started = time.perf_counter()
            state = program(*inputs)
        self.seconds["compile"] += spent
        self._state = state
        look = self.look()
        self._spend(started, phase)
        return look

    def look(self) -> Look:
        """What the host can know now; waits for the device."""
        assert self._state is not None, "begin first"
        counters = self._plan.decoder.drafter.stats(self._state.draft_state)
        self._look = Look(*jax.device_get((_without_caches(self._state), counters)))
        return self._look

    def end_rows(self, ended: Sequence[bool]) -> None:
        """Declares rows done."""
        assert self._state is not None, "begin first"
        assert self._look is not None, "look first"
        done_B = np.asarray(ended) | self._look.state.done_B
        sharding = self._state.done_B.sharding
        self._state = self._state.replace(done_B=jax.device_put(done_B, sharding))

    def release(self) -> None:
        """Forgets the caches."""
        self._state = self._look = None

    @property
    def _capacity(self) -> int:
        assert self._state is not None, "begin first"
        return self._state.tokens_BC.shape[1]

    def _taken(self) -> DecodeState:
        """The state for a program that it is donated to: if that fails, there are no caches left."""
        state, self._state = self._state, None
        return state

    def _request(self, rounds: int) -> Request:
        request = self._plan.request
        limit = jax.device_put(np.int32(rounds), request.max_rounds.sharding)
        return request.replace(max_rounds=limit)

    def _kept(self, plan: Plan) -> list[int]:
        """How many leading tokens of each prompt the caches hold; one is left to be computed."""
        prompts = plan.prompts
        if self._state is None or self._look is None:
            return [0] * len(prompts)
        drafters = {type(each.decoder.drafter) for each in (plan, self._plan)}
        if (
            plan.exits != self._plan.exits or len(drafters) > 1
        ):  # another policy, at another temperature
            return [0] * len(prompts)
        tokens_BC, length_B = self._look.state.tokens_BC, self._look.state.length_B
        if len(length_B) != len(prompts):
            return [0] * len(prompts)
        kept = []
        for ids, row, length in zip(prompts, tokens_BC, length_B, strict=True):
            count = min(len(ids), int(length)) - 1  # the last token has not been through the target
            differs = np.asarray(ids[:count], np.int32) != row[:count]
            kept.append(int(differs.argmax()) if differs.any() else count)
        return kept

    def _make_room(self, phase: str | None) -> None:
        """Before a round would leave the caches: twice the capacity, but not more than the call can need."""
        if self._look is None:  # just begun, with room
            return
        longest, plan = int(self._look.state.length_B.max()), self._plan
        if longest + plan.decoder.margin > self._capacity:
            wanted = min(bucket(2 * self._capacity), plan.final_capacity)
            self._grow(max(wanted, bucket(longest + plan.margin)), phase)

    def _grow(self, capacity: int, phase: str | None) -> None:
        if capacity == self._capacity:
            return
        program, spent = compilation.grow_program(self._plan.decoder, capacity, self._state)
        self.seconds["compile"] += spent
        started = time.perf_counter()
        self._state = program(self._state)
        self._spend(started, phase)

    def _spend(self, started: float, phase: str | None) -> None:
        self._add(time.perf_counter() - started, phase)

    def _add(self, spent: float, phase: str | None) -> None:
        self.seconds["total"] += spent
        if phase is not None:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent


def _without_caches(state: DecodeState) -> DecodeState:
    """Only what the host reads."""
    return state.replace(target_cache=None, draft_state=None)
