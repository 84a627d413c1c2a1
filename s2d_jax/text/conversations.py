"""Conversations on disk: ShareGPT and `{"messages": [...]}` rows.

They come as JSON, JSON lines, parquet, Arrow, or a directory that `save_to_disk` of Hugging Face `datasets` wrote. The content
tells which, never the name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from s2d_jax.errors import UserError

# {"role": ..., "content": ...}, and "unfinished": "yes" for an answer that was cut off.
Message = dict[str, str]

_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard"), "assistant"),
    "system": "system",
}

_PARQUET, _ARROW_STREAM = b"PAR1", b"\xff\xff\xff\xff"


def read_conversations(path: str | Path) -> list[list[Message]]:
    """All conversations of a file or directory.

    Each row is `{"conversations": [{"from", "value"}, ...]}` (ShareGPT) or `{"messages": [{"role", "content"}, ...]}`; other
    columns are left alone. A row may say with `"finished": [true, false]` whether its last answers ended by themselves, as
    `infer.generate` does.

    Returns:
        Messages with the roles system, user and assistant.

    Raises:
        UserError: for what cannot be read or a corrupt row, naming the file and the row.
    """
    rows = [parse_messages(row, where) for where, row in read_rows(path)]
    if not rows:
        raise UserError(f"{path}: holds no conversation; give ShareGPT JSON or messages JSONL")
    return rows


def read_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file or directory as they are, each with where it stands.

    Takes a JSON list, one JSON object per line, parquet, an Arrow stream, and what `save_to_disk` of Hugging Face `datasets`
    wrote: a `Dataset`, or a `DatasetDict` with a split `train`.

    Raises:
        UserError: for what cannot be read, naming the file and, in JSON, the line.
    """
    path = Path(path)
    if path.is_dir():
        yield from _saved_dataset(path)
        return
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic in (_PARQUET, _ARROW_STREAM):
            yield from _table(path, magic)
            return
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; give a conversation file or a saved dataset"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; convert the file") from None
    yield from _json_rows(text, path)


def content_hash(path: str | Path) -> str:
    """SHA-256 of what a file or a saved dataset holds, wherever it lies; UserError if it cannot be read."""
    path = Path(path)
    try:
        if not path.is_dir():
            return _file_hash(path)
        # `map` leaves its results beside a saved dataset, under names of their own.
        files = [f for f in path.rglob("*") if f.is_file() and not f.name.startswith("cache-")]
        whole = hashlib.sha256()
        for name, file in sorted((file.relative_to(path).as_posix(), file) for file in files):
            whole.update(f"{name}\0{_file_hash(file)}\n".encode())
        return whole.hexdigest()
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; give a conversation file or a saved dataset"
        ) from None


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json_rows(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}: line {error.lineno}: not valid JSON ({error.msg}); repair or remove it"
            ) from None
        yield from ((f"{path}: conversation {i}", row) for i, row in enumerate(rows, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}: line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}: line {number}: not valid JSON ({error.msg}); repair or remove the line"
            ) from None


def _saved_dataset(path: Path) -> Iterator[tuple[str, Any]]:
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise UserError(
            f"{path}: is a directory without a saved dataset; give what save_to_disk wrote, or a file"
        )
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


def _table(path: Path, magic: bytes) -> Iterator[tuple[str, Any]]:
    import datasets

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


def parse_messages(row: Any, where: str) -> list[Message]:
    """The messages of a row of `read_rows`.

    Raises:
        UserError: beginning with `where`, for a row of another form.
    """
    if isinstance(row, dict) and _is_turns(row.get("messages")):
        turns, role_key, text_key = row["messages"], "role", "content"
    elif isinstance(row, dict) and _is_turns(row.get("conversations")):
        turns, role_key, text_key = row["conversations"], "from", "value"
    else:
        keys = f"keys {sorted(row)}" if isinstance(row, dict) else type(row).__name__
        raise UserError(
            f"{where}: expected a list `conversations` or `messages`, got {keys}; rename or remove it"
        )
    if isinstance(turns, dict):  # how `datasets` keeps a Sequence of structs
        turns = [
            dict(zip(turns, turn, strict=False)) for turn in zip(*turns.values(), strict=False)
        ]
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not (isinstance(turn, dict) and isinstance(turn.get(text_key), str)):
            raise UserError(
                f"{where}: turn {number} needs `{role_key}` and `{text_key}` as text; "
                "repair or remove the row"
            )
        role = _ROLES.get(turn.get(role_key, ""))
        if role is None:
            raise UserError(
                f"{where}: turn {number} has {role_key}={turn.get(role_key)!r}; "
                f"use one of {', '.join(_ROLES)}"
            )
        messages.append({"role": role, "content": turn[text_key]})
    finished = row.get("finished")
    _mark_unfinished(messages, [] if finished is None else finished, where)
    return messages


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) or (
        isinstance(value, dict) and all(isinstance(column, list) for column in value.values())
    )


def _mark_unfinished(messages: list[Message], finished: Any, where: str) -> None:
    answers = [message for message in messages if message["role"] == "assistant"]
    flags = finished if isinstance(finished, list) else [None]
    if len(flags) > len(answers) or not all(isinstance(flag, bool) for flag in flags):
        raise UserError(
            f"{where}: finished={finished!r} must be a list of true or false, one for each of the last answers"
        )
    for message, ended in zip(reversed(answers), reversed(flags), strict=False):
        if not ended:
            message["unfinished"] = "yes"


def usable_turns(messages: list[Message]) -> tuple[list[Message], str]:
    """An optional system message, then user and assistant in turn, as a chat template takes them.

    Assistant turns before the first question are left out (half of ShareGPT's exports start in mid-conversation), and so is
    everything from the first empty turn on.

    Returns:
        The turns and ""; a last question without an answer stays. If nothing is usable, no turns and the reason: the name of
        a count of `train.data.report.SourceReport`.
    """
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    while turns and turns[0]["role"] == "assistant":
        turns = turns[1:]
    if any(turn["role"] != ("user", "assistant")[i % 2] for i, turn in enumerate(turns)):
        return [], "roles_do_not_alternate"
    if not turns:
        return [], "no_answer"
    filled = next((i for i, turn in enumerate(turns) if not turn["content"].strip()), len(turns))
    if filled == 0:
        return [], "empty_turn"
    return system + turns[:filled], ""
