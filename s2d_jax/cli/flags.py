"""How flags look in `--help`: what they take, and what they do when they are left out."""

from __future__ import annotations

from typing import Annotated, Any

import tyro


def flag(takes: str | None = None, unset: str | None = None) -> Any:
    """Annotates a flag: `draft: Annotated[str | None, flag("DIR", "plain decoding")] = None`.

    Args:
        takes: what the help shows as the flag's value, such as FILE or DIR; None shows the name of the type.
        unset: what the help shows as the default, in place of its value.
    """
    hint = None if unset is None else f"(default: {unset})"
    return tyro.conf.arg(metavar=takes, help_behavior_hint=hint)


# A flag without a value, which also has a `--no-` form.
Switch = Annotated[
    bool,
    tyro.conf.arg(help_behavior_hint=lambda default: f"(default: {_ON_OFF[default]})"),
]
_ON_OFF = {"True": "on", "False": "off"}
