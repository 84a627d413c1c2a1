"""Generated rows for a notebook: the text, each token tinted by the exit that drafted it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Protocol

from s2d_jax.generation.stats import GenerationStats

# The most rows that are shown; a notebook's page should stay quick.
MOST_ROWS = 16
MOST_TOKENS = 1000

# Background tints under dark text, readable on a dark page and on a light one.
_TINTS = ("#b9d7ff", "#bfe3b4", "#ffd9a8", "#e5c8f5", "#ffc4cf", "#bdeae6", "#fff1a6", "#dcd3c4")
_TEXT = "white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace;margin:0.4em 0 0.1em"
_CAPTION = "font-size:85%;opacity:0.75"


class ShownRow(Protocol):
    """The part of a `GeneratedRow` that is shown."""

    @property
    def token_ids(self) -> list[int]: ...

    @property
    def finish_reason(self) -> str: ...

    @property
    def stats(self) -> GenerationStats: ...

    @property
    def drafted_by(self) -> list[int | None]: ...

    @property
    def tokenizer(self) -> object: ...

    def first_pieces(self, count: int) -> list[str]: ...


def html_of(rows: Sequence[ShownRow]) -> str:
    """The text and a caption of each row, and a legend of the exits; the target's own tokens are not tinted."""
    exits = sorted({exit for row in rows for exit in row.stats.exit_histogram})
    style_of = {exit: _style(_TINTS[i % len(_TINTS)]) for i, exit in enumerate(exits)}
    parts = [_row(row, style_of) for row in rows[:MOST_ROWS]]
    if len(rows) > MOST_ROWS:
        parts.append(f'<div style="{_CAPTION}">… {len(rows) - MOST_ROWS} more rows</div>')
    legend = [f'<span style="{style}">exit {exit}</span>' for exit, style in style_of.items()]
    parts.append(f'<div style="{_CAPTION}">drafted at {" ".join([*legend, "target"])}</div>')
    return f"<div>{''.join(parts)}</div>"


def _style(tint: str) -> str:
    return f"background:{tint};color:#111;border-radius:3px"


def _row(row: ShownRow, style_of: dict[int, str]) -> str:
    ids = row.token_ids[:MOST_TOKENS]
    pieces = row.first_pieces(len(ids)) if row.tokenizer else [f"{token} " for token in ids]
    tokens = [
        _token(piece, None if exit is None else style_of[exit])
        for piece, exit in zip(pieces, row.drafted_by, strict=False)
    ]
    if left_out := len(row.token_ids) - len(ids):
        tokens.append(f"… {left_out} more tokens")
    caption = f"{row.stats.summary}, finished by {row.finish_reason}"
    text = f'<div style="{_TEXT}">{"".join(tokens)}</div>'
    return f'{text}<div style="{_CAPTION}">{html.escape(caption)}</div>'


def _token(piece: str, style: str | None) -> str:
    if style is None or not piece:
        return html.escape(piece)
    return f'<span style="{style}">{html.escape(piece)}</span>'
