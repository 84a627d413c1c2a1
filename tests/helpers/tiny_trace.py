"""Costs and traces made by hand."""

from __future__ import annotations

import numpy as np

from s2d_jax.calibration.costs import Costs, TreeCosts
from s2d_jax.calibration.trace import AnswerTrace, Trace

TREE_COSTS = TreeCosts(
    verify={8: 1.6, 16: 1.8, 60: 3.0},
    visit=0.0,
    level={
        1: {1: 0.1, 2: 0.25, 4: 0.4},
        2: {1: 0.15, 2: 0.3, 4: 0.5},
        10: {1: 0.2, 2: 0.4, 4: 0.6},
    },
    head={1: 0.05, 2: 0.06, 10: 0.08},
)
COSTS = Costs(
    verify={1: 1.0, 2: 1.1, 3: 1.2, 4: 1.3, 6: 1.5, 9: 2.0},
    head=0.05,
    alone={1: 0.1, 2: 0.2, 4: 0.3},
    through={1: 0.1, 2: 0.25, 4: 0.4},
    catch_up={1: 0.01, 2: 0.02, 4: 0.03},
    chunk=4,
    tree=TREE_COSTS,
)


def answer_of(rank_ET, confidence_ET, *, top_k: int = 10, among: int = 1) -> AnswerTrace:
    """An answer whose draft spreads `confidence` evenly over its `among` most probable tokens, and the rest over the others.

    Args:
        rank_ET: of the tokens of the answer; `top_k` for none of them. The most probable one is what a chain drafts.
        confidence_ET: what the `among` most probable tokens have together.
    """
    rank_ET, confidence_ET = np.asarray(rank_ET), np.asarray(confidence_ET, float)
    first = np.log(confidence_ET / among)
    others = np.log((1 - confidence_ET) / 1000)
    probs = [first] * among + [others] * (top_k - among)
    # A little less from rank to rank: no ties.
    log_probs_ETk = np.stack(probs, axis=-1) - 1e-3 * np.arange(top_k)
    return AnswerTrace(0, np.exp(first), (rank_ET == 0).astype(float), log_probs_ETk, rank_ET)


def certain(*accepted, confidence: float = 0.9) -> Trace:
    """One answer of a draft with the exit 4, whose most probable tokens are accepted, while no other ever is."""
    rank = np.where(np.array([accepted], bool), 0, 10)
    return Trace((4,), (answer_of(rank, np.full(rank.shape, confidence)),), rank.size + 1)


def coins(trace: Trace):
    """One walk along each answer, whose coins decide nothing where acceptance is certain."""
    return [[np.full(answer.accepted.shape[1], 0.5) for answer in trace.answers]]
