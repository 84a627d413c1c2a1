"""A picture of a run that is drawn anew at every evaluation: loss, agreement and mean acceptance length by exit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from s2d_jax.files import written_whole


def draw_progress(metrics: Path, out: Path) -> None:
    """Draws a run's metrics file into `out`, a .png that is replaced at once."""
    lines = metrics.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    steps = [row for row in rows if "held_out" not in row]
    held_out = [row for row in rows if "held_out" in row]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, agreement, mat = figure.subplots(1, 3)
    exits = list(held_out[0]["loss_per_exit"])
    for number, layer in enumerate(exits):
        color = f"C{number}"
        loss.plot(*_curve(steps, "loss_per_exit", layer), color=color, alpha=0.25, linewidth=0.8)
        loss.plot(*_curve(held_out, "loss_per_exit", layer), color=color, label=f"exit {layer}")
        agreement.plot(*_curve(held_out, "agreement_per_exit", layer), color=color)
        mat.plot(*_curve(held_out, "mat_per_exit", layer), color=color)
    if len(exits) > 1:
        mat.plot(*_curve(held_out, "s2d_mat", None), "k--", label="S2D")
        mat.legend(frameon=False)
    loss.set(title="loss (pale: training)", xlabel="step", ylabel="nats per token")
    agreement.set(title="agreement with the target, held out", xlabel="step", ylim=(0, None))
    mat.set(title="implied MAT, held out", xlabel="step", ylabel="tokens per target pass")
    loss.legend(frameon=False)
    with written_whole(out) as partial:
        FigureCanvasAgg(figure).print_png(str(partial))


def _curve(rows: list[dict[str, Any]], name: str, layer: str | None) -> tuple[list, list]:
    """Steps and values, where there is a value."""
    found = [(row["step"], row[name] if layer is None else row[name][layer]) for row in rows]
    kept = [pair for pair in found if pair[1] is not None]
    return [step for step, _ in kept], [value for _, value in kept]
