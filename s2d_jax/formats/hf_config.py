"""Model shapes as Hugging Face's `config.json` states them, read and written.

An option that this library cannot compute is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from s2d_jax.config.model import ModelConfig, RopeScaling
from s2d_jax.errors import UserError
from s2d_jax.formats.eos_ids import _ids

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}

# What transformers assumes when a config.json leaves a key out.
_HF_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
# Options of the two families that change the arithmetic: key, whether its value switches it on, what is allowed.
_HF_UNSUPPORTED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("quantization_config", bool, "export the model unquantised (f32, bf16 or f16)"),
    ("attention_bias", bool, "only false can be computed (Qwen2's q/k/v bias needs no key)"),
    ("mlp_bias", bool, "only false can be computed"),
    ("use_sliding_window", bool, "only false can be computed"),
    (
        "layer_types",
        lambda kinds: bool(set(kinds or ()) - {"full_attention"}),
        "only full_attention",
    ),
    ("hidden_act", lambda name: name not in (None, "silu"), "only silu can be computed"),
    ("partial_rotary_factor", lambda part: part not in (None, 1, 1.0), "only 1 can be computed"),
)
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _integer(raw: Mapping[str, Any], key: str, default: Any = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"config.json: {key}={value!r} must be an integer; complete the config")
    return value


def _number(raw: Mapping[str, Any], key: str) -> float:
    value = raw[key]
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(f"config.json: {key}={value!r} must be a number; correct the config")
    return float(value)


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """A `config.json`, parsed, of transformers 4 or 5.

    Raises:
        UserError: for another architecture, an option that changes the arithmetic, or a missing key.
    """
    architecture = str((raw.get("architectures") or [raw.get("model_type")])[0])
    by_type = {family: family for family in ARCHITECTURES.values()}
    family = (ARCHITECTURES | by_type).get(architecture)
    if family is None:
        raise UserError(
            f"architecture {architecture!r} is not supported; use one of {', '.join(ARCHITECTURES)}"
        )
    for key, is_on, allowed in _HF_UNSUPPORTED:
        if is_on(raw.get(key)):
            raise UserError(f"config.json: {key}={raw[key]!r} is not supported; {allowed}")
    num_heads = _integer(raw, "num_attention_heads")
    embed_dim = _integer(raw, "hidden_size")
    filled = {**_HF_DEFAULTS, **{key: value for key, value in raw.items() if value is not None}}
    theta, scaling = _rope_from_hf(filled)
    return ModelConfig(
        family=family,
        vocab_size=_integer(raw, "vocab_size"),
        embed_dim=embed_dim,
        ffw_dim=_integer(raw, "intermediate_size"),
        num_layers=_integer(raw, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_integer(raw, "num_key_value_heads", num_heads),
        head_dim=_integer(raw, "head_dim", embed_dim // max(num_heads, 1)),
        norm_eps=_number(filled, "rms_norm_eps"),
        rope_theta=theta,
        max_context=_integer(filled, "max_position_embeddings"),
        rope_scaling=scaling,
        qkv_bias=family == "qwen2",
        tie_embeddings=bool(filled["tie_word_embeddings"]),
        bos_token_id=next(iter(_ids(raw.get("bos_token_id"))), None),
        eos_token_ids=_ids(raw.get("eos_token_id")),
    )


def _rope_from_hf(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """theta and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"config.json: rope_scaling={rope!r} must be an object; correct the config")
    theta = _number({"rope_theta": raw["rope_theta"], **rope}, "rope_theta")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(
            f"config.json: partial_rotary_factor={rope['partial_rotary_factor']} is not supported; only 1 can be computed"
        )
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(
            f"RoPE scaling {kind!r} is not supported; use a model with default or llama3"
        )
    missing = [key for key in LLAMA3_KEYS if key not in rope]
    if missing:
        raise UserError(
            f"config.json: RoPE scaling llama3 lacks {', '.join(missing)}; complete the config"
        )
    factor, low, high, original = (_number(rope, key) for key in LLAMA3_KEYS)
    if not (factor > 0 and 0 < low < high and original >= 1):
        values = ", ".join(f"{key}={rope[key]!r}" for key in LLAMA3_KEYS)
        raise UserError(
            f"config.json: RoPE scaling llama3 with {values} is impossible; positive values with "
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
