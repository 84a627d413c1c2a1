"""Text that wraps at words, and tables whose headings stay whole."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from s2d_jax.cli.tables import print_table
from s2d_jax.cli.wrapping import WrappedText

TEXT = (
    "The quick brown fox jumps over the lazy dog, and then it sleeps.\n\n"
    "    def fib(n):\n        return n  # indented\n"
    "abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz is longer than a line.\n"
    "素早い茶色の狐は怠け者の犬を飛び越え、それから眠る。"
)
HEADINGS = ("method", "tok/s", "speedup", "decode", "MAT", "accepted per depth", "exits", "same")


def shown(text: str, width: int, step: int, *, terminal: bool = True) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal)
    wrapped = WrappedText(console)
    for start in range(0, len(text), step):
        wrapped.write(text[start : start + step])
    wrapped.end()
    return console.file.getvalue()


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize("width", [20, 40])
def test_lines_fit_and_words_stay_whole_however_text_comes(width, step):
    result = shown(TEXT, width, step)
    words = {word for word in TEXT.split() if len(word) <= width and word.isascii()}
    long_word = next(word for word in TEXT.split() if len(word) > width)
    lines = result.split("\n")
    assert all(cell_len(line) <= width for line in lines if long_word not in line)
    assert words <= set(result.split())
    assert "".join(result.split()) == "".join(TEXT.split())
    assert "    def fib(n):\n        return n" in result
    assert result == shown(TEXT, width, 1000)


def test_a_line_that_just_fits_is_not_broken():
    assert shown("aaa bbb\nccc", 7, 2) == "aaa bbb\nccc\n"
    assert shown("aaa bbb", 6, 2) == "aaa \nbbb\n"


def test_where_there_is_no_terminal_text_stays_as_it_is():
    assert shown(TEXT, 20, 7, terminal=False) == TEXT + "\n"


def test_headings_stay_on_one_line_at_100_columns():
    cells = ["SoFT + S2D + tree, 16 nodes", "123.4", "1.52", "2.12", "3.41",
             ".81 .64 .50 .42 .31 .22 .11", "6: 80%  9: 10%  12: 10%", "3 differ"]  # fmt: skip
    console = Console(file=io.StringIO(), width=100)
    print_table(console, "title", HEADINGS, [cells])
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    assert all(heading in lines[2] for heading in HEADINGS)
    assert lines[0].startswith("title")


def test_where_room_is_short_headings_wrap_before_numbers_are_cut():
    cells = [
        "Autoregressive",
        "17.3",
        "1.00",
        "1.00",
        "1.00",
        ".05 .00 .00",
        "6: 52%  9: 24%  12: 24%",
        "yes",
    ]
    console = Console(file=io.StringIO(), width=80)
    print_table(console, "title", HEADINGS, [cells])
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.count(" 1.00 ") == 3
    assert " Autoregressive " in shown
