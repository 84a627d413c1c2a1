"""Tables on the screen."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

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
        rows: cells of each row.
        texts: how many of the first columns hold text; the others hold figures and stand on the right.
    """
    table = Table(title=title, title_justify="left")
    widths = _widths(headings, rows, console.width - 1)
    for index, (heading, width) in enumerate(zip(headings, widths, strict=True)):
        side = "left" if index < texts else "right"
        table.add_column(heading, justify=side, overflow="fold", width=width)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _widths(headings: Sequence[str], rows: Sequence[Sequence[str]], room: int) -> list[int]:
    """Widths of the columns: what the texts want, or less where room is short.

    First cells take several lines, then headings too. Words and numbers are cut last.
    """
    columns = list(zip(headings, *rows, strict=True))
    words = [
        max((cell_len(word) for text in column for word in text.split()), default=0)
        for column in columns
    ]
    whole = [max(cell_len(h), word) for h, word in zip(headings, words, strict=True)]
    widths = [max(map(cell_len, column)) for column in columns]
    for least in (whole, words):
        while sum(widths) + _BESIDE * len(widths) > room and widths != least:
            spare = [width - fewest for width, fewest in zip(widths, least, strict=True)]
            widths[spare.index(max(spare))] -= 1
    return widths
