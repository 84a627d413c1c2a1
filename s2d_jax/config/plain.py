"""Plain Python values in configurations, whatever kind of number or sequence the user gives."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import types
import typing
from collections.abc import Sequence
from typing import Any

import numpy as np

from s2d_jax.errors import UserError, shown

# How messages name the values that a type expects: one, several, an example.
_WORDS = {
    float: ("a finite number", "finite numbers", "0.5"),
    int: ("a whole number", "whole numbers", "1"),
    bool: ("True or False", "True or False", "True"),
    str: ("a text", "texts", "'text'"),
}


def plain_fields(config: Any, prefix: str = "") -> None:
    """Makes every field of a frozen dataclass a plain Python value of the type that it is annotated with.

    NumPy and JAX scalars become Python numbers, sequences and arrays become tuples, and where a tuple is expected a single
    value becomes a tuple of one: so equality, hashes, reprs and JSON do not depend on where a value came from. A number of
    less than 64 bits becomes the shortest decimal that stands for it: `np.float32(0.7)` is 0.7.

    Args:
        config: the dataclass.
        prefix: stands before the names of fields in messages, such as "optim.".

    Raises:
        UserError: for a value of another type, and for numbers that are not finite.
    """
    for name, hint in _hints(type(config)).items():
        value = plain_value(f"{prefix}{name}", getattr(config, name), hint)
        object.__setattr__(config, name, value)


def plain_value(name: str, value: Any, hint: Any) -> Any:
    """`value` as the plain type that `hint` says; `name` is for the UserError that is raised if it has another one."""
    try:
        return _plain(value, hint)
    except TypeError:
        raise UserError(f"{name}={shown(value)} must be {_expected(hint)}") from None


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _plain(value: Any, hint: Any) -> Any:
    """Raises TypeError for a value of another type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):  # with None
        return None if value is None else _plain(value, arguments[0])
    if origin is typing.Literal:  # the config itself checks which texts are allowed
        return _plain(value, str)
    if origin is tuple:
        entries = list(value) if _is_sequence(value) else [value]
        return tuple(_plain(entry, arguments[0]) for entry in entries)
    value = _scalar(value)
    if hint is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    fits = int | float if hint is float else hint
    if not isinstance(value, fits) or (isinstance(value, bool) and hint is not bool):
        raise TypeError
    if hint is float and not math.isfinite(value):
        raise TypeError
    return hint(value) if hint in _WORDS else value


def _is_sequence(value: Any) -> bool:
    if isinstance(value, str | bytes):
        return False
    return isinstance(value, Sequence) or getattr(value, "ndim", 0) > 0


def _scalar(value: Any) -> Any:
    """The Python number that a NumPy or JAX scalar stands for; anything else as it is."""
    if not hasattr(value, "dtype") or getattr(value, "ndim", None) != 0:
        return value
    value = np.asarray(value)[()]
    number = value.item()
    return float(str(value)) if isinstance(number, float) else number


def _expected(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return f"{_expected(arguments[0])}, or None"
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin is not tuple:
        if hint not in _WORDS:
            return f"a {hint.__name__}(...)"
        one, _, example = _WORDS[hint]
        return one if hint is bool else f"{one}, such as {example}"
    if typing.get_origin(arguments[0]) is tuple:
        return "a sequence of sequences of numbers, such as ((0,), (0, 1))"
    if typing.get_origin(arguments[0]) is typing.Literal:
        return f"some of {', '.join(map(repr, typing.get_args(arguments[0])))}"
    _, several, example = _WORDS[arguments[0]]
    return f"{several}, such as ({example},)"
