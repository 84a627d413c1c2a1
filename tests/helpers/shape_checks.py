"""Checks that the shapes and types in signatures are those of every call; `conftest.py` puts it on the package's functions."""

from __future__ import annotations

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep3119Exception

# An int is a float, as it is for a type checker.
_CHECK = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function):
    """beartype, except on what makes a dataclass: JAX rebuilds pytrees around leaves that are no arrays."""
    if function.__name__ == "__init__":
        return function
    try:
        return _CHECK(function)
    except BeartypeDecorHintPep3119Exception:
        return function  # it takes a protocol, which only a type checker can check
