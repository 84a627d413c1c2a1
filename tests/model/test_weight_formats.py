"""Weight formats: what quantising loses, what every form of a product computes, and models whose weights are kept small."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import noisy_draft, tiny_config, tiny_draft, tiny_model, tiny_params

from s2d_jax.backends import forms_of
from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.decode.programs import programs
from s2d_jax.errors import UserError
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.model.params import logical_axes
from s2d_jax.model.products.forms import blocked, plain, scaled, two_digits, weight_first
from s2d_jax.model.products.linear import form_of, linear
from s2d_jax.model.products.weight_formats import (
    WEIGHT_FORMATS,
    Int8Weight,
    compute_dtype,
    dequantise,
    embed,
    quantise,
    take_rows,
    weight_bytes,
)
from s2d_jax.model.transformer import Transformer
from s2d_jax.sharding import MeshConfig, make_mesh, params_sharding
from s2d_jax.weights.export import export_draft, save_model
from s2d_jax.weights.load import load_draft, load_model
from s2d_jax.weights.model import Draft, Model
from s2d_jax.weights.prepare import prepare_for_decode

PROMPTS = [[5, 9, 2], [7, 7, 1, 3, 30, 12, 50], [33, 4, 21, 60, 2], [1]]
GREEDY = SamplingParams(max_new_tokens=30)


def _matrix(rows=40, columns=24, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns), np.float32)


# --- quantising


def test_an_element_moves_by_at_most_half_a_step():
    w = _matrix() * np.logspace(-6, 6, 40, dtype=np.float32)[:, None]
    weight = quantise(w)
    assert weight.values.dtype == np.int8
    assert (np.abs(weight.values).max(axis=1) == 127).all()
    np.testing.assert_allclose(weight.scale, np.abs(w).max(axis=1) / 127, rtol=1e-6)
    error = np.abs(np.asarray(dequantise(weight)) - w)
    assert (error <= 0.5001 * weight.scale[:, None]).all()


def test_rows_of_zeros_and_of_subnormal_numbers_are_zeros():
    weight = quantise(np.stack([np.zeros(4), [1e-45, -1e-45, 0, 1e-40]]).astype(np.float32))
    assert (weight.scale == 1).all()
    assert not weight.values.any()


def test_the_host_and_the_device_quantise_alike(monkeypatch):
    monkeypatch.setattr("s2d_jax.model.products.weight_formats._PIECE", 100)  # ten pieces
    w = _matrix()
    on_host, on_device = quantise(w), quantise(jnp.asarray(w))
    np.testing.assert_array_equal(on_host.values, on_device.values)
    np.testing.assert_array_equal(on_host.scale, on_device.scale)


def test_rows_of_a_weight_keep_its_format():
    w = quantise(jnp.asarray(_matrix()))
    rows = jnp.array([3, 39, 99])
    taken = take_rows(w, rows)
    np.testing.assert_array_equal(taken.values, np.asarray(w.values)[[3, 39, 39]])
    np.testing.assert_array_equal(dequantise(taken), embed(w, rows))


# --- products


def _numpy_product(x: np.ndarray, w) -> np.ndarray:
    """What a product means, in f64, for each format."""
    if not isinstance(w, Int8Weight):
        return x.astype(np.float64) @ np.asarray(w).astype(np.float64).T
    sums = x.astype(np.float64) @ np.asarray(w.values, np.float64).T
    return sums * np.asarray(w.scale, np.float64)[None, :]


def _whole_numbers(rows, weight_format, wide):
    """Inputs whose sums are exact in f32 and which every format holds exactly; `wide` weights take several blocks."""
    rng = np.random.default_rng(rows)
    columns, out = (3000, 501) if wide else (24, 40)
    # Each row's largest is 127 * 2^k, which makes the step of the digits a power of two.
    x = rng.integers(-3, 4, (rows, columns)).astype(np.float32)
    x[:, 0] = 127
    x *= 2.0 ** rng.integers(-2, 3, (rows, 1))
    values = rng.integers(-5, 6, (out, columns))
    if weight_format == "int8":
        scale = 2.0 ** rng.integers(-3, 4, out)
        return x, Int8Weight(jnp.asarray(values, jnp.int8), jnp.asarray(scale, jnp.float32))
    return x, jnp.asarray(values, {"f32": jnp.float32, "bf16": jnp.bfloat16}[weight_format])


@pytest.mark.parametrize("wide", [False, True], ids=["small", "blocks"])
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 32, 33])
@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_linear_equals_its_definition_exactly(weight_format, rows, wide):
    x, w = _whole_numbers(rows, weight_format, wide)
    dtype = jnp.bfloat16 if weight_format == "bf16" else jnp.float32
    out = jax.jit(linear, static_argnums=2)(jnp.asarray(x, dtype), w, jnp.float32)
    np.testing.assert_array_equal(np.asarray(out, np.float64), _numpy_product(x, w))


FORMS = {
    "f32": (plain, weight_first),
    "bf16": (plain, blocked),
    "int8": (scaled, blocked, two_digits),
}


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize(
    ("weight_format", "form"),
    [(name, form) for name, forms in FORMS.items() for form in forms],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_every_form_is_near_the_definition(weight_format, form, rows):
    """Random inputs: f32 rounding, and for digits half a step of 1/32512 of the row's largest."""
    x = _matrix(rows, 300, seed=1)
    w = {"f32": jnp.asarray, "bf16": lambda w: jnp.asarray(w, jnp.bfloat16), "int8": quantise}[
        weight_format
    ](_matrix(40, 300))
    x = np.asarray(jnp.asarray(x, jnp.bfloat16 if weight_format == "bf16" else jnp.float32))
    out = jax.jit(form)(jnp.asarray(x), jax.tree.map(jnp.asarray, w))
    expected = _numpy_product(x, w)
    largest = np.abs(x).astype(np.float64).max(axis=1, keepdims=True)
    weights = np.abs(np.asarray(dequantise(w) if isinstance(w, Int8Weight) else w, np.float64))
    bound = largest * weights.sum(axis=1)[None] * (0.5001 / 32512 if form is two_digits else 2e-6)
    assert (np.abs(np.asarray(out) - expected) <= bound).all()


