"""Conversations on disk, as public chat files hold them; `text/messages.py` has what a row may look like.

They come as JSON, JSON lines, parquet, Arrow, a directory that `save_to_disk` of Hugging Face `datasets` wrote, or the folder
of a dataset repository with its parquet files. The content of a file tells which it is, never the name.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from s2d_jax.errors import UserError
from s2d_jax.files import json_rows, local_path, regular_file
from s2d_jax.text.messages import Message, UnusableRow, parse_messages

_PARQUET, _ARROW_STREAM = b"PAR1", b"\xff\xff\xff\xff"
_REMEDY = "give a conversation file or a saved dataset"
# How the names of files and folders of a dataset repository tell which split they hold: `train`, `train_sft`.
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![A-Za-z])\w*")


def read_conversations(
    path: str | Path, left_out: collections.Counter[str] | None = None
) -> list[list[Message]]:
    """All conversations of a file or directory.

    A row is an object with a list `messages`, `conversations` or `conversation`, or with `prompt` and `completion` (texts or
    lists). Turns of a list have `role` and `content`, or `from` and `value`; content is a text or a list of text parts. A list
    may be written as JSON in a text. Other columns are left alone. A row may say with `"finished": [true, false]` whether its
    last answers ended by themselves, as `infer.generate` does.

    Args:
        path: where they are.
        left_out: counts the rows that hold no such conversation, by reason, as `UnusableRow` names it. None refuses them.

    Returns:
        Messages with the roles system, user and assistant.

    Raises:
        UserError: for what cannot be read, naming the file and the row, and if no conversation is left.
    """
    found, first = [], None
    for where, row in read_rows(path):
        try:
            found.append(parse_messages(row, where))
        except UnusableRow as error:
            if left_out is None:
                raise
            left_out[error.reason] += 1
            first = first or error
    if not found:
        reason = f" ({first})" if first else ""
        raise UserError(
            f"{path}: holds no conversation{reason}; give ShareGPT JSON or messages JSONL"
        )
    return found


def read_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file or directory as they are, each with where it stands.

    Takes what `json_rows` reads, packed by gzip or not, parquet, an Arrow stream, what `save_to_disk` of Hugging Face
    `datasets` wrote (a `Dataset`, or a `DatasetDict` with a split `train`), and a folder of parquet files. If names of these
    tell of splits, as `data/train-00000-of-00002.parquet` does, only `train` is read.

    Raises:
        UserError: for what cannot be read, naming the file and, in JSON, the line.
    """
    path = local_path(path, "the conversations at")
    if path.is_dir():
        yield from _directory(path)
        return
    magic = _magic(path)
    if magic in (_PARQUET, _ARROW_STREAM):
        yield from _table([path], magic)
        return
    yield from json_rows(path)


def _magic(path: Path) -> bytes:
    """The four bytes that a file begins with."""
    try:
        with regular_file(path, _REMEDY).open("rb") as file:
            return file.read(4)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {_REMEDY}") from None


def content_hash(path: str | Path) -> str:
    """SHA-256 of what a file or a saved dataset holds, wherever it lies; UserError if it cannot be read."""
    path = local_path(path, "the conversations at")
    try:
        if not path.is_dir():
            return _file_hash(regular_file(path, _REMEDY))
        # `map` leaves its results beside a saved dataset, under names of their own.
        files = [f for f in path.rglob("*") if f.is_file() and not f.name.startswith("cache-")]
        whole = hashlib.sha256()
        for name, file in sorted((file.relative_to(path).as_posix(), file) for file in files):
            whole.update(f"{name}\0{_file_hash(file)}\n".encode())
        return whole.hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {_REMEDY}") from None


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _directory(path: Path) -> Iterator[tuple[str, Any]]:
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        yield from _saved_dataset(path)
        return
    files = _training_files(path)
    magics = {file: _magic(file) for file in files}
    if damaged := [file for file in files if magics[file] != _PARQUET]:
        raise UserError(f"{damaged[0]}: is no parquet file in spite of its name; fetch it again")
    yield from _table(files, _PARQUET)


def _training_files(path: Path) -> list[Path]:
    """The parquet files of a folder to train on: those of the split `train`, or all where names tell of no splits."""
    files = sorted(
        file
        for file in path.rglob("*.parquet")
        if not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise UserError(
            f"{path}: is a directory without a saved dataset or parquet files; give what save_to_disk wrote, or a file"
        )
    splits = {file: _split_of(file.relative_to(path)) for file in files}
    names = sorted(filter(None, set(splits.values())))
    if not names:
        return files
    to_train = [name for name in names if name.startswith("train")]
    if "train" in to_train:
        to_train = ["train"]
    if len(to_train) != 1:
        raise UserError(f"{path}: has the splits {', '.join(names)}; give the files of one")
    chosen = [file for file in files if splits[file] == to_train[0]]
    folders = sorted({str(file.parent.relative_to(path)) for file in chosen})
    if len(folders) > 1:
        raise UserError(
            f"{path}: has several data sets, in {', '.join(folders)}; give one of these"
        )
    return chosen


def _split_of(file: Path) -> str:
    """The split that the name of a file, or of the folder that it lies in, begins with; "" for none."""
    for name in (file.name, file.parent.name):
        if found := _SPLIT.match(name):
            return found[0]
    return ""


def _saved_dataset(path: Path) -> Iterator[tuple[str, Any]]:
    import datasets  # takes a second, and most files are JSON

    with _damage(path):
        found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found:
            raise UserError(
                f"{path}: has the splits {', '.join(map(str, found))} and no train; give one as {path}/SPLIT"
            )
        found = found["train"]
    yield from _dataset_rows(found, path)


def _table(files: list[Path], magic: bytes) -> Iterator[tuple[str, Any]]:
    """The rows of parquet files, one after another, or of one Arrow stream."""
    import datasets

    for path in files:
        with tempfile.TemporaryDirectory(prefix="s2d-parquet-") as cache:
            with _damage(path):
                if magic == _PARQUET:
                    found = datasets.Dataset.from_parquet(
                        str(path), cache_dir=cache, keep_in_memory=True
                    )
                else:
                    found = datasets.Dataset.from_file(str(path))
            yield from _dataset_rows(found, path)


def _dataset_rows(found: Any, path: Path) -> Iterator[tuple[str, Any]]:
    for number in range(len(found)):
        with _damage(path, f"row {number + 1}: "):
            row = found[number]
        yield f"{path}: row {number + 1}", row


@contextlib.contextmanager
def _damage(path: Path, where: str = "") -> Iterator[None]:
    """Turns what pyarrow and datasets raise for a damaged table into a UserError of one line."""
    try:
        yield
    # Neither documents what it raises: pyarrow's errors are ValueErrors and OSErrors, those of datasets a family of their own.
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"{path}: {where}not readable as a dataset ({reason}); write or fetch it again"
        ) from None
