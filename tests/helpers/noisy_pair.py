"""A tiny target, and a draft of it that is often right and sometimes wrong."""

from __future__ import annotations

import dataclasses

import jax
from tiny import noisy_draft, tiny_model, tiny_params, tiny_tokenizer

from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.draft import DraftConfig
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.weights.model import Draft, Model

PROMPTS = [[5, 9, 2], [7, 7, 1, 3, 30, 12, 50], [33, 4, 21, 60, 2], [1]]
GREEDY = SamplingParams(max_new_tokens=30)
EXITS = (1, 2)


def make_target() -> Model:
    return tiny_model(num_layers=2, spread=14.0)


def make_draft(target: Model) -> Draft:
    """The target with noise: often right, sometimes wrong."""
    return noisy_draft(target, EXITS, (0.4, 0.0))


def make_talking_decoder() -> SpeculativeDecoder:
    """A target of 300 tokens with a tokenizer, and the target with noise as its draft; chains of 3."""
    target = tiny_model(300, 2, spread=14.0)
    target = dataclasses.replace(target, tokenizer=tiny_tokenizer(300))
    noise = tiny_params(target.config, seed=9)
    params = jax.tree.map(lambda x, n: x + n if x.ndim == 2 else x, target.params, noise)
    draft = Draft(target.config, params, target.tokenizer, "noisy", DraftConfig(EXITS))
    return SpeculativeDecoder(target, draft, DecodeConfig(num_draft_tokens=3))
