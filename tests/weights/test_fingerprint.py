"""Fingerprints outlive new fields of the config, and those of version 0.1 are known again."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from s2d_jax.config.model import ModelConfig, RopeScaling
from s2d_jax.weights.fingerprint import Fingerprint

PLAIN = ModelConfig("llama", 64, 32, 48, 4, 4, 2, 8, 1e-5, 10_000.0, 256)
LONG = dataclasses.replace(
    PLAIN,
    family="qwen2",
    norm_eps=1e-6,
    rope_theta=1e6,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
    qkv_bias=True,
    tie_embeddings=True,
    bos_token_id=1,
    eos_token_ids=(2, 3),
)


@dataclasses.dataclass(frozen=True)
class _Later(ModelConfig):
    """A config with a field more."""

    soft_cap: float | None = None


def _print_of(config: ModelConfig) -> Fingerprint:
    found = Fingerprint(config)
    found.add("a", np.arange(6, dtype=np.float32).reshape(2, 3))
    return found


@pytest.mark.parametrize(
    ("config", "written"),
    [(PLAIN, "2883f1e7db5c8ba7"), (LONG, "a32db794db5c1e5f")],
    ids=["plain", "long"],
)
def test_what_version_01_wrote_is_known_again(config, written):
    found = _print_of(config)
    assert found.matches(written)
    assert found.matches(str(found))
    assert str(found) != written
    assert not _print_of(dataclasses.replace(config, rope_theta=5.0)).matches(written)


@pytest.mark.parametrize("config", [PLAIN, LONG], ids=["plain", "long"])
def test_a_field_that_comes_later_changes_nothing(config):
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    assert str(_print_of(_Later(**values))) == str(_print_of(config))
    used = _print_of(_Later(**values, soft_cap=30.0))
    assert str(used) != str(_print_of(config))
    first = _print_of(config)._first
    assert first is not None
    assert not used.matches(first.hexdigest()[:16])
