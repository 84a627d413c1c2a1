"""The forms of GPU and TPU compute what those of the CPU compute: run here on the CPU."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from noisy_pair import make_draft, make_target

from s2d_jax import backends
from s2d_jax.backends import CPU, GPU, TPU, compiling_for, forms, forms_of
from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.config.tree import TreeShape
from s2d_jax.decode import programs as compilation
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.model.kv_cache import keep_path, read_window, write_caches, write_window
from s2d_jax.sampling import SamplingArrays, probabilities, top_k

OTHERS = pytest.mark.parametrize("platform", ["gpu", "tpu"])


def _both(platform, function, *inputs):
    """What a function returns with the forms of `platform`, and with those of the CPU."""

    def traced(platform, *inputs):
        with compiling_for(platform):
            return function(*inputs)

    return [jax.jit(traced, static_argnums=0)(name, *inputs) for name in (platform, "cpu")]


def test_forms_are_those_of_the_backend_that_is_compiled_for():
    assert forms() is CPU
    assert forms_of("cuda") is forms_of("rocm") is GPU
    with compiling_for("tpu"):
        assert forms() is TPU
        with compiling_for("gpu"):
            assert forms() is GPU
        assert forms() is TPU
    assert forms() is CPU


@OTHERS
@pytest.mark.parametrize("batch", [1, 3, 17])
def test_writes(platform, batch):
    rng = np.random.default_rng(batch)
    buffer = rng.normal(size=(batch, 2, 9, 4)).astype(np.float32)
    window = rng.normal(size=(batch, 2, 3, 4)).astype(np.float32)
    start_B = np.array(rng.integers(0, 7, batch), np.int32)

    def write(buffer, window, start_B):
        both = write_caches((buffer, buffer * 2), (window, window * 2), start_B, axis=2)
        return write_window(buffer, window, start_B, axis=2), *both

    expected = buffer.copy()
    for row, start in enumerate(start_B):
        expected[row, :, start : start + 3] = window[row]
    for found in _both(platform, write, buffer, window, start_B):
        for array, right in zip(found, (expected, expected, expected * 2), strict=True):
            np.testing.assert_array_equal(array, right)


@OTHERS
@pytest.mark.parametrize("batch", [1, 3])
def test_a_path_is_kept(platform, batch):
    buffer = np.arange(batch * 10 * 2, dtype=np.float32).reshape(batch, 10, 2)
    start_B = np.arange(batch, dtype=np.int32)
    index_BY = np.tile(np.array([[0, 2, 5]], np.int32), (batch, 1))
    expected = buffer.copy()
    for row in range(batch):
        expected[row, row : row + 3] = buffer[row, row + index_BY[row]]

    def keep(buffer, start_B, index_BY):
        return keep_path(buffer, start_B, index_BY, 6, axis=1)

    for found in _both(platform, keep, buffer, start_B, index_BY):
        np.testing.assert_array_equal(found, expected)


@OTHERS
@pytest.mark.parametrize("batch", [1, 3])
def test_a_window_is_read(platform, batch):
    buffer = np.arange(batch * 2 * 7, dtype=np.float32).reshape(batch, 2, 7)
    start_B = np.array([4, 0, 2], np.int32)[:batch]
    expected = [buffer[row, :, start : start + 3] for row, start in enumerate(start_B)]

    def read(buffer, start_B):
        return read_window(buffer, start_B, 3, axis=2)

    for found in _both(platform, read, buffer, start_B):
        np.testing.assert_array_equal(found, expected)


@OTHERS
def test_filters_find_the_same_tokens(platform):
    rng = np.random.default_rng(5)
    logits_BTV = rng.normal(size=(6, 3, 300)).astype(np.float32) * 3
    logits_BTV[0, 0] = 0.0  # ties
    params = [
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=1.0, top_p=0.9),
        SamplingParams(temperature=1.3, top_k=40, top_p=0.5),
        SamplingParams(temperature=1.0, top_p=1e-6),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.0),
    ]
    arrays = SamplingArrays.stack(params)
    found, expected = _both(platform, probabilities, logits_BTV, arrays)
    np.testing.assert_array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@OTHERS
def test_nothing_is_filtered_where_no_row_asks(platform):
    logits_BTV = np.random.default_rng(6).normal(size=(2, 1, 50)).astype(np.float32)
    arrays = SamplingArrays.stack([SamplingParams(temperature=1.0)] * 2)
    found, _ = _both(platform, probabilities, logits_BTV, arrays)
    np.testing.assert_allclose(found, jax.nn.softmax(logits_BTV), rtol=1e-6)


@OTHERS
def test_the_best_entries(platform):
    x = np.random.default_rng(7).integers(0, 90, (3, 700)).astype(np.float32)  # many ties
    for found in _both(platform, lambda x: top_k(x, 4), x):
        expected = jax.lax.top_k(jnp.asarray(x), 4)
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])


WAYS = {
    "fixed": DecodeConfig(exits=(2,), num_draft_tokens=3),
    "s2d": DecodeConfig(num_draft_tokens=3),
    "tree": DecodeConfig(tree=TreeShape(depth=3, top_k=2, nodes=7)),
}


def _mixtures():
    always = {("gpu", "s2d", 1), ("tpu", "tree", 2)}
    rest = pytest.mark.exhaustive("each way, batch and platform is in the others")
    return [
        pytest.param(*mixture, marks=() if mixture in always else rest)
        for mixture in itertools.product(("gpu", "tpu"), WAYS, (1, 2))
    ]


@pytest.mark.parametrize(("platform", "way", "batch"), _mixtures())
def test_greedy_tokens_are_those_of_the_cpu_forms(monkeypatch, platform, way, batch):
    target = make_target()
    draft = make_draft(target)
    prompts, sampling = [[5, 9, 2], [7, 1, 3, 30]][:batch], SamplingParams(max_new_tokens=24)
    expected = SpeculativeDecoder(target, draft, WAYS[way]).generate(prompts, sampling)
    other = dataclasses.replace(forms_of(platform), products=CPU.products, compiler_options=())
    monkeypatch.setattr(backends, "BACKENDS", {**backends.BACKENDS, "cpu": other})
    monkeypatch.setattr(compilation, "_CACHE", {})
    found = SpeculativeDecoder(target, draft, WAYS[way]).generate(prompts, sampling)
    assert found.token_ids == expected.token_ids
    assert found.stats.exit_histogram == expected.stats.exit_histogram


@pytest.mark.parametrize(("most", "says"), [(None, True), (0, False)])
def test_programs_carry_no_more_python_frames_than_their_compiler_can_take(monkeypatch, most, says):
    some = dataclasses.replace(CPU, python_frames=most)
    monkeypatch.setattr(backends, "BACKENDS", {"cpu": some})
    frames = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, frames)  # 0 in this suite
    jax.config.update(frames, 10)
    try:
        lowered = compilation._lowered(lambda x: jnp.sin(x) * 2, (jnp.zeros(3),))
        assert getattr(jax.config, frames) == 10
    finally:
        jax.config.update(frames, before)
    text = lowered.as_text(debug_info=True)
    assert "jit(traced)/sin" in text
    assert ("test_forms.py" in text) == says
