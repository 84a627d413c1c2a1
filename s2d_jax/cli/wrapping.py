"""Answers on the screen, wrapped at words, even while they arrive."""

from __future__ import annotations

import io
import re
from typing import IO

from rich.cells import cell_len
from rich.console import Console

from s2d_jax.errors import without_controls

# A word, the spaces before it, or one character of a script that is written without spaces.
_PIECE = re.compile(r"[ \t]+|[^\s\u2e80-\u9fff\uac00-\ud7af\uff00-\uffef]+|.", re.DOTALL)


class WrappedText:
    """Writes text to a terminal so that no word is cut at its edge; anywhere else text goes through as it is.

    A word is shown when its end is known. Terminals obey control characters, so they are not sent those that a model wrote.

    Args:
        console: whose width and file are used. A quiet one shows nothing.
    """

    def __init__(self, console: Console):
        self._file: IO[str] = io.StringIO() if console.quiet else console.file
        self._width = console.width if console.is_terminal else None
        self._column, self._pending = 0, ""

    def write(self, text: str) -> None:
        """Adds text."""
        if self._width is None:
            self._file.write(text)
        else:
            text = without_controls(text)
            *whole, self._pending = _PIECE.findall(self._pending + text) or [""]
            self._show(whole)
        self._file.flush()

    def end(self) -> None:
        """Shows what was held back, and ends the line."""
        if self._width is not None:
            self._show([self._pending])
        self._column, self._pending = 0, ""
        self._file.write("\n")
        self._file.flush()

    def _show(self, pieces: list[str]) -> None:
        assert self._width is not None
        for piece in pieces:
            width = cell_len(piece)
            if piece == "\n":
                self._file.write(piece)
                self._column = 0
            elif self._column + width <= self._width:
                self._file.write(piece)
                self._column += width
            elif piece.isspace():  # dropped at the end of a line
                self._file.write("\n")
                self._column = 0
            else:
                start = "\n" if self._column else ""
                self._file.write(start + piece)
                self._column = width % self._width
