"""What trees would have made of a recorded trace. No model, no device, no clock.

The target's own tokens lie on one path from the root, and how deep the grown tree holds that path is how many tokens are
accepted. That is so for sampled answers as well: children are deterministic here, and the recorded token was drawn from p.

What the draft says along that path was recorded, at the positions that follow. What it says on other paths was not. There it is
taken to say what it said at random positions of the trace (drawn once, with a fixed seed): **an assumption**, which matters as
far as other paths compete with the target's for a place in the tree, and for the exits of levels.

All positions grow their trees side by side, and a tree of many levels holds all smaller ones, so a search grows few.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from s2d_jax.calibration.account import Account
from s2d_jax.calibration.candidates import Candidate, Prediction
from s2d_jax.calibration.costs import Costs
from s2d_jax.calibration.trace import Trace
from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.tree import TreeShape

# Levels that trees are grown to at least; a deeper shape grows its own.
_DEPTH = 6
_NEVER = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Grown:
    """Trees grown from each of N positions, ended after 1, 2, ... D levels.

    Attributes:
        exit_ND: int, index of the deepest exit at which nodes left that bring forth each level.
        ahead_NDD: int, `[n, levels - 1, depth - 1]`: how many candidates of a tree of so many levels rank before the target's
            own token at that depth; a token that the draft did not find has a rank beyond any tree.
    """

    exit_ND: np.ndarray
    ahead_NDD: np.ndarray

    def accepted(self, nodes: int) -> np.ndarray:
        """int `[N, D]`: tokens accepted when the best `nodes - 1` candidates are verified, by position and `levels - 1`."""
        return np.logical_and.accumulate(self.ahead_NDD < nodes - 1, axis=2).sum(axis=2)


class Forest:
    """The trees of a trace, grown when they are asked for, and once.

    Args:
        trace: a recorded one.
        seed: of what stands in for what was not recorded.
    """

    def __init__(self, trace: Trace, seed: int):
        self.trace, self._seed = trace, seed
        lengths = [answer.accepted.shape[1] for answer in trace.answers]
        self.starts = np.cumsum([0, *lengths]).tolist()

        def join(name):
            return np.concatenate([getattr(answer, name) for answer in trace.answers], axis=1)

        self._confidence_EN, self._rank_EN = join("confidence"), join("rank")
        self._log_probs_ENK = join("log_probs")
        self._grown: dict[tuple, Grown] = {}

    def grown(self, config: DecodeConfig) -> Grown:
        """The trees of a configuration's exits, thresholds and children, as deep as its tree or deeper."""
        tree = config.tree
        assert tree is not None
        rows = self.trace.rows(config.exits or self.trace.exits)
        thresholds = config.exit_thresholds or (0.0,) * len(rows)
        key = (*rows, *thresholds[:-1], tree.top_k, tree.leaving)
        if key not in self._grown or self._grown[key].exit_ND.shape[1] < tree.depth:
            self._grown[key] = self._grow(rows, thresholds, tree)
        return self._grown[key]

    def _grow(self, rows: list[int], thresholds: tuple[float, ...], tree: TreeShape) -> Grown:
        confidence_EN, rank_EN = self._confidence_EN[rows], self._rank_EN[rows]
        k = tree.top_k
        log_probs_ENk = self._log_probs_ENK[rows][:, :, :k]
        rng, each_N = np.random.default_rng(self._seed), np.arange(confidence_EN.shape[1])
        beam, levels, exits = _Beam.roots(len(each_N)), [], []
        for level in range(max(tree.depth, _DEPTH)):
            # Behind an answer follows the next one; no round drafts that far.
            ahead_N = np.minimum(each_N + level, len(each_N) - 1)
            on_path_N, slot_N = beam.own_N >= 0, np.maximum(beam.own_N, 0)
            at_NS = rng.integers(len(each_N), size=beam.score_NS.shape)
            at_NS[each_N[on_path_N], slot_N[on_path_N]] = ahead_N[on_path_N]
            exit_NS = _leave(confidence_EN[:, at_NS], beam.live_NS, thresholds, tree.leaving)
            exits.append(np.where(beam.live_NS, exit_NS, 0).max(axis=1))
            score_NSk = beam.score_NS[:, :, None] + log_probs_ENk[exit_NS, at_NS]
            score_NC = np.where(beam.live_NS[:, :, None], score_NSk, -np.inf).reshape(
                len(at_NS), -1
            )
            rank_N = rank_EN[exit_NS[each_N, slot_N], ahead_N]
            own_N = np.where(on_path_N & (rank_N < k), slot_N * k + rank_N, -1)
            levels.append((score_NC, own_N))
            beam = _Beam.best(score_NC, own_N, k)
        return Grown(np.stack(exits, axis=1), _ahead(levels))


@dataclasses.dataclass(frozen=True)
class _Beam:
    """The nodes of one level that bring forth the next, in S slots.

    Attributes:
        score_NS: log of the draft's probability of the path to each.
        live_NS: bool, slots that hold a node.
        own_N: int, the slot of the target's own token; -1 where it is not among them.
    """

    score_NS: np.ndarray
    live_NS: np.ndarray
    own_N: np.ndarray

    @classmethod
    def roots(cls, N: int) -> _Beam:
        return cls(np.zeros((N, 1)), np.ones((N, 1), bool), np.zeros(N, int))

    @classmethod
    def best(cls, score_NC: np.ndarray, own_N: np.ndarray, count: int) -> _Beam:
        """The best `count` candidates, the earlier ones where they tie, in their own order."""
        chosen_NS = np.argsort(-score_NC, axis=1, kind="stable")[:, :count]
        chosen_NS = np.sort(chosen_NS, axis=1)
        score_NS = np.take_along_axis(score_NC, chosen_NS, axis=1)
        own_NS = chosen_NS == own_N[:, None]
        slot_N = np.where(own_NS.any(axis=1), own_NS.argmax(axis=1), -1)
        return cls(score_NS, score_NS > -np.inf, slot_N)


