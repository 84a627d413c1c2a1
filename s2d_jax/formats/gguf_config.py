"""The metadata of a GGUF file as a `ModelConfig`."""

from __future__ import annotations

from typing import Any

import numpy as np

from s2d_jax.config.model import ModelConfig, RopeScaling
from s2d_jax.errors import UserError
from s2d_jax.formats.eos_ids import merged_ids
from s2d_jax.formats.gguf import GGUFFile
from s2d_jax.formats.hf_config import _HF_DEFAULTS

GGUF_ARCHITECTURES = ("llama", "qwen2")


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """The shape of the model in a GGUF file.

    Raises:
        UserError: for another architecture, an option that changes the arithmetic, or a missing key.
    """
    family = file.metadata.get("general.architecture")
    if family not in GGUF_ARCHITECTURES:
        raise UserError(
            f"{file.path}: architecture {family!r} is not supported; use one of {', '.join(GGUF_ARCHITECTURES)}"
        )

    def get(key: str, default: Any = None) -> Any:
        value = file.metadata.get(f"{family}.{key}", default)
        if value is None or isinstance(value, list):
            raise UserError(
                f"{file.path}: {family}.{key}={value!r} is not supported; one number is expected"
            )
        return value

    embed_dim, num_heads = get("embedding_length"), get("attention.head_count")
    head_dim = get("attention.key_length", embed_dim // num_heads)
    for key, wanted in (
        ("attention.value_length", head_dim),
        ("rope.dimension_count", head_dim),
        ("attention.sliding_window", 0),
        ("expert_count", 0),
        ("rope.scaling.type", "none"),
    ):
        if (value := get(key, wanted)) != wanted:
            raise UserError(
                f"{file.path}: {family}.{key}={value!r} is not supported; only {wanted!r}"
            )
    theta = float(get("rope.freq_base", _HF_DEFAULTS["rope_theta"]))
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{file.path} lacks tensor token_embd.weight; fetch the complete file")
    tokenizer = {
        key: file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot")
    }
    return ModelConfig(
        family=family,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        embed_dim=embed_dim,
        ffw_dim=get("feed_forward_length"),
        num_layers=get("block_count"),
        num_heads=num_heads,
        num_kv_heads=get("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        # Stored as f32; the shortest decimal that rounds to it is what the model was made with.
        norm_eps=float(str(np.float32(get("attention.layer_norm_rms_epsilon")))),
        rope_theta=theta,
        max_context=get("context_length"),
        rope_scaling=_rope_scaling_from_gguf(file, head_dim, theta),
        qkv_bias=family == "qwen2",
        tie_embeddings="output.weight" not in file.tensors,
        bos_token_id=tokenizer["bos"],
        eos_token_ids=merged_ids(tokenizer["eos"], tokenizer["eot"]),
    )


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
    scaling = RopeScaling(float(factors.max()), 1.0, 4.0, 8192)
    expected = llama3_factors(head_dim, theta, scaling)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise UserError(
            f"{file.path}: RoPE scaling in {ROPE_FACTORS} is not supported; only Llama-3's (low 1, high 4, context 8192)"
        )
    return scaling
