"""Configurations hold plain Python values, whatever kind of number or sequence they were given."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from s2d_jax.config.costs import RoundCosts
from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.draft import DraftConfig, ExitParts
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.config.tree import TreeShape
from s2d_jax.errors import UserError

SAME = {
    "sampling": (
        SamplingParams(
            temperature=np.float32(0.7),
            top_k=np.int64(5),
            top_p=jnp.float32(0.9),
            min_p=np.array(0.1),
            seed=np.uint8(3),
            stop_token_ids=np.array([2, 7]),
            ignore_eos=np.bool_(True),
            stop=["a", np.str_("b")],
        ),
        SamplingParams(0.7, 5, 0.9, 0.1, seed=3, stop_token_ids=(2, 7), ignore_eos=True, stop=("a", "b")),
    ),
    "one where a tuple is expected": (
        SamplingParams(temperature=1, stop_token_ids=np.int32(2), stop="END"),
        SamplingParams(temperature=1.0, stop_token_ids=(2,), stop=("END",)),
    ),
    "decode": (
        DecodeConfig(exits=[6, 9], exit_thresholds=np.array([0.3, 0.0], np.float16)),
        DecodeConfig(exits=(6, 9), exit_thresholds=(0.3, 0.0)),
    ),
    "decode by path": (
        DecodeConfig(policy="auto", policy_file=Path("a/b")),
        DecodeConfig(policy="auto", policy_file="a/b"),
    ),
    "draft": (
        DraftConfig(np.arange(1, 4), parts=ExitParts(jnp.array([2]))),
        DraftConfig((1, 2, 3), (0.5, 0.5, 0.0), ExitParts((2,))),
    ),
    "tree": (TreeShape(np.int32(3), np.int32(2), 6), TreeShape(3, 2, 6)),
    "static tree": (TreeShape.static(np.array([[0, 1], [1, 0]])), TreeShape.static([(0, 1), (1, 0)])),
    "costs": (
        RoundCosts([1, 2], np.ones(3), acceptance=np.ones((2, 2))),
        RoundCosts((1.0, 2.0), (1.0, 1.0, 1.0), acceptance=((1.0, 1.0), (1.0, 1.0))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAME)
def test_numbers_of_numpy_and_jax_are_those_of_python(kind):
    given, plain = SAME[kind]
    assert given == plain
    assert hash(given) == hash(plain)
    assert repr(given) == repr(plain)
    assert json.dumps(dataclasses.asdict(given)) == json.dumps(dataclasses.asdict(plain))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SamplingParams(temperature="hot"), "temperature='hot' must be a finite number"),
        (lambda: SamplingParams(temperature=float("nan")), "temperature=nan must be a finite"),
        (lambda: SamplingParams(top_p=np.float32("inf")), "top_p=.*inf.* must be a finite number"),
        (lambda: SamplingParams(top_k=1.5), "top_k=1.5 must be a whole number, such as 1"),
        (lambda: SamplingParams(max_new_tokens=True), "max_new_tokens=True must be a whole number"),
        (lambda: SamplingParams(seed=np.array([1, 2])), r"seed=array\(\[1, 2\]\) must be a whole"),
        (lambda: SamplingParams(ignore_eos=1), "ignore_eos=1 must be True or False$"),
        (
            lambda: SamplingParams(stop_token_ids="ab"),
            r"'ab' must be whole numbers, such as \(1,\)",
        ),
        (lambda: SamplingParams(stop=3), r"stop=3 must be texts, such as \('text',\)"),
        (lambda: SamplingParams(stop=["a", b"b"]), r"stop=\['a', b'b'\] must be texts"),
        (lambda: DecodeConfig(exits=6.0), "exits=6.0 must be whole numbers.*, or None"),
        (lambda: DecodeConfig(tree=3), r"tree=3 must be a TreeShape\(...\), or None"),
        (lambda: DecodeConfig(draft_sampling=2), "=2 must be one of 'sample', 'argmax'"),
        (lambda: DraftConfig(None), "exit_layers=None must be whole numbers"),
        (lambda: TreeShape.static([(0.5,)]), "paths=.* must be a sequence of sequences of numbers"),
    ],
)
def test_other_values_are_refused_in_one_line(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
