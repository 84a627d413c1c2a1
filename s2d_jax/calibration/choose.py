"""The choice of how to decode with a target and a draft on this machine: time the parts, record, replay, confirm, decide."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from s2d_jax.calibration.candidates import (
    TOP_KS,
    Candidate,
    Prediction,
    best_of_families,
    candidates,
)
from s2d_jax.calibration.confirm import Confirmed, alike, speed, time_in_alternation
from s2d_jax.calibration.costs import Costs
from s2d_jax.calibration.parallel import in_parallel
from s2d_jax.calibration.record import answer_prompts, record_trace
from s2d_jax.calibration.replay import predict
from s2d_jax.calibration.time_chains import costs_of, program_builders
from s2d_jax.calibration.timing import medians
from s2d_jax.calibration.trace import Trace
from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.plain import plain_fields
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.errors import UserError, require
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.generation.placement import Placement
from s2d_jax.generation.policy import (
    Policy,
    PolicyKey,
)
from s2d_jax.weights.model import Draft, Model

WIDTHS = (1, 4, 8)
REPEATS, WALKS = 9, 4
CONFIRMED, TIMED, FEWEST_TIMED = 3, 4, 1
# A winner must gain more than the noise of timing.
SMALLEST_GAIN = 1.01

# `(name, length) -> step`; `step(count)` is called as the phase goes on.
OnPhase = Callable[[str, int], Callable[[int], None]]


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much a calibration measures.

    Attributes:
        temperatures: a policy is chosen for each.
        new_tokens: the most tokens of each recorded answer.
        minutes: no more prompts are timed after this time; it does not limit compiling and recording.
        trees: compare trees of tokens too.
    """

    temperatures: tuple[float, ...] = (0.0, 1.0)
    new_tokens: int = 48
    minutes: float = 9.5
    trees: bool = True

    def __post_init__(self):
        plain_fields(self)
        require(self.new_tokens >= 2, f"new_tokens={self.new_tokens} must be at least 2")
        require(self.minutes > 0, f"minutes={self.minutes} must be above 0")
        require(bool(self.temperatures), "temperatures=() is empty; give at least one, such as 0")
        # As decoding has them, so that what it takes for greedy is calibrated as greedy.
        settled = [SamplingParams(temperature=t).temperature for t in self.temperatures]
        object.__setattr__(self, "temperatures", tuple(dict.fromkeys(settled)))

    def check_prompts(self, prompts: Sequence[list[int]], context: int) -> None:
        """Raises UserError for no prompts, or answers to them that a target of this context could not take in."""
        if not prompts:
            raise UserError("there are no prompts to calibrate with; give at least one")
        longest = max(map(len, prompts))
        if longest + self.new_tokens > context:
            raise UserError(
                f"new_tokens={self.new_tokens} behind a prompt of {longest} tokens exceed the target's context of {context}; "
                "lower them"
            )


class Choice(NamedTuple):
    """What a calibration chose at one temperature, and what it compared.

    Attributes:
        policy: the choice, with its evidence.
        predictions: for all candidates, the best first.
        confirmed: those that were timed.
    """

    policy: Policy
    predictions: Sequence[Prediction]
    confirmed: Sequence[Confirmed]


