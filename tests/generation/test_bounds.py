"""Values that no decoder can have: refused in a line, before anything is made. And 64 bits, which change nothing."""

from __future__ import annotations

import dataclasses
import time

import jax
import noisy_pair
import numpy as np
import pytest
from noisy_pair import EXITS, GREEDY, PROMPTS

import s2d_jax.generation.room
from s2d_jax import load_draft, load_model
from s2d_jax.calibration.choose import Effort
from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.config.tree import TreeShape
from s2d_jax.decode import programs
from s2d_jax.errors import UserError
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.sharding import MeshConfig, make_mesh
from s2d_jax.weights.model import Draft, Model

CHAIN = DecodeConfig(EXITS, num_draft_tokens=3)


@pytest.fixture(scope="module")
def target() -> Model:
    return noisy_pair.make_target()


@pytest.fixture(scope="module")
def draft(target) -> Draft:
    return noisy_pair.make_draft(target)


def refused(make) -> str:
    """The line with which `make` is refused, before it can take long."""
    started = time.perf_counter()
    with pytest.raises(UserError) as error:
        make()
    assert (
        time.perf_counter() - started < 10
    )  # it takes milliseconds; what is made takes minutes, or all memory
    line = str(error.value)
    assert line.isprintable()
    assert len(line) < 300
    return line


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_draft_tokens": 100_000}, "num_draft_tokens=100000 is more than a round can draft"),
        ({"num_draft_tokens": 99_999_999_999}, "is more than a round can draft"),
        ({"max_draft_tokens": 10**6}, "max_draft_tokens=1000000 is more than"),
        ({"num_draft_tokens": float("inf")}, "must be a whole number"),
        ({"gain_rate": float("nan")}, "must be a finite number"),
    ],
)
def test_drafts_of_impossible_length(fields, said):
    assert said in refused(lambda: DecodeConfig(**fields))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"depth": 1000, "nodes": 2000}, "depth=1000 of a tree must be 1 to 128"),
        ({"nodes": 100_000, "top_k": 200}, "nodes=100000 of a tree must be at most 4096"),
        ({"top_k": 10**12}, "top_k=1000000000000 of a tree must be 1 to 4096"),
        ({"depth": 0}, "depth=0 of a tree must be 1 to 128"),
    ],
)
def test_trees_of_impossible_size(fields, said):
    assert said in refused(lambda: TreeShape(**fields))


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        ([[0] * 10_000], "a path of the tree has 10000 ranks; give at most 128"),
        ([[10**12]], "of a tree must be 1 to 4096"),
        ([[i] for i in range(5000)], "of a tree must be 1 to 4096"),
    ],
    ids=["long", "high", "many"],
)
def test_static_trees_of_impossible_size(paths, said):
    assert said in refused(lambda: TreeShape.static(paths))


def test_a_round_fits_the_targets_context(target, draft):
    short = dataclasses.replace(target, config=dataclasses.replace(target.config, max_context=8))
    for config, words in (
        (DecodeConfig(EXITS, num_draft_tokens=8), "a round has 9 positions"),
        (DecodeConfig(EXITS, tree=TreeShape(depth=3, top_k=3, nodes=12)), "the tree has 12"),
    ):
        line = refused(lambda config=config: SpeculativeDecoder(short, draft, config))
        assert words in line
        assert "context of 8" in line
    assert "a round has 9" in refused(
        lambda: SpeculativeDecoder(short, None, DecodeConfig(verify_width=9))
    )


@pytest.mark.parametrize("config", [CHAIN, DecodeConfig(EXITS, tree=TreeShape())])
def test_what_cannot_fit_into_memory_is_refused_before_it_is_made(
    target, draft, config, monkeypatch
):
    monkeypatch.setattr(s2d_jax.generation.room, "memory_of_a_device", lambda: 10**6)
    decoder = SpeculativeDecoder(target, draft, config)
    line = refused(lambda: decoder.generate([[1, 2, 3]] * 1000))
    assert "1000 prompts of up to 3 tokens need" in line
    assert "there are 0 GB; give fewer at once" in line


