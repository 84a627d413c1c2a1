"""Conversations whose answers are replaced by the target's own."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path
from typing import Any

from s2d_jax.cli.prompts import Question, names_of, question_of, read_questions
from s2d_jax.errors import UserError
from s2d_jax.text.conversations import read_rows
from s2d_jax.text.messages import UnusableRow, parse_messages, turns_in, usable_turns


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

    Takes whatever training reads, rows of prompts (`prompt`, `turns`), and .txt with a prompt per line. Rows that hold neither
    are left out.

    Raises:
        UserError: for what cannot be read, or when nothing is left.
    """
    left_out: collections.Counter[str] = collections.Counter()
    if path.suffix == ".txt":
        return [Talk(question) for question in read_questions(path)], left_out
    talks, first = [], ""
    for number, (where, row) in enumerate(read_rows(path), start=1):
        try:
            talks.append(Talk(_question(where, number, row)))
        except UnusableRow as error:
            left_out[_REASONS[error.reason]] += 1
            first = first or f" ({error})"
    if not talks:
        raise UserError(f"{path}: holds no conversation with a user's turn{first}; check it")
    return talks, left_out


def _question(where: str, number: int, row: Any) -> Question:
    """The user's turns of a row; UnusableRow for one that has none, or none that can be used."""
    if turns_in(row) is None:
        return question_of(where, number, row)
    messages, reason = usable_turns(parse_messages(row, where))
    if reason:
        raise UnusableRow(f"{where}: {_REASONS[reason]}", reason)
    history = tuple(message for message in messages if message["role"] == "system")
    turns = tuple(message["content"] for message in messages if message["role"] == "user")
    return Question(*names_of(row, number), turns, history)


_REASONS = {
    "no_conversation": "no prompt or conversation in the row",
    "not_text": "a turn is not text",
    "other_roles": "roles other than user, assistant and system",
    "unclear_finished": "`finished` is no list of true and false",
    "no_answer": "no user's turn",  # here, conversations need no answers
    "roles_do_not_alternate": "roles do not alternate",
    "empty_turn": "the first turn is empty",
}
