"""The picture of a run: readable with one evaluation, with gaps, and after 100,000 steps."""

from __future__ import annotations

import json

import numpy as np
import pytest
from extreme_plots import EXITS, metrics_rows
from figure_checks import faults
from matplotlib.colors import same_color

from s2d_jax.cli.figures import exit_styles
from train.run.progress_plot import draw_progress, progress_figure


@pytest.mark.parametrize(
    ("evaluations", "steps", "exits", "gaps"),
    [(1, 0, 1, False), (2, 40, 5, False), (30, 3_000, 5, True), (100, 100_000, 3, True)],
)
def test_runs_are_readable(evaluations, steps, exits, gaps):
    figure = progress_figure(metrics_rows(evaluations, steps, exits, gaps=gaps))
    assert faults(figure) == []
    for axes in figure.axes:
        assert all(len(line.get_xdata()) <= 500 for line in axes.lines)


def test_a_single_evaluation_is_seen():
    for axes in progress_figure(metrics_rows(1, 0, 2)).axes:
        seen = [line for line in axes.lines if len(line.get_xdata())]
        assert len(seen) >= 2
        assert all(line.get_marker() and line.get_markevery() == [0] for line in seen)


def test_gaps_stay_open_and_what_is_between_two_has_a_marker():
    rows = metrics_rows(60, 60, 1)
    held_out = [row for row in rows if "held_out" in row]
    for number, row in enumerate(held_out):
        if number in (30, 32):  # 31 is alone
            row["mat_per_exit"] = {str(EXITS[0]): None}
    (line,) = progress_figure(rows).axes[2].lines
    assert list(np.flatnonzero(np.isnan(line.get_ydata()))) == [30, 32]
    assert 31 in line.get_markevery()
    assert 33 not in line.get_markevery()


def test_colours_are_those_of_the_exits(tmp_path):
    rows = metrics_rows(3, 10, 5)
    lines = progress_figure(rows).axes[1].lines
    for line, style in zip(lines, exit_styles(EXITS).values(), strict=True):
        assert same_color(line.get_color(), style["color"])
        assert line.get_marker() == style["marker"]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw_progress(tmp_path / "metrics.jsonl", tmp_path / "progress.png")
    assert (tmp_path / "progress.png").read_bytes().startswith(b"\x89PNG")
