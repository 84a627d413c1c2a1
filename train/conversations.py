"""Reading conversation files: ShareGPT JSON and `{"messages": [...]}`, told apart by content."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from s2d_jax.config import UserError

# {"role": ..., "content": ...}, and "unfinished": "yes" for an answer that was cut off.
Message = dict[str, str]

_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard"), "assistant"),
    "system": "system",
}


def read_conversations(path: str | Path) -> list[list[Message]]:
    """All conversations of a file: a JSON list, or one JSON object per line.

    Each is `{"conversations": [{"from", "value"}, ...]}` (ShareGPT) or `{"messages": [{"role", "content"}, ...]}`.

    A row may say with `"finished": [true, false]` whether its last answers ended by themselves, as `infer.generate` does.

    Returns:
        Messages with the roles system, user and assistant.

    Raises:
        UserError: for a file that cannot be read or a corrupt row, naming the file and the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; data.paths must name files") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; convert the file") from None
    rows = [_messages(row, where) for where, row in _rows(text, path)]
    if not rows:
        raise UserError(f"{path}: holds no conversation; give ShareGPT JSON or messages JSONL")
    return rows


def _rows(text: str, path: str | Path) -> Iterator[tuple[str, Any]]:
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


def _messages(row: Any, where: str) -> list[Message]:
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        turns, role_key, text_key = row["messages"], "role", "content"
    elif isinstance(row, dict) and isinstance(row.get("conversations"), list):
        turns, role_key, text_key = row["conversations"], "from", "value"
    else:
        keys = f"keys {sorted(row)}" if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{where}: expected a list `conversations` or `messages`, got {keys}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not (isinstance(turn, dict) and isinstance(turn.get(text_key), str)):
            raise UserError(f"{where}: turn {number} needs `{role_key}` and `{text_key}` as text")
        role = _ROLES.get(turn.get(role_key))  # type: ignore[arg-type]
        if role is None:
            raise UserError(
                f"{where}: turn {number} has {role_key}={turn.get(role_key)!r}; "
                f"use one of {', '.join(_ROLES)}"
            )
        messages.append({"role": role, "content": turn[text_key]})
    _mark_unfinished(messages, row.get("finished", []), where)
    return messages


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


def well_formed(messages: list[Message]) -> list[Message] | None:
    """The part that a chat template takes, or None: an optional system message, then user and assistant in turn.

    Leading assistant turns are dropped (half of ShareGPT's exports start in mid-talk), and so is what follows the last answer.
    """
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    while turns and turns[0]["role"] == "assistant":
        turns = turns[1:]
    while turns and turns[-1]["role"] != "assistant":
        turns = turns[:-1]
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not turns or [turn["role"] for turn in turns] != expected:
        return None
    return system + turns
