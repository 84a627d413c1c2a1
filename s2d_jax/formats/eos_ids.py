"""The tokens that end a text, as `config.json`, `generation_config.json` and tokenizers tell them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from s2d_jax.files import read_json


def _ids(value: Any) -> tuple[int, ...]:
    """An id, a list of ids or None, as a tuple."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def merged_ids(*groups: Any) -> tuple[int, ...]:
    """The ids of all groups (an id, a list, or None each), without repeats, in order of appearance."""
    return tuple(dict.fromkeys(i for group in groups for i in _ids(group)))


def saved_eos_token_ids(directory: Path) -> tuple[int, ...]:
    """What config.json and generation_config.json call the end of a sequence, where they exist."""
    files = [directory / name for name in ("config.json", "generation_config.json")]
    return merged_ids(*(read_json(file).get("eos_token_id") for file in files if file.exists()))
