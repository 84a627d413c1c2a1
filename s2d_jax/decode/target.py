"""The target as the decode loop sees it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from s2d_jax.model.kv_cache import KVCache
from s2d_jax.model.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Target:
    """The verifying model, as the loop sees it.

    Attributes:
        model: its architecture and compute dtype.
        mesh: where its parameters and caches are split; None for one device.
    """

    model: Transformer
    mesh: Any = None

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache of all layers, in the compute dtype, split over the mesh if there is one."""
        c, dtype = self.model.config, self.model.dtype
        shape = (c.num_layers, batch, c.num_kv_heads, capacity, c.head_dim)
        return KVCache.create(*shape, dtype=dtype, mesh=self.mesh)

    def forward(self, params, tokens_BT, cache: KVCache, place=None) -> tuple[jax.Array, KVCache]:
        """The state `[B, T, D]` after the last layer for T tokens behind the cache, and the cache with them written.

        `place` is that of `Transformer.run_blocks`: None for text.
        """
        apply = lambda method, *args: self.model.apply({"params": params}, *args, method=method)  # noqa: E731
        h_BTD = apply("embed", tokens_BT)
        return apply("run_blocks", h_BTD, cache, 0, self.model.config.num_layers, place)

    def logits(self, params, h: jax.Array) -> jax.Array:
        """`[..., D]` -> f32 `[..., V]`."""
        return self.model.apply({"params": params}, h, method="logits")
