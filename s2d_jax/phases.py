"""Where the time of a round goes: the same rounds, with each part as a program of its own."""

from __future__ import annotations

import functools
import time

import jax

from s2d_jax.compilation import programs
from s2d_jax.generation import SpeculativeDecoder

PHASES = ("prefill", "draft", "verify", "rest")


def phase_seconds(decoder: SpeculativeDecoder, prompts, sampling) -> dict[str, float]:
    """Wall seconds of one call by phase: `prefill`, `draft`, `verify`, and `rest` (acceptance, rewinds, stop conditions).

    The parts of a round are waited for one by one, which one loop on the device does not do: use the shares, not the sum.
    Compiling is left out.
    """
    static, width, args = decoder.prepare(prompts, sampling)
    params, request, *_ = args
    (prefill, _), _ = programs(static, width, args)
    propose = jax.jit(static.propose, donate_argnums=2)
    verify = jax.jit(static.verify, donate_argnums=2)
    accept = jax.jit(static.accept, donate_argnums=1)

    def one_round(state, clock):
        proposal, state = clock("draft", propose, params, request, state)
        verified, state = clock("verify", verify, params, request, state, proposal)
        return clock("rest", accept, request, state, verified)

    def generate(clock):
        state = clock("prefill", prefill, *args)
        while not state.done_B.all():
            state = one_round(state, clock)

    generate(lambda _, program, *inputs: program(*inputs))  # compiles
    seconds = dict.fromkeys(PHASES, 0.0)
    generate(functools.partial(_timed, seconds))
    return seconds


def _timed(seconds, phase, program, *inputs):
    started = time.perf_counter()
    outputs = jax.block_until_ready(program(*inputs))
    seconds[phase] += time.perf_counter() - started
    return outputs
