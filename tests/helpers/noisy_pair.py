"""A tiny target, and a draft of it that is often right and sometimes wrong."""

from __future__ import annotations

import pytest
from tiny import noisy_draft, tiny_model

from s2d_jax.config.sampling import SamplingParams
from s2d_jax.weights.model import Draft, Model

PROMPTS = [[5, 9, 2], [7, 7, 1, 3, 30, 12, 50], [33, 4, 21, 60, 2], [1]]


GREEDY = SamplingParams(max_new_tokens=30)


EXITS = (1, 2)


@pytest.fixture(scope="module")
def target() -> Model:
    return tiny_model(num_layers=2, spread=14.0)


@pytest.fixture(scope="module")
def draft(target) -> Draft:
    """The target with noise: often right, sometimes wrong."""
    return noisy_draft(target, EXITS, (0.4, 0.0))
