"""Conversations whose answers are replaced by the target's own."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2d_jax.cli.prompts import Question, question_of, read_questions
from s2d_jax.errors import UserError
from s2d_jax.text.conversations import parse_messages, read_rows, usable_turns

if TYPE_CHECKING:
    pass


@dataclasses.dataclass
class Talk:
    """A conversation that is being answered.

    Attributes:
        question: its user turns, and a system message as history.
        answers: the answers so far, as the journal holds them.
        ended: "" while it goes on, else why it ends before its last turn.
    """

    question: Question
    answers: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    ended: str = ""

    @property
    def waits(self) -> bool:
        return not self.ended and len(self.answers) < len(self.question.turns)

    def messages(self) -> list[dict[str, str]]:
        return self.question.messages([answer["text"] for answer in self.answers])


def read_talks(path: Path) -> tuple[list[Talk], collections.Counter[str]]:
    """The conversations of a file or saved dataset, and how many were left out, by reason.

    Takes whatever training reads, rows of prompts (`prompt`, `turns`), and .txt with a prompt per line.

    Raises:
        UserError: for what cannot be read, a corrupt row, or when nothing is left.
    """
    left_out: collections.Counter[str] = collections.Counter()
    if path.suffix == ".txt":
        return [Talk(question) for question in read_questions(path)], left_out
    talks = []
    for number, (where, row) in enumerate(read_rows(path), start=1):
        if not isinstance(row, dict) or not {"messages", "conversations"} & row.keys():
            talks.append(Talk(question_of(where, number, row)))
            continue
        messages, reason = usable_turns(parse_messages(row, where))
        if reason:
            left_out[_REASONS[reason]] += 1
            continue
        history = tuple(message for message in messages if message["role"] == "system")
        turns = tuple(message["content"] for message in messages if message["role"] == "user")
        name = row.get("question_id", row.get("id", number))
        talks.append(Talk(Question(name, str(row.get("category", "")), turns, history)))
    if not talks:
        raise UserError(f"{path}: holds no conversation with a user's turn; check it")
    return talks, left_out


_REASONS = {
    "no_answer": "no user's turn",  # here, conversations need no answers
    "roles_do_not_alternate": "roles do not alternate",
    "empty_turn": "the first turn is empty",
}
