"""LoRA adapters in the files of Hugging Face PEFT."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from s2d_jax.config.model import MOST_SIZE, ModelConfig
from s2d_jax.errors import UserError, shown
from s2d_jax.fields import Fields
from s2d_jax.files import read_json, write_text, written_whole
from s2d_jax.formats.hub import PEFT_CONFIG, PEFT_WEIGHTS
from s2d_jax.formats.names import WeightName
from s2d_jax.formats.safetensors import SafetensorsFiles, save_safetensors
from s2d_jax.model.lora import FACTORS, LoraConfig, _adapted, _modules, add_factors
from s2d_jax.model.params import Params, abstract_params

# Options of PEFT's LoraConfig that change the arithmetic, and what can be computed.
_PEFT_REQUIRED: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "lora_bias": False,
}
_PEFT_UNSUPPORTED = (
    "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication",
    "target_parameters", "alora_invocation_tokens", "trainable_token_indices",
    "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
# How the factors began, where the base kept its own weights. The others (pissa, olora, corda, loftq, lora_ga) take what the
# factors begin with out of the base, so that the factors alone fit no base that is on a disk.
_PEFT_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")
_PEFT_FACTORS = ("lora_A", "lora_B")


def _peft_names(name: WeightName) -> tuple[str, str]:
    """What PEFT calls the factors beside a kernel.

    Source: `get_peft_model_state_dict` in peft/utils/save_and_load.py, which leaves the adapter's name out.
    """
    module = name.hf.removesuffix(".weight")
    a, b = (f"base_model.model.{module}.{factor}.weight" for factor in _PEFT_FACTORS)
    return a, b


def save_peft(
    directory: Path, config: ModelConfig, params: Params, lora: LoraConfig, base: str
) -> None:
    """Writes the adapters in `params` as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

    PEFT applies them to a model whose first layers are the draft's.

    Args:
        directory: exists.
        config: the draft's shape.
        params: with adapters, f32, f16 or bf16.
        lora: their rank and targets.
        base: the model that PEFT will apply them to.
    """
    described = {
        **_PEFT_REQUIRED,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.rank,
        "lora_dropout": 0.0,
        "target_modules": list(lora.targets),
        "layers_to_transform": list(range(config.num_layers)),
        "inference_mode": True,
    }
    tensors = {}
    for name, module in _adapted(params):
        tensors |= dict(zip(_peft_names(name), (module[f] for f in FACTORS), strict=True))
    with written_whole(directory / PEFT_WEIGHTS) as partial:
        save_safetensors(partial, tensors)
    write_text(directory / PEFT_CONFIG, json.dumps(described, indent=2) + "\n")


def load_peft(directory: str | Path, config: ModelConfig, params: Params) -> Params:
    """`params` with the LoRA that PEFT saved in `directory`, beside the kernels it belongs to.

    Raises:
        UserError: as `read_peft`.
    """
    return add_factors(params, read_peft(Path(directory), config))


def read_peft(
    directory: Path, config: ModelConfig
) -> dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]]:
    """The LoRA that PEFT saved in `directory`: path of a kernel -> (`lora_a`, `lora_b` times PEFT's scale), f32.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors.
        config: the shape of the model that it is for.

    Raises:
        UserError: for missing files, another kind of adapter, or tensors that the model has no place for.
    """
    for name in (PEFT_CONFIG, PEFT_WEIGHTS):
        if not (directory / name).exists():
            raise UserError(
                f"{directory} has no {name}; give a directory that PEFT saved a LoRA in"
            )
    raw = read_json(directory / PEFT_CONFIG)
    rank, scale = peft_scale(raw, directory / PEFT_CONFIG)
    source = SafetensorsFiles([directory / PEFT_WEIGHTS])
    factors, known = {}, set()
    shapes = abstract_params(config)
    for name, module in _modules(shapes):
        a_name, b_name = _peft_names(name)
        out_dim, in_dim = module["kernel"].shape
        found = source.shapes.get(a_name), source.shapes.get(b_name)
        if found == (None, None):
            continue
        if found != ((rank, in_dim), (out_dim, rank)):
            raise UserError(
                f"{directory / PEFT_WEIGHTS}: {a_name} and lora_B have shapes {found}, the model asks for "
                f"{(rank, in_dim)} and {(out_dim, rank)}; give the LoRA of this model"
            )
        a_RI, b_OR = (source.read(n).astype(np.float32) for n in (a_name, b_name))
        factors[name.ours] = (a_RI, b_OR * np.float32(scale))
        known |= {a_name, b_name}
    if strange := sorted(set(source.shapes) - known):
        raise UserError(
            f"{directory / PEFT_WEIGHTS} holds {len(strange)} tensors that the model has no place for, the first is "
            f"{strange[0]}; give a LoRA on projections of this model"
        )
    return factors


def peft_scale(raw: Any, file: Path) -> tuple[int, float]:
    """Rank, and what PEFT multiplies `lora_b @ lora_a` by."""
    fields = Fields(raw, file, "give a LoRA that PEFT saved")
    for key, wanted in _PEFT_REQUIRED.items():
        if (value := raw.get(key, wanted)) != wanted:
            raise UserError(f"{file}: {key}={shown(value)} is not supported; only {wanted!r}")
    for key in _PEFT_UNSUPPORTED:
        if raw.get(key):
            raise UserError(f"{file}: {key}={shown(raw[key])} is not supported; train without it")
    begun = raw.get("init_lora_weights")
    if not any(begun is plain or begun == plain for plain in _PEFT_PLAIN_BEGINNINGS):
        raise UserError(
            f"{file}: init_lora_weights={shown(begun)} is not supported, because it changes the base; save the adapter as a "
            "plain LoRA: save_pretrained(DIR, path_initial_model_for_weight_conversion=INITIAL)"
        )
    rank, alpha = fields.integer("r", 1, MOST_SIZE), fields.number("lora_alpha")
    return rank, alpha / (math.sqrt(rank) if fields.flag("use_rslora", False) else rank)
