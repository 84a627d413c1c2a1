"""A short hash that tells models apart."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np

from s2d_jax.config.model import ModelConfig
from s2d_jax.sharding import fetch_whole

_SAMPLED_WEIGHTS = 16
# The fields whose values made up the hash of version 0.1, in its order.
_FIRST_FIELDS = (
    "family", "vocab_size", "embed_dim", "ffw_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim",
    "norm_eps", "rope_theta", "max_context", "rope_scaling", "qkv_bias", "tie_embeddings",
    "bos_token_id", "eos_token_ids",
)  # fmt: skip


class Fingerprint:
    """A hash of a model's shape and of a few weights of every tensor; tensors are added one after another.

    From the shape it takes the names and values of the fields that differ from their defaults, so a field that is added to the
    config later changes no hash. Files of version 0.1 hold an older form, which `matches` accepts too.
    """

    def __init__(self, config: ModelConfig):
        described = json.dumps(_described(config), sort_keys=True)
        self._digest = hashlib.sha256(described.encode())
        first = {name: value for name, value in _described(config).items() if name in _FIRST_FIELDS}
        self._first = None
        if first == _described(config):  # no field is in use that version 0.1 did not have
            values = tuple(_as_tuple(getattr(config, name)) for name in _FIRST_FIELDS)
            self._first = hashlib.sha256(repr(values).encode())

    def add(self, name: str, tensor: Any) -> None:
        """Takes in a tensor: a NumPy or JAX array."""
        picked = np.linspace(0, tensor.size - 1, min(_SAMPLED_WEIGHTS, tensor.size))
        at = np.unravel_index(picked.astype(np.int64), tensor.shape)
        values = np.asarray(fetch_whole(tensor[at])).astype(np.float32)
        for digest in (self._digest, self._first):
            if digest is not None:
                digest.update(name.encode() + values.tobytes())

    def __str__(self) -> str:
        """16 hexadecimal digits."""
        return self._digest.hexdigest()[:16]

    def matches(self, written: str) -> bool:
        """Whether `written`, a hash from a file, is of this model, in today's form or in that of version 0.1."""
        first = None if self._first is None else self._first.hexdigest()[:16]
        return written in (str(self), first)


def _described(config: Any) -> dict[str, Any]:
    """Names and values of the fields that differ from their defaults."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            found[field.name] = _described(value) if dataclasses.is_dataclass(value) else value
    return found


def _as_tuple(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.astuple(value)
    return value
