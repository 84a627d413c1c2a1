"""The target as the decode loop sees it."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from s2d_jax.model.kv_cache import KVCache
from s2d_jax.model.place import Place
from s2d_jax.model.transformer import Transformer

FINAL_NORM = "final_norm"


@dataclasses.dataclass(frozen=True)
class Target:
    """The verifying model, as the loop sees it.

    Attributes:
        model: its architecture and compute dtype.
        mesh: where its parameters and caches are split; None for one device.
        shown: names of the states that its cache keeps for the drafter; `Drafter.target_states` says what they mean.
    """

    model: Transformer
    mesh: Any = None
    shown: tuple[str, ...] = ()

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache of all layers, in the compute dtype, split over the mesh if there is one."""
        c, dtype = self.model.config, self.model.dtype
        shape = (c.num_layers, batch, c.num_kv_heads, capacity, c.head_dim)
        cache = KVCache.create(*shape, dtype=dtype, mesh=self.mesh)
        shape = (batch, capacity, c.embed_dim)
        return cache.replace(states={name: jnp.zeros(shape, dtype) for name in self.shown})

    def forward(
        self, params, tokens_BT, cache: KVCache, place: Place | None = None
    ) -> tuple[jax.Array, KVCache]:
        """The state `[B, T, D]` after the last layer for T tokens behind the cache, and the cache with them written.

        `place` is that of `Transformer.run_blocks`: None for text.
        """
        apply = lambda method, *args: self.model.apply({"params": params}, *args, method=method)  # noqa: E731
        h_BTD, states, parts = apply("embed", tokens_BT), {}, []
        for start, stop in itertools.pairwise(self._cuts):
            if (name := f"input_{start}") in self.shown:
                states[name] = h_BTD
            h_BTD, part = apply("run_blocks", h_BTD, cache.layers(start, stop), start, stop, place)
            parts.append(part)
        if FINAL_NORM in self.shown:
            states[FINAL_NORM] = apply("normed", h_BTD)
        keys, values = (sum((getattr(p, name) for p in parts), ()) for name in ("keys", "values"))
        return h_BTD, cache.replace(keys=keys, values=values).write_states(states)

    @property
    def _cuts(self) -> tuple[int, ...]:
        """Layers whose input is shown, between the first and the number of layers."""
        inputs = {int(name.removeprefix("input_")) for name in self.shown if name != FINAL_NORM}
        return tuple(sorted({0, *inputs, self.model.config.num_layers}))

    def logits(self, params, h: jax.Array) -> jax.Array:
        """`[..., D]` -> f32 `[..., V]`."""
        return self.model.apply({"params": params}, h, method="logits")