def test_integer_products_do_not_depend_on_the_number_of_rows():
    x, w = jnp.asarray(_matrix(8, 300, seed=1)), quantise(jnp.asarray(_matrix(40, 300)))
    together = jax.jit(two_digits)(x, w)
    for row in range(8):
        alone = jax.jit(two_digits)(x[row : row + 1], w)
        np.testing.assert_array_equal(together[row : row + 1], alone)


def test_not_a_number_is_not_hidden_by_rounding():
    x = jnp.asarray(_matrix(2, 24)).at[1, 3].set(jnp.nan)
    out = np.asarray(two_digits(x, quantise(jnp.asarray(_matrix()))))
    assert np.isfinite(out[0]).all()
    assert np.isnan(out[1]).all()


def test_other_platforms_get_plain_dots():
    assert {form_of(forms_of(p), f, 1) for p in ("tpu", "gpu") for f in ("f32", "bf16")} == {plain}
    assert {form_of(forms_of(p), "int8", rows) for p in ("tpu", "gpu") for rows in (1, 99)} == {
        scaled
    }
    assert compute_dtype("int8", "tpu") == compute_dtype("bf16", "cpu") == jnp.bfloat16
    assert compute_dtype("int8", "cpu") == compute_dtype("f32", "tpu") == jnp.float32


# --- models


@pytest.fixture(scope="module")
def target() -> Model:
    return tiny_model(num_layers=2, spread=14.0, tie_embeddings=True)


@pytest.fixture(scope="module")
def draft(target) -> Draft:
    return noisy_draft(target, (1, 2), (0.4, 0.0))


def _logits(model, tokens=((1, 2, 3, 4, 5),)):
    transformer = Transformer(model.config, dtype=model.dtype)
    return np.asarray(jax.jit(transformer.apply)({"params": model.params}, jnp.asarray(tokens)))


def test_the_compute_dtype_is_that_of_the_norms(target):
    prepared = {name: prepare_for_decode(target, name) for name in WEIGHT_FORMATS}
    assert [m.dtype for m in prepared.values()] == [jnp.float32, jnp.bfloat16, jnp.float32]
    again = prepare_for_decode(prepared["int8"], "int8")
    for a, b in zip(*(jax.tree.leaves(m.params) for m in (again, prepared["int8"])), strict=True):
        assert a is b
    assert prepare_for_decode(prepared["int8"], "f32").dtype == jnp.float32


@pytest.mark.parametrize("tied", [True, False])
def test_int8_logits_are_those_of_the_dequantised_model(tied):
    """Look-up and head read one int8 table when they are tied."""
    model = tiny_model(num_layers=2, spread=8.0, tie_embeddings=tied)
    int8 = prepare_for_decode(model, "int8")
    tables = [leaf for leaf in jax.tree.leaves(int8.params) if leaf.dtype == jnp.int8]
    assert len(tables) == 2 * 7 + (1 if tied else 2)
    expected = _logits(prepare_for_decode(int8, "f32"))
    np.testing.assert_allclose(_logits(int8), expected, atol=2e-4 * np.abs(expected).max())
    assert np.abs(expected - _logits(model)).max() > 0  # int8 is not free


