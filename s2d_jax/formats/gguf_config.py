"""The metadata of a GGUF file as a `ModelConfig`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from s2d_jax.config.model import MOST_LAYERS, MOST_SIZE, ModelConfig, RopeScaling
from s2d_jax.errors import UserError, shown, told_of
from s2d_jax.fields import REQUIRED, Fields
from s2d_jax.formats.eos_ids import merged_ids
from s2d_jax.formats.finite import check_finite
from s2d_jax.formats.gguf import GGUFFile
from s2d_jax.formats.hf_config import DEFAULT_ROPE_THETA
from s2d_jax.formats.names import EMBEDDING

GGUF_ARCHITECTURES = ("llama", "qwen2")


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """The shape of the model in a GGUF file.

    Raises:
        UserError: for another architecture, an option that changes the arithmetic, a missing key, or a value of another type or
            out of bounds. The message names the file and the key.
    """
    fields = Fields(
        file.metadata, file.path, "use a file that a converter wrote, or fetch it again"
    )
    family = fields.text("general.architecture")
    if family not in GGUF_ARCHITECTURES:
        raise UserError(
            f"{file.path}: architecture {shown(family)} is not supported; use one of {', '.join(GGUF_ARCHITECTURES)}"
        )

    def size(key: str, default: Any = REQUIRED) -> int:
        return fields.integer(f"{family}.{key}", 1, MOST_SIZE, default)

    embed_dim, num_heads = size("embedding_length"), size("attention.head_count")
    head_dim = size("attention.key_length", max(1, embed_dim // num_heads))
    for key, wanted in (
        ("attention.value_length", head_dim),
        ("rope.dimension_count", head_dim),
        ("attention.sliding_window", 0),
        ("expert_count", 0),
        ("rope.scaling.type", "none"),
    ):
        if (value := file.metadata.get(f"{family}.{key}", wanted)) != wanted:
            raise UserError(
                f"{file.path}: {family}.{key}={shown(value)} is not supported; only {wanted!r}"
            )
    theta = fields.positive(f"{family}.rope.freq_base", DEFAULT_ROPE_THETA)
    vocab_size = _vocab_size(file)
    ids = [
        fields.integer(f"tokenizer.ggml.{key}_token_id", 0, most, None)
        for key, most in (("bos", math.inf), ("eos", vocab_size - 1), ("eot", vocab_size - 1))
    ]
    epsilon = fields.positive(f"{family}.attention.layer_norm_rms_epsilon")
    values = {
        "family": family,
        "vocab_size": vocab_size,
        "embed_dim": embed_dim,
        "ffw_dim": size("feed_forward_length"),
        "num_layers": fields.integer(f"{family}.block_count", 1, MOST_LAYERS),
        "num_heads": num_heads,
        "num_kv_heads": size("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        # Stored as f32; the shortest decimal that rounds to it is what the model was made with.
        "norm_eps": float(str(np.float32(epsilon))),
        "rope_theta": theta,
        "max_context": size("context_length"),
        "rope_scaling": _rope_scaling_from_gguf(file, head_dim, theta),
        "qkv_bias": family == "qwen2",
        "tie_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": ids[0],
        "eos_token_ids": merged_ids(*ids[1:]),
    }
    with told_of(file.path):
        return ModelConfig(**values)


def _vocab_size(file: GGUFFile) -> int:
    """The rows of the embedding."""
    embedding = file.tensors.get(EMBEDDING.gguf)
    if embedding is None:
        raise UserError(f"{file.path} lacks tensor {EMBEDDING.gguf}; fetch the complete file")
    if len(embedding.shape) != 2 or not 1 <= embedding.shape[0] <= MOST_SIZE:
        raise UserError(
            f"{file.path}: tensor {EMBEDDING.gguf} has shape {embedding.shape}, a row for each token is expected; fetch it anew"
        )
    return embedding.shape[0]


ROPE_FACTORS = "rope_freqs.weight"


def llama3_factors(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """f32 `[H/2]` by which llama.cpp divides the rotation frequencies of a Llama-3 model.

    Source: `LlamaModel.generate_extra_tensors` in llama.cpp's convert_hf_to_gguf.py.
    """
    frequency = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_max_position * frequency / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - smooth) / scaling.factor + smooth)).astype(np.float32)


def _rope_scaling_from_gguf(file: GGUFFile, head_dim: int, theta: float) -> RopeScaling | None:
    """Llama-3 files carry the scaling as a tensor of factors, not as its four numbers.

    All released Llama-3 models share three of the four; the fourth is the largest factor.
    """
    if ROPE_FACTORS not in file.tensors:
        return None
    factors = file.tensor(ROPE_FACTORS)
    check_finite(ROPE_FACTORS, factors, file.path)
    largest = float(factors.max(initial=0.0))
    if not largest > 0:
        raise UserError(f"{file.path}: {ROPE_FACTORS} holds no factors above 0; fetch it again")
    scaling = RopeScaling(largest, 1.0, 4.0, 8192)
    expected = llama3_factors(head_dim, theta, scaling)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise UserError(
            f"{file.path}: RoPE scaling in {ROPE_FACTORS} is not supported; only Llama-3's (low 1, high 4, context 8192)"
        )
    return scaling
