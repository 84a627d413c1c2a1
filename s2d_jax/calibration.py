"""From measured costs and a recorded trace to the best way of decoding, by replaying chains. No model, no device, no clock.

A *trace* holds, for every position of the target's own answers and every exit of the draft, the exit's confidence and the
probability that the emitted token was an accepted draft, had this exit drafted here:

- greedy, or a drafted mode: 1 if the exit's mode is the emitted token y, else 0;
- sampled from q: `min(1, q(y) / p(y))`. A draft is accepted *and* is y with probability `min(p(y), q(y))`, and y is emitted
  with probability p(y). Its mean over y is `sum(min(p, q))`, the probability that a draft is accepted at all.

So walking along an answer and throwing a coin per position replays a chain exactly, as far as it is accepted. Behind a
rejected token the draft would have been elsewhere; there the confidences of the answer's own positions stand in.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from s2d_jax.config import DecodeConfig, RoundCosts

LENGTHS = (1, 2, 3, 5, 7)
CONFIDENCES = (0.2, 0.35, 0.5, 0.65, 0.8)
THRESHOLDS = (0.3, 0.5, 0.7, 0.9)
RATES = (1.0, 1.15, 1.3, 1.6, 2.0)
_KNOTS = 9
_PRIOR = 2.0


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds, at batch size 1, inside compiled loops.

    Attributes:
        verify: of a round without a draft, by the width of its target pass; 1 is plain decoding.
        head: of reading the draft's logits.
        alone: of drafting a token at an exit that is the only one, by exit.
        through: the same where all shallower exits are tried first, by exit.
        catch_up: of a position that the draft has not seen, by exit, when many are taken in together.
        chunk: waiting positions that one pass of a deeper segment takes in.
    """

    verify: Mapping[int, float]
    head: float
    alone: Mapping[int, float]
    through: Mapping[int, float]
    catch_up: Mapping[int, float]
    chunk: int

    def verify_seconds(self, width: int) -> float:
        """Of a width that may lie between those measured."""
        widths = sorted(self.verify)
        return float(np.interp(width, widths, [self.verify[w] for w in widths]))

    def token_seconds(self, exits: tuple[int, ...]) -> tuple[float, ...]:
        """Of drafting a token, by the exit it leaves at."""
        table = self.alone if len(exits) == 1 else self.through
        return tuple(table[exit] for exit in exits)


@dataclasses.dataclass(frozen=True)
class Answer:
    """The trace of one answer.

    Attributes:
        confidence: f64 `[E, T]`, of each exit before each token.
        accepted: f64 `[E, T]`, the probability that the token was an accepted draft of this exit.
    """

    confidence: np.ndarray
    accepted: np.ndarray


@dataclasses.dataclass(frozen=True)
class Trace:
    """Recorded answers of one target at one temperature.

    Attributes:
        exits: of the draft, one per row of each answer.
        answers: what was recorded.
    """

    exits: tuple[int, ...]
    answers: tuple[Answer, ...]

    def rows(self, exits: tuple[int, ...]) -> list[int]:
        return [self.exits.index(exit) for exit in exits]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way of decoding that the search compares; `config` None is plain decoding.

    A drafter of another shape (a tree) joins with a name, a config, and a branch of `replay` of its own.
    """

    name: str
    family: str
    config: DecodeConfig | None


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What replaying says about a candidate.

    Attributes:
        candidate: which.
        speedup: over plain decoding, prefill left out.
        mean_acceptance_length: tokens per target pass.
        mean_draft_length: drafted tokens per round.
    """

    candidate: Candidate
    speedup: float
    mean_acceptance_length: float
    mean_draft_length: float


