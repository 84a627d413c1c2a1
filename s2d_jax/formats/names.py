"""The one table of weight names: ours, Hugging Face's, GGUF's. Import and export both read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from s2d_jax.config.draft import ExitParts
from s2d_jax.config.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class WeightName:
    """One tensor under its three names; `{i}` stands for the layer."""

    ours: tuple[str, ...]
    hf: str
    gguf: str

    def at_layer(self, i: int, stored: int | None = None) -> WeightName:
        """The names in layer `i`, which has the number `stored` (None: the same) in files."""
        ours = tuple(part.format(i=i) for part in self.ours)
        stored = i if stored is None else stored
        return WeightName(ours, self.hf.format(i=stored), self.gguf.format(i=stored))


def _layer(ours: str, hf: str, gguf: str) -> WeightName:
    return WeightName(
        ("layers_{i}", *ours.split(".")), f"model.layers.{{i}}.{hf}", f"blk.{{i}}.{gguf}"
    )


EMBEDDING = WeightName(("embed", "embedding"), "model.embed_tokens.weight", "token_embd.weight")
FINAL_NORM = WeightName(("final_norm", "scale"), "model.norm.weight", "output_norm.weight")
LM_HEAD = WeightName(("lm_head", "kernel"), "lm_head.weight", "output.weight")
# The parts that belong to single exits: `exit_heads_6`, `exit_adapters_9`.
EXIT_HEADS, EXIT_ADAPTERS = "exit_heads", "exit_adapters"

LAYER = (
    _layer("attn_norm.scale", "input_layernorm.weight", "attn_norm.weight"),
    _layer("attn.q_proj.kernel", "self_attn.q_proj.weight", "attn_q.weight"),
    _layer("attn.k_proj.kernel", "self_attn.k_proj.weight", "attn_k.weight"),
    _layer("attn.v_proj.kernel", "self_attn.v_proj.weight", "attn_v.weight"),
    _layer("attn.o_proj.kernel", "self_attn.o_proj.weight", "attn_output.weight"),
    _layer("mlp_norm.scale", "post_attention_layernorm.weight", "ffn_norm.weight"),
    _layer("mlp.gate_proj.kernel", "mlp.gate_proj.weight", "ffn_gate.weight"),
    _layer("mlp.up_proj.kernel", "mlp.up_proj.weight", "ffn_up.weight"),
    _layer("mlp.down_proj.kernel", "mlp.down_proj.weight", "ffn_down.weight"),
)
QKV_BIAS = (
    _layer("attn.q_proj.bias", "self_attn.q_proj.bias", "attn_q.bias"),
    _layer("attn.k_proj.bias", "self_attn.k_proj.bias", "attn_k.bias"),
    _layer("attn.v_proj.bias", "self_attn.v_proj.bias", "attn_v.bias"),
)


# The projections of a block, by the names that Hugging Face and PEFT have for them: `q_proj`, ..., `down_proj`.
PROJECTIONS = {name.ours[-2]: name for name in LAYER if name.ours[-1] == "kernel"}


def weight_names(
    config: ModelConfig, layers: Sequence[int] | None = None
) -> tuple[WeightName, ...]:
    """Every tensor that a model of `config` consists of, in the order of the forward pass.

    Args:
        layers: the numbers that its layers have in the files of a larger model; None: the same as here.
    """
    per_layer = LAYER + (QKV_BIAS if config.qkv_bias else ())
    numbers = enumerate(range(config.num_layers) if layers is None else layers)
    blocks = [name.at_layer(i, stored) for i, stored in numbers for name in per_layer]
    head = () if config.tie_embeddings else (LM_HEAD,)
    return (EMBEDDING, *blocks, FINAL_NORM, *head)


def shared_head(config: ModelConfig) -> WeightName:
    """The head that all exits share: the embedding where it is tied."""
    return EMBEDDING if config.tie_embeddings else LM_HEAD


def part_names(parts: ExitParts) -> tuple[WeightName, ...]:
    """Every tensor of `parts`. No other program has names for them, so their Hugging Face and GGUF names are the same."""

    def name(kind: str, exit: int, *rest: str) -> WeightName:
        stored = ".".join((kind, str(exit), *rest, "weight"))
        return WeightName((f"{kind}_{exit}", *rest, "kernel"), stored, stored)

    heads = [name(EXIT_HEADS, exit) for exit in parts.heads]
    factors = [
        name(EXIT_ADAPTERS, exit, factor) for exit in parts.adapters for factor in ("down", "up")
    ]
    return (*heads, *factors)


def get_weight(params: Any, name: WeightName) -> Any:
    """The leaf of the nested dict `params` under `name.ours`."""
    for part in name.ours:
        params = params[part]
    return params


def set_weight(params: dict[str, Any], name: WeightName, value: Any) -> None:
    """Puts `value` into the nested dict `params` under `name.ours`, making the dicts on the way."""
    *parents, last = name.ours
    for part in parents:
        params = params.setdefault(part, {})
    params[last] = value
