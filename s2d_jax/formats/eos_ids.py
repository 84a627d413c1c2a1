"""The tokens that end a text, as `config.json`, `generation_config.json` and tokenizers tell them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from s2d_jax.fields import Fields
from s2d_jax.files import read_json


def _ids(value: Any) -> tuple[int, ...]:
    """An id, a list of ids or None, as a tuple."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def merged_ids(*groups: Any) -> tuple[int, ...]:
    """The ids of all groups (an id, a list, or None each), without repeats, in order of appearance."""
    return tuple(dict.fromkeys(i for group in groups for i in _ids(group)))


def checked_ids(fields: Fields, name: str, vocab_size: int | None = None) -> tuple[int, ...]:
    """The ids of a field that holds one, a list of them, or nothing.

    Raises:
        UserError: for another type, ids below 0, or ids that a vocabulary of `vocab_size` lacks (None: not known).
    """
    value = fields.raw.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    fits = all(type(i) is int and i >= 0 and (vocab_size is None or i < vocab_size) for i in ids)
    if not fits:
        known = "" if vocab_size is None else f" of the vocabulary, 0 to {vocab_size - 1}"
        raise fields.wrong(name, f"a token id{known}, or a list of such ids")
    return tuple(ids)


def saved_eos_token_ids(directory: Path, vocab_size: int | None = None) -> tuple[int, ...]:
    """What config.json and generation_config.json call the end of a sequence, where they exist.

    Raises:
        UserError: for values that are no ids, or are outside a vocabulary of `vocab_size` (None: not known).
    """
    files = [directory / name for name in ("config.json", "generation_config.json")]
    found = [Fields(read_json(file), file) for file in files if file.exists()]
    return merged_ids(*(checked_ids(fields, "eos_token_id", vocab_size) for fields in found))