@pytest.fixture(scope="module")
def wide() -> Model:
    """Matrices that weigh something."""
    config = tiny_config(
        *(256, 6), embed_dim=256, ffw_dim=512, num_heads=8, num_kv_heads=4, head_dim=32
    )
    return Model(config, tiny_params(config), None, "wide")


def test_int8_takes_at_most_three_tenths_of_f32(wide):
    ratio = weight_bytes(prepare_for_decode(wide, "int8").params) / weight_bytes(wide.params)
    assert ratio <= 0.3


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_loading_equals_preparing(tmp_path, weight_format):
    model = tiny_model(spread=4.0)
    save_model(tmp_path / "m", model.config, model.params, None)
    loaded = load_model(tmp_path / "m", weight_format=weight_format)
    prepared = prepare_for_decode(model, weight_format)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, prepared.params)
    assert loaded.dtype == prepared.dtype
    drafted = load_draft(tmp_path / "m", weight_format=weight_format)
    assert jax.tree.structure(drafted.params) == jax.tree.structure(loaded.params)


def test_unknown_formats_and_quantised_exports_are_refused(tmp_path):
    model = tiny_model()
    for use in (
        lambda: prepare_for_decode(model, "int4"),
        lambda: load_model(tmp_path, weight_format="int4"),
        lambda: load_draft(tmp_path, weight_format="int4"),
    ):
        with pytest.raises(UserError, match=r"'int4' is unknown; use one of f32, bf16, int8"):
            use()
    with pytest.raises(UserError, match=r"dtype int8; export parameters in f32, f16 or bf16"):
        export_draft(prepare_for_decode(tiny_draft(), "int8"), tmp_path / "out", {})
    assert not (tmp_path / "out").exists()


PAIRS = [("int8", "f32"), ("int8", "bf16"), ("f32", "int8"), ("bf16", "int8"), ("int8", "int8")]
EXITS = {"s2d": (1, 2), "sd": (2,)}
other_drafter = pytest.mark.exhaustive(
    "each small format is a target's and a draft's; test_exit_parts.py has f32 with int8"
)


@pytest.mark.parametrize(
    ("target_format", "draft_format", "drafter"),
    [
        *(("bf16", "int8", "s2d"), ("int8", "bf16", "sd")),
        *(
            pytest.param(*pair, drafter, marks=other_drafter)
            for pair in PAIRS
            for drafter in ("sd", "s2d")
            if (*pair, drafter) not in (("bf16", "int8", "s2d"), ("int8", "bf16", "sd"))
        ),
    ],
)
def test_greedy_equals_the_width_matched_reference(
    target, draft, target_format, draft_format, drafter
):
    small, other = (
        prepare_for_decode(target, target_format),
        prepare_for_decode(draft, draft_format),
    )
    decoder = SpeculativeDecoder(small, other, DecodeConfig(exits=EXITS[drafter]))
    reference = SpeculativeDecoder(small, None, DecodeConfig(verify_width=decoder.verify_width))
    result = decoder.generate(PROMPTS, GREEDY)
    assert result.token_ids == reference.generate(PROMPTS, GREEDY).token_ids
    assert result.stats.mean_acceptance_length > 1.3


# --- what is compiled


wide_pass = pytest.mark.exhaustive("int8 has a pass of several positions, and bf16 one of one")


@pytest.mark.parametrize(
    ("weight_format", "use_draft"),
    [
        *(("int8", True), ("bf16", False)),
        *(pytest.param(*case, marks=wide_pass) for case in (("int8", False), ("bf16", True))),
    ],
)
def test_no_f32_copy_of_the_weights_is_in_the_compiled_loop(wide, weight_format, use_draft):
    target = prepare_for_decode(wide, weight_format)
    draft = tiny_draft(256, (1, 2)) if use_draft else None
    decoder = SpeculativeDecoder(target, draft)
    static, width, args = decoder.prepare([[1, 2, 3]], SamplingParams(max_new_tokens=20))
    (_, run), _ = programs(static, width, args)
    held = weight_bytes(target.params)
    assert held > 3e6
    # One matrix at a time may be converted: the largest has 131,072 elements.
    assert run.memory_analysis().temp_size_in_bytes < 2.5e6


