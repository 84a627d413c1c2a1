"""Several processes do the same work together: what the first one has counts, and the others compare."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator
from typing import Any

from s2d_jax.cli.parsing import goes_unnamed
from s2d_jax.errors import UserError, printable
from s2d_jax.processes import bytes_of_main_process, number_of_processes, text_of_main_process

# Flags whose values may differ, since only the first process writes there, or each does it for itself.
_OWN = ("out", "compile_cache", "cache_dir", "num_proc")


def several_processes() -> bool:
    """Whether other processes work together with this one."""
    return number_of_processes() > 1


def of_first_process(value: Any) -> Any:
    """Gives every process the JSON value of the first one; where there is only one, its own as it is."""
    if not several_processes():
        return value
    return json.loads(bytes_of_main_process(json.dumps(value).encode()))


def check_agreement(settings: dict[str, Any]) -> None:
    """Raises UserError in a process whose settings, JSON values, are not those of the first one."""
    if not several_processes():
        return
    _compare(json.loads(json.dumps(settings)), of_first_process(settings))


def check_flags_agree(command: str, args: Any) -> None:
    """Raises UserError in a process whose command or flags, a dataclass, are not the first one's; no device is asked."""
    if not several_processes():
        return
    text = json.dumps({"command": command, **dict(_flags(args))}, default=str)
    _compare(json.loads(text), json.loads(text_of_main_process("flags", text)))


def _flags(args: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names as they are typed, and values."""
    hints = typing.get_type_hints(type(args), include_extras=True)
    for field in dataclasses.fields(args):
        name, value = prefix + field.name.replace("_", "-"), getattr(args, field.name)
        if dataclasses.is_dataclass(value):
            yield from _flags(value, prefix if goes_unnamed(hints[field.name]) else f"{name}.")
        elif field.name not in _OWN:
            yield name, value


def _compare(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"{key} is {brief(ours.get(key))} here, and {brief(theirs.get(key))} in process 0; start all processes with "
                "the same flags and files"
            )


def brief(value: Any) -> str:
    """A value of the settings, in a few words."""
    text = json.dumps(value, ensure_ascii=False)
    return printable(text if len(text) <= 60 else f"{text[:57]}...")
