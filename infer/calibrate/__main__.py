"""Computes how to decode with a target and a draft on this machine: `python -m infer.calibrate --target DIR --draft DIR`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import tyro
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

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
from s2d_jax.calibration.time_trees import MEASURED_TOP_KS
from s2d_jax.calibration.timing import medians
from s2d_jax.calibration.trace import Trace
from s2d_jax.cli.command import run_command_line
from s2d_jax.cli.environment import environment
from s2d_jax.cli.loading import load_listed_draft, load_target, tokenizer_of
from s2d_jax.cli.options import ComputeOptions, DraftOptions, require_targets
from s2d_jax.cli.prompts import encode, read_questions
from s2d_jax.cli.screen import counting_bar, screen
from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.decode.programs import use_compile_cache
from s2d_jax.errors import UserError
from s2d_jax.generation.checks import num_known_tokens
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.generation.policy import (
    Policy,
    PolicyKey,
    policy_file_of,
    read_policies,
    write_policies,
)
from s2d_jax.weights.model import Draft, Model

DEFAULT_QUESTIONS = Path(__file__).parents[2] / "configs" / "demo_prompts_train.jsonl"
WIDTHS = (1, 4, 8)
REPEATS, WALKS = 9, 4
CONFIRMED, TIMED, FEWEST_TIMED = 3, 4, 1
# A winner must gain more than what timing alone may show.
SMALLEST_GAIN = 1.01


@dataclasses.dataclass(frozen=True)
class Args:
    """Measure costs, record acceptance, compute the best policy, confirm it, and write it down."""

    target: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Model directory, hub id or .gguf file; several are calibrated in turn."""
    draft: str | None = None
    """Exported sorted draft, or any model with the same vocabulary."""
    questions: Path = DEFAULT_QUESTIONS
    """Prompts like those that will be asked."""
    temperature: tyro.conf.UseAppendAction[tuple[float, ...]] = ()
    """Temperatures to calibrate for; several may be given. Default: 0 and 1."""
    out: Path | None = None
    """Write policies here instead of into the draft's sorted_draft.json (see --policy-file)."""
    prompts: int = 6
    """Answers that the trace is recorded on; the best candidates are timed on some of them."""
    new_tokens: int = 48
    """Tokens of each answer."""
    minutes: float = 9.5
    """No more prompts are timed after so many minutes per target; compiling and recording take what they take."""
    trees: bool = True
    """Compare trees of tokens too."""
    raw: bool = False
    """Leave the chat template out."""
    draft_options: tyro.conf.OmitArgPrefixes[DraftOptions] = DraftOptions()
    compute: tyro.conf.OmitArgPrefixes[ComputeOptions] = ComputeOptions()

    def __post_init__(self):
        for name in ("prompts", "new_tokens", "minutes"):
            value = getattr(self, name)
            if value <= 0:
                raise UserError(f"{name.replace('_', '-')} {value} must be above 0")
        for temperature in self.temperature:
            SamplingParams(temperature=temperature)


def main() -> None:
    run_command_line(Args, calibrate)


