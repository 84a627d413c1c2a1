"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from s2d_jax.errors import UserError

# What comes with s2d-jax: configurations of training and prompts, in `configs`.
SHIPPED = Path(__file__).parent / "shipped"


def here_or_shipped(path: str | Path) -> Path:
    """`path`; if it does not exist and reads `configs/NAME`, the file of that name that comes with s2d-jax."""
    path = Path(path).expanduser()
    shipped = SHIPPED / path
    is_shipped = path.parts[:1] == ("configs",) and ".." not in path.parts and shipped.is_file()
    return shipped if is_shipped and not path.exists() else path


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; renames it at the end, or removes it on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file of UTF-8 text, whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A parsed JSON object.

    Raises:
        UserError: if the file is damaged, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise UserError(
            f"{path} holds a JSON {type(value).__name__}, an object is expected; fetch it again"
        )
    return value
