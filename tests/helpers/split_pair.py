"""A tiny target and a noisy draft of it, and the target split over a mesh."""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import Mesh
from tiny import tiny_config, tiny_params, with_noise

from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.draft import DraftConfig
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.model.params import logical_axes
from s2d_jax.sharding import params_sharding
from s2d_jax.weights.model import Draft, Model


def tiny_target() -> Model:
    """Its heads divide over eight devices."""
    config = tiny_config(num_layers=2, num_heads=8, num_kv_heads=8, ffw_dim=64)
    return Model(config, tiny_params(config, spread=14.0), None, "tiny")


def noisy_draft(target: Model) -> Draft:
    """The target with noise, with exits at both layers."""
    noisy = with_noise(target.params, 0.04, seed=4)
    return Draft(target.config, noisy, None, "noisy", DraftConfig((1, 2), (0.6, 0.0)))


def split(model: Model, mesh: Mesh) -> Model:
    """The model with its parameters on the mesh."""
    shardings = params_sharding(model.config, logical_axes(model.config), mesh)
    return dataclasses.replace(model, params=jax.device_put(model.params, shardings))


def check_next_turn(target: Model, draft: Draft, mesh: Mesh, prompts: list[list[int]]) -> None:
    """A conversation on the mesh whose caches grow has the tokens of one device in both turns, and reads only what is new."""
    config = DecodeConfig(initial_room=8)
    decoder = SpeculativeDecoder(split(target, mesh), draft, config)
    conversation, sampling = decoder.conversation(), SamplingParams(max_new_tokens=60)
    rows = len(prompts) + -len(prompts) % mesh.shape["data"]
    # 156 positions are needed.
    assert decoder.prepare(prompts, sampling)[2][2].shape == (rows, 128)
    first = conversation.generate(prompts, sampling)
    later = [[*p, *ids, 3] for p, ids in zip(prompts, first.token_ids, strict=True)]
    second = conversation.generate(later, sampling)
    one = SpeculativeDecoder(target, draft, config)
    assert first.token_ids == one.generate(prompts, sampling).token_ids
    assert second.token_ids == one.generate(later, sampling).token_ids
    assert [row.prefilled_tokens for row in second.row_stats] == [2] * len(prompts)
