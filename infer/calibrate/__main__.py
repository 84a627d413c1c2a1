"""Computes how to decode with a target and a draft on this machine: `python -m infer.calibrate --target DIR --draft DIR`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import tyro
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from s2d_jax.calibration.candidates import (
    best_of_families,
)
from s2d_jax.calibration.choose import Calibration, Choice, Effort
from s2d_jax.calibration.time_trees import MEASURED_TOP_KS
from s2d_jax.cli.command import run_command_line
from s2d_jax.cli.environment import environment
from s2d_jax.cli.loading import load_listed_draft, load_target, tokenizer_of
from s2d_jax.cli.options import ComputeOptions, DraftOptions, require_targets
from s2d_jax.cli.prompts import encode, read_questions
from s2d_jax.cli.screen import counting_bar, screen
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.decode.programs import use_compile_cache
from s2d_jax.errors import UserError
from s2d_jax.generation.checks import num_known_tokens
from s2d_jax.generation.policy import (
    policy_file_of,
    read_policies,
    write_policies,
)
from s2d_jax.weights.model import Draft

DEFAULT_QUESTIONS = Path(__file__).parents[2] / "configs" / "demo_prompts_train.jsonl"


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
    assert draft is not None  # there is a path
    _check_trees(args, draft)
    file = policy_file_of(draft, args.out)
    read_policies(file)  # a damaged file is known before anything is measured
    temperatures = tuple(dict.fromkeys(args.temperature or (0.0, 1.0)))
    for path in args.target:
        started = time.perf_counter()
        target = load_target(path, args.compute.target_format)
        # Prompts from all over the file.
        chosen = questions[:: max(1, len(questions) // args.prompts)][: args.prompts]
        prompts = [
            encode(tokenizer_of(target), question.messages([]), raw=args.raw) for question in chosen
        ]
        with counting_bar(TextColumn("elapsed"), TimeElapsedColumn()) as progress:
            calibration = Calibration(
                target,
                draft,
                prompts,
                Effort(temperatures, args.new_tokens, args.minutes, args.trees),
                on_phase=partial(_bar, progress),
                environment=environment(target.dtype.name),
                started=started,
            )
            for choice in calibration.choices():
                _show(target.source, choice)
                write_policies(file, [choice.policy])
        screen().print(f"policies written to {file}", soft_wrap=True)
        del target


def _check_trees(args: Args, draft: Draft) -> None:
    known = num_known_tokens(draft, draft.config.vocab_size)
    if args.trees and known < max(MEASURED_TOP_KS):
        raise UserError(
            f"trees are measured with {max(MEASURED_TOP_KS)} children of a node, the draft knows {known} tokens; "
            "give --no-trees, or a longer list"
        )


def _bar(progress: Progress, name: str, total: int) -> Callable[[int], None]:
    """A progress bar for a phase."""
    task = progress.add_task(name, total=total)
    return lambda count: progress.update(task, advance=count)


def _show(target: str, choice: Choice) -> None:
    policy, predictions, confirmed = choice
    temperature = policy.key.temperature
    title = f"{Path(target).name}, temperature {temperature:g}: {policy.evidence['chosen']}"
    table = Table(title=title, title_justify="left")
    table.add_column("candidate", overflow="fold")
    for name in ("drafted", "MAT", "predicted", "timed only", "measured", "with prefill"):
        table.add_column(name, justify="right")
    timed = {entry.prediction.candidate.name: entry for entry in confirmed}
    shown = [entry.prediction for entry in confirmed]
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