@pytest.mark.parametrize("load", [load_model, load_draft])
@pytest.mark.parametrize("path", [None, 5, b"model", ["a"], np.zeros(3)])
def test_only_paths_are_loaded(load, path):
    assert "is no model; give a Hugging Face directory" in refused(lambda: load(path))


@pytest.mark.parametrize("load", [load_model, load_draft])
def test_a_mesh_is_a_mesh(load, tmp_path):
    assert "is no mesh; give make_mesh" in refused(lambda: load(tmp_path, mesh=8))
    other = jax.make_mesh((1,), ("x",))
    assert "the axes x, without data" in refused(lambda: load(tmp_path, mesh=other))


def test_names_with_nul_and_homes_of_nobody_are_no_paths():
    assert r"a\x00b does not exist" in refused(lambda: load_model("a\0b"))
    line = refused(lambda: load_model("~nobody-of-this-name/x.gguf"))
    assert "~nobody-of-this-name/x.gguf does not exist" in line


@pytest.mark.parametrize("fields", [{"data": 10**6}, {"fsdp": 300, "tensor": 300}, {"data": 1.5}])
def test_meshes_of_impossible_size(fields):
    assert "mesh" in refused(lambda: make_mesh(MeshConfig(**fields)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"minutes": float("nan")}, "minutes=nan must be a finite number"),
        ({"minutes": 0}, "minutes=0.0 must be above 0"),
        ({"new_tokens": 1}, "new_tokens=1 must be at least 2"),
        ({"temperatures": ()}, "is empty"),
        ({"temperatures": (-1,)}, "temperature=-1.0 must be 0 or more"),
    ],
)
def test_impossible_calibrations(fields, said):
    assert said in refused(lambda: Effort(**fields))


def test_a_calibration_fits_the_targets_context():
    effort = Effort((0.0, 1e-300), new_tokens=100_000)
    assert effort.temperatures == (0.0,)
    assert "exceed the target's context of 512" in refused(
        lambda: effort.check_prompts([[1, 2]], 512)
    )
    assert "no prompts" in refused(lambda: effort.check_prompts([], 512))


@pytest.mark.exhaustive("compiles two programs for a bound that seldom changes")
def test_the_smallest_temperatures_are_greedy_in_chains_and_trees(target, draft):
    """And small ones that are not greedy emit the same, through all the arithmetic of sampling."""
    for config in (CHAIN, DecodeConfig(EXITS, tree=TreeShape(depth=2, top_k=2, nodes=5))):
        decoder = SpeculativeDecoder(target, draft, config)
        expected = decoder.generate(PROMPTS, GREEDY).token_ids
        for temperature in (1e-45, 1e-30):
            sampling = dataclasses.replace(GREEDY, temperature=temperature)
            assert decoder.generate(PROMPTS, sampling).token_ids == expected


def test_64_bits_change_nothing(target, draft, monkeypatch):
    decoder = SpeculativeDecoder(target, draft, CHAIN)
    hot = SamplingParams(temperature=1.0, seed=2**40, max_new_tokens=10)
    expected = [decoder.generate(PROMPTS, sampling).token_ids for sampling in (GREEDY, hot)]
    logits, score = target.logits([1, 2, 3]), target.score([[1, 2, 3]])[0].total
    jax.clear_caches()
    monkeypatch.setattr(programs, "_CACHE", {})
    with jax.enable_x64(True):
        decoder = SpeculativeDecoder(noisy_pair.make_target(), draft, CHAIN)
        assert [decoder.generate(PROMPTS, s).token_ids for s in (GREEDY, hot)] == expected
        assert target.logits([1, 2, 3]).dtype == np.float32
        np.testing.assert_array_equal(target.logits([1, 2, 3]), logits)
        assert target.score([[1, 2, 3]])[0].total == score
