"""Speedup and mean acceptance length over the nodes of a tree, beside plain decoding and chains, interleaved in one process.

Usage: tree_sweep.py --target MODEL --draft DIR --questions FILE.jsonl --out DIR [--tree-depth 4 --tree-top-k 10]
  (--independent-draft MODEL --method draft for another model as draft)

Each question is answered by every method before the next; speeds are medians over the repeats, then means over the questions. A
tree of N nodes is at most N - 1 levels deep. `draft`, `verify` and `rest` are shares of rounds whose parts are run one by one.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from infer.bench.measure import Sample, measure, round_shares
from infer.bench.methods import BASELINE, Method, build_methods, check_trees, parse_methods
from s2d_jax import SamplingParams, SpeculativeDecoder, use_compile_cache
from s2d_jax.cli.command import run_command_line
from s2d_jax.cli.environment import environment
from s2d_jax.cli.figures import (
    COLOURS,
    MARKED,
    legend_below,
    log_ticks,
    ratio_scale,
    save_figure,
    wrapped,
)
from s2d_jax.cli.loading import load_listed_draft, load_target
from s2d_jax.cli.options import DraftingOptions, LoadingOptions, SamplingOptions, parse_numbers
from s2d_jax.cli.outputs import check_directory
from s2d_jax.cli.prompts import read_questions
from s2d_jax.cli.screen import PlainColumn, counting_bar, eta, screen
from s2d_jax.cli.short_text import short_name
from s2d_jax.errors import UserError
from s2d_jax.files import write_text
from s2d_jax.generation.stats import sum_stats


@dataclasses.dataclass(frozen=True)
class Args:
    """Sweep the node budget of a tree."""

    target: str
    questions: Path
    out: Path
    """Directory of sweep.md, sweep.json and sweep.png."""
    draft: str | None = None
    independent_draft: str | None = None
    method: str = "s2d"
    """What drafts: s2d, sd@K or draft."""
    nodes: str = "4,8,16,24,32,48,60"
    chains: str = "2,3,4,5,7"
    """Lengths of chains to compare with."""
    max_questions: int | None = None
    repeats: int = 1
    raw: bool = False
    phase_questions: int = 1
    """Questions on which the time of a round is split."""
    check_identity: bool = False
    """Compare greedy tokens with width-matched references, one for every width."""
    sampling: tyro.conf.OmitArgPrefixes[SamplingOptions] = SamplingOptions(max_new_tokens=96)
    drafting: tyro.conf.OmitArgPrefixes[DraftingOptions] = DraftingOptions()
    """--tree-depth, --tree-top-k and --tree-leaving shape the trees."""
    loading: tyro.conf.OmitArgPrefixes[LoadingOptions] = LoadingOptions()


@dataclasses.dataclass(frozen=True)
class Row:
    """One way of decoding. Seconds are of `generate`'s one loop; shares are of rounds run part by part."""

    name: str
    label: str
    nodes: int
    depth: int
    tree: bool
    tokens_per_second: float
    speedup: float
    decode_speedup: float
    mat: float
    round_milliseconds: float
    shares: dict[str, float]
    identical: bool | None


def main(args: Args) -> None:
    if args.draft is None and args.independent_draft is None:
        raise UserError("there is nothing to draft with; give --draft or --independent-draft")
    if args.repeats < 1:
        raise UserError(f"repeats={args.repeats} must be at least 1")
    check_directory(args.out)
    method_names(args)
    use_compile_cache(args.loading.compile_cache)
    questions = read_questions(args.questions, max_questions=args.max_questions)
    loading = args.loading
    draft, independent = (
        load_listed_draft(path, loading.draft_vocabulary if path else None, loading.draft_format)
        for path in (args.draft, args.independent_draft)
    )
    target = load_target(args.target, loading)
    methods = sweep_methods(args, target, draft, independent)
    with counting_bar(PlainColumn("{task.fields[last]}"), *eta()) as progress:
        total = len(questions) * len(methods) * args.repeats
        task = progress.add_task("sweeping", total=total, last="")

        def on_sample(sample: Sample) -> None:
            last = f"{sample.method} {sample.tokens_per_second:.1f} tok/s"
            progress.update(task, advance=1, last=last)

        samples = measure(
            *(target, methods, questions, args.sampling),
            repeats=args.repeats,
            raw=args.raw,
            check_identity=args.check_identity and args.sampling.temperature == 0,
            on_sample=on_sample,
        )
        timed, shares = questions[: args.phase_questions], {}
        task = progress.add_task("parts of rounds", total=len(methods), last="")
        for method in methods:
            shares[method.name] = round_shares(target, method, timed, args.sampling, raw=args.raw)
            progress.update(task, advance=1, last=method.name)
    rows = make_rows(methods, samples, shares, args.sampling.temperature)
    verdict = explain_best(rows)
    show(args, rows, verdict)
    settings = {**dataclasses.asdict(args), "prompts": len(questions)}
    report = {
        "environment": environment(target.dtype.name),
        "settings": settings,
        "rows": [dataclasses.asdict(row) for row in rows],
        "verdict": verdict,
    }
    write_text(args.out / "sweep.json", json.dumps(report, indent=1, default=str) + "\n")
    write_text(args.out / "sweep.md", markdown(args, rows, verdict))
    save_figure(figure(args, rows), args.out / "sweep.png")


