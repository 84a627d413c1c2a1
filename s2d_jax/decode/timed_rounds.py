"""Where the time of a round goes: rounds whose parts are programs of their own."""

from __future__ import annotations

import time
from typing import Any

import jax

from s2d_jax.decode import programs as compilation
from s2d_jax.decode.loop import Decoder
from s2d_jax.decode.state import DecodeState
from s2d_jax.draft.request import Request

ROUND_PHASES = ("draft", "verify", "rest")


def timed_rounds(
    decoder: Decoder, params: Any, request: Request, state: DecodeState, max_rounds: int
) -> tuple[DecodeState, dict[str, float], float]:
    """Up to `max_rounds` rounds, fewer when all rows are done or one lacks room.

    The host waits for each part, unlike in one loop on the device. So `rest` (acceptance, rewinds, stop conditions) also holds
    the time in which the host asks whether to go on.

    Returns:
        The state, wall seconds by `ROUND_PHASES` (they add up to the time spent here), and seconds spent compiling beforehand.
    """
    programs, compiling = compilation.round_programs(decoder, (params, request, state))
    seconds: dict[str, float] = dict.fromkeys(ROUND_PHASES, 0.0)
    last = time.perf_counter()

    def clock(phase):
        nonlocal last
        now = time.perf_counter()
        seconds[phase], last = seconds[phase] + now - last, now

    rounds = 0
    while rounds < max_rounds and not state.done_B.all() and decoder.has_room(state):
        clock("rest")
        proposal, state = jax.block_until_ready(programs.propose(params, request, state))
        clock("draft")
        verified, state = jax.block_until_ready(programs.verify(params, request, state, proposal))
        clock("verify")
        state = jax.block_until_ready(programs.accept(request, state, verified))
        rounds += 1
    clock("rest")
    return state, seconds, compiling
