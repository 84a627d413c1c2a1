"""Targets and drafts from paths, for command lines."""

from __future__ import annotations

from s2d_jax.config import UserError
from s2d_jax.pretrained import Model, load_model
from s2d_jax.tokenizer import Tokenizer


def load_target(path: str, weight_format: str) -> Model:
    """A model with a tokenizer. Raises UserError if it has none."""
    model = load_model(path, weight_format=weight_format)
    tokenizer_of(model)
    return model


def tokenizer_of(model: Model) -> Tokenizer:
    """The model's tokenizer. Raises UserError if it has none."""
    if model.tokenizer is None:
        raise UserError(f"{model.source} has no tokenizer; add its tokenizer.json to the directory")
    return model.tokenizer
