"""The parts of a check. Each takes a subject and gives figures; `PARTS` has their order."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from infer.accelerator_check.arithmetic import decode_bytes, prefill_flops, tokens_per_round
from infer.accelerator_check.loops import Loop, Tick, interleaved, plain_loop, simulated_loop
from infer.accelerator_check.subject import Subject
from infer.accelerator_check.training import train_steps
from infer.bench.kernels import matmul_peak, read_bandwidth
from s2d_jax.calibration.timing import CONTEXT
from s2d_jax.compilers.chips import chip_of
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.decode.programs import prefill_program
from s2d_jax.generation.decoder import SpeculativeDecoder

ACCEPTANCES = (0.6, 0.8, 0.9)
# The acceptance at which a round is taken apart.
_USUAL = 0.8
Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        name: in the report.
        title: on the screen.
        measure: `(subject, repeats, tick) -> figures`.
        ticks: how often it calls `tick`, from the subject and the repeats.
    """

    name: str
    title: str
    measure: Callable[[Subject, int, Tick], Figures]
    ticks: Callable[[Subject, int], int]


def measure_limits(subject: Subject, repeats: int, tick: Tick) -> Figures:
    """What the devices could do: `bandwidth` (bytes/s) and `flops` (1/s) of all of them, `source`, and what was measured."""
    devices = 1 if subject.mesh is None else subject.mesh.size
    kind = jax.devices()[0].device_kind
    measured = {"bandwidth": read_bandwidth() * 1e9, "flops": matmul_peak(jnp.bfloat16) * 1e9}
    tick("measuring one device")
    chip, each, source = chip_of(kind), measured, "measured here: no limit is known for this device"
    if chip is not None:
        each = {"bandwidth": chip.bandwidth, "flops": chip.flops}
        source = f"data sheet of {chip.name}"
    limits = {name: devices * value for name, value in each.items()}
    return {**limits, "source": source, "devices": devices, "measured_on_one_device": measured}


