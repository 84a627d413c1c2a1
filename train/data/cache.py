"""Packed rows kept under a hash of everything that they depend on, so that a second run reads them instead of making them.

An entry appears by one rename, after all of it is on the disk; processes that make the same entry at once do not disturb each
other. An entry that is found damaged is removed and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import transformers

from s2d_jax.files import local_path
from s2d_jax.progress.activity import activity
from s2d_jax.text.conversations import content_hash
from s2d_jax.text.tokenizer import Tokenizer
from train.config.sections import DataSection

CACHE_VARIABLE = "S2D_DATA_CACHE"
ROWS = "rows"
_ENTRY, _HASHES = "entry.json", "hashes.json"
_LEFTOVER_SECONDS = 24 * 3600.0
# Part of every key. The first five are the hashes of the files that made the rows of version 0.1. If
# you change which rows come out, add a word here, so that rows kept earlier are not reused; tests/train/test_data_cache.py
# fails until you do.
_HOW_ROWS_ARE_MADE = [
    "c561a8b109819921e6a4ed543639e8b8d4aa1a74528741f02a22c95b9001ebb3",
    "e70c0435453e90040b8210cc5499d86f86d1ddb12917224d90fcb448255001d4",
    "9ccb51d0c789b292bcd089a94b9971db79f8376ceaa86f39bc82729a3f1e81d9",
    "75a2f65af058e663534616bad918cc44e8c78818ae0eb1864b9f89801eb8084a",
    "83d3fa3d3c7065bba4bb85c32eabbf9f7387c50ae3b510ed2cf9280e24b1a1e1",
    "rows of all public chat files",
]


def cache_directory(config: DataSection) -> Path:
    """`data.cache_dir`, else $S2D_DATA_CACHE, else s2d-jax/data in the user's cache directory."""
    chosen = config.cache_dir or os.environ.get(CACHE_VARIABLE)
    if chosen:
        return local_path(chosen, "data.cache_dir" if config.cache_dir else f"${CACHE_VARIABLE}")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "s2d-jax" / "data"


def cache_key(config: DataSection, tokenizer: Tokenizer) -> str:
    """SHA-256 of the sources' contents, the tokenizer with its template, the length of rows, and how they are made.

    Names of files, weights and the seed are not part of it: rows do not depend on them.

    Raises:
        UserError: for a source that cannot be read.
    """
    parts = {
        "sources": [content_hash(path) for path in config.paths],
        "tokenizer": tokenizer.fingerprint(),
        "max_length": config.max_length,
        "code": _HOW_ROWS_ARE_MADE,
        "libraries": [tokenizers.__version__, transformers.__version__],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class DamagedRows(Exception):
    """Rows on disk differ from those that were saved."""


def write_dataset(rows: datasets.Dataset, directory: Path) -> None:
    """Saves rows with the hash of each file, and waits until all is on the disk."""
    with activity("saving the rows"):
        rows.save_to_disk(str(directory))
    files = sorted(directory.iterdir())
    hashes = {file.name: _file_hash(file) for file in files}
    (directory / _HASHES).write_text(json.dumps(hashes, indent=2), encoding="utf-8")
    for path in (*files, directory / _HASHES, directory):
        _to_disk(path)


def read_dataset(directory: Path) -> datasets.Dataset:
    """What `write_dataset` saved. Raises DamagedRows if it is damaged, FileNotFoundError if it does not exist."""
    if not directory.is_dir():
        raise FileNotFoundError(directory)
    try:
        hashes = json.loads((directory / _HASHES).read_text(encoding="utf-8"))
        for name, known in hashes.items():
            if _file_hash(directory / name) != known:
                raise DamagedRows(f"{name} is not what was saved")
        return datasets.Dataset.load_from_disk(str(directory))
    except (OSError, ValueError, AttributeError) as error:
        raise DamagedRows(" ".join(str(error).split())[:160]) from None


class RowsCache:
    """Entries `KEY/` with the rows, and facts about them in entry.json."""

    def __init__(self, directory: Path):
        self.directory = directory

    def find(self, key: str) -> tuple[datasets.Dataset, dict[str, Any]] | None:
        """The rows and facts of an entry, or None; a damaged entry is removed."""
        entry = self.directory / key
        if not entry.is_dir():
            return None
        try:
            facts = json.loads((entry / _ENTRY).read_text(encoding="utf-8"))
            return read_dataset(entry / ROWS), facts
        except (OSError, ValueError, DamagedRows):
            shutil.rmtree(entry, ignore_errors=True)
            return None

    def keep(self, key: str, rows: datasets.Dataset, facts: dict[str, Any]) -> None:
        """Adds an entry, unless another process was faster. If the disk refuses, raises OSError and leaves nothing."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.directory))
        try:
            write_dataset(rows, partial / ROWS)
            (partial / _ENTRY).write_text(json.dumps(facts, indent=2), encoding="utf-8")
            for path in (partial / _ENTRY, partial):
                _to_disk(path)
            partial.chmod(0o755)  # mkdtemp hides it from other users
            os.rename(partial, self.directory / key)
        except OSError:
            if not (self.directory / key).is_dir():  # else another process was faster
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        """Removes what killed processes left: files older than any that are still being written."""
        for path in self.directory.glob(".partial-*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
