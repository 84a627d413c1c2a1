"""A short hash that tells models apart."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import jax
import numpy as np

from s2d_jax.config.model import ModelConfig

_SAMPLED_WEIGHTS = 16


class Fingerprint:
    """A hash of a model's shape and of a few weights of every tensor, which are added one after another."""

    def __init__(self, config: ModelConfig):
        self._digest = hashlib.sha256(repr(dataclasses.astuple(config)).encode())

    def add(self, name: str, tensor: Any) -> None:
        """Takes in a tensor: a NumPy or JAX array."""
        picked = np.linspace(0, tensor.size - 1, min(_SAMPLED_WEIGHTS, tensor.size))
        at = np.unravel_index(picked.astype(np.int64), tensor.shape)
        values = np.asarray(jax.device_get(tensor[at])).astype(np.float32)
        self._digest.update(name.encode() + values.tobytes())

    def __str__(self) -> str:
        """16 hexadecimal digits."""
        return self._digest.hexdigest()[:16]
