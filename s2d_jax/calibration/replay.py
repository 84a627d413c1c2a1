"""Predicts how each candidate would have decoded a recorded trace. No model, no device, no clock.

Chains are replayed here, trees in `replay_tree`. Walking along an answer and tossing a coin per position replays a
chain exactly, as far as it is accepted. Behind a rejected token the draft would have continued from another text; there the
confidences at the answer's own positions stand in.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from s2d_jax.calibration.account import Account
from s2d_jax.calibration.candidates import Candidate, Prediction
from s2d_jax.calibration.costs import Costs
from s2d_jax.calibration.replay_tree import Forest, replay_tree
from s2d_jax.calibration.trace import AnswerTrace, Trace
from s2d_jax.config.costs import RoundCosts
from s2d_jax.config.decode import DecodeConfig


def predict(
    trace: Trace, costs: Costs, found: Sequence[Candidate], *, repeats: int, seed: int
) -> list[Prediction]:
    """Replays every candidate with the same coins, best first.

    Args:
        repeats: walks along each answer; one is enough where acceptance is certain (greedy).
        seed: for the coins, and for the positions that stand in for what the trace lacks.
    """
    rng = np.random.default_rng(seed)
    coins = [
        [rng.random(answer.accepted.shape[1]) for answer in trace.answers] for _ in range(repeats)
    ]
    forest = Forest(trace, seed)

    def one(candidate: Candidate) -> Prediction:
        if candidate.config is not None and candidate.config.tree is not None:
            return replay_tree(forest, costs, candidate)
        return replay(trace, costs, candidate, coins)

    predictions = [one(candidate) for candidate in found]
    return sorted(predictions, key=lambda prediction: -prediction.speedup)


def replay(trace: Trace, costs: Costs, candidate: Candidate, coins) -> Prediction:
    """Walks every answer with one candidate that drafts chains, or nothing.

    Args:
        coins: for each walk and answer, a number in [0, 1) per position.
    """
    plain = costs.verify_seconds(1)
    if candidate.config is None:
        return Prediction(candidate, 1.0, 1.0, 0.0)
    seconds, rounds, drafted, emitted = 0.0, 0, 0, 0
    walker = _Walker(trace, costs, candidate.config)
    for walk in coins:
        for answer, coin in zip(trace.answers, walk, strict=True):
            spent, passes, tokens = walker.walk(answer, coin)
            seconds, rounds, drafted = seconds + spent, rounds + passes, drafted + tokens
            emitted += coin.size
    rounds = max(rounds, 1)
    return Prediction(candidate, emitted * plain / seconds, emitted / rounds, drafted / rounds)


class _Walker:
    """Replays rounds of one configuration."""

    def __init__(self, trace: Trace, costs: Costs, config: DecodeConfig):
        exits, G = config.exits or trace.exits, config.draft_width
        self.config, self.rows = config, trace.rows(exits)
        self.max_new_tokens = trace.max_new_tokens
        self.thresholds = config.exit_thresholds or (0.0,) * len(exits)
        self.verify = [costs.verify_seconds(self._width(g, config)) for g in range(G + 1)]
        token = costs.token_seconds(exits)
        before = (0.0, *token[:-1])
        # One pass of each segment, and one reading of the head behind it.
        self.head = costs.head
        self.passes = [max(t - b - costs.head, 0.0) for t, b in zip(token, before, strict=True)]
        self.chunks = [1] + [costs.chunk] * (len(exits) - 1)
        self.rule = config.draft_length_rule
        self.missed = costs.catch_up[exits[0]]
        if self.rule == "expected_gain":
            assert config.costs is not None
            # Without tables the confidence is the probability of acceptance, as in the loop.
            self.acceptance = config.costs.acceptance or ((0.0, 1.0),) * len(exits)
            self.limits = [gain_limits(config.costs, config.gain_rate, n) for n in range(G + 1)]

    @staticmethod
    def _width(num_draft: int, config: DecodeConfig) -> int:
        widths = config.verify_widths
        return widths[bisect.bisect_left(widths, num_draft + 1)]

    def walk(self, answer: AnswerTrace, coin: np.ndarray) -> tuple[float, int, int]:
        """Seconds, rounds and drafted tokens of one answer."""
        confidence = answer.confidence[self.rows].T.tolist()
        accepted = (coin[None, :] < answer.accepted[self.rows]).T.tolist()
        total, at, seconds, rounds, drafted = len(coin), 0, 0.0, 0, 0
        limit = self.config.num_draft_tokens
        computed = [0] * len(self.rows)  # tokens that each segment has seen; `at + 1` are known
        account = Account(self.config, self.max_new_tokens) if self.config.guard else None
        while at < total:
            most = min(limit, total - at - 1)
            if account is not None:
                most = min(most, account.affordable_length())
            chain, steps, spent = self._chain(confidence, at, most, computed)
            good = 0
            while good < len(chain) and accepted[at + good][chain[good]]:
                good += 1
            seconds += spent + self.verify[len(chain)]
            rounds, drafted = rounds + 1, drafted + len(chain)
            if account is not None:
                account.settle(steps, len(chain), good + 1)
            at += good + 1
            computed = [min(n, at) for n in computed]
            if self.rule == "heuristic":
                limit += 2 if good == len(chain) else -1
                limit = min(max(limit, 1), self.config.draft_width)
        return seconds, rounds, drafted

    def _chain(self, confidence, at: int, most: int, computed: list[int]):
        """Exits of the tokens drafted from position `at`, exits of all draft steps, and seconds; moves `computed`."""
        chain: list[int] = []
        steps: list[int] = []
        seconds, hope = 0.0, 1.0
        # What was missed in plain rounds is taken in at once, all but the two positions that wait after any round.
        missed = at - 1 - computed[0]
        if most > 0 and missed > 0:
            seconds += missed * self.missed
            computed[0] = at - 1
        gainful = self.rule == "expected_gain"
        draw_above, more_above = self.limits[most] if gainful else ([], [])
        for i in range(most):
            sure = confidence[at + i]
            exit = 0
            while exit < len(sure) - 1 and sure[exit] <= self.thresholds[exit]:
                exit += 1
            for s in range(exit + 1):
                waiting = at + i + 1 - computed[s]
                passes = max(1, -(-waiting // self.chunks[s]))
                seconds += passes * self.passes[s] + self.head
                computed[s] = at + i + 1
            steps.append(exit)
            if gainful:
                hope *= _interpolate(self.acceptance[exit], sure[exit])
                if hope < draw_above[exit][i]:
                    break
                chain.append(exit)
                if hope <= more_above[exit][i]:
                    break
                continue
            chain.append(exit)
            if self.rule == "confidence" and sure[exit] < self.config.min_confidence:
                break
        return chain, steps, seconds


def gain_limits(
    costs: RoundCosts, rate: float, G: int
) -> tuple[list[list[float]], list[list[float]]]:
    """The expected-gain rule of `s2d_jax.draft.length` as limits on the product of acceptances, for at most G tokens.

    Returns:
        By exit and by the tokens drafted before: the least product at which a token is drawn, and the product above which
        another step follows.
    """
    a, verify = costs.next_acceptance, costs.verify

    def limit(i, step, first):
        """`first` 0: this token and those after it; 1: only those after it."""
        known = verify[i + first]
        ratios = []
        for n in range(first, G - i):
            tokens = sum(a**m for m in range(first, n + 1))
            cost = rate * (n * step + verify[i + 1 + n] - known)
            ratios.append(cost / tokens if tokens > 0 else float("inf"))
        return min(ratios, default=float("inf"))

    draw = [[limit(i, step, 0) for i in range(G)] for step in costs.draft_step]
    more = [[limit(i, step, 1) for i in range(G)] for step in costs.draft_step]
    return draw, more


def _interpolate(table: Sequence[float], confidence: float) -> float:
    at = min(max(confidence, 0.0), 1.0) * (len(table) - 1)
    low = min(int(at), len(table) - 2)
    return table[low] + (at - low) * (table[low + 1] - table[low])
