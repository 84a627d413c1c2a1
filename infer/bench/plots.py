"""Pictures of a report: speedup and MAT, exits, acceptance per depth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from infer.bench.report import targets_of
from s2d_jax.cli.figures import (
    COLOURS,
    MARKED,
    Style,
    exit_styles,
    legend_below,
    line_styles,
    log_ticks,
    ratio_scale,
    save_figure,
    wrapped,
)
from s2d_jax.cli.short_text import short_name

Row = dict[str, Any]
_LABEL_LETTERS, _LINE_INCHES, _BAR_INCHES = 34, 0.16, 0.15


def write_plots(directory: Path, rows: list[Row], exits: Sequence[int] = ()) -> None:
    """Writes speedup.png, exits.png and acceptance.png; pictures without data are left out.

    Args:
        exits: the draft's, ascending, so that colours are the same as in the pictures of its training.
    """
    save_figure(speedup_figure(rows), directory / "speedup.png")
    if any(row["exit_histogram"] for row in rows):
        save_figure(exits_figure(rows, exits), directory / "exits.png")
    if any(row["accepted_per_depth"] for row in rows):
        save_figure(acceptance_figure(rows), directory / "acceptance.png")


def speedup_figure(rows: list[Row]) -> Figure:
    """Bars of speedup and MAT: groups are methods, colours are targets. Bars on a log axis begin at the baseline."""
    labels, names = list(dict.fromkeys(row["label"] for row in rows)), _names(rows)
    ticks = [wrapped(label, _LABEL_LETTERS) for label in labels]
    group = max(1.25 * len(names) * _BAR_INCHES, _lines(ticks) * _LINE_INCHES + 0.1)
    figure = Figure(figsize=(10, 1.3 + group * len(labels)), layout="constrained")
    panels = (
        ("speedup", "speedup", "times the baseline's tokens per second"),
        ("mean_acceptance_length", "mean acceptance length (MAT)", "tokens per target pass"),
    )
    height = 0.8 / len(names)
    for axes, (key, title, unit) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        scale = ratio_scale(row[key] for row in rows)
        start = 1.0 if scale == "log" else 0.0
        axes.set_xscale(scale)
        for i, target in enumerate(names):
            own = [row for row in rows if row["target"] == target]
            values = [row[key] for row in own]
            places = [
                labels.index(row["label"]) + (i - (len(names) - 1) / 2) * height for row in own
            ]
            bars = axes.barh(
                *(places, [value - start for value in values], height),
                left=start,
                **_fill(i),
            )
            texts = [f"{value:.2f}" for value in values]
            axes.bar_label(bars, texts, padding=2, fontsize=7)
        axes.axvline(1.0, color=MARKED, linewidth=1.2, linestyle="--", zorder=0)
        axes.margins(x=0.15)
        log_ticks(axes.xaxis)
        axes.set(title=title, xlabel=unit)
    figure.axes[0].set_yticks(range(len(labels)), ticks)
    figure.axes[0].set_ylim(len(labels) - 0.4, -0.6)
    handles = [Patch(**_fill(i), label=name) for i, name in enumerate(names.values())]
    baseline = Line2D([], [], color=MARKED, linestyle="--", label=f"baseline: {labels[0]}")
    legend_below(figure, [*handles, baseline])
    return figure


def _fill(number: int) -> Style:
    """The look of the bars of target `number`; after the last colour, colours repeat with stripes."""
    again, colour = divmod(number, len(COLOURS))
    stripes = {"hatch": "//" * again or None, "edgecolor": "white", "linewidth": 0}
    return {"facecolor": COLOURS[colour], **stripes}


def exits_figure(rows: list[Row], exits: Sequence[int] = ()) -> Figure:
    """A bar per method, divided by the exits that drafted its tokens; a panel per target."""
    rows = [row for row in rows if row["exit_histogram"]]
    others = {layer for row in rows for layer in row["exit_histogram"]} - set(exits)
    styles = exit_styles([*exits, *sorted(others)])
    figure, panels = _panels_below_each_other(rows)
    for axes, own in zip(panels, _by_target(rows).values(), strict=True):
        left = [0.0] * len(own)
        for layer, style in styles.items():
            totals = [max(sum(row["exit_histogram"].values()), 1) for row in own]
            counts = [row["exit_histogram"].get(layer, 0) for row in own]
            shares = [count / total for count, total in zip(counts, totals, strict=True)]
            bars = axes.barh(
                range(len(own)), shares, 0.75, left=left, color=style["color"], edgecolor="white"
            )
            texts = [f"{share:.0%}" if share >= 0.07 else "" for share in shares]
            dark = sum(style["color"][:3]) < 1.5
            axes.bar_label(
                bars, texts, label_type="center", fontsize=7, color="white" if dark else "black"
            )
            left = [start + share for start, share in zip(left, shares, strict=True)]
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
    figure.axes[-1].set_xlabel("share of drafted tokens, or of the nodes drafted after")
    handles = [
        Patch(color=style["color"], label=f"exit {layer}") for layer, style in styles.items()
    ]
    legend_below(figure, handles)
    return figure


def _panels_below_each_other(rows: list[Row]) -> tuple[Figure, list[Axes]]:
    """A panel per target with a place on the y axis for each of its methods."""
    ticks = {
        target: [wrapped(row["label"], _LABEL_LETTERS) for row in own]
        for target, own in _by_target(rows).items()
    }
    place = max(_lines(names) for names in ticks.values()) * _LINE_INCHES + 0.08
    heights = [len(names) * place for names in ticks.values()]
    figure = Figure(figsize=(8, 0.6 + sum(heights) + 0.3 * len(ticks)), layout="constrained")
    panels = figure.subplots(len(ticks), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    names = _names(rows)
    for axes, (target, texts) in zip(panels, ticks.items(), strict=True):
        axes.set_yticks(range(len(texts)), texts, fontsize=8)
        axes.set_ylim(len(texts) - 0.45, -0.55)
        axes.set_title(wrapped(names[target], 70), fontsize=9)
    return figure, list(panels)


def acceptance_figure(rows: list[Row]) -> Figure:
    """Acceptance over depth: a panel per target, a line per method."""
    rows = [row for row in rows if row["accepted_per_depth"]]
    styles, names = line_styles(dict.fromkeys(row["label"] for row in rows)), _names(rows)
    columns = min(len(names), 2)
    across = math.ceil(len(names) / columns)
    figure = Figure(figsize=(max(4.5 * columns, 8.5), 3.6 * across), layout="constrained")
    grid = figure.subplots(across, columns, sharey=True, squeeze=False).flat
    for axes, (target, own) in zip(grid, _by_target(rows).items(), strict=False):
        for row in own:
            values = row["accepted_per_depth"]
            depths = range(1, len(values) + 1)
            axes.plot(depths, values, **styles[row["label"]], markersize=4, linewidth=1.2)
        axes.set(ylim=(-0.02, 1.02), xlabel="depth of the drafted token")
        axes.set_title(wrapped(names[target], 100 // columns), fontsize=9)
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("rounds that accepted so far,\nof those that drafted so far")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(alpha=0.3)
    for axes in grid:
        axes.set_axis_off()
    legend_below(figure, [Line2D([], [], **style, label=label) for label, style in styles.items()])
    return figure


def _by_target(rows: list[Row]) -> dict[str, list[Row]]:
    return {target: [row for row in rows if row["target"] == target] for target in targets_of(rows)}


def _names(rows: list[Row]) -> dict[str, str]:
    """Short names of the targets; paths where two short names are equal."""
    short = {target: short_name(target) for target in targets_of(rows)}
    names = list(short.values())
    return {target: name if names.count(name) == 1 else target for target, name in short.items()}


def _lines(texts: Iterable[str]) -> int:
    return max(text.count("\n") + 1 for text in texts)
