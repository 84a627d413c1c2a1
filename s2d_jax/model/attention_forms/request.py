"""What attention is asked for: queries, keys and values, and what each query may look at."""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Causal(flax.struct.PyTreeNode):
    """Each position of a row looks at itself and at those before it: what a pass without a cache sees.

    Attributes:
        segment_ids_BT: int32, a position looks at its own segment only; None: a row is one segment.
    """

    segment_ids_BT: jax.Array | np.ndarray | None = None

    def mask(self, batch: int, length: int) -> Bool[Array, "{batch} {length} {length}"]:
        """The same, written out."""
        steps = jnp.arange(length, dtype=jnp.int32)
        mask_BTS = jnp.broadcast_to(
            (steps[None, :] <= steps[:, None])[None], (batch, length, length)
        )
        if self.segment_ids_BT is None:
            return mask_BTS
        segment_ids_BT = self.segment_ids_BT
        return mask_BTS & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of `attend.attention`, which describes them.

    Attributes:
        mesh: the devices that the program is for, where it is split over several.
    """

    q_BTNH: Float[Array, "B T N H"]
    k_BKSH: Float[Array, "B K S H"]
    v_BKSH: Float[Array, "B K S H"]
    looks: Bool[Array, "B T S"] | Causal
    used_B: Int[Array, "B"] | None = None
    positions_BT: Int[Array, "B T"] | None = None
    window: int | None = None
    soft_cap: float | None = None
    scale: float | None = None
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None

    @property
    def factor(self) -> float:
        """What scores are multiplied with."""
        return 1 / math.sqrt(self.q_BTNH.shape[3]) if self.scale is None else self.scale

    @cached_property
    def at_BT(self) -> Int[Array, "B T"]:
        """int32, where each query stands among the keys.

        Raises:
            ValueError: for a mask without positions.
        """
        if self.positions_BT is not None:
            return self.positions_BT
        if not isinstance(self.looks, Causal):
            raise ValueError(f"window={self.window} over a mask needs positions_BT")
        B, T = self.q_BTNH.shape[:2]
        return jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))

    @property
    def reach(self) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
        """int32 `first_B` and `used_B`: no query looks at a key outside of [first, used), which holds at least one."""
        B, S = len(self.q_BTNH), self.k_BKSH.shape[2]
        used_B = jnp.full(B, S, jnp.int32) if self.used_B is None else jnp.clip(self.used_B, 1, S)
        if self.window is None:
            return jnp.zeros_like(used_B), used_B
        oldest_B = jnp.min(self.at_BT, axis=1) - self.window + 1
        return jnp.clip(oldest_B, 0, used_B - 1), used_B

    @cached_property
    def mask_BTS(self) -> Bool[Array, "B T S"]:
        """What each query looks at, the window included."""
        (B, T), S = self.q_BTNH.shape[:2], self.k_BKSH.shape[2]
        mask_BTS = self.looks.mask(B, T) if isinstance(self.looks, Causal) else self.looks
        if self.window is None:
            return mask_BTS
        each_S = jnp.arange(S, dtype=jnp.int32)
        return mask_BTS & (each_S[None, None, :] > self.at_BT[:, :, None] - self.window)
