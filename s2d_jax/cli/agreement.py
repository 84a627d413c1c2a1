"""Several processes do the same work together: what the first one has counts, and the others compare."""

from __future__ import annotations

import json
from typing import Any

import jax

from s2d_jax.errors import UserError, printable
from s2d_jax.processes import bytes_of_main_process


def several_processes() -> bool:
    """Whether other processes answer together with this one. Starts no backend where it works alone."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def of_first_process(value: Any) -> Any:
    """Gives every process the JSON value of the first one; where there is only one, its own as it is."""
    if not several_processes():
        return value
    return json.loads(bytes_of_main_process(json.dumps(value).encode()))


def check_agreement(settings: dict[str, Any]) -> None:
    """Raises UserError in a process whose settings, JSON values, are not those of the first one."""
    if not several_processes():
        return
    ours, theirs = json.loads(json.dumps(settings)), of_first_process(settings)
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
