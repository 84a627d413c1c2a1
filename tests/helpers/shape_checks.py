"""Checks that the shapes and types in signatures are those of every call; `conftest.py` puts it on the package's functions."""

from __future__ import annotations

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep3119Exception

# An int is a float, as it is for a type checker.
_CHECK = beartype(conf=BeartypeConf(is_pep484_tower=True))


# What users give: the library says itself, in a line for people, what it refuses.
_FROM_USERS = {"prompts", "prompt", "texts", "token_ids", "path", "paths"}


def _is_for_users(function) -> bool:
    hints = function.__annotations__
    sampling = str(hints.get("sampling", "SamplingArrays"))
    return bool(_FROM_USERS & hints.keys()) or "SamplingArrays" not in sampling


def checked(function):
    """beartype, except on what users give anything, and on what makes a dataclass.

    JAX rebuilds pytrees around leaves that are no arrays.
    """
    if function.__name__ == "__init__" or _is_for_users(function):
        return function
    try:
        return _CHECK(function)
    except BeartypeDecorHintPep3119Exception:
        return function  # it takes a protocol, which only a type checker can check
