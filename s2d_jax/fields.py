"""The fields of JSON objects and of files' metadata, read with their types and bounds checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2d_jax.errors import UserError, shown

REQUIRED: Any = object()
"""The default of a field that must be there."""


class Fields:
    """Fields by name, each of the type that its reader asks for.

    A field that is absent or null has its reader's default. Where nothing was found to be wrong, values come back as plain
    Python: numbers, texts, tuples.

    Args:
        raw: what a file held.
        where: that file, and the place in it; messages begin with it.
        remedy: messages end with it.

    Raises:
        UserError: if `raw` is no mapping. Every reader raises it for a value of another type or out of bounds, and for a
            required field that is missing.
    """

    def __init__(self, raw: Any, where: str | Path, remedy: str = "correct the file"):
        if not isinstance(raw, Mapping):
            raise UserError(f"{where}: {shown(raw)} must be an object with fields; {remedy}")
        self.raw, self.where, self.remedy = raw, where, remedy

    def integer(
        self, name: str, least: float = -math.inf, most: float = math.inf, default: Any = REQUIRED
    ) -> Any:
        """A whole number from `least` to `most`."""
        value = self._get(name, default)
        if value is default:
            return value
        if not (_is_integer(value) and least <= value <= most):
            raise self.wrong(name, f"a whole number{_between(least, most)}")
        return int(value)

    def number(
        self, name: str, least: float = -math.inf, most: float = math.inf, default: Any = REQUIRED
    ) -> Any:
        """A finite number from `least` to `most`, as a float."""
        value = self._get(name, default)
        if value is default:
            return value
        if not (_is_number(value) and least <= value <= most):
            raise self.wrong(name, f"a number{_between(least, most)}")
        return float(value)

    def positive(self, name: str, default: Any = REQUIRED) -> Any:
        """A finite number above 0, as a float."""
        value = self.number(name, default=default)
        if value is not default and value <= 0:
            raise self.wrong(name, "a number above 0")
        return value

    def flag(self, name: str, default: Any = REQUIRED) -> Any:
        """True or false."""
        return self._typed(name, bool, "true or false", default)

    def text(self, name: str, default: Any = REQUIRED) -> Any:
        """A text."""
        return self._typed(name, str, "a text", default)

    def list(self, name: str, default: Any = REQUIRED) -> Any:
        """A list, as it is."""
        return self._typed(name, list, "a list", default)

    def texts(self, name: str, default: Any = REQUIRED) -> Any:
        """A list of texts, as a tuple."""
        return self._all(name, lambda entry: isinstance(entry, str), "a list of texts", default)

    def integers(
        self, name: str, least: float = -math.inf, most: float = math.inf, default: Any = REQUIRED
    ) -> Any:
        """A list of whole numbers from `least` to `most`, as a tuple."""
        expected = f"a list of whole numbers{_between(least, most)}"
        fits = lambda entry: _is_integer(entry) and least <= entry <= most  # noqa: E731
        return self._all(name, fits, expected, default)

    def numbers(self, name: str, default: Any = REQUIRED) -> Any:
        """A list of finite numbers, as a tuple."""
        return self._all(name, _is_number, "a list of numbers", default)

    def fields(self, name: str, default: Any = REQUIRED) -> Any:
        """An object, as `Fields` of its own."""
        value = self._get(name, default)
        return value if value is default else Fields(value, f"{self.where}: {name}", self.remedy)

    def only(self, names: Sequence[str]) -> None:
        """Raises UserError if there are fields of other names."""
        if unknown := [name for name in self.raw if name not in names]:
            raise UserError(
                f"{self.where} has an unknown field {shown(unknown[0])}; known are {', '.join(names)}; {self.remedy}"
            )

    def wrong(self, name: str, expected: str) -> UserError:
        """The error for a field that is not what is `expected`, such as "a list of texts"."""
        return UserError(
            f"{self.where}: {name}={shown(self.raw.get(name))} must be {expected}; {self.remedy}"
        )

    def _get(self, name: str, default: Any) -> Any:
        value = self.raw.get(name)
        if value is not None:
            return value
        if default is REQUIRED:
            raise UserError(f"{self.where} lacks {name}; {self.remedy}")
        return default

    def _typed(self, name: str, kind: type, expected: str, default: Any) -> Any:
        value = self._get(name, default)
        if value is not default and not isinstance(value, kind):
            raise self.wrong(name, expected)
        return value

    def _all(self, name: str, fits: Any, expected: str, default: Any) -> Any:
        value = self.list(name, default)
        if value is default:
            return value
        if not all(map(fits, value)):
            raise self.wrong(name, expected)
        return tuple(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False


def _between(least: float, most: float) -> str:
    if least == -math.inf:
        return "" if most == math.inf else f" of at most {most}"
    return f" of at least {least}" if most == math.inf else f" from {least} to {most}"
