"""Methods compared on the same prompts, with tables, files and plots."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from infer.bench.args import Args
from infer.bench.kernels import bench_kernels
from infer.bench.measure import Sample, measure, round_shares
from infer.bench.methods import BASELINE, Method, build_methods, check_trees, parse_methods
from infer.bench.plots import write_plots
from infer.bench.report import make_rows, show_report, write_report
from s2d_jax.cli.agreement import check_agreement, several_processes
from s2d_jax.cli.environment import environment
from s2d_jax.cli.loading import (
    Meshes,
    keep_programs,
    load_listed_draft,
    load_target,
    meshes_of_flags,
    tokenizer_of,
)
from s2d_jax.cli.options import MeshOptions, require_targets
from s2d_jax.cli.outputs import check_directory
from s2d_jax.cli.profiling import write_profile
from s2d_jax.cli.prompts import Question, encode, read_questions
from s2d_jax.cli.screen import PlainColumn, counting_bar, eta, screen
from s2d_jax.cli.short_text import short_name
from s2d_jax.errors import UserError
from s2d_jax.files import write_text
from s2d_jax.generation.placement import Placement
from s2d_jax.processes import is_main_process
from s2d_jax.weights.model import Draft, Model
from s2d_jax.weights.prepare import format_kept


def bench(args: Args) -> None:
    """Measures every target, prints the tables and writes the report."""
    if is_main_process():
        check_directory(args.out)
    _check_one_process(args)
    if args.measuring.kernels:
        bench_kernels(args.target[0] if args.target else None, args.out)
        return
    require_targets(args.target)
    if args.measuring.profile is not None:
        check_directory(args.measuring.profile, "--profile")
    keep_programs(args.loading.compile_cache)
    names = parse_methods(args.methods)
    args.sampling.params()
    _check_drafting(args, names)
    questions = _questions(args)
    check_agreement({"questions": [question.turns for question in questions]})
    meshes = meshes_of_flags(args.mesh)
    draft, independent = _load_drafts(args, meshes)
    rows, samples, dtype, formats = [], [], "", []
    for path in args.target:
        drafts, raw = [draft, independent], args.measuring.raw
        target = load_target(path, args.loading, drafts, raw=raw, mesh=meshes.target)
        dtype = target.dtype.name
        formats.append(format_kept(target))
        methods = build_methods(names, target, draft, independent, args.drafting)
        for method in methods:  # reports a missing policy before anything is measured
            method.decoder.settled(args.sampling.temperature)
        own = _measure(args, target, methods, questions)
        shares = {
            method.name: round_shares(
                target,
                method,
                questions[: args.measuring.phase_questions],
                args.sampling,
                raw=args.measuring.raw,
            )
            for method in methods
        }
        rows += make_rows(path, args.sampling.temperature, methods, own, shares)
        samples += [_sample_row(path, sample) for sample in own]
        if args.measuring.profile is not None:
            _profile(args, args.measuring.profile / short_name(path), target, methods, questions[0])
        del target, methods
    if not is_main_process():
        return
    settings = _settings(args, questions, formats, [draft, independent], meshes)
    write_report(args.out, environment(dtype), settings, rows)
    lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    write_text(args.out / "samples.jsonl", "".join(lines))
    write_plots(args.out, rows, draft.draft_config.exit_layers if draft else ())
    show_report(screen(), settings, rows)


def _check_one_process(args: Args) -> None:
    """Raises UserError for flags that look at one process, or at one device, where there are more."""
    if args.measuring.kernels and args.mesh != MeshOptions():
        raise UserError("--kernels times products on one device; leave --mesh.* out")
    for flag in ("kernels", "profile"):
        if getattr(args.measuring, flag) and several_processes():
            raise UserError(f"--{flag} looks at one process; run it in one, or leave it out")


def _questions(args: Args) -> list[Question]:
    if args.questions is None:
        raise UserError("no --questions were given; give a file of prompts")
    categories = tuple(args.measuring.categories.split(",")) if args.measuring.categories else ()
    most = args.measuring.max_questions
    return read_questions(args.questions, categories=categories, max_questions=most)


def _load_drafts(args: Args, meshes: Meshes) -> list[Draft | None]:
    """The sorted and the independent draft, where decoders would put them, so that those of all methods share them."""
    vocabulary, weight_format = args.loading.draft_vocabulary, args.loading.draft_format
    paths = args.draft, args.measuring.independent_draft
    if vocabulary is not None and not any(paths):
        raise UserError("--draft-vocabulary needs a draft; give --draft or --independent-draft")
    placement, drafts = Placement(meshes.target), []
    for path in paths:
        listed = vocabulary if path else None
        draft = load_listed_draft(path, listed, weight_format, meshes.draft)
        if draft is not None:
            params = placement.put_draft(draft.device_params)
            draft = dataclasses.replace(draft, params=params)
        drafts.append(draft)
    return drafts


def _profile(args: Args, directory: Path, target, methods, question: Question) -> None:
    prompt = encode(tokenizer_of(target), question.messages([]), raw=args.measuring.raw)
    for method in methods:
        write_profile(directory / method.name, method.decoder, prompt, args.sampling.params())


def _check_drafting(args: Args, names: tuple[str, ...]) -> None:
    if args.drafting.policy is not None:
        raise UserError("--policy auto is a method here; add auto to --methods")
    check_trees(names, args.drafting)
    dataclasses.replace(args.drafting, policy_file=None).config()


def _measure(
    args: Args, target, methods: Sequence[Method], questions: list[Question]
) -> list[Sample]:
    with counting_bar(PlainColumn("{task.fields[last]}"), *eta()) as progress:
        total = len(questions) * len(methods) * args.measuring.repeats
        task = progress.add_task(Path(target.source).name[:32], total=total, last="")

        def on_sample(sample: Sample) -> None:
            last = f"{sample.method} {sample.tokens_per_second:.1f} tok/s"
            progress.update(task, advance=1, last=last)

        greedy = args.sampling.temperature == 0
        return measure(
            target,
            methods,
            questions,
            args.sampling,
            repeats=args.measuring.repeats,
            raw=args.measuring.raw,
            check_identity=greedy and not args.measuring.skip_identity_check,
            on_sample=on_sample,
        )


def _sample_row(target: str, sample: Sample) -> dict:
    row = {"target": target, **dataclasses.asdict(sample)}
    mat = sample.stats.mean_acceptance_length
    return {**row, "tokens_per_second": sample.tokens_per_second, "mean_acceptance_length": mat}


def _settings(
    args: Args,
    questions: list[Question],
    target_formats: Sequence[str],
    drafts: Sequence[Model | None],
    meshes: Meshes,
) -> dict:
    """What was asked for; of the weight formats, what the models were loaded in."""
    return {
        "questions": str(args.questions),
        "prompts": len(questions),
        "turns": sum(len(question.turns) for question in questions),
        "draft": args.draft,
        "independent_draft": args.measuring.independent_draft,
        "baseline": f"{BASELINE}: the target alone, one position per pass, on the same engine",
        "batch_size": 1,
        "repeats": args.measuring.repeats,
        "chat_template": not args.measuring.raw,
        **dataclasses.asdict(args.sampling),
        **dataclasses.asdict(args.drafting),
        **dataclasses.asdict(args.loading),
        **_mesh_settings(meshes, drafts),
        "target_format": _listed(target_formats),
        "draft_format": _listed([format_kept(draft) for draft in drafts if draft is not None]),
    }


def _mesh_settings(meshes: Meshes, drafts: Sequence[Model | None]) -> dict:
    """The mesh that the models lie on; nothing for one device."""
    if meshes.target is None:
        return {}
    found = {f"mesh.{axis}": meshes.target.shape[axis] for axis in ("data", "tensor")}
    if any(draft is not None for draft in drafts):
        found["mesh.draft"] = "whole" if meshes.draft is None else "split"
    return found


def _listed(formats: Sequence[str]) -> str | None:
    """The format of all models, or of each in their order where they differ; None of no model.

    >>> _listed(["f32", "f32"]), _listed(["bf16", "f32"]), _listed([])
    ('f32', 'bf16, f32', None)
    """
    return (formats[0] if len(set(formats)) == 1 else ", ".join(formats)) or None
