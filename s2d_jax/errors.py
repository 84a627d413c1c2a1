"""The one kind of error that users see without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user gave: one line with the value, what was expected, the remedy.

    Command lines print it without a traceback and exit with status 2.
    """


def require(condition: bool, message: str) -> None:
    """Raises UserError with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def shown(value: object, longest: int = 60) -> str:
    """`repr(value)` on one line, cut after `longest` characters: for messages."""
    text = " ".join(repr(value).split())
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
