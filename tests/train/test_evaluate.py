"""Acceptance on held-out answers against a slow walk, and what the metrics say of it."""

from __future__ import annotations

import numpy as np
import pytest

from train.run.implied_acceptance import (
    HeldOutAnswer,
    acceptance,
    answers_of_row,
    exits_taken,
    mean_acceptance_length,
    rounds_of_chain,
)


def slow_rounds(agrees, draft_tokens):
    """Plays decoding token by token: the prefill writes the first; each round adds accepted tokens and one of the target's."""
    written, rounds = 1, 0
    while written < len(agrees):
        rounds += 1
        for _ in range(draft_tokens):
            if written == len(agrees) or not agrees[written]:
                break
            written += 1
        written += 1  # the correction or the bonus token
    return rounds


@pytest.mark.parametrize("draft_tokens", [1, 2, 5])
def test_rounds_equal_a_walk_token_by_token(draft_tokens):
    rng = np.random.default_rng(0)
    for _ in range(300):
        agrees = rng.random(rng.integers(0, 20)) < rng.random()
        assert rounds_of_chain(agrees, draft_tokens) == slow_rounds(agrees, draft_tokens)


def test_mean_acceptance_length_of_perfect_and_useless_drafts():
    assert mean_acceptance_length([np.ones(13, bool)], 5) == 6.0  # 12 tokens in 2 rounds
    assert mean_acceptance_length([np.zeros(13, bool)], 5) == 1.0
    assert mean_acceptance_length([np.ones(1, bool)], 5) is None


def test_answers_are_the_runs_of_counted_positions():
    counted = np.array([0, 1, 1, 0, 0, 1, 1, 1], bool)
    agrees = np.arange(16).reshape(2, 8)
    found = list(answers_of_row(counted, agrees, agrees / 16))
    assert [answer.agrees_ET.tolist() for answer in found] == [
        [[1, 2], [9, 10]],
        [[5, 6, 7], [13, 14, 15]],
    ]


def test_a_token_leaves_at_the_first_exit_above_its_threshold():
    confidence = np.array([[0.6, 0.5, 0.2], [0.9, 0.7, 0.3], [0.1, 0.1, 0.1]])
    assert exits_taken(confidence, (0.5, 0.6, 0.0)).tolist() == [0, 1, 2]


def test_acceptance_of_each_exit_and_of_s2d():
    agrees = np.array([[1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], bool)
    confidence = np.array([[0.9, 0.1, 0.9, 0.1, 0.1, 0.1], [0.5] * 6])
    row = acceptance([HeldOutAnswer(agrees, confidence)], (6, 12), (0.5, 0.0), 5)
    assert row["agreement_per_exit"] == {"6": 1 / 6, "12": 1.0}
    assert row["mat_per_exit"] == {"6": 1.0, "12": 5.0}
    assert row["exit_histogram"] == {"6": 2 / 6, "12": 4 / 6}
    # The third token leaves at 6 and is wrong: tokens 2 and 3 in one round, 4 to 6 in the next.
    assert row["s2d_mat"] == 2.5