def measure_verify(subject: Subject, repeats: int, tick: Tick) -> Figures:
    """Milliseconds of a pass by width, and what plain decoding (width 1) reads."""
    rounds = subject.size.rounds
    loops = {
        width: _compiled(plain_loop(subject.target, width, rounds), tick, f"a pass of {width}")
        for width in subject.size.widths
    }
    runs = {width: _seconds_of_round(loop) for width, loop in loops.items()}
    raw = interleaved(runs, repeats, tick, "width")
    middle = {width: statistics.median(seconds) for width, seconds in raw.items()}
    # In the middle of a run the text is half of `rounds` longer than at its start.
    needed = decode_bytes(subject.size.config, CONTEXT + rounds // 2)
    return {
        "rows": [
            {"width": width, "milliseconds": 1e3 * seconds, "ratio": seconds / middle[1]}
            for width, seconds in middle.items()
        ],
        "plain": {
            "tokens_per_second": 1 / middle[1],
            "bytes_per_token": needed,
            "bytes_per_second": needed / middle[1],
        },
        "raw_seconds": {str(width): seconds for width, seconds in raw.items()},
    }


def measure_rounds(subject: Subject, repeats: int, tick: Tick) -> Figures:
    """Milliseconds of the parts of a round by exit, each part a program of its own, and of the round in one loop."""
    rounds, exits = subject.size.rounds, subject.size.exits
    loops = {exit: _simulated(subject, exit, _USUAL, rounds) for exit in exits}
    for exit, loop in loops.items():
        _compiled(loop, tick, f"rounds at exit {exit}")
        loop.parts()
    apart = {exit: loop.parts for exit, loop in loops.items()}
    together = {exit: _seconds_of_round(loop) for exit, loop in loops.items()}
    taken = interleaved(apart, repeats, tick, "the parts at exit")
    whole = interleaved(together, repeats, tick, "rounds at exit")
    rows = []
    for exit in exits:
        row = {
            phase: 1e3 * statistics.median(run[phase] for run in taken[exit])
            for phase in ("step", "draft", "verify", "rest")
        }
        in_one_loop = 1e3 * statistics.median(whole[exit])
        rows.append({"exit": exit, **row, "in_one_loop": in_one_loop})
    raw = {str(exit): {"parts": taken[exit], "in_one_loop": whole[exit]} for exit in exits}
    return {"acceptance": _USUAL, "rows": rows, "raw_seconds": raw}


def measure_prefill(subject: Subject, repeats: int, tick: Tick) -> Figures:
    """Tokens per second of reading prompts, and the operations per second that they need."""
    decoder, programs = SpeculativeDecoder(subject.target), {}
    for length in subject.size.prompts:
        sampling = SamplingParams(max_new_tokens=1, ignore_eos=True)
        static, width, args = decoder.prepare([[1] * length], [sampling])
        program, *_ = prefill_program(static, width, args)
        jax.block_until_ready(program(*args))
        programs[length] = lambda program=program, args=args: _seconds(lambda: program(*args))
        tick(f"compiling prefill of {length}")
    raw = interleaved(programs, repeats, tick, "prefill of")
    rows = []
    for length, seconds in raw.items():
        middle = statistics.median(seconds)
        flops = prefill_flops(subject.size.config, length) / middle
        rows.append(
            {"tokens": length, "tokens_per_second": length / middle, "flops_per_second": flops}
        )
    return {"rows": rows, "raw_seconds": {str(n): seconds for n, seconds in raw.items()}}


def measure_simulated(subject: Subject, repeats: int, tick: Tick) -> Figures:
    """Tokens per second where coins accept what the first exit drafts, beside plain decoding."""
    rounds, exit = subject.size.rounds, subject.size.exits[0]
    plain = _compiled(plain_loop(subject.target, 1, rounds), tick, "plain decoding")
    loops = {share: _simulated(subject, exit, share, rounds) for share in ACCEPTANCES}
    for share, loop in loops.items():
        _compiled(loop, tick, f"acceptance {share}")
    runs = {"plain": plain.run, **{share: loop.run for share, loop in loops.items()}}
    kept = {name: (lambda run=run: _tokens_and_seconds(run)) for name, run in runs.items()}
    raw = interleaved(kept, repeats, tick, "acceptance")
    rates = {name: statistics.median(n / s for n, s in pairs) for name, pairs in raw.items()}
    drafted = loops[ACCEPTANCES[0]].decoder.drafter.width
    rows = [
        {
            "acceptance": share,
            "tokens_per_round": raw[share][0][0] / rounds,
            "expected_tokens_per_round": tokens_per_round(share, drafted),
            "tokens_per_second": rates[share],
            "speedup": rates[share] / rates["plain"],
        }
        for share in ACCEPTANCES
    ]
    figures = {"exit": exit, "drafted": drafted, "plain_tokens_per_second": rates["plain"]}
    pairs = {str(name): column for name, column in raw.items()}
    return {**figures, "rounds": rounds, "rows": rows, "raw_tokens_and_seconds": pairs}


def _simulated(subject: Subject, exit_layer: int, acceptance: float, rounds: int) -> Loop:
    pair = subject.target, subject.draft
    return simulated_loop(*pair, exit_layer, acceptance, rounds, subject.seed)


def _compiled(loop: Loop, tick: Tick, name: str) -> Loop:
    loop.compile()
    tick(f"compiling {name}")
    return loop


def _seconds_of_round(loop: Loop) -> Callable[[], float]:
    return lambda: loop.run()[0] / loop.rounds


def _tokens_and_seconds(run: Callable) -> tuple[int, float]:
    seconds, state = run()
    return int(state.length_B[0]) - CONTEXT, seconds


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - started


PARTS = (
    Part("limits", "the chip's limits", measure_limits, lambda subject, repeats: 1),
    Part(
        "verify",
        "verify passes by width",
        measure_verify,
        lambda subject, repeats: len(subject.size.widths) * (1 + repeats),
    ),
    Part(
        "rounds",
        "the parts of a round",
        measure_rounds,
        lambda subject, repeats: len(subject.size.exits) * (1 + 2 * repeats),
    ),
    Part(
        "prefill",
        "prefill",
        measure_prefill,
        lambda subject, repeats: len(subject.size.prompts) * (1 + repeats),
    ),
    Part(
        "simulated",
        "simulated acceptance",
        measure_simulated,
        lambda subject, repeats: (1 + len(ACCEPTANCES)) * (1 + repeats),
    ),
    Part("training", "training steps", train_steps, lambda subject, repeats: 1 + repeats),
)
