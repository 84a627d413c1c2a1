"""A file that long work is written to as it goes, so that a killed process loses at most one batch.

The first line holds the settings of the work, each further line the answers of one batch. Batches may stand in any order: each
names its turn and its talks. Lines are only appended, and each is on the disk before the next batch is asked for. Half a line
at the end, left by a killed process, is dropped.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from s2d_jax.cli.agreement import brief
from s2d_jax.cli.screen import screen
from s2d_jax.errors import UserError
from s2d_jax.files import parse_json


class Journal:
    """Opens `path` for one process, reads what an earlier one left, and appends. Use as a context manager.

    Args:
        path: the file; created if it does not exist.
        settings: everything that decides the answers, as JSON values.
        later: keys of settings that are not known yet; `settle` must be called with them before `add`.
        writes: False in a process that leaves the file to another one. It has no `batches` of its own.

    Attributes:
        batches: the entries of earlier processes, in order.

    Raises:
        UserError: if another process has the file open, or it was begun with other settings, or it is damaged.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        later: Sequence[str] = (),
        *,
        writes: bool = True,
    ):
        self.path = path
        self._file: int | None = None
        self._settings, self._begun = _plain(settings), not writes
        self.batches: list[dict[str, Any]] = []
        if writes:
            self._open(later)

    def _open(self, later: Sequence[str]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._lock(file)
            self.batches = self._read(file, self._settings, later)
        except BaseException:
            os.close(file)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)

    @property
    def kept_answers(self) -> int:
        """How many answers earlier processes left."""
        return sum(len(batch["answers"]) for batch in self.batches)

    def settle(self, found: dict[str, Any]) -> None:
        """Takes settings that were left for `later`, or are known once more.

        Raises:
            UserError: if the journal was begun with others.
        """
        found = _plain(found)
        if not self._begun:
            self._begin({**self._settings, **found})
        self._compare({**self._settings, **found}, ())

    def kept(self, turn: int, groups: Sequence[Sequence[int]]) -> dict[int, dict[str, Any]]:
        """The entries of a turn that earlier processes left, by the number of their batch.

        Args:
            turn: 0 for first turns.
            groups: the talks of each batch of the turn.

        Raises:
            UserError: for an entry that is none of these batches, or a batch that is there twice.
        """
        numbers = {str(list(group)): number for number, group in enumerate(groups)}
        found: dict[int, dict[str, Any]] = {}
        for entry in self.batches:
            if entry.get("turn") == turn or type(entry.get("turn")) is not int:
                number = numbers.get(str(entry.get("talks")))
                if number is None or number in found:
                    raise UserError(
                        f"{self.path} holds other batches than these conversations have; remove it to start again"
                    )
                found[number] = entry
        return found

    def add(self, batch: dict[str, Any]) -> None:
        """Appends an entry and waits for the disk."""
        assert self._begun, "settings are still missing"
        self._append(batch)

    def remove(self) -> None:
        """Removes the file, once the work is done and kept elsewhere."""
        if self._file is not None:
            self.path.unlink()

    def _lock(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process writes {self.path}; wait for it, or choose another --out"
            ) from None

    def _read(
        self, file: int, settings: dict[str, Any], later: Sequence[str]
    ) -> list[dict[str, Any]]:
        with os.fdopen(os.dup(file), "rb") as stream:
            stream.seek(0)
            whole, _, _ = stream.read().rpartition(b"\n")
        lines = whole.split(b"\n") if whole else []
        length = len(whole) + 1 if lines else 0
        os.ftruncate(file, length)
        os.lseek(file, length, os.SEEK_SET)
        entries = [self._parsed(number, line) for number, line in enumerate(lines, start=1)]
        self._settings, self._begun = settings, bool(entries)
        if entries:
            self._settings = entries[0]
            self._compare(settings, later)
        elif not later:
            self._begin(settings)
        return entries[1:]

    def _begin(self, settings: dict[str, Any]) -> None:
        self._append(settings)
        self._settings, self._begun = settings, True

    def _compare(self, settings: dict[str, Any], later: Sequence[str]) -> None:
        for key in sorted((self._settings.keys() | settings.keys()) - set(later)):
            before, now = self._settings.get(key), settings.get(key)
            if before != now:
                raise self._begun_otherwise(key, before, now)

    def _begun_otherwise(self, key: str, before: Any, now: Any) -> UserError:
        if key == "tokenizer":
            return UserError(
                f"{self.path} was begun with another tokenizer or chat template (earlier versions read some directories by "
                "their tokenizer_class, and made other ids); choose another --out, or remove it to start again"
            )
        return UserError(
            f"{self.path} was begun with {key}={brief(before)}, not {brief(now)}; go on with the same, choose "
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
        if self._file is None:
            return
        data = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)


def journal_of(out: Path) -> Path:
    """Where the answers are kept until all are done."""
    return out.with_name(f"{out.name}.journal")


@contextlib.contextmanager
def resuming(journal: Journal) -> Iterator[None]:
    """Says what an earlier process left, and after Ctrl-C that nothing is lost."""
    if kept := journal.kept_answers:
        screen().print(f"resuming {journal.path}: {kept:,} answers are there", soft_wrap=True)
    try:
        yield
    except KeyboardInterrupt:
        message = f"the answers so far are in {journal.path}; the same command goes on"
        screen(stderr=True).print(message, soft_wrap=True)
        raise


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """As they are read back from JSON."""
    return parse_json(json.dumps(settings), "the settings")
