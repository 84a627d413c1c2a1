"""Configurations refuse bad values with the value and the remedy."""

from __future__ import annotations

import pytest

from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.draft import DraftConfig
from s2d_jax.errors import UserError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DraftConfig((9, 6)), r"exit_layers=\(9, 6\) must be ascending positive"),
        (lambda: DraftConfig(()), r"exit_layers=\(\) must be ascending positive"),
        (
            lambda: DraftConfig((6, 12), (0.5,)),
            r"has 1 values for 2 exits \(6, 12\); give one per exit",
        ),
        (lambda: DraftConfig((6, 12), (1.5, 0.0)), r"must lie in \[0, 1\]: they are probabilities"),
        (
            lambda: DraftConfig((6, 12), (0.5, 0.5)),
            r"the last exit always accepts; set its threshold to 0",
        ),
        (
            lambda: DraftConfig((6, 14)).check_depth(12),
            r"exceeds num_layers=12; drop the deepest exit",
        ),
        (lambda: DecodeConfig(num_draft_tokens=0), r"num_draft_tokens=0 must be at least 1"),
        (lambda: DecodeConfig(max_draft_tokens=0), r"max_draft_tokens=0 must be at least 1"),
        (
            lambda: DecodeConfig(draft_length_rule="x"),
            r"draft_length_rule='x' is unknown; use one of fixed",
        ),
        (
            lambda: DecodeConfig(draft_sampling="x"),
            r"draft_sampling='x' is unknown; use sample or argmax",
        ),
        (
            lambda: DecodeConfig(num_draft_tokens=11, draft_length_rule="heuristic"),
            r"num_draft_tokens=11 exceeds max_draft_tokens=10; raise the cap",
        ),
        (lambda: DecodeConfig(exits=(6,), exit_thresholds=(0.5,)), r"the last exit always accepts"),
    ],
)
def test_bad_values_die_at_construction(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_default_thresholds():
    assert DraftConfig((6, 9, 12)).exit_thresholds == (0.5, 0.5, 0.0)
