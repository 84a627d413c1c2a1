"""Which nodes of a tree a node attends to."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def mask(
    ancestors_BTM: Bool[Array, "B T M"], start_B: Int[Array, "B"], capacity: int
) -> Bool[Array, "B T {capacity}"]:
    """bool: which of a cache's S positions each node may look at; the tree's M nodes stand from `start_B` on.

    Args:
        ancestors_BTM: bool, which of the tree's M nodes are ancestors of each of T nodes, or the node itself.
        start_B: int32; everything before it is text that all nodes see.
        capacity: static.
    """
    M = ancestors_BTM.shape[2]
    in_window_BS = jnp.arange(capacity, dtype=jnp.int32)[None, :] - start_B[:, None]
    at_B1S = jnp.clip(in_window_BS, 0, M - 1)[:, None, :]
    in_tree_BTS = jnp.take_along_axis(ancestors_BTM, at_B1S, axis=2)
    inside_BS = (in_window_BS >= 0) & (in_window_BS < M)
    return (in_window_BS < 0)[:, None, :] | (inside_BS[:, None, :] & in_tree_BTS)
