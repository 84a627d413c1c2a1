"""Predicts how trees would have decoded a recorded trace. No model, no device, no clock.

The target's own tokens lie on one path from the root. As many tokens are accepted as the grown tree holds of that path. This is
true for sampled answers too: children are deterministic here, and the recorded token was drawn from p.

The draft's output along that path was recorded, at the positions that follow. Its output on other paths was not; the output at
random positions of the trace (drawn once, with a fixed seed) stands in for it. This is **an assumption**. It matters as far as
other paths compete with the target's for a place in the tree, and for the exits of levels.

The trees of all positions grow side by side, and a tree of many levels holds all shallower ones, so a search grows few.
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

# Trees are grown to at least this many levels; a deeper shape grows its own.
_DEPTH = 6
_NEVER = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Grown:
    """Trees grown from each of T positions, ended after 1, 2, ... Y levels.

    Attributes:
        exit_TY: int, for each level, index of the deepest exit at which its parent nodes left.
        ahead_TYY: int, `[t, levels - 1, depth - 1]`: how many candidates of a tree of this many levels rank before the target's
            own token at this depth. If the token is not a candidate, the number is larger than any tree.
    """

    exit_TY: np.ndarray
    ahead_TYY: np.ndarray

    def accepted(self, nodes: int) -> np.ndarray:
        """int `[T, Y]`: tokens accepted when the best `nodes - 1` candidates are verified, by position and `levels - 1`."""
        return np.logical_and.accumulate(self.ahead_TYY < nodes - 1, axis=2).sum(axis=2)


class Forest:
    """The trees of a trace; each is grown once, when it is first asked for.

    Args:
        trace: a recorded one.
        seed: for the random positions that stand in for what was not recorded.
    """

    def __init__(self, trace: Trace, seed: int):
        self.trace, self._seed = trace, seed
        lengths = [answer.accepted.shape[1] for answer in trace.answers]
        self.starts = np.cumsum([0, *lengths]).tolist()

        def join(name):
            return np.concatenate([getattr(answer, name) for answer in trace.answers], axis=1)

        self._confidence_ET, self._rank_ET = join("confidence"), join("rank")
        self._log_probs_ETk = join("log_probs")
        self._grown: dict[tuple, Grown] = {}

    def grown(self, config: DecodeConfig) -> Grown:
        """The trees of a configuration's exits, thresholds and children, as deep as its tree or deeper."""
        tree = config.tree
        assert tree is not None
        rows = self.trace.rows(config.exits or self.trace.exits)
        thresholds = config.exit_thresholds or (0.0,) * len(rows)
        key = (*rows, *thresholds[:-1], tree.top_k, tree.leaving)
        if key not in self._grown or self._grown[key].exit_TY.shape[1] < tree.depth:
            self._grown[key] = self._grow(rows, thresholds, tree)
        return self._grown[key]

    def _grow(self, rows: list[int], thresholds: tuple[float, ...], tree: TreeShape) -> Grown:
        confidence_ET, rank_ET = self._confidence_ET[rows], self._rank_ET[rows]
        k = tree.top_k
        log_probs_ETk = self._log_probs_ETk[rows][:, :, :k]
        rng, each_T = np.random.default_rng(self._seed), np.arange(confidence_ET.shape[1])
        beam, levels, exits = _Beam.roots(len(each_T)), [], []
        for level in range(max(tree.depth, _DEPTH)):
            # Behind an answer stands the next one; no round drafts that far.
            ahead_T = np.minimum(each_T + level, len(each_T) - 1)
            on_path_T, place_T = beam.own_T >= 0, np.maximum(beam.own_T, 0)
            at_TJ = rng.integers(len(each_T), size=beam.score_TJ.shape)
            at_TJ[each_T[on_path_T], place_T[on_path_T]] = ahead_T[on_path_T]
            exit_TJ = _leave(confidence_ET[:, at_TJ], beam.live_TJ, thresholds, tree.leaving)
            exits.append(np.where(beam.live_TJ, exit_TJ, 0).max(axis=1))
            score_TJk = beam.score_TJ[:, :, None] + log_probs_ETk[exit_TJ, at_TJ]
            score_TX = np.where(beam.live_TJ[:, :, None], score_TJk, -np.inf).reshape(
                len(at_TJ), -1
            )
            rank_T = rank_ET[exit_TJ[each_T, place_T], ahead_T]
            own_T = np.where(on_path_T & (rank_T < k), place_T * k + rank_T, -1)
            levels.append((score_TX, own_T))
            beam = _Beam.best(score_TX, own_T, k)
        return Grown(np.stack(exits, axis=1), _ahead(levels))