def _leave(confidence_ENS, live_NS, thresholds: tuple[float, ...], leaving: str) -> np.ndarray:
    """int `[N, S]`: index of the exit at which each slot leaves."""
    last = len(confidence_ENS) - 1
    exit_NS = np.full(live_NS.shape, last)
    for exit in range(last - 1, -1, -1):
        sure_NS = (confidence_ENS[exit] > thresholds[exit]) & live_NS
        if leaving == "level":
            sure_NS = sure_NS.any(axis=1, keepdims=True)
        exit_NS = np.where(sure_NS, exit, exit_NS)
    return exit_NS


def _ahead(levels: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """`Grown.ahead_NDD`, from each level's scores `[N, C]` and own candidate `[N]`. Shallower, then earlier ones win ties."""
    D, N = len(levels), len(levels[0][1])
    ahead_NDD = np.full((N, D, D), _NEVER, np.int64)
    for depth, (score_NC, own_N) in enumerate(levels):
        own_N1 = own_N[:, None]
        own_score_N1 = np.take_along_axis(score_NC, np.maximum(own_N1, 0), axis=1)
        counts = []
        for level, (others_NC, _) in enumerate(levels):
            before_NC = others_NC > own_score_N1
            if level < depth:
                before_NC |= others_NC == own_score_N1
            elif level == depth:
                earlier_NC = np.arange(others_NC.shape[1])[None, :] < own_N1
                before_NC |= (others_NC == own_score_N1) & earlier_NC
            counts.append(before_NC.sum(axis=1))
        upto_ND = np.cumsum(np.stack(counts, axis=1), axis=1)
        ahead_NDD[:, depth:, depth] = np.where(own_N1 >= 0, upto_ND[:, depth:], _NEVER)
    return ahead_NDD


def replay_tree(forest: Forest, costs: Costs, candidate: Candidate) -> Prediction:
    """Walks every answer with one candidate, whose config has a tree."""
    config, plain = candidate.config, costs.verify_seconds(1)
    assert config is not None
    assert config.tree is not None
    walker = _Walker(forest, costs, config)
    seconds, rounds, trees, emitted = 0.0, 0, 0, forest.starts[-1]
    for start, end in zip(forest.starts[:-1], forest.starts[1:], strict=True):
        spent, passes, grown = walker.walk(start, end)
        seconds, rounds, trees = seconds + spent, rounds + passes, trees + grown
    drafted, rounds = trees * (config.tree.nodes - 1), max(rounds, 1)
    return Prediction(candidate, emitted * plain / seconds, emitted / rounds, drafted / rounds)


class _Walker:
    """Replays rounds of one configuration."""

    def __init__(self, forest: Forest, costs: Costs, config: DecodeConfig):
        tree, exits, measured = config.tree, config.exits or forest.trace.exits, costs.tree
        assert tree is not None
        assert measured is not None
        grown = forest.grown(config)
        self.exits = grown.exit_ND.tolist()
        self.accepted = grown.accepted(tree.nodes).tolist()
        self.config, self.tree, self.measured, self.segments = config, tree, measured, len(exits)
        self.max_new_tokens = forest.trace.max_new_tokens
        self.plain, self.missed = costs.verify_seconds(1), costs.catch_up[exits[0]]
        self.verify = measured.verify_seconds(tree.nodes)
        self.passes = (
            measured.segment_seconds(exits, 1),
            measured.segment_seconds(exits, tree.top_k),
        )
        self.heads = measured.head_seconds(1), measured.head_seconds(tree.top_k)
        # Positions that one pass takes in, for the root and for other levels, by segment (`s2d_jax.tree.drafter`).
        level_chunk, behind = max(tree.top_k, costs.chunk), len(exits) - 1
        self.chunks = [2] + [costs.chunk] * behind, [tree.top_k] + [level_chunk] * behind

    def walk(self, at: int, end: int) -> tuple[float, int, int]:
        """Seconds, rounds, and rounds with a tree, of the answer at [at, end)."""
        seconds, rounds, trees = 0.0, 0, 0
        computed = [at] * self.segments  # positions that each segment has seen; `at + 1` are known
        account = Account(self.config, self.max_new_tokens) if self.config.guard else None
        while at < end:
            levels, good, steps = min(self.tree.depth, end - at - 1), 0, []
            if account is not None:
                levels = min(levels, account.affordable_length())
            if levels == 0:
                seconds += self.plain
            else:
                good, steps = self.accepted[at][levels - 1], self.exits[at][:levels]
                seconds += self._draft(at, steps, good, computed)
                seconds += self.verify + self.measured.visit * (good + 1)
                trees += 1
            if account is not None:
                account.settle(steps, levels, good + 1)
            rounds, at = rounds + 1, at + good + 1
        return seconds, rounds, trees

    def _draft(self, at: int, steps: list[int], good: int, computed: list[int]) -> float:
        """Seconds of growing a tree whose levels leave at `steps`; moves `computed` to what is kept of it."""
        seconds, text = max(at - 1 - computed[0], 0) * self.missed, at + 1
        computed[0] = max(computed[0], at - 1)
        for level, exit in enumerate(steps):
            where = int(level > 0)
            end = text + level * self.tree.top_k
            for s in range(exit + 1):
                count = max(1, -(-(end - computed[s]) // self.chunks[where][s]))
                seconds += count * self.passes[where][s] + self.heads[where]
                computed[s] = end
        for s, seen in enumerate(computed):
            if seen >= text:
                computed[s] = text + min(good, (seen - text) // self.tree.top_k)
        return seconds
