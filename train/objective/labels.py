"""What the positions of a batch are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax

# Values at some positions by name, each [E, B, W] with one entry per exit; "loss" is what training minimises.
TokenValues = dict[str, jax.Array]
# (learned, fixed, h_EBWD, labels of [B, W]) -> values of these positions
TokenFunction = Callable[[Any, Any, jax.Array, "Labels"], TokenValues]


class Labels(flax.struct.PyTreeNode):
    """What the positions of a batch learn from.

    Attributes:
        targets_BT: int32, the next token of each position.
        weights_BT: f32, 0 where a position does not count.
        teachers: for each teacher, arrays `[B, T, ...]` that its distribution is read from.
    """

    targets_BT: jax.Array
    weights_BT: jax.Array
    teachers: tuple[Any, ...] = ()