def sweep_methods(args: Args, target, draft, independent) -> list[Method]:
    """Plain decoding, the chains, and the trees."""
    models, (chains, trees) = (target, draft, independent), method_names(args)
    methods = build_methods((BASELINE, *chains), *models, args.drafting)
    for name, options in trees.items():
        methods += build_methods((name,), *models, options)
    return methods


def method_names(args: Args) -> tuple[list[str], dict[str, DraftingOptions]]:
    """The chains, and the trees with the options of each; a tree of few nodes has fewer levels.

    Raises:
        UserError: for what cannot be swept.
    """
    chains = [f"{args.method}:{tokens}" for tokens in numbers("chains", args.chains)]
    trees = {}
    for nodes in numbers("nodes", args.nodes):
        if nodes < 2:
            raise UserError(f"--nodes {nodes} is no tree; give 2 or more")
        depth = min(args.drafting.tree_depth, nodes - 1)
        name = f"{args.method}+tree:{nodes}"
        trees[name] = dataclasses.replace(args.drafting, tree_depth=depth)
    parse_methods(",".join((*chains, *trees)))
    for name, options in trees.items():
        check_trees((name,), options)
    return chains, trees


def numbers(flag: str, text: str) -> tuple[int, ...]:
    return parse_numbers(flag, text, int) if text else ()


def make_rows(
    methods: Sequence[Method],
    samples: Sequence[Sample],
    shares: dict[str, dict[str, float]],
    temperature: float,
) -> list[Row]:
    """One row per method, in their order."""
    by_method = {m.name: [s for s in samples if s.method == m.name] for m in methods}
    plain = by_method[BASELINE]
    rows = []
    for method in methods:
        own, config = by_method[method.name], method.decoder.config
        identical = [sample.identical for sample in own]
        drafts = method.decoder.draft is not None
        rows.append(
            Row(
                name=method.name,
                label=method.label,
                nodes=verified_width(method.decoder, temperature),
                depth=config.draft_width if drafts else 0,
                tree=drafts and config.tree is not None,
                tokens_per_second=mean_speed(own, lambda s: s.tokens_per_second),
                speedup=ratio(own, plain, lambda s: s.tokens_per_second),
                decode_speedup=ratio(own, plain, lambda s: s.decode_tokens_per_second),
                mat=sum_stats([s.stats for s in own]).mean_acceptance_length,
                round_milliseconds=1e3 * statistics.median(map(seconds_per_round, own)),
                shares=shares[method.name],
                identical=None if None in identical else all(identical),
            )
        )
    return rows


def verified_width(decoder: SpeculativeDecoder, temperature: float) -> int:
    """Positions of a target pass; trees of drawn children have fewer than were asked for."""
    row = SamplingParams(temperature=temperature)
    return decoder.prepare([[0]], row)[0].verifier.widths[-1]


def mean_speed(samples: Sequence[Sample], speed: Callable[[Sample], float]) -> float:
    """Mean over the questions of the median over the repeats."""
    of_question = itertools.groupby(
        sorted(samples, key=lambda s: str(s.question_id)), key=lambda s: str(s.question_id)
    )
    return statistics.fmean(statistics.median(map(speed, group)) for _, group in of_question)


def ratio(samples, plain, speed) -> float:
    return mean_speed(samples, speed) / mean_speed(plain, speed)


def seconds_per_round(sample: Sample) -> float:
    return sample.stats.seconds["decode"] / max(sample.stats.target_forwards, 1)


