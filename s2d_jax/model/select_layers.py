"""A model made of some layers of another model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from s2d_jax.config.model import ModelConfig
from s2d_jax.errors import UserError
from s2d_jax.model.params import Params


def check_layers(layers: Sequence[int], num_layers: int) -> None:
    """Raises UserError unless `layers` lists some of the layers 0 .. num_layers - 1 of a model, in any order."""
    wrong = [i for i in layers if not 0 <= i < num_layers]
    if wrong or not layers:
        what = f"layer {wrong[0]} is not in the model" if wrong else "there are no layers"
        raise UserError(f"layers={tuple(layers)}: {what}; list some of 0 to {num_layers - 1}")
    if len(set(layers)) < len(layers):
        raise UserError(f"layers={tuple(layers)} repeats a layer; list each at most once")


def selected(
    config: ModelConfig, params: Params, layers: Sequence[int]
) -> tuple[ModelConfig, Params]:
    """The model of some layers, in the order given, with the same embedding, final norm and head.

    Args:
        config, params: the model's; everything beside its layers is kept as it is.
        layers: numbers from 0.

    Raises:
        UserError: for no layers, repeated ones, or layers that the model does not have.
    """
    check_layers(layers, config.num_layers)
    of_layers = {f"layers_{i}" for i in range(config.num_layers)}
    kept = {name: value for name, value in params.items() if name not in of_layers}
    kept |= {f"layers_{new}": params[f"layers_{old}"] for new, old in enumerate(layers)}
    return dataclasses.replace(config, num_layers=len(layers)), kept


def truncated(config: ModelConfig, params: Params, num_layers: int) -> tuple[ModelConfig, Params]:
    """The model of the first `num_layers` layers, with the same embedding, final norm and head.

    Raises:
        UserError: if the model has fewer layers.
    """
    if not 1 <= num_layers <= config.num_layers:
        raise UserError(
            f"num_layers={num_layers} must be between 1 and the model's {config.num_layers} layers"
        )
    return selected(config, params, range(num_layers))
