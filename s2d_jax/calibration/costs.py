"""Seconds that the parts of a round take."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from s2d_jax.config.tree import TreeShape


@dataclasses.dataclass(frozen=True)
class TreeCosts:
    """Seconds of the parts of a round with a tree, with all costs that a tree adds.

    Attributes:
        verify: seconds of all but drafting, by the number of nodes.
        visit: seconds of each node that acceptance visits, beyond those of greedy acceptance.
        level: seconds of drafting a level: `[nodes][exit]`, by the nodes that it expands (1 is the first level, which expands
            the root) and by the exit that it leaves at when all shallower ones are tried first.
        head: seconds of reading the draft's logits, by the number of nodes.
    """

    verify: Mapping[int, float]
    visit: float
    level: Mapping[int, Mapping[int, float]]
    head: Mapping[int, float]

    def verify_seconds(self, nodes: int) -> float:
        """Seconds for any number of nodes, also between those measured."""
        return _between(self.verify, nodes)

    def head_seconds(self, nodes: int) -> float:
        return _between(self.head, nodes)

    def segment_seconds(self, exits: tuple[int, ...], nodes: int) -> list[float]:
        """Seconds of one pass from each exit, or the start, to the next exit, without reading logits."""
        measured = sorted(self.level[1])
        passes, before = [], 0.0
        for exit in exits:
            # The root is measured separately; other levels are interpolated between those measured.
            table = {n: row[exit] for n, row in self.level.items() if (n == 1) == (nodes == 1)}
            read = (measured.index(exit) + 1) * self.head_seconds(nodes)
            through = _between(table, nodes) - read
            passes.append(max(through - before, 0.0))
            before = max(through, before)
        return passes

    def mean_level_seconds(self, exits: tuple[int, ...], tree: TreeShape) -> tuple[float, ...]:
        """Mean seconds of a level of a whole tree, by the exit that all of its levels leave at."""
        found = []
        for count in range(1, len(exits) + 1):
            root, level = (
                sum(self.segment_seconds(exits, nodes)[:count]) + count * self.head_seconds(nodes)
                for nodes in (1, tree.top_k)
            )
            found.append((root + (tree.depth - 1) * level) / tree.depth)
        return tuple(found)


def _between(table: Mapping[int, float], at: int) -> float:
    """Linear interpolation in a table; constant beyond its ends."""
    known = sorted(table)
    return float(np.interp(at, known, [table[n] for n in known]))


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds, at batch size 1, inside compiled loops.

    Attributes:
        verify: seconds of a round without a draft, by the width of its target pass; 1 is plain decoding.
        head: seconds of reading the draft's logits.
        alone: seconds of drafting a token at the only exit in use, by exit.
        through: the same when all shallower exits are tried first, by exit.
        catch_up: seconds per position that the draft has not seen, by exit, when many are taken in together.
        chunk: waiting positions that one pass of a deeper segment takes in.
        tree: costs of rounds with a tree; None if trees are not compared.
    """

    verify: Mapping[int, float]
    head: float
    alone: Mapping[int, float]
    through: Mapping[int, float]
    catch_up: Mapping[int, float]
    chunk: int
    tree: TreeCosts | None = None

    def verify_seconds(self, width: int) -> float:
        """Seconds for any width, also between those measured."""
        return _between(self.verify, width)

    def token_seconds(self, exits: tuple[int, ...]) -> tuple[float, ...]:
        """Seconds of drafting a token, by the exit it leaves at."""
        table = self.alone if len(exits) == 1 else self.through
        return tuple(table[exit] for exit in exits)
