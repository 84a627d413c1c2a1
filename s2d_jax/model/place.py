"""Where the positions that a model computes stand: their rotary positions, and what each may look at."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


class Place(flax.struct.PyTreeNode):
    """The place of T positions among the S of a cache.

    Attributes:
        positions_BT: int32, rotary positions.
        mask_BTS: bool, which entries of the cache each position looks at.
    """

    positions_BT: jax.Array
    mask_BTS: jax.Array

    @classmethod
    def of_text(cls, length_B: Int[Array, "B"], width: int, capacity: int) -> Place:
        """The `width` positions behind `length_B` of a text: each looks at all before it, and at itself."""
        positions_BT = length_B[:, None] + jnp.arange(width, dtype=jnp.int32)[None, :]
        each_S = jnp.arange(capacity, dtype=jnp.int32)
        return cls(positions_BT, each_S[None, None, :] <= positions_BT[:, :, None])

    def first(self, width: int) -> Place:
        """The place of the first `width` (static) positions."""
        return Place(self.positions_BT[:, :width], self.mask_BTS[:, :width])
