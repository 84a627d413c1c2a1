"""Prompts from files: our own JSONL, Spec-Bench's, conversations, and plain text lines."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from s2d_jax.errors import UserError
from s2d_jax.files import here_or_shipped
from s2d_jax.text.tokenizer import Tokenizer

Message = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Question:
    """User turns to be answered one after the other.

    Attributes:
        question_id: its own id, else the line number.
        category: for tables by category; "" when the file names none.
        turns: what the user says; each later turn follows the model's own answer.
        history: messages that come before the first turn.
    """

    question_id: int | str
    category: str
    turns: tuple[str, ...]
    history: tuple[Message, ...] = ()

    def messages(self, answers: list[str]) -> list[Message]:
        """The conversation up to the user turn that follows `answers`."""
        conversation = list(self.history)
        for turn, answer in zip(self.turns, answers, strict=False):
            conversation.append({"role": "user", "content": turn})
            conversation.append({"role": "assistant", "content": answer})
        if len(answers) < len(self.turns):
            conversation.append({"role": "user", "content": self.turns[len(answers)]})
        return conversation


def encode(tokenizer: Tokenizer, messages: list[Message], *, raw: bool) -> list[int]:
    """Token ids of a prompt: through the chat template, or as the bare text of all messages, with the tokenizer's BOS."""
    if not raw:
        return tokenizer.encode_chat(messages)
    text = "".join(message["content"] for message in messages)
    return tokenizer.encode_text(text)


def read_questions(
    path: Path, *, categories: tuple[str, ...] = (), max_questions: int | None = None
) -> list[Question]:
    """Reads questions from JSONL rows with `prompt`, `turns` or `messages`, or from .txt lines.

    Raises:
        UserError: for a missing file, a row that has none of these, or when nothing is left.
    """
    path = here_or_shipped(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a .jsonl or .txt file of prompts")
    parse = _parse_text if path.suffix == ".txt" else _parse_row
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    found = [parse(path, number, line) for number, line in lines if line.strip()]
    if categories:
        known = sorted({question.category for question in found})
        if unknown := sorted(set(categories) - set(known)):
            raise UserError(f"category {unknown[0]!r} is not in {path}; it has {', '.join(known)}")
        found = [question for question in found if question.category in categories]
    if max_questions is not None:
        if max_questions < 1:
            raise UserError(f"max-questions {max_questions} must be at least 1")
        found = found[:max_questions]
    if not found:
        raise UserError(f"{path} holds no prompts; give one JSON object per line")
    return found


def _parse_text(path: Path, number: int, line: str) -> Question:
    del path
    return Question(number, "", (line,))


def _parse_row(path: Path, number: int, line: str) -> Question:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg}); write one object per line") from None
    return question_of(where, number, row)


def question_of(where: str, number: int, row: Any) -> Question:
    """The question of a row with `prompt`, `turns` or `messages`; UserError, beginning with `where`, for another."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: {type(row).__name__} instead of an object; write {{...}}")
    question_id, category = row.get("question_id", number), str(row.get("category", ""))
    if isinstance(row.get("prompt"), str):
        return Question(question_id, category, (row["prompt"],))
    if _is_texts(row.get("turns")):
        return Question(question_id, category, tuple(row["turns"]))
    if isinstance(row.get("messages"), list):
        history, turn = _split_messages(where, row["messages"])
        return Question(question_id, category, (turn,), history)
    raise UserError(
        f"{where}: has {', '.join(row) or 'no fields'}; expected prompt (text), turns (texts) or "
        "messages (objects with role and content)"
    )


def _is_texts(value) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(x, str) for x in value)


def _split_messages(where: str, messages: list) -> tuple[tuple[Message, ...], str]:
    """The messages before the last user message, and that message; a last answer is dropped."""
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise UserError(f"{where}: a message lacks role or content; give both")
    kept = [{"role": m["role"], "content": m["content"]} for m in messages]
    if kept and kept[-1]["role"] == "assistant":
        kept.pop()
    if not kept or kept[-1]["role"] != "user":
        raise UserError(f"{where}: no user message at the end; end messages with a user's turn")
    return tuple(kept[:-1]), kept[-1]["content"]
