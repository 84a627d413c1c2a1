"""A model in a few words, for reprs."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from s2d_jax.config.model import ModelConfig
from s2d_jax.model.products.weight_formats import weight_bytes

_LONGEST_SOURCE = 44


def short_source(source: str) -> str:
    """Where a model came from; a long path is cut to its end."""
    return source if len(source) <= _LONGEST_SOURCE else f"…{source[1 - _LONGEST_SOURCE :]}"


def described_shape(config: ModelConfig) -> str:
    """Family, depth, width and vocabulary."""
    size = f"{config.num_layers} layers x {config.embed_dim}"
    return f"{config.family}, {size}, vocabulary {config.vocab_size}, context {config.max_context}"


def described_size(params: Any) -> str:
    """The dtype of most of the parameters, and the bytes of all."""
    leaves = jax.tree.leaves(params)
    largest = max(leaves, key=lambda leaf: math.prod(leaf.shape))
    size, unit = float(weight_bytes(params)), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{jnp.dtype(largest.dtype).name}, {size:.3g} {unit}"
