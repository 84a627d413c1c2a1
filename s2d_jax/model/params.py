"""Parameters of a `Transformer`: made at random, as shapes only, and with the logical axes that sharding needs."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from s2d_jax.config.draft import NO_PARTS, ExitParts
from s2d_jax.config.model import ModelConfig
from s2d_jax.model.transformer import Transformer

Params = dict[str, Any]


def _init(config: ModelConfig, key, parts: ExitParts = NO_PARTS) -> Any:
    model = Transformer(config, parts=parts)
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def init_params(config: ModelConfig, key: Key[Array, ""], dtype: Any = jnp.float32) -> Params:
    """Random weights: normal(0, 0.02), norms 1, biases 0."""
    params = nn.meta.unbox(_init(config, key))
    return jax.tree.map(lambda x: x.astype(dtype), params)


def abstract_params(
    config: ModelConfig, dtype: Any = jnp.float32, parts: ExitParts = NO_PARTS
) -> Params:
    """The tree of `jax.ShapeDtypeStruct` that `init_params` and `init_exit_parts` would return; nothing is computed."""
    boxed = jax.eval_shape(lambda: _init(config, jax.random.key(0), parts))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), nn.meta.unbox(boxed))


def logical_axes(config: ModelConfig, parts: ExitParts = NO_PARTS) -> Params:
    """The tree of tuples of the logical axis names of every parameter; `s2d_jax.sharding.RULES` lists them."""
    boxed = jax.eval_shape(lambda: _init(config, jax.random.key(0), parts))
    is_boxed = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(lambda x: tuple(x.names), boxed, is_leaf=is_boxed)
