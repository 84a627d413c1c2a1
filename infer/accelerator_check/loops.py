"""Decoding loops that are run again and again from the same state, and what a run of each takes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from infer.accelerator_check.coins import CoinRequest, CoinVerifier
from s2d_jax.calibration.timing import filled, prepared, rotated
from s2d_jax.config.decode import DecodeConfig
from s2d_jax.decode.loop import Decoder
from s2d_jax.decode.programs import run_program
from s2d_jax.decode.state import DecodeState
from s2d_jax.decode.timed_rounds import ROUND_PHASES, timed_rounds
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.sharding import replicated
from s2d_jax.weights.model import Draft, Model

Name = TypeVar("Name", bound=Hashable)
Tick = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Loop:
    """Rounds in mid-text, behind caches that hold zeros.

    Attributes:
        decoder: static.
        params, request, state: as `Decoder.run` takes them, on their devices.
        rounds: how many a run makes.
    """

    decoder: Decoder
    params: Any
    request: Any
    state: DecodeState
    rounds: int

    def compile(self) -> None:
        """Compiles the loop and runs it once, so that no run that is timed compiles or warms up."""
        self.run()

    def run(self) -> tuple[float, DecodeState]:
        """Seconds of all rounds in one loop on the device, and the state after them."""
        program, _ = run_program(self.decoder, (self.params, self.request, self.state))
        state = self._copy()
        started = time.perf_counter()
        after = jax.block_until_ready(program(self.params, self.request, state))
        return time.perf_counter() - started, after

    def parts(self) -> dict[str, float]:
        """Seconds of a round by `ROUND_PHASES`, each part a program that the host waits for; and `step`, of a drafted token."""
        after, seconds, _ = timed_rounds(
            self.decoder, self.params, self.request, self._copy(), self.rounds
        )
        rounds, drafted = int(after.rounds_B[0]), int(after.drafted_BG.sum())
        mean = {phase: seconds[phase] / rounds for phase in ROUND_PHASES}
        return {**mean, "step": seconds["draft"] / drafted}

    def _copy(self) -> DecodeState:
        """Programs take the state's memory for their own, so each run gets a copy."""
        return jax.block_until_ready(jax.tree.map(jnp.copy, self.state))


def plain_loop(target: Model, width: int, rounds: int) -> Loop:
    """Plain decoding whose target pass has `width` positions, of which one counts."""
    decoder = SpeculativeDecoder(target, None, DecodeConfig(verify_width=width))
    static, args, state = prepared(decoder, rounds=rounds + 1)
    return _loop(static, args, state, rounds)


def simulated_loop(
    target: Model, draft: Draft, exit_layer: int, acceptance: float, rounds: int, seed: int
) -> Loop:
    """Rounds of a draft that leaves at one exit, whose tokens coins accept."""
    config = DecodeConfig(exits=(exit_layer,))
    decoder = SpeculativeDecoder(target, draft, config)
    # Two rounds more than are run, so that no draft is cut short by the end of the text.
    tokens = (rounds + 2) * decoder.verify_width
    static, args, state = prepared(decoder, rounds=tokens)
    coins = CoinVerifier(True, static.verifier.widths)
    state = state.replace(draft_state=filled(state.draft_state, state.length_B - 1))
    loop = _loop(dataclasses.replace(static, verifier=coins), args, state, rounds)
    key_B = jax.vmap(jax.random.key)(jnp.full(1, seed, jnp.uint32))
    drawn = (key_B, jnp.full(1, acceptance, jnp.float32))
    if static.target.mesh is not None:
        drawn = jax.device_put(drawn, replicated(static.target.mesh))
    request = CoinRequest.of(loop.request.replace(key_B=drawn[0]), drawn[1])
    return dataclasses.replace(loop, request=request)


def _loop(static: Decoder, args: tuple, state: DecodeState, rounds: int) -> Loop:
    params, request, *_ = args
    limit = jnp.int32(rounds)
    mesh = static.target.mesh
    if mesh is not None:
        limit = jax.device_put(limit, replicated(mesh))
        state = jax.device_put(state, state.shardings(mesh))
    return Loop(static, params, request.replace(max_rounds=limit), state, rounds)


def interleaved(
    programs: Mapping[Name, Callable[[], Any]], repeats: int, tick: Tick, what: str
) -> dict[Name, list[Any]]:
    """What all programs return, run in turn `repeats` times, in an order that changes; `what` stands before their names."""
    found: dict[Name, list[Any]] = {name: [] for name in programs}
    for turn in range(repeats):
        for name in rotated(list(programs), turn):
            found[name].append(programs[name]())
            tick(f"timing {what} {name}")
    return found
