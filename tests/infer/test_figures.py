"""Pictures of reports and of rounds with data that is hard to draw: nothing is cut, nothing covers anything."""

from __future__ import annotations

import itertools

import pytest
from extreme_plots import EXITS, bench_rows, chain_round, kernel_report, tree_round
from figure_checks import faults, points_in_texts
from matplotlib.colors import same_color, to_rgb
from matplotlib.figure import Figure

from infer.bench.kernel_report import kernels_figure
from infer.bench.plots import acceptance_figure, exits_figure, speedup_figure, write_plots
from infer.generate.explain_show import quoted, round_figure
from s2d_jax.cli.figures import COLOURS, drawable, exit_styles, line_styles

BENCHES = [(1, 1, 1), (2, 1, 2), (12, 1, 3), (3, 3, 4), (12, 4, 5)]


@pytest.mark.parametrize(
    "size",
    [
        *BENCHES[:-1],
        pytest.param(
            BENCHES[-1],
            marks=pytest.mark.exhaustive("as many bars are tested, and several targets"),
        ),
    ],
)
def test_bars_and_lines_of_a_report_are_readable(size):
    rows = bench_rows(*size)
    assert faults(speedup_figure(rows)) == []
    if size[0] > 1:  # plain decoding alone has neither
        assert faults(exits_figure(rows)) == []
        assert faults(acceptance_figure(rows)) == []


def test_wide_ranges_of_speedups_are_logarithmic_and_begin_at_the_baseline():
    speedups, lengths = speedup_figure(bench_rows(12, 1, 1)).axes
    assert (speedups.get_xscale(), lengths.get_xscale()) == ("log", "linear")
    ends = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in speedups.patches]
    assert {start for start, _ in ends} == {1.0}
    assert [end for _, end in ends][:3] == pytest.approx([1.0, 0.3, 0.434], rel=1e-2)
    narrow, _ = speedup_figure(bench_rows(2, 1, 1)).axes
    assert narrow.get_xscale() == "linear"
    assert {bar.get_x() for bar in narrow.patches} == {0.0}


def test_targets_of_one_name_are_told_apart():
    (legend,) = speedup_figure(bench_rows(2, 4, 2)).legends
    names = [text.get_text() for text in legend.get_texts()]
    assert len(set(names)) == 5
    assert names[-1] == "baseline: Autoregressive"
    assert len(exits_figure(bench_rows(2, 4, 2)).axes) == 4


def test_an_exit_has_one_colour_in_all_pictures():
    of_all = exit_styles(EXITS)
    rows = bench_rows(2, 1, 1)  # only the first exit was used
    (bar,) = exits_figure(rows, EXITS).axes[0].patches[:1]
    assert same_color(bar.get_facecolor(), of_all[EXITS[0]]["color"])
    (axes,) = round_figure(chain_round(5), EXITS).axes
    points = {line.get_marker(): line.get_color() for line in axes.lines}
    for style in of_all.values():
        assert same_color(points[style["marker"]], style["color"])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_exits_differ_in_grey(count):
    greys = [grey(style["color"]) for style in exit_styles(EXITS[:count]).values()]
    assert all(lighter - darker > 0.08 for darker, lighter in itertools.pairwise(greys))


def test_lines_and_bars_beside_each_other_differ_in_grey():
    greys = [grey(colour) for colour in COLOURS]
    assert all(abs(one - next) > 0.08 for one, next in itertools.pairwise(greys))
    styles = [tuple(style.values()) for style in line_styles(map(str, range(12))).values()]
    assert len({marker for _, marker, _ in styles}) == 12
    assert len({(colour, dashes) for colour, _, dashes in styles}) == 12


def grey(colour) -> float:
    """Luma, as printers and Rec. 601 have it."""
    red, green, blue = to_rgb(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue


@pytest.mark.parametrize(
    "round",
    [chain_round(1), chain_round(15), tree_round(10, 3), tree_round(60, 6)],
    ids=["chain of 1", "chain of 15", "tree of 10", "tree of 60"],
)
def test_rounds_are_readable(round):
    figure = round_figure(round, EXITS)
    assert faults(figure) == []
    assert points_in_texts(figure.axes[0]) == []


def test_tokens_are_cut_by_the_room_that_they_take():
    assert quoted("\n" * 30, 8) == "'\\n\\n\\n…'"
    assert quoted("猫" * 30, 8) == "'猫猫猫…'"
    assert quoted("'" + "a" * 30, 8) == '"\'aaaaaa…"'
    assert drawable("aé\U000e0041") == "aé\\U000e0041"  # no font has a tag


@pytest.mark.parametrize("counts", [(2,), (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32, 64, 128, 512)])
def test_forms_of_products_are_readable(counts):
    assert faults(kernels_figure(kernel_report(counts, 3))) == []
    assert faults(kernels_figure(kernel_report(counts, 1))) == []


def test_a_cut_label_and_a_legend_over_bars_are_found():
    figure = Figure(figsize=(3, 2))
    axes = figure.subplots()
    axes.bar([0, 1], [1, 1], label="bar")
    axes.set_xticks([0, 0.1], ["a long label", "another one"])
    axes.set_ylabel("a label that is longer than the figure is high")
    axes.legend()
    found = faults(figure)
    assert "a legend covers data" in found
    assert "'a long label' and 'another one' overlap" in found
    assert "'a label that is longer than the figure is high' is cut" in found


def test_reports_are_written(tmp_path):
    write_plots(tmp_path, bench_rows(2, 1, 2), EXITS)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("speedup.png", "exits.png", "acceptance.png")
    }
    write_plots(tmp_path / "alone", bench_rows(1, 1, 1))
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["speedup.png"]