def relative_costs(costs: Costs, trace: Trace, exits: tuple[int, ...], width: int) -> RoundCosts:
    """Costs in units of a plain round, with the acceptance tables that the trace gives.

    Args:
        exits: in use.
        width: the most drafted tokens; a round without any computes one position, any other `width + 1`.
    """
    plain = costs.verify_seconds(1)
    wide = costs.verify_seconds(width + 1) / plain
    rows = trace.rows(exits)
    return RoundCosts(
        draft_step=tuple(round(s / plain, 4) for s in costs.token_seconds(exits)),
        verify=(1.0, *(round(wide, 4) for _ in range(width))),
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
    """How probably a token is accepted when the one before it was."""
    pairs = [(a.accepted[row][:-1], a.accepted[row][1:]) for a in trace.answers]
    both = sum(float(first @ second) for first, second in pairs)
    return (both + 0.5) / (sum(float(first.sum()) for first, _ in pairs) + 1.0)


def candidates(costs: Costs, trace: Trace, max_width: int) -> list[Candidate]:
    """All that is compared: plain decoding; every exit alone and thresholds over all exits, each with every length rule."""
    lengths = tuple(length for length in LENGTHS if length <= max_width)
    longest = lengths[-2:]
    found = [Candidate("no speculation", "plain", None)]
    for exit in trace.exits:
        found += _with_rules(costs, trace, (exit,), None, lengths, longest, CONFIDENCES)
    if len(trace.exits) > 1:
        for values in itertools.product(THRESHOLDS, repeat=min(len(trace.exits) - 1, 2)):
            # With more than three exits the middle ones share a threshold.
            middle = (values[-1],) * (len(trace.exits) - 1 - len(values))
            thresholds = (*values, *middle, 0.0)
            found += _with_rules(
                *(costs, trace, trace.exits, thresholds, lengths, longest, CONFIDENCES[1:4])
            )
    return found


def _with_rules(costs, trace, exits, thresholds, lengths, longest, confidences) -> list[Candidate]:
    """Every draft-length rule, with its parameters, on one choice of exits."""
    where = f"exit {exits[0]}"
    if thresholds is not None:
        where = "exits " + " ".join(f"{e}>{t:g}" for e, t in zip(exits, thresholds, strict=True))
    family = where.split(">")[0]

    def make(rule, suffix, **fields):
        G = fields["num_draft_tokens"]
        G = fields.get("max_draft_tokens", G)
        config = DecodeConfig(
            exits=exits,
            exit_thresholds=thresholds,
            draft_length_rule=rule,
            costs=relative_costs(costs, trace, exits, G),
            guard=True,
            narrow_widths=(1,),
            **fields,
        )
        return Candidate(f"{where}, {suffix}", f"{family}, {rule}", config)

    found = [make("fixed", f"{G} tokens", num_draft_tokens=G) for G in lengths]
    found += [
        make("heuristic", f"heuristic up to {G}", num_draft_tokens=min(5, G), max_draft_tokens=G)
        for G in longest
    ]
    found += [
        make("confidence", f"up to {G}, confidence {c:g}", num_draft_tokens=G, min_confidence=c)
        for G in longest
        for c in confidences
    ]
    found += [
        make("expected_gain", f"up to {G}, gain rate {r:g}", num_draft_tokens=G, gain_rate=r)
        for G in longest
        for r in RATES
    ]
    return found


def predict(
    trace: Trace, costs: Costs, found: Sequence[Candidate], *, repeats: int, seed: int
) -> list[Prediction]:
    """Replays every candidate with the same coins, best first.

    Args:
        repeats: walks along each answer; one is enough where acceptance is certain (greedy).
        seed: of the coins.
    """
    rng = np.random.default_rng(seed)
    coins = [
        [rng.random(answer.accepted.shape[1]) for answer in trace.answers] for _ in range(repeats)
    ]
    predictions = [replay(trace, costs, candidate, coins) for candidate in found]
    return sorted(predictions, key=lambda prediction: -prediction.speedup)


def best_of_families(predictions: Sequence[Prediction], count: int) -> list[Prediction]:
    """The best speculative ones, one per family: neighbours in a grid of parameters say the same."""
    best: dict[str, Prediction] = {}
    for prediction in predictions:
        if prediction.candidate.config is not None:
            best.setdefault(prediction.candidate.family, prediction)
    return list(best.values())[:count]


def replay(trace: Trace, costs: Costs, candidate: Candidate, coins) -> Prediction:
    """Walks every answer with one candidate.

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
        self.thresholds = config.exit_thresholds or (0.0,) * len(exits)
        self.verify = [costs.verify_seconds(self._width(g, config)) for g in range(G + 1)]
        token = costs.token_seconds(exits)
        before = (0.0, *token[:-1])
        # One pass of each segment, and one reading of the head behind it.
        self.head = costs.head
        self.passes = [max(t - b - costs.head, 0.0) for t, b in zip(token, before, strict=True)]
        self.chunks = [1] + [costs.chunk] * (len(exits) - 1)
        self.rule = config.draft_length_rule
        if self.rule == "expected_gain":
            assert config.costs is not None
            # Without tables a confidence stands for itself, as in the loop.
            self.acceptance = config.costs.acceptance or ((0.0, 1.0),) * len(exits)
            self.limits = [gain_limits(config.costs, config.gain_rate, n) for n in range(G + 1)]

    @staticmethod
    def _width(num_draft: int, config: DecodeConfig) -> int:
        widths = config.verify_widths
        return widths[bisect.bisect_left(widths, num_draft + 1)]

    def walk(self, answer: Answer, coin: np.ndarray) -> tuple[float, int, int]:
        """Seconds, rounds and drafted tokens of one answer."""
        confidence = answer.confidence[self.rows].T.tolist()
        accepted = (coin[None, :] < answer.accepted[self.rows]).T.tolist()
        total, at, seconds, rounds, drafted = len(coin), 0, 0.0, 0, 0
        limit = self.config.num_draft_tokens
        computed = [0] * len(self.rows)  # tokens that each segment has seen; `at + 1` are known
        while at < total:
            most = min(limit, total - at - 1)
            chain, spent = self._chain(confidence, at, most, computed)
            good = 0
            while good < len(chain) and accepted[at + good][chain[good]]:
                good += 1
            seconds += spent + self.verify[len(chain)]
            rounds, drafted = rounds + 1, drafted + len(chain)
            at += good + 1
            computed = [min(n, at) for n in computed]
            if self.rule == "heuristic":
                limit += 2 if good == len(chain) else -1
                limit = min(max(limit, 1), self.config.max_draft_tokens)
        return seconds, rounds, drafted

    def _chain(self, confidence, at: int, most: int, computed: list[int]):
        """The exits of the tokens drafted from position `at`, and the seconds that took; moves `computed`."""
        chain: list[int] = []
        seconds, hope = 0.0, 1.0
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
        return chain, seconds


def gain_limits(
    costs: RoundCosts, rate: float, G: int
) -> tuple[list[list[float]], list[list[float]]]:
    """The expected-gain rule of `s2d_jax.draft_length` as limits on the product of acceptances, for at most G tokens.

    Returns:
        By exit and by the tokens drafted before: the product from which a token is drawn, and above which another step follows.
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
