"""Training runs beside each other: held-out agreement with the target and the MAT that it implies, by exit.

Prints the last row of each run, and saves the curves over the steps.

Usage: compare_runs.py OUT.png NAME=RUN_DIR ...
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from s2d_jax.cli.figures import save_figure
from s2d_jax.cli.screen import screen

PANELS = (("agreement_per_exit", "held-out agreement"), ("mat_per_exit", "chain MAT implied by it"))
STYLES = ("-", "--", ":", "-.")


def held_out(run_dir: Path) -> list[dict]:
    """What the run measured on its held-out rows, by step."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get("held_out")]


def exits_of(runs: dict[str, list[dict]]) -> list[int]:
    """All exits that any of the runs has."""
    return sorted({int(e) for rows in runs.values() for e in rows[0]["agreement_per_exit"]})


def curves(runs: dict[str, list[dict]]) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    exits = exits_of(runs)
    for axes, (key, title) in zip(figure.subplots(1, 2), PANELS, strict=True):
        for number, (name, rows) in enumerate(runs.items()):
            for exit_layer, style in zip(exits, STYLES, strict=False):
                if str(exit_layer) in rows[0][key]:
                    values = [row[key][str(exit_layer)] for row in rows]
                    steps = [row["step"] for row in rows]
                    label = f"{name}, exit {exit_layer}"
                    axes.plot(steps, values, style, color=f"C{number}", label=label)
        axes.set_xlabel("step")
        axes.set_title(title)
    figure.axes[1].legend(fontsize=8)
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


named = dict(word.split("=", 1) for word in sys.argv[2:])
found = {name: held_out(Path(run_dir)) for name, run_dir in named.items()}
screen().print(table(found))
save_figure(curves(found), Path(sys.argv[1]))
