"""Pictures of a report: speedup and MAT, exits, acceptance per depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from infer.bench.report import targets_of
from s2d_jax.cli.figures import save_figure
from s2d_jax.cli.short_text import short_name

Row = dict[str, Any]


def write_plots(directory: Path, rows: list[Row]) -> None:
    """Writes speedup.png, exits.png and acceptance.png; pictures without data are left out."""
    save_figure(_bars(rows), directory / "speedup.png")
    if any(row["exit_histogram"] for row in rows):
        save_figure(_exits(rows), directory / "exits.png")
    if any(row["accepted_per_depth"] for row in rows):
        save_figure(_acceptance(rows), directory / "acceptance.png")


def _bars(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    labels, targets = list(dict.fromkeys(row["label"] for row in rows)), targets_of(rows)
    height = 0.8 / len(targets)
    panels = (("speedup", "speedup"), ("mean_acceptance_length", "MAT"))
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        for i, target in enumerate(targets):
            own = {row["label"]: row[key] for row in rows if row["target"] == target}
            positions = [
                labels.index(label) + (i - (len(targets) - 1) / 2) * height for label in own
            ]
            bars = axes.barh(positions, list(own.values()), height, label=short_name(target))
            axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        axes.set_yticks(range(len(labels)), labels)
        axes.axvline(1.0, color="grey", linewidth=0.8)
        axes.margins(x=0.15)
        axes.set_title(title)
    figure.axes[0].invert_yaxis()
    figure.axes[1].legend(fontsize=7, loc="lower right")
    return figure


def _exits(rows: list[Row]) -> Figure:
    rows = [row for row in rows if row["exit_histogram"]]
    figure = Figure(figsize=(7, 0.6 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['label']}, {short_name(row['target'])}" for row in rows]
    left = [0.0] * len(rows)
    for exit_layer in sorted({exit for row in rows for exit in row["exit_histogram"]}):
        widths = [
            row["exit_histogram"].get(exit_layer, 0) / max(sum(row["exit_histogram"].values()), 1)
            for row in rows
        ]
        axes.barh(names, widths, left=left, label=f"exit {exit_layer}")
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("share of drafted tokens, or of the nodes drafted after")
    axes.legend(fontsize=7)
    return figure


def _acceptance(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        values = row["accepted_per_depth"]
        if values:
            name = f"{row['label']}, {short_name(row['target'])}"
            axes.plot(range(1, len(values) + 1), values, marker="o", label=name)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("depth")
    axes.set_ylabel("rounds that accepted so far, of those that drafted so far")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=7)
    return figure
