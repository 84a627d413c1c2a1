"""What calibration measures and compares: costs, a recorded trace, and the candidates that the replay judges with them.

A *trace* holds, for every position of the target's own answers and every exit of the draft, the exit's confidence and the
probability that the emitted token would have been an accepted draft, if this exit had drafted here:

- greedy, or a drafted mode: 1 if the exit's mode is the emitted token y, else 0;
- sampled from q: `min(1, q(y) / p(y))`. A draft is accepted *and* is y with probability `min(p(y), q(y))`, and y is emitted
  with probability p(y). Its mean over y is `sum(min(p, q))`, the probability that a draft is accepted at all.

For trees (`replay_tree`) it holds what decides how they grow: the exit's most probable tokens, and which of them was emitted.

No model, no device, no clock.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from s2d_jax.calibration.costs import Costs
from s2d_jax.calibration.trace import Trace
from s2d_jax.config.costs import RoundCosts
from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.tree import TreeShape

LENGTHS = (1, 2, 3, 5, 7)
CONFIDENCES = (0.2, 0.35, 0.5, 0.65, 0.8)
THRESHOLDS = (0.3, 0.5, 0.7, 0.9)
RATES = (1.0, 1.15, 1.3, 1.6, 2.0)
DEPTHS = (2, 3, 4, 5, 6)
TOP_KS = (2, 4, 8, 10)
NODES = (8, 12, 16, 32, 60)
_KNOTS = 9
_PRIOR = 2.0


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way of decoding that the search compares; `config` None is plain decoding."""

    name: str
    family: str
    config: DecodeConfig | None


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What replaying says about a candidate.

    Attributes:
        candidate: the candidate that was replayed.
        speedup: over plain decoding, prefill left out.
        mean_acceptance_length: tokens per target pass.
        mean_draft_length: drafted and verified tokens per round.
    """

    candidate: Candidate
    speedup: float
    mean_acceptance_length: float
    mean_draft_length: float


def relative_costs(
    costs: Costs, trace: Trace, exits: tuple[int, ...], widths: Sequence[int]
) -> RoundCosts:
    """Costs in units of a plain round, with the acceptance tables that the trace gives.

    Args:
        exits: the exits in use.
        widths: the widths that a target pass may have, ascending from 1; a round takes the smallest that holds its chain.
    """
    plain = costs.verify_seconds(1)
    verify = []
    for width in range(1, widths[-1] + 1):
        computed = widths[bisect.bisect_left(widths, width)]
        verify.append(round(costs.verify_seconds(computed) / plain, 4))
    rows = trace.rows(exits)
    return RoundCosts(
        draft_step=tuple(round(s / plain, 4) for s in costs.token_seconds(exits)),
        verify=tuple(verify),
        catch_up=round(costs.catch_up[exits[-1]] / plain, 4),
        acceptance=tuple(_acceptance_table(trace, row) for row in rows),
        next_acceptance=round(_next_acceptance(trace, rows[-1]), 4),
    )


def _acceptance_table(trace: Trace, row: int) -> tuple[float, ...]:
    """Acceptance at evenly spaced confidences: means weighted by nearness, and the confidence itself where data is thin."""
    at = np.concatenate([answer.confidence[row] for answer in trace.answers]) * (_KNOTS - 1)
    accepted = np.concatenate([answer.accepted[row] for answer in trace.answers])
    table = []
    for knot in range(_KNOTS):
        weight = np.maximum(0.0, 1.0 - np.abs(at - knot))
        prior = _PRIOR * knot / (_KNOTS - 1)
        table.append(round(float((weight @ accepted + prior) / (weight.sum() + _PRIOR)), 4))
    return tuple(table)


def _next_acceptance(trace: Trace, row: int) -> float:
    """The probability that a token is accepted if the one before it was."""
    pairs = [(a.accepted[row][:-1], a.accepted[row][1:]) for a in trace.answers]
    both = sum(float(first @ second) for first, second in pairs)
    return (both + 0.5) / (sum(float(first.sum()) for first, _ in pairs) + 1.0)


def candidates(costs: Costs, trace: Trace, widths: Sequence[int]) -> list[Candidate]:
    """All that is compared: plain decoding; and every exit alone and thresholds over all exits, each with every length rule of
    chains and with trees.

    Chains with the same exits run the same compiled program: lengths, rules, thresholds and costs are arrays in it. Trees do so
    if they also have the same shape.

    Args:
        widths: the widths that a target pass may have, ascending from 1.
    """
    found = [Candidate("no speculation", "plain", None)]
    for exits, thresholds in _exit_choices(trace):
        confidences = CONFIDENCES if thresholds is None else CONFIDENCES[1:4]
        found += _with_rules(costs, trace, exits, thresholds, widths, confidences)
        if costs.tree is not None:
            found += _with_trees(costs, trace, exits, thresholds)
    return found


def _exit_choices(trace: Trace) -> list[tuple[tuple[int, ...], tuple[float, ...] | None]]:
    """Exits, and their thresholds where there are several."""
    found: list = [((exit,), None) for exit in trace.exits]
    if len(trace.exits) > 1:
        for values in itertools.product(THRESHOLDS, repeat=min(len(trace.exits) - 1, 2)):
            # With more than three exits the middle ones share a threshold.
            middle = (values[-1],) * (len(trace.exits) - 1 - len(values))
            found.append((trace.exits, (*values, *middle, 0.0)))
    return found


def _named(exits, thresholds) -> tuple[str, str]:
    """What a choice of exits is called, and its family."""
    where = f"exit {exits[0]}"
    if thresholds is not None:
        where = "exits " + " ".join(f"{e}>{t:g}" for e, t in zip(exits, thresholds, strict=True))
    return where, where.split(">")[0]


def _with_rules(costs, trace, exits, thresholds, widths, confidences) -> list[Candidate]:
    """Every draft-length rule, with its parameters, on one choice of exits."""
    where, family = _named(exits, thresholds)
    relative = relative_costs(costs, trace, exits, widths)
    most = widths[-1] - 1
    lengths = tuple(length for length in LENGTHS if length <= most)

    def make(rule, suffix, **fields):
        config = DecodeConfig(
            exits=exits,
            exit_thresholds=thresholds,
            draft_length_rule=rule,
            max_draft_tokens=most,
            costs=relative,
            guard=True,
            narrow_widths=tuple(widths[:-1]),
            **fields,
        )
        return Candidate(f"{where}, {suffix}", f"{family}, {rule}", config)

    found = [make("fixed", f"{G} token{'s' * (G > 1)}", num_draft_tokens=G) for G in lengths]
    found.append(make("heuristic", f"heuristic up to {most}", num_draft_tokens=min(5, most)))
    for G in lengths[-2:]:
        found += [
            make("confidence", f"up to {G}, confidence {c:g}", num_draft_tokens=G, min_confidence=c)
            for c in confidences
        ]
        found += [
            make("expected_gain", f"up to {G}, gain rate {r:g}", num_draft_tokens=G, gain_rate=r)
            for r in RATES
        ]
    return found


def tree_shapes(exits: tuple[int, ...]) -> list[TreeShape]:
    """The shapes that are compared; with several exits, both rules of leaving."""
    return [
        TreeShape(depth, k, nodes, leaving=leaving)
        for depth, k, nodes in itertools.product(DEPTHS, TOP_KS, NODES)
        for leaving in (("level", "node") if len(exits) > 1 else ("level",))
        if depth < nodes <= TreeShape.most_nodes(depth, k)
    ]


def _with_trees(costs: Costs, trace: Trace, exits, thresholds) -> list[Candidate]:
    """Every tree, on one choice of exits. Children are the most probable tokens, even where tokens are sampled."""
    where, family = _named(exits, thresholds)
    known = trace.answers[0].log_probs.shape[2]

    def make(tree: TreeShape) -> Candidate:
        name = f"{where}, tree of {tree.depth} levels, top {tree.top_k}, {tree.nodes} nodes"
        config = DecodeConfig(
            exits=exits,
            exit_thresholds=thresholds,
            tree=tree,
            draft_sampling="argmax",
            costs=relative_tree_costs(costs, exits, tree),
            guard=True,
            narrow_widths=(1,),
        )
        if tree.leaving == "node":
            name += ", one by one"
        return Candidate(name, f"{family}, tree", config)

    return [make(tree) for tree in tree_shapes(exits) if tree.top_k <= known]


def relative_tree_costs(costs: Costs, exits: tuple[int, ...], tree: TreeShape) -> RoundCosts:
    """Costs in units of a plain round; `costs` must include those of trees."""
    assert costs.tree is not None
    plain, measured = costs.verify_seconds(1), costs.tree
    verify = measured.verify_seconds(tree.nodes) + (tree.depth + 1) * measured.visit
    steps = measured.mean_level_seconds(exits, tree)
    return RoundCosts(
        draft_step=tuple(round(seconds / plain, 4) for seconds in steps),
        verify=(1.0, *(round(verify / plain, 4),) * tree.depth),
        catch_up=round(costs.catch_up[exits[-1]] / plain, 4),
    )


def best_of_families(predictions: Sequence[Prediction], count: int) -> list[Prediction]:
    """The best speculative candidates, one per family: neighbours in a grid of parameters differ little."""
    best: dict[str, Prediction] = {}
    for prediction in predictions:
        if prediction.candidate.config is not None:
            best.setdefault(prediction.candidate.family, prediction)
    return list(best.values())[:count]