def test_the_copy_test_can_fail():
    """A conversion that nothing ties to the loop is hoisted, and its bytes are counted."""
    weights = [jnp.ones((256, 256), jnp.int8) for _ in range(8)]

    def loop(x, weights):
        def body(carry):
            x = carry[1]
            for w in weights:
                x = jnp.tanh(plain(x, w.astype(jnp.float32)))
            return carry[0] + 1, x

        return jax.lax.while_loop(lambda carry: carry[0] < 9, body, (0, x))

    compiled = jax.jit(loop).lower(jnp.ones((2, 256)), weights).compile()
    assert compiled.memory_analysis().temp_size_in_bytes > 8 * 256 * 256 * 4 * 0.9


# --- sharded


@pytest.fixture(scope="module")
def many_heads() -> Model:
    config = tiny_config(num_layers=2, num_heads=8, num_kv_heads=8, ffw_dim=64)
    return Model(config, tiny_params(config, spread=14.0), None, "tiny")


@pytest.mark.exhaustive("products of split int8 weights, and their loading, are tested below")
@pytest.mark.parametrize("mesh_config", [MeshConfig(fsdp=2, tensor=4), MeshConfig(tensor=8)])
def test_sharded_int8_equals_one_device(many_heads, draft, mesh_config):
    mesh = make_mesh(mesh_config)
    shardings = params_sharding(many_heads.config, logical_axes(many_heads.config), mesh)
    placed = jax.device_put(many_heads.params, shardings)
    sharded = prepare_for_decode(dataclasses.replace(many_heads, params=placed), "int8")
    one = prepare_for_decode(many_heads, "int8")
    jax.tree.map(np.testing.assert_array_equal, sharded.params, one.params)
    up = sharded.params["layers_0"]["mlp"]["up_proj"]["kernel"]
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    assert up.values.sharding.shard_shape((64, 32)) == (64 // tensor, 32 // fsdp)
    assert up.scale.sharding.shard_shape((64,)) == (64 // tensor,)
    sampling = SamplingParams(max_new_tokens=30)
    bf16_draft = prepare_for_decode(draft, "bf16")
    expected = SpeculativeDecoder(one, bf16_draft).generate(PROMPTS[:2], sampling)
    result = SpeculativeDecoder(sharded, bf16_draft).generate(PROMPTS[:2], sampling)
    assert result.token_ids == expected.token_ids


@pytest.mark.parametrize("rows", [2, 12])
@pytest.mark.parametrize("weight_format", ["bf16", "int8"])
def test_blocks_of_a_sharded_weight(monkeypatch, weight_format, rows):
    """Blocks that do not match the shards are slow, but right."""
    monkeypatch.setattr("s2d_jax.model.products.forms._BLOCK", 10 * 3000)
    x, w = _whole_numbers(rows, weight_format, True)
    w = jax.tree.map(lambda leaf: leaf[:496], w)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    spec = jax.sharding.PartitionSpec
    shardings = [
        jax.sharding.NamedSharding(mesh, spec(*("tensor", "fsdp")[: leaf.ndim]))
        for leaf in jax.tree.leaves(w)
    ]
    placed = jax.device_put(w, jax.tree.unflatten(jax.tree.structure(w), shardings))
    dtype = jnp.bfloat16 if weight_format == "bf16" else jnp.float32
    out = jax.jit(linear, static_argnums=2)(jnp.asarray(x, dtype), placed, jnp.float32)
    np.testing.assert_array_equal(np.asarray(out, np.float64), _numpy_product(x, w))


def test_loading_int8_onto_a_mesh_splits_scales_like_outputs(many_heads, tmp_path):
    save_model(tmp_path / "m", many_heads.config, many_heads.params, None)
    mesh = make_mesh(MeshConfig(tensor=4))
    loaded = load_model(tmp_path / "m", weight_format="int8", mesh=mesh)
    down = loaded.params["layers_0"]["mlp"]["down_proj"]["kernel"]
    assert down.values.sharding.shard_shape((32, 64)) == (32, 16)
    assert down.scale.sharding.shard_shape((32,)) == (32,)
    prepared = prepare_for_decode(many_heads, "int8")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, prepared.params)


def test_the_program_of_an_int8_target_holds_int8_weights(target):
    reference = DecodeConfig(verify_width=6)  # a program that is there
    decoder = SpeculativeDecoder(prepare_for_decode(target, "int8"), None, reference)
    static, width, args = decoder.prepare(PROMPTS, GREEDY)
    (_, run), _ = programs(static, width, args)
    assert re.search(r"s8\[48,32\]", run.as_text())
