"""Training runs beside each other: held-out agreement with the target and the MAT that it implies, by exit.

Prints the last row of each run, and saves the curves over the steps.

Usage: compare_runs.py OUT.png NAME=RUN_DIR ...
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from s2d_jax.cli.figures import exit_styles, legend_below, save_figure
from s2d_jax.cli.screen import screen

PANELS = (
    ("agreement_per_exit", "held-out agreement with the target", "share of tokens"),
    ("mat_per_exit", "chain MAT implied by it", "tokens per target pass"),
)
DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 4)))


def held_out(run_dir: Path) -> list[dict]:
    """What the run measured on its held-out rows, by step."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get("held_out")]


def exits_of(runs: dict[str, list[dict]]) -> list[int]:
    """All exits that any of the runs has."""
    return sorted({int(e) for rows in runs.values() for e in rows[0]["agreement_per_exit"]})


def curves(runs: dict[str, list[dict]]) -> Figure:
    """Colours are exits, as in the pictures of each run; dashes are runs."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    exits = exit_styles(exits_of(runs))
    dashes = {name: DASHES[i % len(DASHES)] for i, name in enumerate(runs)}
    for axes, (key, title, unit) in zip(figure.subplots(1, 2), PANELS, strict=True):
        for name, rows in runs.items():
            for layer, style in exits.items():
                if str(layer) in rows[0][key]:
                    values = np.array([row[key][str(layer)] for row in rows], float)
                    steps = [row["step"] for row in rows]
                    every = -(-len(steps) // 12)
                    line = {**style, "linestyle": dashes[name], "markevery": every}
                    axes.plot(steps, values, **line, markersize=4)
        axes.set(xlabel="step", ylabel=unit, title=title)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
    handles = [Line2D([], [], **style, label=f"exit {layer}") for layer, style in exits.items()]
    handles += [
        Line2D([], [], color="black", linestyle=style, label=name) for name, style in dashes.items()
    ]
    legend_below(figure, handles)
    return figure


def table(runs: dict[str, list[dict]]) -> Table:
    exits = exits_of(runs)
    shown = Table(
        "run", "step", "loss", title="agreement and MAT at each exit", title_justify="left"
    )
    for what in ("agreed", "MAT"):
        for exit_layer in exits:
            shown.add_column(f"{what}\n{exit_layer}", justify="right")
    shown.add_column("S2D MAT", justify="right")
    for name, rows in runs.items():
        last = rows[-1]
        agreement = [last["agreement_per_exit"].get(str(e)) for e in exits]
        mat = [last["mat_per_exit"].get(str(e)) for e in exits]
        shown.add_row(
            *(name, str(last["step"]), f"{last['loss']:.3f}"),
            *("" if x is None else f"{x:.1%}" for x in agreement),
            *("" if x is None else f"{x:.2f}" for x in mat),
            f"{last['s2d_mat']:.2f}",
        )
    return shown


if __name__ == "__main__":
    named = dict(word.split("=", 1) for word in sys.argv[2:])
    found = {name: held_out(Path(run_dir)) for name, run_dir in named.items()}
    screen().print(table(found))
    save_figure(curves(found), Path(sys.argv[1]))
