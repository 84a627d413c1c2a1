"""A tiny target and a noisy draft of it, and the target split over a mesh."""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import Mesh
from tiny import tiny_config, tiny_params, with_noise

from s2d_jax.config.draft import DraftConfig
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
