"""Calibrates targets one after the other, and writes their policies."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.progress import Progress, TimeElapsedColumn

from infer.calibrate.args import Args
from s2d_jax.calibration.candidates import best_of_families
from s2d_jax.calibration.choose import Calibration, Choice, Effort
from s2d_jax.calibration.time_trees import MEASURED_TOP_KS
from s2d_jax.cli.agreement import check_agreement
from s2d_jax.cli.environment import environment
from s2d_jax.cli.loading import (
    keep_programs,
    load_listed_draft,
    load_target,
    meshes_of_flags,
    tokenizer_of,
)
from s2d_jax.cli.options import require_targets
from s2d_jax.cli.outputs import check_writable
from s2d_jax.cli.prompts import Question, encode, read_questions
from s2d_jax.cli.screen import PlainColumn, counting_bar, screen
from s2d_jax.cli.tables import print_table
from s2d_jax.errors import UserError
from s2d_jax.generation.checks import num_known_tokens
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.generation.policy import (
    policy_file_of,
    read_policies,
    write_policies,
)
from s2d_jax.processes import is_main_process
from s2d_jax.weights.model import Draft, Model


def calibrate(args: Args) -> None:
    """Calibrates every target and writes its policies."""
    require_targets(args.target)
    if args.draft is None:
        raise UserError("no --draft was given; give an exported sorted draft, or another model")
    if args.out is not None and is_main_process():
        check_writable(args.out)
    keep_programs(args.loading.compile_cache)
    questions = read_questions(args.questions)
    check_agreement({"questions": [question.turns for question in questions]})
    vocabulary = args.loading.draft_vocabulary
    meshes = meshes_of_flags(args.mesh)
    draft = load_listed_draft(args.draft, vocabulary, args.loading.draft_format, meshes.draft)
    assert draft is not None  # there is a path
    _check_trees(args, draft)
    file = policy_file_of(draft, args.out)
    if is_main_process():
        file = check_writable(file)
        read_policies(file)  # reports a damaged file before anything is measured
    temperatures = tuple(dict.fromkeys(args.temperature or (0.0, 1.0)))
    for path in args.target:
        started = time.perf_counter()
        raw = args.effort.raw
        target = load_target(path, args.loading, [draft], raw=raw, mesh=meshes.target)
        # Prompts from all over the file.
        chosen = questions[:: max(1, len(questions) // args.effort.prompts)][: args.effort.prompts]
        prompts = [_prompt(target, question, raw=args.effort.raw) for question in chosen]
        with counting_bar(PlainColumn("elapsed"), TimeElapsedColumn()) as progress:
            calibration = Calibration(
                target,
                draft,
                prompts,
                Effort(
                    temperatures, args.effort.new_tokens, args.effort.minutes, args.effort.trees
                ),
                on_phase=partial(_bar, progress),
                environment=environment(target.dtype.name),
                started=started,
            )
            choices = []
            for choice in calibration.choices():
                if is_main_process():
                    write_policies(file, [choice.policy])
                choices.append(choice)
        for choice in choices:  # below the bars, which would draw over a table
            _show(target.source, choice)
        screen().print(f"policies written to {file}", soft_wrap=True)
        del target


def _prompt(target: Model, question: Question, *, raw: bool) -> list[int]:
    ids = encode(tokenizer_of(target), question.messages([]), raw=raw)
    return SpeculativeDecoder(target).encode(ids, question.name)


def _check_trees(args: Args, draft: Draft) -> None:
    known = num_known_tokens(draft, draft.config.vocab_size)
    if args.effort.trees and known < max(MEASURED_TOP_KS):
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
    headings = "candidate", "drafted", "MAT", "predicted", "timed only", "measured", "with prefill"
    timed = {entry.prediction.candidate.name: entry for entry in confirmed}
    shown = [entry.prediction for entry in confirmed]
    shown += [p for p in predictions if p.candidate.config is None]
    shown += [p for p in best_of_families(predictions, 12) if p not in shown]
    rows = []
    for prediction in sorted(shown, key=lambda p: -p.speedup):
        entry = timed.get(prediction.candidate.name)
        predicted = (
            prediction.mean_draft_length,
            prediction.mean_acceptance_length,
            prediction.speedup,
        )
        if entry is None:
            measured = ["-"] * 3
        else:
            figures = entry.predicted_on_timed, entry.decode_speedup, entry.estimate
            measured = [f"{figure:.2f}" for figure in figures]
        row = [prediction.candidate.name, *(f"{figure:.2f}" for figure in predicted), *measured]
        rows.append(row)
    print_table(screen(), title, headings, rows)