def explain_best(rows: Sequence[Row]) -> list[str]:
    """Which tree is the fastest, why not its neighbours, and what trees gain over chains."""
    trees = sorted((row for row in rows if row.tree), key=lambda row: row.nodes)
    chains = [row for row in rows if not row.tree and row.depth]
    if not trees:
        return []
    best = max(trees, key=lambda row: row.speedup)
    lines = [
        f"The best tree has {best.nodes} nodes: speedup {best.speedup:.2f}, MAT {best.mat:.2f}."
    ]
    at = trees.index(best)
    for other in (*trees[max(at - 1, 0) : at], *trees[at + 1 : at + 2]):
        longer = best.round_milliseconds / other.round_milliseconds
        lines.append(
            f"Against {other.nodes} nodes its round takes {longer:.2f} times as long and emits "
            f"{best.mat / other.mat:.2f} times as many tokens."
        )
    if chains:
        chain = max(chains, key=lambda row: row.speedup)
        gain = best.speedup / chain.speedup
        lines.append(
            f"The best chain has {chain.depth} tokens: speedup {chain.speedup:.2f}, MAT {chain.mat:.2f}; "
            f"the tree is {gain:.2f} times as fast."
        )
    for chain in chains:
        equal = [row for row in trees if row.depth == chain.depth]
        if equal:
            widest = max(equal, key=lambda row: row.mat)
            lines.append(
                f"At depth {chain.depth} the chain's MAT is {chain.mat:.2f}, that of {widest.nodes} nodes {widest.mat:.2f}: "
                f"{widest.mat / chain.mat:.2f} times."
            )
    return lines


HEADER = (
    *("method", "depth", "tok/s", "speedup", "decode", "MAT", "ms/round"),
    *("draft", "verify", "rest", "same"),
)


def cells(row: Row) -> list[str]:
    shares = [f"{row.shares[phase]:.0%}" for phase in row.shares] or ["-"] * 3
    return [
        row.name,
        str(row.depth),
        f"{row.tokens_per_second:.2f}",
        f"{row.speedup:.2f}",
        f"{row.decode_speedup:.2f}",
        f"{row.mat:.2f}",
        f"{row.round_milliseconds:.1f}",
        *shares,
        {None: "-", True: "yes", False: "no"}[row.identical],
    ]


def title_of(args: Args) -> str:
    return f"{short_name(args.target)}, top-k {args.drafting.tree_top_k}, temperature {args.sampling.temperature:g}"


def show(args: Args, rows: Sequence[Row], verdict: Sequence[str]) -> None:
    table = Table(title=title_of(args), title_justify="left", padding=(0, 0, 0, 1))
    for number, name in enumerate(HEADER):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*cells(row))
    console = screen()
    console.print(table)
    for line in verdict:
        console.print(line, soft_wrap=True)


def markdown(args: Args, rows: Sequence[Row], verdict: Sequence[str]) -> str:
    divider = ["---", *["---:"] * (len(HEADER) - 1)]
    lines = [HEADER, divider, *map(cells, rows)]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"# {title_of(args)}\n\n{body}\n\n" + "\n".join(verdict) + "\n"


def figure(args: Args, rows: Sequence[Row]) -> Figure:
    """Speedup and MAT over the nodes; dashed, the chains; dotted, plain decoding."""
    made = Figure(figsize=(9, 4), layout="constrained")
    trees = [row for row in rows if row.tree]
    chains = [row for row in rows if not row.tree and row.depth]
    panels = (
        ("speedup", "speedup", "times plain decoding's tokens per second"),
        ("mat", "mean acceptance length (MAT)", "tokens per target pass"),
    )
    for axes, (field, name, unit) in zip(made.subplots(1, 2), panels, strict=True):
        values = [getattr(row, field) for row in trees]
        axes.plot([row.nodes for row in trees], values, color=COLOURS[0], marker="o")
        if chains:
            # In the left picture the fastest chain, in the right one the chain as deep as the tree, if it was measured.
            equal = [row for row in chains if row.depth == args.drafting.tree_depth]
            fastest = max(chains, key=lambda row: row.speedup)
            chain = equal[0] if field == "mat" and equal else fastest
            axes.axhline(getattr(chain, field), color=COLOURS[2], linestyle="--")
            name += f"\n(chain: {chain.depth} tokens)"
        axes.axhline(1.0, color=MARKED, linestyle=":")
        axes.set(xlabel="nodes that the target verifies", ylabel=unit, title=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.margins(y=0.15)
        axes.set_yscale(ratio_scale(values))
        log_ticks(axes.yaxis)
        axes.grid(alpha=0.3)
    panel = made.axes[0]
    made.suptitle(wrapped(title_of(args), 90))
    lines = (
        ("tree", COLOURS[0], "o-"),
        ("chain", COLOURS[2], "--"),
        ("plain decoding", MARKED, ":"),
    )
    legend_below(made, [panel.plot([], [], s, color=c, label=name)[0] for name, c, s in lines])
    return made


if __name__ == "__main__":
    run_command_line(Args, main)