class Calibration:
    """The phases of calibrating one target.

    Args:
        target, draft: the models, as they will decode. A target on a mesh is measured there.
        prompts: token ids of prompts like those of later use.
        effort: how much is measured.
        on_phase: called with the name and the length of each phase; what it returns is called with each step's length.
        environment: recorded in the evidence.
        started: `time.perf_counter()` when the minutes began.

    Raises:
        UserError: for no prompts, or more new tokens than fit into the target's context behind the longest.
    """

    def __init__(
        self,
        target: Model,
        draft: Draft,
        prompts: Sequence[list[int]],
        effort: Effort,
        *,
        on_phase: OnPhase,
        environment: Mapping[str, Any],
        started: float,
    ):
        effort.check_prompts(prompts, target.config.max_context)
        self.target, self.prompts, self.effort = target, prompts, effort
        # Once, and not again for every program that is measured.
        on_mesh = Placement.beside(target.device_params).put_draft(draft.device_params)
        self.draft = dataclasses.replace(draft, params=on_mesh)
        self.on_phase, self.environment, self.started = on_phase, environment, started
        self.seconds: dict[str, float] = {}

    def choices(self) -> Iterator[Choice]:
        """One for each temperature, as they are found."""
        with jax.enable_x64(False):  # measured as decoding runs (s2d_jax.decode.programs)
            seconds = self._measure_costs()
        for number, temperature in enumerate(self.effort.temperatures, start=1):
            share = number / len(self.effort.temperatures)
            with jax.enable_x64(False):
                choice = self._choice(
                    seconds, temperature, self.started + 60 * self.effort.minutes * share
                )
            yield choice

    def _choice(self, seconds: dict, temperature: float, until: float) -> Choice:
        """The choice at one temperature; no more prompts are timed after `until`."""
        trace = self._record(temperature)
        costs = costs_of(
            seconds,
            self.draft,
            WIDTHS,
            temperature,
            chunk=DecodeConfig().catch_up_width,
            trees=self.effort.trees,
        )
        predictions = _predict(trace, costs, candidates(costs, trace, WIDTHS), temperature)
        confirmed = self._confirm(predictions, trace, costs, temperature, until)
        policy = self._decide(costs, trace, predictions, confirmed, temperature)
        return Choice(policy, predictions, confirmed)

    def _phase(self, name: str, total: int):
        """Announces a phase, and records how long it takes."""
        told, began = self.on_phase(name, total), time.perf_counter()

        def advance(count: int = 1) -> None:
            told(count)
            self.seconds[name] = round(time.perf_counter() - began, 1)

        return advance

    def _measure_costs(self) -> dict:
        builders = program_builders(
            self.target, self.draft, WIDTHS, self.effort.temperatures, trees=self.effort.trees
        )
        built = in_parallel(builders, self._phase("compiling parts", len(builders)))
        programs = {name: program for part in built for name, program in part.items()}
        return medians(programs, REPEATS, self._phase("measuring parts", REPEATS * len(programs)))

    def _record(self, temperature: float) -> Trace:
        name, new_tokens = f"temperature {temperature:g}", self.effort.new_tokens
        sampling = SamplingParams(temperature=temperature, max_new_tokens=new_tokens)
        on_batch = self._phase(f"{name}: answering", len(self.prompts))
        sequences = answer_prompts(self.target, self.prompts, sampling, on_batch)
        on_answer = self._phase(f"{name}: recording", len(sequences))
        trace = record_trace(
            self.target,
            self.draft,
            sequences,
            [len(prompt) for prompt in self.prompts],
            new_tokens,
            temperature,
            on_answer,
        )
        if not trace.answers:
            raise UserError(
                f"{self.target.source} answers every prompt with one token; give other prompts"
            )
        return trace

    def _confirm(self, predictions, trace: Trace, costs: Costs, temperature: float, until: float):
        """Times the best candidates on some of the recorded prompts."""
        name, chosen = f"temperature {temperature:g}", best_of_families(predictions, CONFIRMED)
        decoders = [
            SpeculativeDecoder(self.target, self.draft, _config(prediction))
            for prediction in chosen
        ]
        everyone = (SpeculativeDecoder(self.target), *decoders)
        sampling = SamplingParams(
            temperature=temperature, max_new_tokens=self.effort.new_tokens, seed=1
        )
        timed = alike(trace, self.prompts)[:TIMED]
        # Candidates with the same exits, and trees of the same shape, run the same programs.
        distinct = {(decoder.exits, decoder.config.tree): decoder for decoder in everyone}.values()
        length = len(self.prompts[timed[0]])
        warmups = [partial(decoder.warmup, [length], sampling=sampling) for decoder in distinct]
        # They also run for a round. Devices that wait for each other must be given the same program first.
        at_once = None if decoders[0].mesh is None else 1
        in_parallel(warmups, self._phase(f"{name}: compiling", len(warmups)), at_once=at_once)
        on_run = self._phase(f"{name}: confirming", len(timed) * len(everyone))
        runs = time_in_alternation(
            everyone,
            [self.prompts[number] for number in timed],
            sampling,
            fewest=FEWEST_TIMED,
            until=until,
            on_run=on_run,
        )
        same = trace.of_prompts(timed[: len(runs[0])])
        return [
            Confirmed(
                prediction,
                _predict(same, costs, [prediction.candidate], temperature)[0].speedup,
                speed(column, decode=True) / speed(runs[0], decode=True),
                speed(column, decode=False) / speed(runs[0], decode=False),
            )
            for prediction, column in zip(chosen, runs[1:], strict=True)
        ]

    def _decide(
        self, costs: Costs, trace: Trace, predictions, confirmed, temperature: float
    ) -> Policy:
        best = max(confirmed, key=lambda entry: entry.estimate)
        wins = best.estimate >= SMALLEST_GAIN
        evidence = {
            "target": self.target.source,
            "chosen": best.prediction.candidate.name if wins else "no speculation",
            "seconds": dataclasses.asdict(costs),
            "trace": _summary(trace),
            "predicted": {p.candidate.name: round(p.speedup, 4) for p in predictions[:20]},
            "confirmed": {
                entry.prediction.candidate.name: {
                    "predicted_decode_speedup": round(entry.prediction.speedup, 4),
                    "predicted_on_timed_prompts": round(entry.predicted_on_timed, 4),
                    "measured_decode_speedup": round(entry.decode_speedup, 4),
                    "measured_speedup": round(entry.speedup, 4),
                    "estimated_speedup": round(entry.estimate, 4),
                }
                for entry in confirmed
            },
            "minutes": round((time.perf_counter() - self.started) / 60, 2),
            "phases": dict(self.seconds),
            "environment": dict(self.environment),
        }
        key = PolicyKey.of(self.target, self.draft, temperature)
        return Policy(key, _config(best.prediction) if wins else None, evidence)


def _predict(trace: Trace, costs: Costs, found: Sequence[Candidate], temperature: float):
    """Replays the candidates: once where acceptance is certain, else over several walks."""
    return predict(trace, costs, found, repeats=1 if temperature == 0 else WALKS, seed=0)


def _config(prediction: Prediction) -> DecodeConfig:
    config = prediction.candidate.config
    assert config is not None
    return config


def _summary(trace: Trace) -> dict:
    def means(name, row):
        total = sum(float(getattr(answer, name)[row].sum()) for answer in trace.answers)
        return round(total / sum(answer.accepted.shape[1] for answer in trace.answers), 4)

    def among(row):
        rank_T = np.concatenate([answer.rank[row] for answer in trace.answers])
        return {k: round(float((rank_T < k).mean()), 4) for k in TOP_KS}

    rows = range(len(trace.exits))
    return {
        "answers": len(trace.answers),
        "positions": sum(answer.accepted.shape[1] for answer in trace.answers),
        "acceptance": {trace.exits[row]: means("accepted", row) for row in rows},
        "confidence": {trace.exits[row]: means("confidence", row) for row in rows},
        "among_the_best": {trace.exits[row]: among(row) for row in rows},
    }
