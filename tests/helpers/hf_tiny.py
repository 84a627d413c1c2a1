"""Tiny Hugging Face torch models and GGUF files as oracles, and the comparison layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tiny import tiny_config, tiny_qwen2_config

from s2d_jax.config.model import ModelConfig, RopeScaling
from s2d_jax.errors import UserError
from s2d_jax.formats.gguf_config import llama3_factors
from s2d_jax.formats.names import get_weight, weight_names
from s2d_jax.model.kv_cache import KVCache
from s2d_jax.model.params import Params
from s2d_jax.model.transformer import Transformer

LLAMA3 = RopeScaling(8.0, 1.0, 4.0, 8192)

# Rotations of llama3 begin to differ beyond the original context, so this one is shorter than the test's sequences.
SHORT_LLAMA3 = RopeScaling(4.0, 1.0, 4.0, 16)

CASES: dict[str, ModelConfig] = {
    "llama": tiny_config(),
    "llama tied": tiny_config(tie_embeddings=True),
    "llama without groups": tiny_config(num_kv_heads=4, norm_eps=1e-6),
    "llama one kv head": tiny_config(num_kv_heads=1, rope_theta=500_000.0),
    "llama wide heads": tiny_config(embed_dim=36, num_heads=3, num_kv_heads=3, head_dim=14),
    "llama3 scaling": tiny_config(rope_theta=500_000.0, rope_scaling=LLAMA3, head_dim=32),
    "llama3 short scaling": tiny_config(rope_scaling=SHORT_LLAMA3, tie_embeddings=True),
    "qwen2": tiny_qwen2_config(),
    "qwen2 tied": tiny_qwen2_config(tie_embeddings=True, rope_theta=1e6, norm_eps=1e-6),
    "qwen2 wide heads": tiny_qwen2_config(embed_dim=36, num_heads=6, num_kv_heads=3, head_dim=10),
}


@dataclasses.dataclass(frozen=True)
class Families:
    """The transformers classes of one family."""

    config: type
    model: type


HF_FAMILIES = {
    "llama": Families(transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": Families(transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
}


def hf_model(config: ModelConfig, seed: int = 0) -> transformers.PreTrainedModel:
    """A random f32 torch model of this shape, its states of order 1 so that errors show.

    The shape is spelled out here rather than by `config_to_hf`, which it checks.
    """
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (s := config.rope_scaling) is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_max_position,
        }
    family = HF_FAMILIES[config.family]
    hf_config = family.config(
        vocab_size=config.vocab_size,
        hidden_size=config.embed_dim,
        intermediate_size=config.ffw_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps,
        max_position_embeddings=config.max_context,
        rope_parameters=rope,
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    model = family.model(hf_config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1 + 0.2 * noise)
            elif "embed" in name or name.endswith("bias"):
                weight.copy_(noise)
            else:
                weight.copy_(1.5 * noise / weight.shape[-1] ** 0.5)
    return model


def random_tokens(vocab_size: int, length: int = 40, batch: int = 2, seed: int = 0) -> np.ndarray:
    """int32 `[B, T]`."""
    shape = (batch, length)
    return np.random.default_rng(seed).integers(0, vocab_size, shape).astype(np.int32)


@torch.no_grad()
def hf_logits(model: transformers.PreTrainedModel, tokens_BT: np.ndarray) -> np.ndarray:
    """f32 `[B, T, V]`."""
    return model(torch.from_numpy(tokens_BT).long()).logits.float().numpy()


def our_logits(config: ModelConfig, params: Params, tokens_BT: np.ndarray) -> np.ndarray:
    """f32 `[B, T, V]`."""
    return np.asarray(Transformer(config).apply({"params": params}, jnp.asarray(tokens_BT)))


def cached_logits(config: ModelConfig, params: Params, tokens_BT: np.ndarray, window: int):
    """What `our_logits` gives, computed as decoding does: `window` positions at a time behind a cache."""
    model, (batch, length) = Transformer(config), tokens_BT.shape
    shape = (config.num_layers, batch, config.num_kv_heads, length, config.head_dim)
    cache = KVCache.create(*shape, dtype=jnp.float32)

    @jax.jit
    def run(params, tokens, cache):
        variables = {"params": params}
        h = model.apply(variables, tokens, method="embed")
        h, cache = model.apply(variables, h, cache, 0, config.num_layers, method="run_blocks")
        return model.apply(variables, h, method="logits"), cache.advance_to(cache.length_B + window)

    windows = []
    for start in range(0, length, window):
        logits, cache = run(params, jnp.asarray(tokens_BT[:, start : start + window]), cache)
        windows.append(np.asarray(logits))
    return np.concatenate(windows, axis=1)


@torch.no_grad()
def hf_states(model: transformers.PreTrainedModel, tokens_BT: np.ndarray) -> list[np.ndarray]:
    """The state before the first layer, after each layer (before the final norm), and the logits."""
    states: list[np.ndarray] = []

    def keep(_module, _inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        states.append(hidden.float().numpy().copy())

    modules = (model.model.embed_tokens, *model.model.layers)
    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        logits = hf_logits(model, tokens_BT)
    finally:
        for hook in hooks:
            hook.remove()
    return [*states, logits]


def our_states(config: ModelConfig, params: Params, tokens_BT: np.ndarray) -> list[np.ndarray]:
    """What `hf_states` gives, from this library."""
    model, tokens = Transformer(config), jnp.asarray(tokens_BT)
    every_layer = tuple(range(1, config.num_layers + 1))
    variables = {"params": params}
    embedded = model.apply(variables, tokens, method="embed")
    hiddens = model.apply(variables, tokens, exit_layers=every_layer, method="exit_hiddens")
    logits = model.apply(variables, hiddens[-1], method="logits")
    return [np.asarray(state) for state in (embedded, *hiddens, logits)]


def first_divergent_layer(
    ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], rtol: float = 1e-3
) -> str | None:
    """Where two forward passes part: "embedding", "layer 1", ..., "logits", or None.

    States are compared by their largest difference relative to the largest entry, as they grow with depth.
    """
    assert len(ours) == len(theirs)
    names = ["embedding", *(f"layer {i}" for i in range(1, len(ours) - 1)), "logits"]
    for name, a, b in zip(names, ours, theirs, strict=True):
        if not np.abs(a - b).max() <= rtol * np.abs(b).max():
            return name
    return None


def expect_user_error(match: str):
    """`pytest.raises` for the one line of a UserError."""

    return pytest.raises(UserError, match=match, check=lambda error: "\n" not in str(error))


def permute_rope_rows(weight_OI: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k in Llama files (`LlamaModel.permute` in its converter)."""
    shape = (num_heads, 2, weight_OI.shape[0] // num_heads // 2, *weight_OI.shape[1:])
    return weight_OI.reshape(shape).swapaxes(1, 2).reshape(weight_OI.shape)


def write_gguf(
    path: Path,
    config: ModelConfig,
    params: Params,
    *,
    metadata: dict[str, object] | None = None,
    tokenizer: dict[str, object] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    matrix_type: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """Writes a model as llama.cpp's converter would.

    Args:
        metadata: added to, or in place of, what `config` says; keys without the architecture.
        tokenizer: `tokenizer.*` keys without that prefix.
        extra: further tensors; None in place of an array leaves a tensor out.
        matrix_type: of all matrices; vectors are f32.
    """
    writer = gguf.GGUFWriter(path, config.family)
    writer.add_file_type(0)
    values: dict[str, object] = {
        "block_count": config.num_layers,
        "context_length": config.max_context,
        "embedding_length": config.embed_dim,
        "feed_forward_length": config.ffw_dim,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    prefixed = {f"{config.family}.{key}": v for key, v in (values | (metadata or {})).items()}
    prefixed |= {f"tokenizer.{key}": v for key, v in (tokenizer or tiny_gguf_vocabulary()).items()}
    for key, value in prefixed.items():
        _add_value(writer, key, value)
    tensors = {}
    for name in weight_names(config):
        array = np.asarray(get_weight(params, name), np.float32)
        if config.family == "llama" and ("attn_q." in name.gguf or "attn_k." in name.gguf):
            heads = config.num_heads if "attn_q." in name.gguf else config.num_kv_heads
            array = permute_rope_rows(array, heads)
        tensors[name.gguf] = array
    if config.rope_scaling is not None:
        factors = llama3_factors(config.head_dim, config.rope_theta, config.rope_scaling)
        tensors["rope_freqs.weight"] = factors
    for name, array in (tensors | (extra or {})).items():
        if array is None:
            continue
        kind = matrix_type if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_value(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    if value is not None:
        add[type(value)](key, value)


def tiny_gguf_vocabulary(size: int = 64) -> dict[str, object]:
    """A byte-level vocabulary of 64 letters with two control tokens, under GGUF's keys."""
    letters = [chr(code) for code in range(ord("!"), ord("!") + size - 4)]
    return {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.tokens": [*letters, '!"', "Ġ", "<|im_start|>", "<|im_end|>"],
        "ggml.token_type": [1] * (size - 2) + [3, 3],
        "ggml.merges": ['! "'],
        "ggml.bos_token_id": size - 2,
        "ggml.eos_token_id": size - 1,
    }
