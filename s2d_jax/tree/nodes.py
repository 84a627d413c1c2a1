"""A tree of drafted tokens per row: which node descends from which, where each stands, and what it may look at.

M nodes lie in one window behind the cache, the root (the last emitted token) first, parents before their children, siblings in
the order in which they are tried. A node's place in the window is not its position in the text: siblings share a position.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Tree(flax.struct.PyTreeNode):
    """The drafted tree of every row.

    Attributes:
        tokens_BM: int32.
        parent_BM: int32, a smaller node; 0 for the root.
        depth_BM: int32, 0 for the root.
        valid_BM: bool; other nodes are never accepted. The root is valid.
        slot_BM: int32, where the draft keeps a node, counted from its entry for the root, which is 0; -1 if it never ran the
            node. Slots ascend along a path.
        score_BM: f32, log of the draft's probability of the path to the node; 0 for the root.
        exit_BM: int32, index of the exit that proposed the node; 0 for the root.
    """

    tokens_BM: jax.Array
    parent_BM: jax.Array
    depth_BM: jax.Array
    valid_BM: jax.Array
    slot_BM: jax.Array
    score_BM: jax.Array
    exit_BM: jax.Array


def ancestors(parent_BM: Int[Array, "B M"], depth: int) -> Bool[Array, "B M M"]:
    """bool: entry `[b, i, j]` says that node j is node i or an ancestor of it, the root included.

    Args:
        parent_BM: int32.
        depth: static, depth of the deepest node.
    """
    node_M = jnp.arange(parent_BM.shape[1], dtype=jnp.int32)
    at_BM = jnp.broadcast_to(node_M, parent_BM.shape)
    found_BMM = at_BM[:, :, None] == node_M[None, None, :]
    for _ in range(depth):
        at_BM = jnp.take_along_axis(parent_BM, at_BM, axis=1)
        found_BMM |= at_BM[:, :, None] == node_M[None, None, :]
    return found_BMM


def positions(depth_BM: Int[Array, "B M"], length_B: Int[Array, "B"]) -> Int[Array, "B M"]:
    """int32: rotary positions; the root is the last of `length_B` tokens."""
    return length_B[:, None] - 1 + depth_BM


def path(
    parent_BM: Int[Array, "B M"],
    depth_BM: Int[Array, "B M"],
    node_B: Int[Array, "B"],
    depth: int,
) -> Int[Array, "B {depth+1}"]:
    """int32: the nodes from the root to `node_B`, by depth; beyond its own depth `node_B` is repeated."""
    at_B1, found = node_B[:, None], []
    for level in range(depth, -1, -1):
        own_B1 = jnp.take_along_axis(depth_BM, at_B1, axis=1)
        found.append(at_B1)
        up_B1 = jnp.take_along_axis(parent_BM, at_B1, axis=1)
        at_B1 = jnp.where(own_B1 == level, up_B1, at_B1)
    return jnp.concatenate(found[::-1], axis=1)
