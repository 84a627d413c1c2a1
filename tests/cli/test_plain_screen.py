"""What a user or a model wrote is never markup, a formula or a command to the terminal."""

from __future__ import annotations

import io

import pytest
from matplotlib.figure import Figure
from rich.progress import Progress

from s2d_jax.cli.figures import save_figure
from s2d_jax.cli.screen import PlainColumn, PlainConsole, rule_above
from s2d_jax.cli.short_text import shares
from s2d_jax.cli.tables import print_table
from s2d_jax.cli.wrapping import WrappedText
from s2d_jax.errors import visible
from train.data.report import DataReport, SourceReport
from train.run.terminal import ProgressReport

HOSTILE = "[/INST] [bold]hi[/bold] :bomb: \x1b[31mred\x9b2J\x07 \ud800"
SHOWN = r"[/INST] [bold]hi[/bold] :bomb: \x1b[31mred\x9b2J\x07 \ud800"


def console(width: int = 100, **options) -> PlainConsole:
    return PlainConsole(file=io.StringIO(), width=width, **options)


def print_line(out):
    out.print(HOSTILE, soft_wrap=True)


def print_rule(out):
    out.print(rule_above(f"\n {HOSTILE}\nsecond line"))


def print_cells(out):
    print_table(out, HOSTILE, [HOSTILE, "b"], [["a", HOSTILE], [HOSTILE, "b"]])


def show_bar(out):
    with Progress(PlainColumn("{task.description}"), console=out, auto_refresh=False) as bar:
        bar.add_task(HOSTILE, total=1)


def say_in_training(out):
    ProgressReport(out).say(HOSTILE)


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("show", [print_line, print_rule, print_cells, show_bar, say_in_training])
def test_texts_are_shown_as_they_are(show, terminal):
    out = console(width=200, force_terminal=terminal, color_system=None)
    show(out)
    written = out.file.getvalue()
    assert SHOWN in written
    assert not {"\x07", "\x9b", "\ud800"} & set(written)
    assert "\x1b[31m" not in written


@pytest.mark.parametrize("turn", ["", " ", "\n\n", "\x85"])
def test_a_turn_without_a_visible_line_has_an_empty_rule(turn):
    out = console()
    out.print(rule_above(turn))
    assert out.file.getvalue().strip() == "─" * 100


def test_a_data_report_shows_names_as_they_are_and_fits_the_screen():
    source = SourceReport(path="/data/[/b]/" + "long-name-" * 8, weight=1.0, shortened=3)
    report = DataReport((source,), "kept", f"no {HOSTILE}")
    for width in (60, 80, 100):
        lines = report.table(width).splitlines()[:-2]
        assert max(map(len, lines)) <= width
        assert "/data/[/b]/" in "".join(lines)
    assert ProgressReport(console(80, force_terminal=True)).width == 80
    assert ProgressReport(console(150, force_terminal=True)).width == 100


def test_answers_reach_a_terminal_without_control_characters_and_files_as_they_are():
    answer = "a\tb\n\x1b[2Jc\x9bd\re\x00"
    for terminal, expected in ((True, "a\tb\n[2Jcde\n"), (False, answer + "\n")):
        out = console(force_terminal=terminal)
        text = WrappedText(out)
        for character in answer:
            text.write(character)
        text.end()
        assert out.file.getvalue() == expected


def test_shares_stay_in_one_piece_in_a_narrow_cell():
    out = console(width=40)
    cell = shares({6: 80, 9: 8, 12: 12})
    print_table(out, "", ["method", "exits", "speed"], [["SoFT + S2D", cell, "1.23"]])
    written = out.file.getvalue()
    assert max(map(len, written.splitlines())) <= 40
    assert all(share in written for share in ("6: 80%", "9: 8%", "12: 12%"))
    assert "\N{NO-BREAK SPACE}" not in written


def test_dollar_signs_in_names_begin_no_formula(tmp_path):
    figure = Figure()
    axes = figure.subplots()
    axes.barh(range(2), [1, 2], label="a$b$\\frac$")
    axes.set_yticks(range(2), ["$\\frac{$", "models/$HOME$^{"])
    axes.set_title("$x_{$")
    figure.legend()
    save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_visible_keeps_text_of_all_scripts():
    text = "日本語\u3000 naïve\xa0café 👩‍👩‍👧\n\tمرحبا"
    assert visible(text) == text
