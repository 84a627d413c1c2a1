"""Times candidates of a calibration against plain decoding, on a few of the prompts that its trace was recorded on."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

from s2d_jax.calibration.candidates import Prediction
from s2d_jax.calibration.timing import rotated, warm_run
from s2d_jax.calibration.trace import Trace
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.generation.buckets import bucket
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.generation.stats import GenerationStats
from s2d_jax.processes import of_main_process


@dataclasses.dataclass(frozen=True)
class Confirmed:
    """A candidate that was timed, on a few of the recorded prompts.

    Attributes:
        prediction: on all recorded prompts.
        predicted_on_timed: the speedup that the replay gives on the timed prompts.
        decode_speedup, speedup: measured on the timed prompts, over plain decoding, without and with prefill.
    """

    prediction: Prediction
    predicted_on_timed: float
    decode_speedup: float
    speedup: float

    @property
    def estimate(self) -> float:
        """The speedup to expect, with prefill: the replay over all prompts, corrected by what only timing shows.

        The few timed prompts may suit a candidate by chance. The replay of the same prompts has the same bias, which cancels.
        """
        return self.speedup * self.prediction.speedup / self.predicted_on_timed


def alike(trace: Trace, prompts: Sequence[list[int]]) -> list[int]:
    """Numbers of the recorded prompts in the most frequent length bucket, which use the same programs."""
    answered = [answer.prompt for answer in trace.answers]
    buckets = [bucket(len(prompts[number])) for number in answered]
    usual = statistics.mode(buckets)
    return [number for number, size in zip(answered, buckets, strict=True) if size == usual]


def time_in_alternation(
    decoders: Sequence[SpeculativeDecoder],
    prompts: Sequence[list[int]],
    sampling: SamplingParams,
    *,
    fewest: int,
    until: float,
    on_run: Callable[[], None],
) -> list[list[GenerationStats]]:
    """Stats of each decoder on each prompt; the order rotates, so that none always follows another.

    Args:
        fewest: this many prompts are timed in any case.
        until: a time of `time.perf_counter()`; no prompt is begun that would probably end later.
    """
    runs: list[list[GenerationStats]] = [[] for _ in decoders]
    began = time.perf_counter()
    for number, prompt in enumerate(prompts):
        now = time.perf_counter()
        expected = now + (now - began) / max(number, 1)  # another takes as long as those before
        late = of_main_process(float(number >= fewest and expected > until))
        if late:
            break
        for turn in rotated(range(len(decoders)), number):
            runs[turn].append(warm_run(decoders[turn], prompt, sampling)[0].stats)
            on_run()
    return runs


def speed(column: Sequence[GenerationStats], *, decode: bool) -> float:
    """New tokens per second over all prompts, with or without prefill."""
    if decode:
        tokens = sum(stats.emitted_tokens - 1 for stats in column)
        return tokens / sum(stats.seconds["decode"] for stats in column)
    return sum(s.emitted_tokens for s in column) / sum(s.seconds["total"] for s in column)
