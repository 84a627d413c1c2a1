"""A picture of a run, redrawn at every evaluation: loss, agreement and mean acceptance length by exit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from s2d_jax.cli.figures import (
    Style,
    exit_styles,
    legend_below,
    log_ticks,
    ratio_scale,
    save_figure,
)
from train.run.metrics import read_metrics

_Row = dict[str, Any]
# If a panel had more points than pixels, they would hide each other.
_MOST_POINTS, _MOST_MARKERS = 500, 12


def draw_progress(metrics: Path, out: Path) -> None:
    """Draws a run's metrics file into `out`, a .png that is replaced at once."""
    save_figure(progress_figure(read_metrics(metrics)), out)


def progress_figure(rows: list[_Row]) -> Figure:
    """Panels for loss, agreement and MAT, a line per exit. An evaluation without a value leaves a gap."""
    steps = [row for row in rows if "held_out" not in row]
    held_out = [row for row in rows if "held_out" in row]
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    loss, agreement, mat = figure.subplots(1, 3)
    exits = list(held_out[0]["loss_per_exit"])
    styles = dict(zip(exits, exit_styles(map(int, exits)).values(), strict=True))
    each, handles = max(-(-len(steps) // _MOST_POINTS), 1), []
    for layer, style in styles.items():
        pale = {"color": style["color"], "alpha": 0.35, "linewidth": 0.8}
        loss.plot(*_means(*_curve(steps, "loss_per_exit", layer), each), **pale)
        for axes, name in (
            *((loss, "loss_per_exit"), (agreement, "agreement_per_exit"), (mat, "mat_per_exit")),
        ):
            _plot(axes, *_curve(held_out, name, layer), style)
        handles.append(Line2D([], [], **style, label=f"exit {layer}"))
    if len(exits) > 1:
        s2d: Style = {"color": "black", "marker": "*"}
        _plot(mat, *_curve(held_out, "s2d_mat", None), s2d)
        handles.append(Line2D([], [], **s2d, label="S2D"))
    if steps:
        what = "training" if each == 1 else f"training, means of {each} steps"
        handles.append(Line2D([], [], color="grey", alpha=0.35, label=what))
    loss.set(title="loss, held out and training", ylabel="nats per token")
    loss.set_yscale(ratio_scale(v for row in held_out for v in row["loss_per_exit"].values()))
    log_ticks(loss.yaxis)
    agreement.set(
        title="agreement with the target, held out", ylabel="share of tokens", ylim=(0, None)
    )
    agreement.yaxis.set_major_formatter(PercentFormatter(1))
    mat.set(title="implied MAT, held out", ylabel="tokens per target pass")
    for axes in (loss, agreement, mat):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
    legend_below(figure, handles)
    return figure


def _plot(axes, steps: np.ndarray, values: np.ndarray, style: Style) -> None:
    """A line with some markers; a single point between two gaps always has a marker."""
    known = np.pad(np.isfinite(values), 1)
    alone = known[1:-1] & ~known[:-2] & ~known[2:]
    some = np.arange(len(values)) % -(-len(values) // _MOST_MARKERS) == 0
    axes.plot(steps, values, **style, markersize=4, markevery=list(np.flatnonzero(alone | some)))


def _curve(rows: list[_Row], name: str, layer: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, NaN where there is none."""
    values = [row.get(name) if layer is None else row[name].get(layer) for row in rows]
    return np.array([row["step"] for row in rows]), np.array(values, float)


def _means(steps: np.ndarray, values: np.ndarray, each: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of `each` neighbours; an incomplete group at the end is left out."""
    whole = len(steps) // each * each
    return tuple(x[:whole].reshape(-1, each).mean(1) for x in (steps, values))