def calibrate(args: Args) -> None:
    """Calibrates every target and writes its policies."""
    require_targets(args.target)
    if args.draft is None:
        raise UserError("no --draft was given; give an exported sorted draft, or another model")
    use_compile_cache(args.compute.compile_cache)
    questions = read_questions(args.questions)
    vocabulary = args.draft_options.draft_vocabulary
    draft = load_listed_draft(args.draft, vocabulary, args.compute.draft_format)
    _check_trees(args, draft)
    file = policy_file_of(draft, args.out)
    read_policies(file)  # a damaged file is known before anything is measured
    for path in args.target:
        started = time.perf_counter()
        target = load_target(path, args.compute.target_format)
        # Prompts from all over the file.
        chosen = questions[:: max(1, len(questions) // args.prompts)][: args.prompts]
        prompts = [
            encode(tokenizer_of(target), question.messages([]), raw=args.raw) for question in chosen
        ]
        with counting_bar(TextColumn("elapsed"), TimeElapsedColumn()) as progress:
            calibration = Calibration(args, target, draft, prompts, progress, started)
            for policy in calibration.policies():
                write_policies(file, [policy])
        screen().print(f"policies written to {file}", soft_wrap=True)
        del target


def _check_trees(args: Args, draft: Draft) -> None:
    known = num_known_tokens(draft, draft.config.vocab_size)
    if args.trees and known < max(MEASURED_TOP_KS):
        raise UserError(
            f"trees are measured with {max(MEASURED_TOP_KS)} children of a node, the draft knows {known} tokens; "
            "give --no-trees, or a longer list"
        )


class Calibration:
    """The phases of calibrating one target."""

    def __init__(
        self, args: Args, target: Model, draft: Draft, prompts, progress: Progress, started: float
    ):
        self.args, self.target, self.draft = args, target, draft
        self.prompts, self.progress = prompts, progress
        self.temperatures = tuple(dict.fromkeys(args.temperature or (0.0, 1.0)))
        self.started = started
        self.seconds: dict[str, float] = {}

    def policies(self) -> Iterator[Policy]:
        """One for each temperature, as they are found."""
        seconds = self._measure_costs()
        for number, temperature in enumerate(self.temperatures):
            trace = self._record(temperature)
            costs = costs_of(
                *(seconds, self.draft, WIDTHS, temperature),
                chunk=DecodeConfig().catch_up_width,
                trees=self.args.trees,
            )
            predictions = _predict(trace, costs, candidates(costs, trace, WIDTHS), temperature)
            until = self.started + 60 * self.args.minutes * (number + 1) / len(self.temperatures)
            confirmed = self._confirm(predictions, trace, costs, temperature, until)
            policy = self._decide(costs, trace, predictions, confirmed, temperature)
            _show(self.target.source, temperature, predictions, confirmed, policy)
            yield policy

    def _phase(self, name: str, total: int):
        """A progress bar of its own, whose end is noted."""
        task, began = self.progress.add_task(name, total=total), time.perf_counter()

        def advance(count: int = 1) -> None:
            self.progress.update(task, advance=count)
            self.seconds[name] = round(time.perf_counter() - began, 1)

        return advance

    def _measure_costs(self) -> dict:
        builders = program_builders(
            self.target, self.draft, WIDTHS, self.temperatures, trees=self.args.trees
        )
        built = in_parallel(builders, self._phase("compiling parts", len(builders)))
        programs = {name: program for part in built for name, program in part.items()}
        return medians(programs, REPEATS, self._phase("measuring parts", REPEATS * len(programs)))

    def _record(self, temperature: float) -> Trace:
        args, name = self.args, f"temperature {temperature:g}"
        sampling = SamplingParams(temperature=temperature, max_new_tokens=args.new_tokens)
        on_batch = self._phase(f"{name}: answering", len(self.prompts))
        sequences = answer_prompts(self.target, self.prompts, sampling, on_batch)
        on_answer = self._phase(f"{name}: recording", len(sequences))
        trace = record_trace(
            *(self.target, self.draft, sequences, [len(p) for p in self.prompts]),
            *(args.new_tokens, temperature, on_answer),
        )
        if not trace.answers:
            raise UserError(
                f"{self.target.source} answers every prompt of {args.questions} with one token; give other prompts"
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
            temperature=temperature, max_new_tokens=self.args.new_tokens, seed=1
        )
        timed = alike(trace, self.prompts)[:TIMED]
        # Candidates with the same exits, and trees of the same shape, run the same programs.
        distinct = {(decoder.exits, decoder.config.tree): decoder for decoder in everyone}.values()
        length = len(self.prompts[timed[0]])
        warmups = [partial(decoder.warmup, [length], sampling=sampling) for decoder in distinct]
        in_parallel(warmups, self._phase(f"{name}: compiling", len(warmups)))
        on_run = self._phase(f"{name}: confirming", len(timed) * len(everyone))
        runs = time_in_alternation(
            *(everyone, [self.prompts[number] for number in timed], sampling),
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
            "environment": environment(self.target.dtype.name),
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


def _show(
    target: str,
    temperature: float,
    predictions: Sequence[Prediction],
    confirmed: Sequence[Confirmed],
    policy: Policy,
) -> None:
    title = f"{Path(target).name}, temperature {temperature:g}: {policy.evidence['chosen']}"
    table = Table(title=title, title_justify="left")
    table.add_column("candidate", overflow="fold")
    for name in ("drafted", "MAT", "predicted", "timed only", "measured", "with prefill"):
        table.add_column(name, justify="right")
    timed = {entry.prediction.candidate.name: entry for entry in confirmed}
    shown = [*(entry.prediction for entry in confirmed)]
    shown += [p for p in predictions if p.candidate.config is None]
    shown += [p for p in best_of_families(predictions, 12) if p not in shown]
    for prediction in sorted(shown, key=lambda p: -p.speedup):
        entry = timed.get(prediction.candidate.name)
        table.add_row(
            prediction.candidate.name,
            f"{prediction.mean_draft_length:.2f}",
            f"{prediction.mean_acceptance_length:.2f}",
            f"{prediction.speedup:.2f}",
            "-" if entry is None else f"{entry.predicted_on_timed:.2f}",
            "-" if entry is None else f"{entry.decode_speedup:.2f}",
            "-" if entry is None else f"{entry.estimate:.2f}",
        )
    screen().print(table)


if __name__ == "__main__":
    main()
