"""Measures speedup and acceptance: `python -m infer.bench --target DIR --draft DIR ...`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from infer.cli import check_writable, run_command_line, screen, written_whole
from infer.environment import environment
from infer.loading import load_target
from infer.measure import Sample, measure, round_shares
from infer.methods import BASELINE, Method, build_methods, parse_methods
from infer.options import ComputeOptions, DraftingOptions, SamplingOptions, require_targets
from infer.plots import write_plots
from infer.questions import Question, read_questions
from infer.report import make_rows, show_report, write_report
from s2d_jax.config import UserError
from s2d_jax.pretrained import load_draft, load_model


@dataclasses.dataclass(frozen=True)
class Args:
    """Compare ways of decoding on the same prompts, one prompt at a time."""

    questions: Path
    """Prompts file, or Spec-Bench's (question_id, category, turns)."""
    target: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Model directory, hub id or .gguf file; several are measured in turn."""
    draft: str | None = None
    """Exported sorted draft, loaded once for all targets."""
    independent_draft: str | None = None
    """Another model of the same vocabulary, for the method `draft`."""
    methods: str = "ar,s2d"
    """Some of ar, draft, sd@K (exit K of the draft), s2d; ar, the baseline, is always measured."""
    out: Path = Path("runs/bench")
    """Directory of report.json, report.md, samples.jsonl and plots."""
    max_questions: int | None = None
    """Only the first so many."""
    categories: str | None = None
    """Only these categories, separated by commas."""
    repeats: int = 1
    """Runs of each method on each prompt."""
    raw: bool = False
    """Leave the chat template out."""
    phase_questions: int = 0
    """Split the time of a round (draft, verify, rest) on this many of the first questions."""
    skip_identity_check: bool = False
    """Do not compare greedy tokens with the width-matched reference."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingOptions] = SamplingOptions()
    drafting: tyro.conf.OmitArgPrefixes[DraftingOptions] = DraftingOptions()
    compute: tyro.conf.OmitArgPrefixes[ComputeOptions] = ComputeOptions()

    def __post_init__(self):
        if self.repeats < 1:
            raise UserError(f"repeats {self.repeats} must be at least 1")
        if self.phase_questions < 0:
            raise UserError(f"phase-questions {self.phase_questions} must be 0 or more")


def main() -> None:
    run_command_line(Args, bench)


def bench(args: Args) -> None:
    """Measures every target, prints the tables and writes the report."""
    require_targets(args.target)
    check_writable(args.out / "report.json")
    names = parse_methods(args.methods)
    args.sampling.params()
    args.drafting.config()
    categories = tuple(args.categories.split(",")) if args.categories else ()
    questions = read_questions(
        args.questions, categories=categories, max_questions=args.max_questions
    )
    dtype = args.compute.jax_dtype
    draft = load_draft(args.draft, dtype=dtype) if args.draft else None
    independent = (
        load_model(args.independent_draft, dtype=dtype) if args.independent_draft else None
    )
    rows, samples = [], []
    for path in args.target:
        target = load_target(path, dtype)
        methods = build_methods(names, target, draft, independent, args.drafting)
        own = _measure(args, target, methods, questions)
        shares = {
            method.name: round_shares(
                *(target, method, questions[: args.phase_questions], args.sampling), raw=args.raw
            )
            for method in methods
        }
        rows += make_rows(path, args.sampling.temperature, methods, own, shares)
        samples += [_sample_row(path, sample) for sample in own]
        del target, methods
    settings = _settings(args, questions)
    write_report(args.out, environment(args.compute.dtype), settings, rows)
    with written_whole(args.out / "samples.jsonl") as partial:
        lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        partial.write_text("".join(lines), encoding="utf-8")
    write_plots(args.out, rows)
    show_report(screen(), settings, rows)


def _measure(
    args: Args, target, methods: Sequence[Method], questions: list[Question]
) -> list[Sample]:
    progress = Progress(
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(TextColumn("{task.fields[last]}"), TextColumn("ETA"), TimeRemainingColumn()),
        console=screen(stderr=True),
        speed_estimate_period=600.0,  # seconds; one answer of a large model takes minutes
    )
    with progress:
        total = len(questions) * len(methods) * args.repeats
        task = progress.add_task(Path(target.source).name[:32], total=total, last="")

        def on_sample(sample: Sample) -> None:
            last = f"{sample.method} {sample.tokens_per_second:.1f} tok/s"
            progress.update(task, advance=1, last=last)

        greedy = args.sampling.temperature == 0
        return measure(
            *(target, methods, questions, args.sampling),
            repeats=args.repeats,
            raw=args.raw,
            check_identity=greedy and not args.skip_identity_check,
            on_sample=on_sample,
        )


def _sample_row(target: str, sample: Sample) -> dict:
    row = {"target": target, **dataclasses.asdict(sample)}
    mat = sample.stats.mean_acceptance_length
    return {**row, "tokens_per_second": sample.tokens_per_second, "mean_acceptance_length": mat}


def _settings(args: Args, questions: list[Question]) -> dict:
    return {
        "questions": str(args.questions),
        "prompts": len(questions),
        "turns": sum(len(question.turns) for question in questions),
        "draft": args.draft,
        "independent_draft": args.independent_draft,
        "baseline": f"{BASELINE}: the target alone, one position per pass, on the same engine",
        "batch_size": 1,
        "repeats": args.repeats,
        "chat_template": not args.raw,
        **dataclasses.asdict(args.sampling),
        **dataclasses.asdict(args.drafting),
    }


if __name__ == "__main__":
    main()
