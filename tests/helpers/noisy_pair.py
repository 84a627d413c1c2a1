"""A tiny target, and a draft of it that is often right and sometimes wrong."""

from __future__ import annotations

from tiny import noisy_draft, tiny_model

from s2d_jax.config.sampling import SamplingParams
from s2d_jax.weights.model import Draft, Model

PROMPTS = [[5, 9, 2], [7, 7, 1, 3, 30, 12, 50], [33, 4, 21, 60, 2], [1]]
GREEDY = SamplingParams(max_new_tokens=30)
EXITS = (1, 2)


def make_target() -> Model:
    return tiny_model(num_layers=2, spread=14.0)


def make_draft(target: Model) -> Draft:
    """The target with noise: often right, sometimes wrong."""
    return noisy_draft(target, EXITS, (0.4, 0.0))
