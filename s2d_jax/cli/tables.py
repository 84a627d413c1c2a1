"""Tables on the screen."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from s2d_jax.errors import visible

# Columns that rich draws beside a cell's text: a space on each side and a line.
_BESIDE = 3


def print_table(
    console: Console,
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    texts: int = 1,
) -> None:
    """Prints a table whose headings stay on one line if there is room; cells take several lines before.

    Args:
        console: where to.
        title: above it, on the left.
        headings: one per column.
        rows: cells of each row. A cell that takes several lines is broken at spaces, but not at no-break spaces.
        texts: how many of the first columns hold text; the others hold figures and stand on the right.
    """
    table = Table(title=title, title_justify="left")
    headings, rows = list(map(visible, headings)), [list(map(visible, row)) for row in rows]
    widths = _widths(headings, rows, console.width - 1)
    for index, (heading, width) in enumerate(zip(headings, widths, strict=True)):
        side = "left" if index < texts else "right"
        table.add_column(heading, justify=side, overflow="fold", width=width)
    for row in rows:
        table.add_row(*(_wrapped(cell, width) for cell, width in zip(row, widths, strict=True)))
    console.print(table)


def _wrapped(cell: str, width: int) -> str:
    """The cell in lines of `width` columns. rich would break it at no-break spaces, too."""
    lines = [""]
    for word in re.findall(r"[ \t]*[^ \t]+", cell):
        if cell_len(lines[-1] + word) <= width or not lines[-1]:
            lines[-1] += word
        else:
            lines.append(word.lstrip(" \t"))
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")


def _widths(headings: Sequence[str], rows: Sequence[Sequence[str]], room: int) -> list[int]:
    """Widths of the columns: what the texts want, or less where room is short.

    First cells take several lines, then headings too. Words and numbers are cut last.
    """
    columns = list(zip(headings, *rows, strict=True))
    words = [
        max((cell_len(word) for text in column for word in re.split(r"[ \t\n]+", text)), default=0)
        for column in columns
    ]
    whole = [max(cell_len(h), word) for h, word in zip(headings, words, strict=True)]
    widths = [max(map(cell_len, column)) for column in columns]
    for least in (whole, words):
        while sum(widths) + _BESIDE * len(widths) > room and widths != least:
            spare = [width - fewest for width, fewest in zip(widths, least, strict=True)]
            widths[spare.index(max(spare))] -= 1
    return widths
