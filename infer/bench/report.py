"""From samples to rows, and from rows to report.json, report.md and the tables on the screen."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from infer.bench.measure import Sample
from infer.bench.methods import BASELINE, Method
from s2d_jax.cli.short_text import rates, shares, short_name
from s2d_jax.cli.tables import print_table
from s2d_jax.files import write_text
from s2d_jax.generation.stats import sum_stats

Row = dict[str, Any]


def make_rows(
    target: str,
    temperature: float,
    methods: Sequence[Method],
    samples: Sequence[Sample],
    shares_by_method: Mapping[str, dict[str, float]],
) -> list[Row]:
    """One row per method of one target.

    Args:
        target: its path.
        temperature: the temperature of all samples.
        methods: in the order of the rows; speedups are over the baseline's samples.
        samples: the samples of all methods.
        shares_by_method: shares of a round's time by phase; empty if not measured.
    """
    by_method = {m.name: [s for s in samples if s.method == m.name] for m in methods}
    baseline = by_method[BASELINE]
    return [
        {
            "method": method.name,
            "label": method.label,
            "target": target,
            "temperature": temperature,
            **_figures(by_method[method.name], baseline),
            "seconds_by_phase": _phases(
                by_method[method.name], shares_by_method.get(method.name, {})
            ),
            "categories": _by_category(by_method[method.name], baseline),
        }
        for method in methods
    ]


def _phases(samples: Sequence[Sample], round_shares: dict[str, float]) -> dict[str, float]:
    """Seconds of prefill and decode, and of the parts of decode where their shares are known."""
    seconds = sum_stats([sample.stats for sample in samples]).seconds
    known = {phase: seconds[phase] for phase in ("prefill", "decode")}
    return known | {phase: share * known["decode"] for phase, share in round_shares.items()}


def _figures(samples: Sequence[Sample], baseline: Sequence[Sample]) -> Row:
    stats = sum_stats([sample.stats for sample in samples])
    identical = [sample.identical for sample in samples]
    return {
        "tokens_per_second": _mean_speed(samples),
        "speedup": _mean_speed(samples) / _mean_speed(baseline),
        "decode_only_speedup": _decode_speedup(samples, baseline),
        "mean_acceptance_length": stats.mean_acceptance_length,
        "accepted_per_depth": list(stats.acceptance_per_depth),
        "draft_acceptance_rate": stats.draft_acceptance_rate,
        "exit_histogram": stats.exit_histogram,
        "draft_steps": stats.draft_steps,
        "identical_to_baseline": None if None in identical else all(identical),
        "prompts_not_identical": [s.question_id for s in samples if s.identical is False],
        "prompts": len({sample.question_id for sample in samples}),
        "turns_left_out": sum(sample.turns_left_out for sample in samples),
        "runs": len(samples),
        "new_tokens": stats.emitted_tokens,
        "target_forwards": stats.target_forwards,
        "plain_rounds": stats.plain_rounds,
        "draft_forwards": stats.draft_forwards,
        "drafted_tokens": stats.drafted_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "mean_draft_length": stats.mean_draft_length,
        "draft_length_histogram": stats.draft_length_histogram,
        "compile_seconds": sum(sample.compile_seconds for sample in samples),
    }


def _mean_speed(samples: Sequence[Sample]) -> float:
    return statistics.fmean(sample.tokens_per_second for sample in samples)


def _decode_speedup(samples: Sequence[Sample], baseline: Sequence[Sample]) -> float | None:
    """None when every answer had only the token that prefill emits."""
    speeds = [statistics.fmean(s.decode_tokens_per_second for s in x) for x in (samples, baseline)]
    return speeds[0] / speeds[1] if speeds[1] else None


def _by_category(samples: Sequence[Sample], baseline: Sequence[Sample]) -> dict[str, Row]:
    figures = {}
    for category in dict.fromkeys(sample.category for sample in baseline):
        own = [sample for sample in samples if sample.category == category]
        plain = [sample for sample in baseline if sample.category == category]
        figures[category] = {
            "speedup": _mean_speed(own) / _mean_speed(plain),
            "mean_acceptance_length": sum_stats([s.stats for s in own]).mean_acceptance_length,
            "prompts": len({sample.question_id for sample in own}),
        }
    return figures


def write_report(directory: Path, environment: Row, settings: Row, rows: list[Row]) -> None:
    """Writes report.json and report.md, each whole or not at all."""
    report = {"environment": environment, "settings": settings, "rows": rows}
    write_text(directory / "report.json", json.dumps(report, indent=2) + "\n")
    write_text(directory / "report.md", _markdown(report))


def show_report(console: Console, settings: Row, rows: list[Row]) -> None:
    """Prints the table of speedup / MAT, then the details of each target."""
    tables = [_summary_table(settings, rows)]
    tables += [_detail_table(target, rows) for target in targets_of(rows)]
    for title, headings, lines in tables:
        print_table(console, title, headings, lines)


def _markdown(report: Row) -> str:
    rows, settings = report["rows"], report["settings"]
    tables = [_summary_table(settings, rows)]
    tables += [_detail_table(target, rows) for target in targets_of(rows)]
    tables += [_category_table(t, rows) for t in targets_of(rows) if len(rows[0]["categories"]) > 1]
    parts = ["# Benchmark"]
    for title, header, lines in tables:
        divider = ["---"] + ["---:"] * (len(header) - 1)
        body = "\n".join(f"| {' | '.join(cells)} |" for cells in (header, divider, *lines))
        parts.append(f"## {title}\n\n{body}")
    for title in ("environment", "settings"):
        listed = "\n".join(f"- {key}: {value}" for key, value in report[title].items())
        parts.append(f"## {title.capitalize()}\n\n{listed}")
    return "\n\n".join(parts) + "\n"


def targets_of(rows: list[Row]) -> list[str]:
    """The targets, in the order measured."""
    return list(dict.fromkeys(row["target"] for row in rows))


def _summary_table(settings: Row, rows: list[Row]) -> tuple[str, list[str], list[list[str]]]:
    targets = targets_of(rows)
    lines = []
    for label in dict.fromkeys(row["label"] for row in rows):
        cells = {row["target"]: row for row in rows if row["label"] == label}
        lines.append([label, *(_speedup_and_mat(cells[target]) for target in targets)])
    title = f"speedup / MAT, temperature {settings['temperature']:g}, {rows[0]['prompts']} prompts"
    for axis in ("data", "tensor"):
        if settings.get(f"mesh.{axis}", 1) > 1:
            title += f", {axis} {settings[f'mesh.{axis}']}"
    return title, ["method", *(short_name(target) for target in targets)], lines


def _detail_table(target: str, rows: list[Row]) -> tuple[str, list[str], list[list[str]]]:
    header = ["method", "tok/s", "speedup", "decode", "MAT", "accepted per depth", "exits", "same"]
    lines = []
    for row in (row for row in rows if row["target"] == target):
        identical = {None: "-", True: "yes", False: f"{len(row['prompts_not_identical'])} differ"}
        decode = row["decode_only_speedup"]
        cells = [f"{row['speedup']:.2f}", "-" if decode is None else f"{decode:.2f}"]
        lines.append(
            [
                row["label"],
                f"{row['tokens_per_second']:.1f}",
                *cells,
                f"{row['mean_acceptance_length']:.2f}",
                rates(row["accepted_per_depth"]),
                shares(row["exit_histogram"]),
                identical[row["identical_to_baseline"]],
            ]
        )
    left_out = sum(row["turns_left_out"] for row in rows if row["target"] == target)
    note = f", {left_out} later turns left out: longer than its context" if left_out else ""
    return short_name(target) + note, header, lines


def _category_table(target: str, rows: list[Row]) -> tuple[str, list[str], list[list[str]]]:
    own = [row for row in rows if row["target"] == target]
    header = ["category", *(row["label"] for row in own)]
    lines = [
        [category or "-", *(_speedup_and_mat(row["categories"][category]) for row in own)]
        for category in own[0]["categories"]
    ]
    return f"{short_name(target)} by category, speedup / MAT", header, lines


def _speedup_and_mat(figures: Row) -> str:
    return f"{figures['speedup']:.2f} / {figures['mean_acceptance_length']:.2f}"
