"""Acceptance on held-out rows while training: what each exit would have drafted, and what the target would have kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class HeldOutAnswer:
    """One answer, teacher-forced: every token predicted from the true ones before it.

    Attributes:
        agrees_ET: bool, whether an exit's argmax is what the target writes (its argmax, or else the answer's own token).
        confidence_ET: f32, the largest probability of each exit.
    """

    agrees_ET: np.ndarray
    confidence_ET: np.ndarray


def answers_of_row(
    counted_T: np.ndarray, agrees_ET: np.ndarray, confidence_ET: np.ndarray
) -> Iterator[HeldOutAnswer]:
    """The answers of a packed row: its runs of counted positions.

    Args:
        counted_T: bool, whether the position's next token is an assistant's.
        agrees_ET, confidence_ET: as in `HeldOutAnswer`, for all positions of the row.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[0], counted_T.astype(np.int8), [0]])))
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        yield HeldOutAnswer(agrees_ET[:, start:stop], confidence_ET[:, start:stop])


def rounds_of_chain(agrees_T: np.ndarray, draft_tokens: int) -> int:
    """Target passes needed to write an answer with chains of at most `draft_tokens`; prefill emits the first token.

    Exact for greedy answers: as long as drafted tokens agree, the draft sees the same text as here.

    >>> rounds_of_chain(np.array([1, 1, 1, 0, 1, 1], bool), 2)
    2
    """
    at, rounds = 1, 0
    while at < len(agrees_T):
        window = agrees_T[at : at + draft_tokens]
        accepted = len(window) if window.all() else int(np.argmin(window))
        at, rounds = at + accepted + 1, rounds + 1
    return rounds


def exits_taken(confidence_ET: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """The exit `[T]` where each token leaves: the first whose confidence is above its threshold; the last always accepts."""
    leaves_ET = confidence_ET > np.asarray(thresholds)[:, None]
    leaves_ET[-1] = True
    return np.argmax(leaves_ET, axis=0)


def acceptance(
    answers: Sequence[HeldOutAnswer],
    exit_layers: Sequence[int],
    thresholds: Sequence[float],
    draft_tokens: int,
) -> dict[str, Any]:
    """The figures of the held-out answers for the metrics file.

    Returns:
        `agreement_per_exit`, `mat_per_exit` (with chains from that exit alone), and for S2D at `thresholds` `exit_histogram`
        (shares) and `s2d_mat`. A MAT is None if no answer has two tokens.
    """
    names = [str(layer) for layer in exit_layers]
    agrees_ET = np.concatenate([answer.agrees_ET for answer in answers], axis=1)
    taken = [exits_taken(answer.confidence_ET, thresholds) for answer in answers]
    sorted_agrees = [
        np.take_along_axis(answer.agrees_ET, exits[None], axis=0)[0]
        for answer, exits in zip(answers, taken, strict=True)
    ]
    shares = np.bincount(np.concatenate(taken), minlength=len(names)) / agrees_ET.shape[1]
    per_exit = [
        mean_acceptance_length([answer.agrees_ET[e] for answer in answers], draft_tokens)
        for e in range(len(names))
    ]
    return {
        "agreement_per_exit": dict(zip(names, agrees_ET.mean(axis=1).tolist(), strict=True)),
        "mat_per_exit": dict(zip(names, per_exit, strict=True)),
        "exit_histogram": dict(zip(names, shares.tolist(), strict=True)),
        "s2d_mat": mean_acceptance_length(sorted_agrees, draft_tokens),
    }


def mean_acceptance_length(agrees: Sequence[np.ndarray], draft_tokens: int) -> float | None:
    """Tokens per target pass, without prefill's token and pass."""
    rounds = sum(rounds_of_chain(agrees_T, draft_tokens) for agrees_T in agrees)
    tokens = sum(max(len(agrees_T) - 1, 0) for agrees_T in agrees)
    return tokens / rounds if rounds else None
