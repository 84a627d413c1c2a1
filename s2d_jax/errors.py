"""The one kind of error that users see without a traceback."""

from __future__ import annotations

import contextlib
import re
import reprlib
from collections.abc import Iterator, Sequence


class UserError(ValueError):
    """A mistake in what the user gave: one line with the value, what was expected, the remedy.

    Command lines print it without a traceback and exit with status 2.
    """


def require(condition: bool, message: str) -> None:
    """Raises UserError with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def told_of(where: object) -> Iterator[None]:
    """Puts `where`, such as the path of a file, before the message of a UserError that the block raises."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{printable(where)}: {error}") from None


def shown(value: object, longest: int = 60) -> str:
    """`repr(value)` on one line, cut after `longest` characters: for messages. Whatever the value is, this raises nothing."""
    try:
        text = printable(" ".join(_SHORT.repr(value).split()))
    except (
        Exception
    ):  # a repr may raise anything, and values nested deeply or numbers of many digits do
        text = f"<{type(value).__name__}>"
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def first_of(names: Sequence[str], most: int = 3) -> str:
    """The first few of many names: `a, b, c and 4 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def printable(value: object) -> str:
    """`str(value)` with escapes for line ends and whatever else is no visible character: for names that a user wrote."""
    text = str(value)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def visible(text: str) -> str:
    """`text` as a screen may show it: line ends and tabs stay.

    There are escapes for other control characters, which terminals obey, for characters that turn the direction of writing,
    and for halves of surrogate pairs, which no terminal can be sent.
    """
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def without_controls(text: str) -> str:
    """`text` without control characters other than line ends and tabs: for what a model wrote, on a terminal."""
    return _CONTROLS.sub("", text)


_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

# Reads no further into long or deeply nested values than a message shows.
_SHORT = reprlib.Repr()
# YAML may name one list many times in another: a few hundred bytes would be read billions of times.
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 4, 4000, 4000, 100
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxarray = 20
