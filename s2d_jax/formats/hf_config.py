"""Model shapes as Hugging Face's `config.json` states them, read and written.

An option that this library cannot compute is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from s2d_jax.config.model import MOST_LAYERS, MOST_SIZE, ModelConfig, RopeScaling
from s2d_jax.errors import UserError, shown, told_of
from s2d_jax.fields import REQUIRED, Fields
from s2d_jax.formats.eos_ids import checked_ids

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}

# What transformers assumes when a config.json leaves a key out.
DEFAULT_NORM_EPS, DEFAULT_ROPE_THETA, DEFAULT_CONTEXT = 1e-6, 10_000.0, 2048
# Options of the two families that change the arithmetic: switches, and what is allowed where one is on.
_SWITCHES = {
    "attention_bias": "only false can be computed (Qwen2's q/k/v bias needs no key)",
    "mlp_bias": "only false can be computed",
    "use_sliding_window": "only false can be computed",
}
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def config_from_hf(raw: Mapping[str, Any], where: str | Path = "config.json") -> ModelConfig:
    """A `config.json`, parsed, of transformers 4 or 5.

    Args:
        raw: its fields.
        where: the file, for messages.

    Raises:
        UserError: for another architecture, an option that changes the arithmetic, a missing key, or a value of another type
            or out of bounds. The message names the file and the field.
    """
    fields = Fields(raw, where, "correct the config")
    family = _family(fields)
    _check_options(fields)
    size = lambda name, default=REQUIRED: fields.integer(name, 1, MOST_SIZE, default)  # noqa: E731
    vocab_size, embed_dim, num_heads = map(
        size, ("vocab_size", "hidden_size", "num_attention_heads")
    )
    num_kv_heads = size("num_key_value_heads", num_heads)
    for name, whole, parts, part in (
        ("hidden_size", embed_dim, num_heads, "num_attention_heads"),
        ("num_attention_heads", num_heads, num_kv_heads, "num_key_value_heads"),
    ):
        if whole % parts:
            raise fields.wrong(name, f"a multiple of {part}={parts}")
    theta, scaling = _rope_from_hf(fields)
    values = {
        "family": family,
        "vocab_size": vocab_size,
        "embed_dim": embed_dim,
        "ffw_dim": size("intermediate_size"),
        "num_layers": fields.integer("num_hidden_layers", 1, MOST_LAYERS),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": size("head_dim", embed_dim // num_heads),
        "norm_eps": fields.positive("rms_norm_eps", DEFAULT_NORM_EPS),
        "rope_theta": theta,
        "max_context": size("max_position_embeddings", DEFAULT_CONTEXT),
        "rope_scaling": scaling,
        "qkv_bias": family == "qwen2",
        "tie_embeddings": fields.flag("tie_word_embeddings", False),
        "bos_token_id": next(iter(checked_ids(fields, "bos_token_id")), None),
        "eos_token_ids": checked_ids(fields, "eos_token_id", vocab_size),
    }
    with told_of(where):
        return ModelConfig(**values)


def _family(fields: Fields) -> str:
    """The family of an architecture, or of a `model_type` where no architecture is named."""
    architectures = fields.texts("architectures", ()) or (fields.text("model_type", None),)
    by_type = {family: family for family in ARCHITECTURES.values()}
    family = (ARCHITECTURES | by_type).get(architectures[0])
    if family is None:
        raise UserError(
            f"{fields.where}: architecture {shown(architectures[0])} is not supported; use one of {', '.join(ARCHITECTURES)}"
        )
    return family


def _check_options(fields: Fields) -> None:
    """Raises UserError for an option that is on and cannot be computed."""
    raw = fields.raw

    def refuse(key: str, allowed: str) -> None:
        raise UserError(f"{fields.where}: {key}={shown(raw[key])} is not supported; {allowed}")

    if raw.get("quantization_config"):
        refuse("quantization_config", "export the model unquantised (f32, bf16 or f16)")
    for key, allowed in _SWITCHES.items():
        if fields.flag(key, False):
            refuse(key, allowed)
    if set(fields.texts("layer_types", ())) - {"full_attention"}:
        refuse("layer_types", "only full_attention")
    if fields.text("hidden_act", "silu") != "silu":
        refuse("hidden_act", "only silu can be computed")
    if fields.number("partial_rotary_factor", default=1.0) != 1:
        refuse("partial_rotary_factor", "only 1 can be computed")


def _rope_from_hf(fields: Fields) -> tuple[float, RopeScaling | None]:
    """theta and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    name = "rope_scaling" if fields.raw.get("rope_scaling") else "rope_parameters"
    rope = fields.fields(name) if fields.raw.get(name) else Fields({}, fields.where)
    theta = fields.positive("rope_theta", DEFAULT_ROPE_THETA)
    theta = rope.positive("rope_theta", theta)
    kind = rope.text("rope_type", rope.text("type", "default"))
    if (part := rope.number("partial_rotary_factor", default=1.0)) != 1:
        raise UserError(
            f"{rope.where}: partial_rotary_factor={part} is not supported; only 1 can be computed"
        )
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(
            f"{rope.where}: RoPE scaling {shown(kind)} is not supported; use a model with default or llama3"
        )
    missing = [key for key in LLAMA3_KEYS if rope.raw.get(key) is None]
    if missing:
        raise UserError(
            f"{rope.where}: RoPE scaling llama3 lacks {', '.join(missing)}; complete the config"
        )
    factor, low, high, original = (rope.number(key) for key in LLAMA3_KEYS)
    if not (factor > 0 and 0 < low < high and 1 <= original <= MOST_SIZE):
        values = ", ".join(f"{key}={shown(rope.raw[key])}" for key in LLAMA3_KEYS)
        raise UserError(
            f"{rope.where}: RoPE scaling llama3 with {values} is impossible; positive values with "
            "low_freq_factor below high_freq_factor are expected, so correct the config"
        )
    return theta, RopeScaling(factor, low, high, int(original))


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of `config`; both the keys of transformers 5 and those of 4 and vLLM.

    Args:
        dtype: name of the weights' dtype, such as "float32".
    """
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        s = config.rope_scaling
        values = (s.factor, s.low_freq_factor, s.high_freq_factor, s.original_max_position)
        rope = {"rope_type": "llama3", **dict(zip(LLAMA3_KEYS, values, strict=True))}
    architecture = next(name for name, family in ARCHITECTURES.items() if family == config.family)
    eos = config.eos_token_ids
    family_keys = (
        {"attention_bias": False, "mlp_bias": False}
        if config.family == "llama"
        else {"use_sliding_window": False}
    )
    return {
        "architectures": [architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.ffw_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_context,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling else None,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
        **family_keys,
    }
