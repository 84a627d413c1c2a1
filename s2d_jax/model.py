"""The transformer: embed, run blocks [start, stop), read logits at any depth through the shared norm and head."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from s2d_jax.config import ModelConfig, UserError
from s2d_jax.kv_cache import KVCache
from s2d_jax.layers import Block, Linear, RMSNorm
from s2d_jax.linear import linear
from s2d_jax.weight_formats import embed

Params = dict[str, Any]


class Embed(nn.Module):
    """The embedding table `[V, D]`, which a tied head reads as well."""

    config: ModelConfig

    def setup(self):
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        self.embedding = self.param(
            "embedding", init, (self.config.vocab_size, self.config.embed_dim)
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return embed(self.embedding, tokens)

    def attend(self, h: jax.Array) -> jax.Array:
        """`[..., D]` -> f32 `[..., V]`: the tied head."""
        return linear(h, self.embedding, jnp.float32)


class Transformer(nn.Module):
    """Llama or Qwen2. Weights are cast to `dtype` on use, so f32 masters can compute in bf16.

    `Transformer(config).apply({"params": params}, ..., method="run_blocks")`

    With `trimmed_head_size` K, logits are read through the K rows of the head that `pretrained.with_trimmed_head` gathered.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    trimmed_head_size: int | None = None

    def setup(self):
        c = self.config
        self.embed_table = Embed(c, name="embed")
        self.layers = [Block(c) for _ in range(c.num_layers)]
        self.final_norm = RMSNorm(c.embed_dim, c.norm_eps)
        axes, size = ("vocab", "embed"), self.trimmed_head_size
        if size is not None:
            self.trimmed_head = Linear(c.embed_dim, size, axes, out_dtype=jnp.float32)
        elif not c.tie_embeddings:
            self.lm_head = Linear(c.embed_dim, c.vocab_size, axes, out_dtype=jnp.float32)

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """`[B, T]` int32 -> `[B, T, D]` in the compute dtype. Ids beyond the vocabulary read its last row."""
        return self.embed_table(tokens_BT).astype(self.dtype)

    def run_blocks(self, h_BTD, cache: KVCache, start: int, stop: int):
        """Runs layers [start, stop) on the T positions that follow each row's cached length.

        Args:
            h_BTD: the state before layer `start`.
            cache: of exactly these layers; its capacity must hold `length_B + T`.

        Returns:
            The state `[B, T, D]` after layer `stop - 1`, and the cache with the window written but its length unchanged.
        """
        positions_BT = cache.positions(h_BTD.shape[1])
        capacity = cache.keys[0].shape[2]
        mask_BTS = jnp.arange(capacity, dtype=jnp.int32)[None, None, :] <= positions_BT[:, :, None]
        keys, values = [], []
        for layer, k, v in zip(self.layers[start:stop], cache.keys, cache.values, strict=True):
            h_BTD, (k, v) = layer(h_BTD, positions_BT, mask_BTS, (k, v))
            keys.append(k)
            values.append(v)
        return h_BTD, cache.replace(keys=tuple(keys), values=tuple(values))

    def logits(self, h: jax.Array) -> jax.Array:
        """`[..., D]` -> f32 `[..., V]` (`[..., K]` with a trimmed head): the final norm and the head, shared by all exits."""
        normed = self.final_norm(h)
        if self.trimmed_head_size is not None:
            return self.trimmed_head(normed)
        head = self.embed_table.attend if self.config.tie_embeddings else self.lm_head
        return head(normed)

    def exit_hiddens(
        self, tokens_BT, *, exit_layers, positions_BT=None, segment_ids_BT=None, remat=False
    ) -> tuple[jax.Array, ...]:
        """The states `[B, T, D]` after each of `exit_layers` (ascending), without a cache.

        Args:
            tokens_BT: int32.
            positions_BT: int32; 0..T-1 when absent.
            segment_ids_BT: int32; a token attends to earlier tokens of its own segment only.
            remat: recompute each block in the backward pass.
        """
        B, T = tokens_BT.shape
        steps = jnp.arange(T, dtype=jnp.int32)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(steps[None], (B, T))
        mask_BTS = jnp.broadcast_to((steps[None, :] <= steps[:, None])[None], (B, T, T))
        if segment_ids_BT is not None:
            mask_BTS = mask_BTS & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])

        def run(layer, h):
            return layer(h, positions_BT, mask_BTS)[0]

        h_BTD, exits = self.embed(tokens_BT), {}
        for depth, layer in enumerate(self.layers[: max(exit_layers)], start=1):
            h_BTD = nn.remat(run)(layer, h_BTD) if remat else run(layer, h_BTD)
            exits[depth] = h_BTD
        return tuple(exits[depth] for depth in exit_layers)

    def __call__(self, tokens_BT, *, positions_BT=None, segment_ids_BT=None) -> jax.Array:
        """f32 logits `[B, T, V]` of the full depth, without a cache."""
        (h_BTD,) = self.exit_hiddens(
            tokens_BT,
            exit_layers=(self.config.num_layers,),
            positions_BT=positions_BT,
            segment_ids_BT=segment_ids_BT,
        )
        return self.logits(h_BTD)


def _init(config: ModelConfig, key) -> Params:
    return Transformer(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def init_params(config: ModelConfig, key: jax.Array, dtype=jnp.float32) -> Params:
    """Random weights: normal(0, 0.02), norms 1, biases 0."""
    params = nn.meta.unbox(_init(config, key))
    return jax.tree.map(lambda x: x.astype(dtype), params)


def abstract_params(config: ModelConfig, dtype=jnp.float32) -> Params:
    """The tree of `jax.ShapeDtypeStruct` that `init_params` would return; nothing is computed."""
    boxed = jax.eval_shape(lambda: _init(config, jax.random.key(0)))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), nn.meta.unbox(boxed))


def logical_axes(config: ModelConfig) -> Params:
    """The tree of tuples of logical axis names (`vocab`, `embed`, `heads`, `kv_heads`, `ffw`, `norm`) of every parameter."""
    boxed = jax.eval_shape(lambda: _init(config, jax.random.key(0)))
    is_boxed = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(lambda x: tuple(x.names), boxed, is_leaf=is_boxed)


def truncated(config: ModelConfig, params: Params, num_layers: int) -> tuple[ModelConfig, Params]:
    """The model of the first `num_layers` layers, with the same embedding, final norm and head.

    Raises:
        UserError: if the model has fewer layers.
    """
    if not 1 <= num_layers <= config.num_layers:
        raise UserError(
            f"num_layers={num_layers} must be between 1 and the model's {config.num_layers} layers"
        )
    dropped = {f"layers_{i}" for i in range(num_layers, config.num_layers)}
    kept = {name: value for name, value in params.items() if name not in dropped}
    return dataclasses.replace(config, num_layers=num_layers), kept
