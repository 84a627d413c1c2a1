"""Prompts from files: our own JSONL, Spec-Bench's, conversations, and plain text lines."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from s2d_jax.errors import UserError, printable, shown
from s2d_jax.files import here_or_shipped, json_rows, local_path, read_text
from s2d_jax.text.messages import Message, UnusableRow, read_turn, text_of, told_row, turns_in
from s2d_jax.text.tokenizer import Tokenizer

_REMEDY = "give a .jsonl or .txt file of prompts"


@dataclasses.dataclass(frozen=True)
class Question:
    """User turns to be answered one after the other.

    Attributes:
        question_id: its own id, else the number of its row or, in a .txt, its line.
        category: for tables by category; "" when the file names none.
        turns: what the user says; each later turn follows the model's own answer.
        history: messages that come before the first turn.
    """

    question_id: int | str
    category: str
    turns: tuple[str, ...]
    history: tuple[Message, ...] = ()

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"prompt {printable(self.question_id)}"

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
    """Reads questions from rows of JSON with `prompt`, `turns` or a conversation, or from .txt lines.

    Raises:
        UserError: for a file that cannot be read, a row that has none of these, or when nothing is left.
    """
    path = here_or_shipped(local_path(path, "the prompts at"))
    if path.suffix == ".txt":
        lines = enumerate(read_text(path, _REMEDY).split("\n"), start=1)
        found = [Question(n, "", (line.removesuffix("\r"),)) for n, line in lines if line.strip()]
    else:
        rows = enumerate(json_rows(path, _REMEDY), start=1)
        found = [question_of(where, number, row) for number, (where, row) in rows]
    if categories:
        known = sorted({question.category for question in found})
        if unknown := sorted(set(categories) - set(known)):
            raise UserError(
                f"category {shown(unknown[0])} is not in {path}; it has {', '.join(map(printable, known))}"
            )
        found = [question for question in found if question.category in categories]
    if max_questions is not None:
        if max_questions < 1:
            raise UserError(f"max-questions {max_questions} must be at least 1")
        found = found[:max_questions]
    if not found:
        raise UserError(f"{path} holds no prompts; give one JSON object per line")
    return found


def names_of(row: Any, number: int) -> tuple[int | str, str]:
    """The id of a row, `number` if it has none, and its category, "" if it has none."""
    fields = row if isinstance(row, dict) else {}
    ids = (fields.get(name) for name in ("question_id", "id"))
    question_id = next((value for value in ids if value is not None), number)
    category = fields.get("category", "")
    return (
        question_id if type(question_id) in (int, str) else shown(question_id),
        "" if category is None else category if isinstance(category, str) else shown(category),
    )


def question_of(where: str, number: int, row: Any) -> Question:
    """The question of a row with `prompt`, `turns` or a conversation.

    A conversation is what `turns_in` finds; its last answer is dropped, since it is asked for.

    Args:
        where: where the row stands.
        number: its id if it has none of its own.
        row: as `json_rows` gives it.

    Raises:
        UnusableRow: beginning with `where`, for another row.
    """
    names = names_of(row, number)
    if isinstance(row, dict):
        if (prompt := text_of(row.get("prompt"))) is not None:
            return Question(*names, (prompt,))
        turns = row.get("turns")
        if isinstance(turns, list) and turns:
            texts = tuple(text for turn in turns if (text := text_of(turn)) is not None)
            if len(texts) == len(turns):
                return Question(*names, texts)
    turns = turns_in(row)
    if turns is None:
        raise UnusableRow(
            f"{where}: is {told_row(row)}; expected prompt (text), turns (texts) or messages (objects with role and content)",
            "no_conversation",
        )
    history, turn = _split_messages(where, turns)
    return Question(*names, (turn,), history)


def _split_messages(where: str, turns: list[Any]) -> tuple[tuple[Message, ...], str]:
    """The messages before the last user message, and that message; a last answer is dropped."""
    kept: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        role, content = read_turn(turn)
        if not role or content is None:
            raise UnusableRow(
                f"{where}: message {number} lacks role or content as text, it is {shown(turn)}; give both",
                "not_text",
            )
        kept.append({"role": role, "content": content})
    if kept and kept[-1]["role"] == "assistant":
        kept.pop()
    if not kept or kept[-1]["role"] != "user":
        raise UnusableRow(
            f"{where}: no user message at the end; end messages with a user's turn", "no_answer"
        )
    return tuple(kept[:-1]), kept[-1]["content"]
