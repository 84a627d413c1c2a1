"""Heads and residual adapters of single exits: their initial values, and an exit as a plain model."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from s2d_jax.config.draft import ExitParts
from s2d_jax.config.model import ModelConfig
from s2d_jax.errors import UserError
from s2d_jax.formats.names import (
    EXIT_HEADS,
    FINAL_NORM,
    LM_HEAD,
    get_weight,
    part_names,
    set_weight,
    shared_head,
)
from s2d_jax.model.params import Params, logical_axes
from s2d_jax.model.select_layers import truncated
from s2d_jax.sharding import mesh_of, params_sharding

_ADAPTER_SPREAD = 0.02


def init_exit_parts(
    config: ModelConfig, params: Params, parts: ExitParts, key: Key[Array, ""]
) -> Params:
    """`params` with heads and adapters that change no logits yet.

    A head begins as a copy of the shared one. An adapter begins with `down` normal(0, 0.02) and `up` zero, so that its residual
    is zero and `up` learns from the first step (as LoRA's second factor does).

    Args:
        config: the draft's shape.
        params: the draft's arrays; the parts get their dtype, and their mesh if they lie on one.
        parts: which exits get what.
        key: for the adapters' random numbers.
    """
    head_VD = get_weight(params, shared_head(config))
    dtype = get_weight(params, FINAL_NORM).dtype
    added: Params = {}
    for name in part_names(parts):
        module, *path = name.ours
        if module.startswith(EXIT_HEADS):
            value: Any = jax.tree.map(jnp.copy, head_VD)
        elif path[0] == "down":
            key, own_key = jax.random.split(key)
            shape = (parts.adapter_rank, config.embed_dim)
            value = _ADAPTER_SPREAD * jax.random.normal(own_key, shape, jnp.float32)
            value = value.astype(dtype)
        else:
            value = jnp.zeros((config.embed_dim, parts.adapter_rank), dtype)
        set_weight(added, name, value)
    if (mesh := mesh_of(params)) is not None:
        shardings = params_sharding(config, logical_axes(config, parts), mesh)
        added = jax.device_put(added, {name: shardings[name] for name in added})
    return {**params, **added}


def exit_model(
    config: ModelConfig, params: Params, parts: ExitParts, exit_layer: int
) -> tuple[ModelConfig, Params]:
    """An exit as a plain model: the layers up to it, the final norm, and the head that it reads (untied if it is its own).

    Raises:
        UserError: for an exit with an adapter, which no plain model has.
    """
    if exit_layer in parts.adapters:
        raise UserError(
            f"exit {exit_layer} has a residual adapter, which no plain model has; take an exit without one"
        )
    config, params = truncated(config, params, exit_layer)
    if exit_layer in parts.heads:
        config = dataclasses.replace(config, tie_embeddings=False)
        own_head = params[f"{EXIT_HEADS}_{exit_layer}"]
        params = {**params, LM_HEAD.ours[0]: own_head}
    return config, params
