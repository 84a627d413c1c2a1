"""Which tokens a trimmed head keeps, and how much of a text they cover."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from s2d_jax.errors import UserError

FOLDS = 5


def choose_tokens(
    counts_V: np.ndarray, text_counts_V: np.ndarray, keep: Sequence[int], size: int
) -> np.ndarray:
    """The `size` tokens worth drafting: those in `keep`, the most frequent in answers, then in other text, then the lowest ids.

    Each criterion breaks the ties of those before it. The list is filled with the lowest unused ids, because tokenizers number
    tokens in the order of merges, that is by their frequency in the tokenizer's training text.

    Args:
        counts_V: how often each token was written in answers.
        text_counts_V: how often each token occurs in other text.
        keep: ids that are always in the list; special and stop tokens.
        size: U.

    Returns:
        int64 `[U]`, ascending.

    >>> nothing = np.zeros(6, int)
    >>> choose_tokens(np.array([0, 5, 0, 7, 0, 7]), nothing, [4], 4).tolist()
    [1, 3, 4, 5]
    >>> choose_tokens(np.array([0, 5, 0, 0, 0, 0]), np.array([0, 0, 0, 9, 0, 0]), [4], 4).tolist()
    [0, 1, 3, 4]

    Raises:
        UserError: if `size` exceeds the vocabulary, or cannot hold `keep`.
    """
    return np.sort(_ranked(counts_V, text_counts_V, keep, size)[:size])


def _ranked(counts_V, text_counts_V, keep: Sequence[int], size: int) -> np.ndarray:
    """All ids, in the order in which they are chosen."""
    vocab_size, kept = len(counts_V), len(set(keep))
    if size > vocab_size:
        raise UserError(
            f"size {size} exceeds the vocabulary of {vocab_size} tokens; choose a smaller one"
        )
    if size <= kept:
        raise UserError(
            f"size {size} does not exceed the {kept} special tokens that are always kept; choose a larger one"
        )
    always_V = np.zeros(vocab_size, bool)
    always_V[list(keep)] = True
    return np.lexsort((np.arange(vocab_size), -text_counts_V, -counts_V, ~always_V))


def coverage(
    counts_FV: np.ndarray, text_counts_V: np.ndarray, keep: Sequence[int], sizes: Sequence[int]
) -> dict[int, float]:
    """For each list size, the share of written tokens that the list holds, measured on answers that it was not made from.

    Each fold's tokens are looked up in the list that the other folds give.

    Args:
        counts_FV: how often each token was written in each fold; at least two folds.
        text_counts_V: how often each token occurs in other text, on which nothing is measured.
        keep: as for `choose_tokens`.
        sizes: list sizes.
    """
    whole_V = counts_FV.sum(axis=0)
    covered = dict.fromkeys(sizes, 0)
    for fold_V in counts_FV:
        ranked_V = _ranked(whole_V - fold_V, text_counts_V, keep, max(sizes))
        found = np.cumsum(fold_V[ranked_V])
        for size in sizes:
            covered[size] += int(found[size - 1])
    return {size: count / int(whole_V.sum()) for size, count in covered.items()}
