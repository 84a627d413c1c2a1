"""The target as the decode loop sees it."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from s2d_jax.model.kv_cache import KVCache
from s2d_jax.model.place import Place
from s2d_jax.model.transformer import Transformer, apply_model
from s2d_jax.sharding import gathered_last

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
        cache = KVCache.create(
            c.num_layers, batch, c.num_kv_heads, capacity, c.head_dim, dtype=dtype, mesh=self.mesh
        )
        shape = (batch, capacity, c.embed_dim)
        return cache.replace(states={name: jnp.zeros(shape, dtype) for name in self.shown})

    def forward(
        self,
        params: Any,
        tokens_BT: Int[Array, "B T"],
        cache: KVCache,
        place: Place | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """The state after the last layer for T tokens that follow the cache, and the cache with them written.

        `place` is as in `Transformer.run_blocks`: None for text.
        """
        h_BTD = apply_model(self.model, params, "embed", tokens_BT)
        states, keys, values = {}, [], []
        for start, stop in itertools.pairwise(self._cuts):
            if (name := f"input_{start}") in self.shown:
                states[name] = h_BTD
            part = cache.layers(start, stop)
            h_BTD, part = apply_model(
                self.model, params, "run_blocks", h_BTD, part, start, stop, place
            )
            keys += part.keys
            values += part.values
        if FINAL_NORM in self.shown:
            states[FINAL_NORM] = apply_model(self.model, params, "normed", h_BTD)
        written = cache.replace(keys=tuple(keys), values=tuple(values))
        return h_BTD, written.write_states(states)

    @property
    def _cuts(self) -> tuple[int, ...]:
        """Layers whose input is shown, between the first and the number of layers."""
        inputs = {int(name.removeprefix("input_")) for name in self.shown if name != FINAL_NORM}
        return tuple(sorted({0, *inputs, self.model.config.num_layers}))

    def logits(self, params: Any, h: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """f32 logits of states, through the final norm and the head; whole on every device of a tensor axis.

        They are gathered once, so that no filter and no argmax sends anything.
        """
        return gathered_last(apply_model(self.model, params, "logits", h), self.mesh)
