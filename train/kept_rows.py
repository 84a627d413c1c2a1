"""The rows of a run on disk: kept with checksums, so that a damaged one is found before a resumed run trains on it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import datasets

from s2d_jax.config import UserError
from s2d_jax.files import write_text
from train.data import save_rows

_REMEDY = "restore the directory from a copy, or start another run"


def keep_rows(rows: datasets.Dataset, directory: Path) -> None:
    """Writes the rows and, beside their directory, the checksum of each of its files."""
    save_rows(rows, directory)
    sums = {path.name: _checksum(path) for path in sorted(directory.iterdir())}
    write_text(_sums_file(directory), json.dumps(sums, indent=2) + "\n")


def check_rows(directory: Path) -> None:
    """Reads the files of `keep_rows` once, at the speed of the disk.

    Raises:
        UserError: if one of them is missing or not what was written.
    """
    try:
        sums = json.loads(_sums_file(directory).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"{_sums_file(directory)} is not readable; a resumed run needs the rows it began with, so {_REMEDY}"
        ) from None
    for name, expected in sums.items():
        path = directory / name
        if not path.exists():
            raise UserError(f"{path} is missing; a resumed run needs its rows, so {_REMEDY}")
        if (found := _checksum(path)) != expected:
            raise UserError(
                f"{path} is damaged (SHA-256 {found[:12]}, written was {expected[:12]}); {_REMEDY}"
            )


def _sums_file(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.sha256.json")


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
