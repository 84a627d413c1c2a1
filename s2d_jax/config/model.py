"""The shape of a model: `ModelConfig`, for every supported family."""

from __future__ import annotations

import dataclasses

from s2d_jax.config.plain import plain_fields
from s2d_jax.errors import UserError as UserError
from s2d_jax.errors import require

FAMILIES = ("llama", "qwen2")
MOST_LAYERS = 10_000
"""More than any model has. What is made for each layer before its tensors are seen stays small."""
MOST_SIZE = 2**31 - 1
"""Of any other size: ids and positions are int32."""
_SIZES = (
    "vocab_size", "embed_dim", "ffw_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_context",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3's frequency scaling of RoPE (`rope_type: llama3` in a Hugging Face config).

    Wavelengths above `original_max_position / low_freq_factor` are stretched by `factor`,
    those shorter than `original_max_position / high_freq_factor` are kept, those between are blended.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self):
        plain_fields(self)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder-only transformer of the Llama or Qwen2 family.

    Raises:
        UserError: if a value is impossible, naming it and the remedy.
    """

    family: str
    vocab_size: int
    embed_dim: int
    ffw_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    max_context: int
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    tie_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        plain_fields(self)
        require(
            self.family in FAMILIES,
            f"family={self.family!r} is not supported; use one of {', '.join(FAMILIES)}",
        )
        for name in _SIZES:
            value = getattr(self, name)
            most = MOST_LAYERS if name == "num_layers" else MOST_SIZE
            require(
                1 <= value <= most,
                f"{name}={value} must be from 1 to {most}; check the model's config.json",
            )
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            require(value > 0, f"{name}={value} must be above 0; check the model's config.json")
        outside = [i for i in self.eos_token_ids if not 0 <= i < self.vocab_size]
        require(
            not outside,
            f"eos_token_ids={self.eos_token_ids} must be ids of the vocabulary, 0 to {self.vocab_size - 1}; check the model's "
            "config.json",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
            "check the model's config.json",
        )
        require(
            self.head_dim % 2 == 0,
            f"head_dim={self.head_dim} must be even for RoPE; check the model's config.json",
        )
