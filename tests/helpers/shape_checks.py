"""Checks that the shapes and types in signatures are those of every call; `conftest.py` puts it on the package's functions."""

from __future__ import annotations

from beartype import beartype


def checked(function):
    """beartype, except on what makes a dataclass: JAX rebuilds pytrees around leaves that are no arrays."""
    return function if function.__name__ == "__init__" else beartype(function)
