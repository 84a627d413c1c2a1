"""What target and draft said at each position of recorded answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np

# The most children of a node that a trace records.
CHILDREN = 10


@dataclasses.dataclass(frozen=True)
class AnswerTrace:
    """The trace of one answer.

    Attributes:
        prompt: number of the prompt that it answers.
        confidence: f64 `[E, T]`, the confidence of each exit before each token.
        accepted: f64 `[E, T]`, the probability that the token was an accepted draft of this exit.
        log_probs: f32 `[E, T, k]`, log-probabilities of each exit's k most probable tokens, before temperature and filters.
        rank: int `[E, T]`, which of those k tokens was emitted; k if none.
    """

    prompt: int
    confidence: np.ndarray
    accepted: np.ndarray
    log_probs: np.ndarray
    rank: np.ndarray


@dataclasses.dataclass(frozen=True)
class Trace:
    """Recorded answers of one target at one temperature.

    Attributes:
        exits: the draft's exits, one per row of each answer's arrays.
        answers: what was recorded.
        max_new_tokens: the limit of each answer.
    """

    exits: tuple[int, ...]
    answers: tuple[AnswerTrace, ...]
    max_new_tokens: int

    def of_prompts(self, numbers: Collection[int]) -> Trace:
        """Only the answers to these prompts."""
        answers = tuple(answer for answer in self.answers if answer.prompt in numbers)
        return dataclasses.replace(self, answers=answers)

    def rows(self, exits: tuple[int, ...]) -> list[int]:
        return [self.exits.index(exit) for exit in exits]
