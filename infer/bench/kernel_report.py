"""The table of product forms: on the screen, as kernels.json and kernels.md, and as a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console
from rich.table import Table
from rich.text import Text

from s2d_jax.cli.figures import Style, legend_below, line_styles, log_ticks, save_figure
from s2d_jax.files import write_text

Report = dict[str, Any]


def write_kernels(directory: Path, report: Report) -> None:
    """Writes kernels.json, kernels.md and kernels.png, each whole or not at all."""
    write_text(directory / "kernels.json", json.dumps(report, indent=2) + "\n")
    write_text(directory / "kernels.md", _markdown(report))
    save_figure(kernels_figure(report), directory / "kernels.png")


def show_kernels(console: Console, report: Report) -> None:
    """Prints milliseconds and GB/s of every form; what `linear` picks is in bold with a star."""
    for title, key in _TABLES:
        header, lines = _table(report, key)
        table = Table(title=title, title_justify="left", caption=_machine(report))
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i < 2 else "right")
        for line in lines:
            table.add_row(*(Text(cell, "bold" if "*" in cell else "") for cell in line))
        console.print(table)


_TABLES = (
    ("milliseconds by rows (* is what linear uses)", "milliseconds"),
    ("GB/s of weights by rows", "gb_per_s"),
    ("GF/s by rows", "gf_per_s"),
)


def _machine(report: Report) -> str:
    machine, chain = report["machine"], report["chain"]
    dims = " x ".join(map(str, chain["dims"]))
    return (
        f"memory reads {machine['gb_per_s']:.1f} GB/s, f32 products {machine['gf_per_s']:.0f} GF/s; "
        f"{chain['num_layers']} layers of {dims} in one loop"
    )


def _table(report: Report, key: str) -> tuple[list[str], list[list[str]]]:
    counts = sorted({row["rows"] for row in report["rows"]})
    cells: dict[tuple[str, str], dict[int, Report]] = {}
    for row in report["rows"]:
        cells.setdefault((row["format"], row["form"]), {})[row["rows"]] = row
    lines = []
    for (weight_format, form), by_rows in cells.items():
        temporary = max(row["temporary_mb"] for row in by_rows.values())
        values = [f"{_short(by_rows[n][key])}{'*' * by_rows[n]['picked']}" for n in counts]
        lines.append([weight_format, form, *values, f"{temporary:.0f}"])
    return ["format", "form", *map(str, counts), "temp MB"], lines


def _short(value: float) -> str:
    """Three digits: 1.23, 12.3, 123."""
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f}"


def _markdown(report: Report) -> str:
    parts = ["# Forms of a product", _machine(report) + "."]
    for title, key in _TABLES:
        header, lines = _table(report, key)
        divider = ["---", "---"] + ["---:"] * (len(header) - 2)
        body = "\n".join(f"| {' | '.join(cells)} |" for cells in (header, divider, *lines))
        parts.append(f"## {title.capitalize()}\n\n{body}")
    listed = "\n".join(f"- {key}: {value}" for key, value in report["environment"].items())
    parts.append(f"## Environment\n\n{listed}")
    return "\n\n".join(parts) + "\n"


def kernels_figure(report: Report) -> Figure:
    """Milliseconds over rows: a panel per format, a line per form, stars on what `linear` uses."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    formats = list(dict.fromkeys(row["format"] for row in report["rows"]))
    styles = line_styles(dict.fromkeys(row["form"] for row in report["rows"]))
    panels = figure.subplots(1, len(formats), sharey=True, squeeze=False)[0]
    for axes, weight_format in zip(panels, formats, strict=True):
        own = [row for row in report["rows"] if row["format"] == weight_format]
        for form in dict.fromkeys(row["form"] for row in own):
            line = [row for row in own if row["form"] == form]
            columns = [[row[key] for row in line] for key in ("rows", "milliseconds")]
            axes.plot(*columns, **styles[form], markersize=4)
        picked = [row for row in own if row["picked"]]
        places = [[row[key] for row in picked] for key in ("rows", "milliseconds")]
        axes.plot(*places, **_PICKED, zorder=3)
        axes.set(xscale="log", yscale="log", title=weight_format, xlabel="rows of the activations")
        counts = _apart(sorted({row["rows"] for row in own}))
        axes.set_xticks(counts, [str(count) for count in counts], fontsize=8)
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("milliseconds")
    log_ticks(panels[0].yaxis)
    handles = [Line2D([], [], **style, label=form) for form, style in styles.items()]
    legend_below(figure, [*handles, Line2D([], [], **_PICKED, label="what linear uses")])
    return figure


_PICKED: Style = {"color": "black", "marker": "*", "markersize": 10, "linestyle": ""}


def _apart(counts: list[int]) -> list[int]:
    """The counts whose labels do not touch each other on a log axis, the largest first."""
    kept = counts[-1:]
    for count in counts[-2::-1]:
        if 1.3 * count <= kept[-1]:
            kept.append(count)
    return kept
