"""A file that long work is written to as it goes, so that a killed process loses at most one batch.

The first line holds the settings of the work, each further line the answers of one batch. Lines are only appended, and each is
on the disk before the next batch begins. Half a line at the end, left by a killed process, is dropped.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from s2d_jax.errors import UserError, printable
from s2d_jax.files import parse_json


class Journal:
    """Opens `path` for one process, reads what an earlier one left, and appends. Use as a context manager.

    Args:
        path: the file; created if it does not exist.
        settings: everything that decides the answers, as JSON values.

    Attributes:
        batches: the entries of earlier processes, in order.

    Raises:
        UserError: if another process has the file open, or it was begun with other settings, or it is damaged.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._lock()
            self.batches = self._read(parse_json(json.dumps(settings), "the settings"))
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def add(self, batch: dict[str, Any]) -> None:
        """Appends an entry and waits for the disk."""
        self._append(batch)

    def remove(self) -> None:
        """Removes the file, once the work is done and kept elsewhere."""
        self.path.unlink()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process writes {self.path}; wait for it, or choose another --out"
            ) from None

    def _read(self, settings: dict[str, Any]) -> list[dict[str, Any]]:
        with os.fdopen(os.dup(self._file), "rb") as file:
            file.seek(0)
            whole, _, _ = file.read().rpartition(b"\n")
        lines = whole.split(b"\n") if whole else []
        length = len(whole) + 1 if lines else 0
        os.ftruncate(self._file, length)
        os.lseek(self._file, length, os.SEEK_SET)
        entries = [self._parsed(number, line) for number, line in enumerate(lines, start=1)]
        if not entries:
            self._append(settings)
            return []
        begun = entries[0]
        for key in sorted(begun.keys() | settings.keys()):
            before, now = begun.get(key), settings.get(key)
            if before != now:
                raise self._begun_otherwise(key, before, now)
        return entries[1:]

    def _begun_otherwise(self, key: str, before: Any, now: Any) -> UserError:
        if key == "tokenizer":
            return UserError(
                f"{self.path} was begun with another tokenizer or chat template (earlier versions read some directories by "
                "their tokenizer_class, and made other ids); choose another --out, or remove it to start again"
            )
        return UserError(
            f"{self.path} was begun with {key}={_brief(before)}, not {_brief(now)}; go on with the same, choose "
            "another --out, or remove it to start again"
        )

    def _parsed(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            entry = parse_json(line.decode(), f"line {number}")
        except ValueError:  # a UserError is one, and so is what is no UTF-8
            entry = None
        if not isinstance(entry, dict):
            raise UserError(
                f"{self.path}: line {number} is damaged; remove it and all behind it, or the file to start again"
            )
        return entry

    def _append(self, entry: dict[str, Any]) -> None:
        data = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return printable(text if len(text) <= 60 else f"{text[:57]}...")
