"""Which tree a round drafts, as the user asks for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np

from s2d_jax.config.plain import plain_fields, plain_value
from s2d_jax.errors import require, shown

Paths: TypeAlias = Sequence[Sequence[int]] | np.ndarray
"""The paths of a static tree: ranks of children from the root on."""

MOST_DEPTH = 128
"""The deepest tree: each level is a part of the compiled program."""
MOST_NODES = 4096
"""The largest tree: which node descends from which is a table of nodes x nodes."""


@dataclasses.dataclass(frozen=True)
class TreeShape:
    """Which tree of tokens is drafted and verified in a round. Compiled in.

    A dynamic tree (EAGLE-2, Li et al. 2024) grows where the draft is sure: on each level, the `top_k` nodes of the largest
    cumulative probability get `top_k` children each. The best `nodes - 1` of all nodes are verified. A static tree is always
    the same: a list of paths, where the path (0, 2) is the third most probable token after the most probable one.

    Attributes:
        depth: levels below the root; a round emits `depth + 1` tokens at most.
        top_k: children of an expanded node, and nodes that are expanded on a level.
        nodes: positions that the target verifies, the root (the last emitted token) included. A dynamic tree of drawn
            children has fewer: 1 + depth * min(top_k, (nodes - 1) // depth), as their number is fixed before they are drawn.
        paths: the paths of a static tree, ascending; `TreeShape.static` builds one. () grows dynamically.
        leaving: with several exits, "level": all nodes of a level leave as soon as one of them is confident (the rule of the
            S2D reference); "node": each for itself.

    Raises:
        UserError: for values that make no tree.
    """

    depth: int = 4
    top_k: int = 10
    nodes: int = 60
    paths: tuple[tuple[int, ...], ...] = ()
    leaving: Literal["level", "node"] = "level"

    def __post_init__(self):
        plain_fields(self)
        for name, most in (("depth", MOST_DEPTH), ("top_k", MOST_NODES)):
            value = getattr(self, name)
            require(1 <= value <= most, f"{name}={shown(value)} of a tree must be 1 to {most}")
        require(
            self.nodes <= MOST_NODES,
            f"nodes={shown(self.nodes)} of a tree must be at most {MOST_NODES}",
        )
        require(
            self.leaving in ("level", "node"),
            f"leaving={self.leaving!r} is unknown; use level or node",
        )
        if self.paths:
            own = (self.depth, self.top_k, self.nodes, self.paths)
            require(
                own == _static_fields(self.paths),
                "the paths of a tree do not fit its depth, top_k and nodes; build it with TreeShape.static(paths)",
            )
        else:
            largest = self.most_nodes(self.depth, self.top_k)
            require(
                self.depth < self.nodes <= largest,
                f"nodes={self.nodes} of a tree must be {self.depth + 1} to {largest}: a chain of depth={self.depth} at least, "
                f"all children with top_k={self.top_k} at most",
            )

    @staticmethod
    def most_nodes(depth: int, top_k: int) -> int:
        """How many nodes a dynamic tree can have: the root, its children, and those of `top_k` nodes of every further level."""
        return 1 + top_k + (depth - 1) * top_k**2

    @classmethod
    def static(cls, paths: Paths, leaving: Literal["level", "node"] = "level") -> TreeShape:
        """The tree of these paths and all their beginnings.

        Args:
            paths: ranks of children from the root on, from 0; () is the root itself, and need not be named.
            leaving: as the attribute.

        Raises:
            UserError: for no paths, or ranks below 0.
        """
        return cls(
            *_static_fields(plain_value("paths", paths, tuple[tuple[int, ...], ...])), leaving
        )

    def without_gaps(self) -> TreeShape:
        """The static tree in which the children of every node have ranks 0, 1, 2, ... in the order that they had."""
        renamed: dict[tuple[int, ...], tuple[int, ...]] = {(): ()}
        for path in self.paths:  # parents come before children, siblings in their order
            above = renamed[path[:-1]]
            rank = sum(other[:-1] == path[:-1] for other in renamed if other)
            renamed[path] = (*above, rank)
        return TreeShape.static([path for path in renamed.values() if path], self.leaving)


def _static_fields(paths: Sequence[Sequence[int]]) -> tuple[int, int, int, tuple]:
    """Depth, top_k, nodes and the closed, ordered paths of a static tree."""
    deepest = max(map(len, paths), default=0)
    require(
        deepest <= MOST_DEPTH, f"a path of the tree has {deepest} ranks; give at most {MOST_DEPTH}"
    )
    closed = _closed(paths)
    require(len(closed) > 0, "a static tree has no paths; give some, such as (0,), (1,), (0, 0)")
    lowest = min(rank for path in closed for rank in path)
    require(lowest >= 0, f"a path of the tree has rank {lowest}; ranks count from 0")
    depth = max(len(path) for path in closed)
    top_k = 1 + max(rank for path in closed for rank in path)
    return depth, top_k, 1 + len(closed), closed


def _closed(paths: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """The paths and all their beginnings, by length, then by rank: parents before children."""
    found = {tuple(path[:length]) for path in paths for length in range(1, len(path) + 1)}
    return tuple(sorted(found, key=lambda path: (len(path), path)))