@dataclasses.dataclass(frozen=True)
class _Beam:
    """The J nodes of one level that are expanded.

    Attributes:
        score_TJ: log of the draft's probability of the path to each node.
        live_TJ: bool, places that hold a node.
        own_T: int, the place of the target's own token; -1 if it is not in the beam.
    """

    score_TJ: np.ndarray
    live_TJ: np.ndarray
    own_T: np.ndarray

    @classmethod
    def roots(cls, T: int) -> _Beam:
        return cls(np.zeros((T, 1)), np.ones((T, 1), bool), np.zeros(T, int))

    @classmethod
    def best(cls, score_TX: np.ndarray, own_T: np.ndarray, count: int) -> _Beam:
        """The best `count` candidates in their own order; earlier ones win ties."""
        chosen_TJ = np.argsort(-score_TX, axis=1, kind="stable")[:, :count]
        chosen_TJ = np.sort(chosen_TJ, axis=1)
        score_TJ = np.take_along_axis(score_TX, chosen_TJ, axis=1)
        own_TJ = chosen_TJ == own_T[:, None]
        place_T = np.where(own_TJ.any(axis=1), own_TJ.argmax(axis=1), -1)
        return cls(score_TJ, score_TJ > -np.inf, place_T)


def _leave(confidence_ETJ, live_TJ, thresholds: tuple[float, ...], leaving: str) -> np.ndarray:
    """int `[T, J]`: index of the exit at which each node leaves."""
    last = len(confidence_ETJ) - 1
    exit_TJ = np.full(live_TJ.shape, last)
    for exit in range(last - 1, -1, -1):
        sure_TJ = (confidence_ETJ[exit] > thresholds[exit]) & live_TJ
        if leaving == "level":
            sure_TJ = sure_TJ.any(axis=1, keepdims=True)
        exit_TJ = np.where(sure_TJ, exit, exit_TJ)
    return exit_TJ


def _ahead(levels: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """`Grown.ahead_TYY`, from each level's scores `[T, X]` and own candidate `[T]`. Shallower, then earlier ones win ties."""
    Y, T = len(levels), len(levels[0][1])
    ahead_TYY = np.full((T, Y, Y), _NEVER, np.int64)
    for depth, (score_TX, own_T) in enumerate(levels):
        own_T1 = own_T[:, None]
        own_score_T1 = np.take_along_axis(score_TX, np.maximum(own_T1, 0), axis=1)
        counts = []
        for level, (others_TX, _) in enumerate(levels):
            before_TX = others_TX > own_score_T1
            if level < depth:
                before_TX |= others_TX == own_score_T1
            elif level == depth:
                earlier_TX = np.arange(others_TX.shape[1])[None, :] < own_T1
                before_TX |= (others_TX == own_score_T1) & earlier_TX
            counts.append(before_TX.sum(axis=1))
        upto_TY = np.cumsum(np.stack(counts, axis=1), axis=1)
        ahead_TYY[:, depth:, depth] = np.where(own_T1 >= 0, upto_TY[:, depth:], _NEVER)
    return ahead_TYY


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
        self.exits = grown.exit_TY.tolist()
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
