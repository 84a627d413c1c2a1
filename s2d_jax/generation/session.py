"""One batch on the device from call to call: its caches, what they hold, and the programs that advance it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from s2d_jax.backends import platform_of
from s2d_jax.decode import programs as compilation
from s2d_jax.decode.state import DecodeState
from s2d_jax.decode.timed_rounds import timed_rounds
from s2d_jax.draft.request import Request
from s2d_jax.generation.buckets import bucket
from s2d_jax.generation.plan import UNLIMITED, Plan
from s2d_jax.progress.activity import activity, is_shown
from s2d_jax.progress.durations import known
from s2d_jax.sharding import fetch_whole, put_whole

# Reading prompts is not shown if they have fewer tokens, or should take fewer seconds.
_FEWEST_TOLD = 32
_SHORTEST_TOLD = 1.0


@dataclasses.dataclass(frozen=True)
class Look:
    """What the host sees: the state without its caches, and the drafter's counters, as NumPy arrays."""

    state: DecodeState
    counters: dict[str, np.ndarray]


class Session:
    """The state of one batch. `begin` a call, then `advance` until all rows are done; the next `begin` may reuse the caches.

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
        """Runs the part of the prompts that the caches lack, and emits each row's first token; `wait` times it as `prefill`."""
        kept = self._kept(plan)
        self._plan, self.seconds = plan, {"compile": 0.0, "total": 0.0}
        phase = "prefill" if wait else None
        self.prefilled = [len(ids) - held for ids, held in zip(plan.prompts, kept, strict=True)]
        width = plan.width(kept)
        capacity = plan.capacity(kept, width)
        if any(kept):
            self._grow(max(capacity, self._capacity), phase)
            arrays = plan.arrays(self._capacity)
            kept_B = plan.placement.put(jnp.asarray(kept + [0] * plan.padding, jnp.int32))
            inputs = (plan.params, plan.request, self._taken(), *arrays, kept_B)
            program, spent = compilation.extend_program(plan.decoder, width, inputs)
        else:
            self.release()
            inputs = (plan.params, plan.request, *plan.arrays(capacity))
            (program, _), spent = compilation.programs(plan.decoder, width, inputs)
        self.seconds["compile"] += spent
        started = time.perf_counter()
        with self._reading(plan.params) as told:
            state = program(*inputs)
            if wait or told:
                jax.block_until_ready(state)
        self._spend(started, phase)
        self._state, self._look = state, None

    @contextlib.contextmanager
    def _reading(self, params: Any) -> Iterator[bool]:
        """Shows that prompts are read, if it should take about a second or more. Then the host waits for it to end.

        Yields:
            Whether it is shown. If not, the device goes on with the rounds, and the host does not know when reading ended.
        """
        tokens = len(self.prefilled) * max(self.prefilled)
        if tokens < _FEWEST_TOLD or not is_shown():
            yield False
            return
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        key = f"prefill/{platform_of(None)}/{size}"
        per_second = known(key)
        if per_second is not None and tokens / per_second < _SHORTEST_TOLD:
            yield False
            return
        text = f"reading {tokens:,} tokens of the prompt{'s' * (len(self.prefilled) > 1)}"
        with activity(text, total=tokens, key=key, quiet=_SHORTEST_TOLD):
            yield True

    def advance(self, rounds: int = UNLIMITED, *, phases: bool = False, wait: bool = False) -> Look:
        """Runs up to `rounds` rounds, fewer when all rows are done or the caches are full, and looks.

        Args:
            rounds: the most rounds to run.
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
        with self._decoding() if rounds == UNLIMITED else contextlib.nullcontext():
            look = self.look()
        self._spend(started, phase)
        return look

    def _decoding(self) -> contextlib.AbstractContextManager:
        """Shows that the device decodes, when nobody looks before it is done."""
        most = max(row.max_new_tokens for row in self._plan.rows)
        return activity(f"decoding up to {most:,} tokens", quiet=_SHORTEST_TOLD)

    def look(self) -> Look:
        """What the host can see now; waits for the device."""
        assert self._state is not None, "begin first"
        counters = self._plan.decoder.drafter.stats(self._state.draft_state)
        state, counters = fetch_whole((_without_caches(self._state), counters))
        asked = len(self._plan.prompts)
        self._look = Look(jax.tree.map(lambda rows: rows[:asked], state), counters)
        return self._look

    def end_rows(self, ended: Sequence[bool]) -> None:
        """Declares rows done."""
        assert self._state is not None, "begin first"
        assert self._look is not None, "look first"
        done_B = np.asarray(ended) | self._look.state.done_B
        done_B = np.append(done_B, np.ones(self._plan.padding, bool))
        sharding = self._state.done_B.sharding
        self._state = self._state.replace(done_B=put_whole(done_B, sharding))

    def release(self) -> None:
        """Forgets the caches."""
        self._state = self._look = None

    @property
    def _capacity(self) -> int:
        assert self._state is not None, "begin first"
        return self._state.tokens_BC.shape[1]

    def _taken(self) -> DecodeState:
        """The state, to be donated to a program: if the program fails, there are no caches left."""
        state, self._state = self._state, None
        assert state is not None, "begin first"
        return state

    def _request(self, rounds: int) -> Request:
        request = self._plan.request
        limit = put_whole(np.int32(rounds), request.max_rounds.sharding)
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
        """Doubles the capacity before a round would exceed it, but not beyond what the call can need."""
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
