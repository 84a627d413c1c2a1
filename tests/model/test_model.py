"""The transformer: cached and uncached runs agree, against NumPy; segments; truncation; forms of a product; shardings."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_transformer import all_depths, logits
from tiny import tiny_config, tiny_params, tiny_qwen2_config

from s2d_jax.config.model import ModelConfig
from s2d_jax.errors import UserError
from s2d_jax.model.kv_cache import KVCache, read_window, write_window
from s2d_jax.model.params import abstract_params, init_params, logical_axes
from s2d_jax.model.products.linear import linear
from s2d_jax.model.select_layers import truncated
from s2d_jax.model.transformer import Transformer
from s2d_jax.sharding import MeshConfig, make_mesh, params_sharding, partition_spec

TOKENS = [[3, 14, 15, 9, 26, 5, 35, 8, 9, 7]]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def llama(request):
    config = tiny_config(tie_embeddings=request.param)
    return config, tiny_params(config, spread=5.0)


def test_every_depth_equals_numpy(llama):
    config, params = llama
    model, depths = Transformer(config), (1, 2, 4)

    @jax.jit
    def run(variables, tokens):
        hiddens = model.apply(variables, tokens, exit_layers=depths, method="exit_hiddens")
        return hiddens, [model.apply(variables, hidden, method="logits") for hidden in hiddens]

    hiddens, outputs = run({"params": params}, jnp.array(TOKENS))
    host = jax.tree.map(np.asarray, params)
    states, _, _ = all_depths(config, host, TOKENS[0])
    for depth, hidden, ours in zip(depths, hiddens, outputs, strict=True):
        np.testing.assert_allclose(hidden[0], states[depth], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(ours[0], logits(config, host, states[depth]), atol=1e-4)


@pytest.mark.parametrize(
    "make_config",
    [
        tiny_config,
        pytest.param(
            tiny_qwen2_config,
            marks=pytest.mark.exhaustive("test_load.py compares families with torch"),
        ),
    ],
)
def test_cached_windows_equal_one_pass(make_config):
    """Rows of different lengths, windows of different widths."""
    config = make_config(num_layers=2)
    params, model = tiny_params(config, spread=5.0), Transformer(config)
    tokens_BT = jax.random.randint(jax.random.key(2), (2, 12), 0, 64)
    whole_BTV = jax.jit(model.apply)({"params": params}, tokens_BT)
    cache = KVCache.create(2, 2, config.num_kv_heads, 16, config.head_dim, dtype=jnp.float32)
    length_B = jnp.array([5, 3], jnp.int32)

    @jax.jit
    def run(tokens, cache):
        h = model.apply({"params": params}, tokens, method="embed")
        h, cache = model.apply({"params": params}, h, cache, 0, 2, method="run_blocks")
        return model.apply({"params": params}, h, method="logits"), cache

    _, cache = run(tokens_BT[:, :5], cache)  # row 1 has only three real tokens
    cache = cache.advance_to(length_B)
    for width in (1, 4):
        window_BT = read_window(tokens_BT, cache.length_B, width)
        out_BTV, cache = run(window_BT, cache)
        for row in range(2):
            start = int(cache.length_B[row])
            expected = whole_BTV[row, start : start + width]
            np.testing.assert_allclose(out_BTV[row], expected, atol=2e-5)
        cache = cache.advance_to(cache.length_B + width)


def test_segments_do_not_see_each_other(llama):
    config, params = llama
    model = Transformer(config)
    packed = jnp.array([TOKENS[0][:4] + TOKENS[0][:6]])
    segments = jnp.array([[1] * 4 + [2] * 6])
    positions = jnp.array([[*range(4), *range(6)]])
    apply = jax.jit(model.apply)
    out = apply({"params": params}, packed, positions_BT=positions, segment_ids_BT=segments)
    alone = apply({"params": params}, jnp.array([TOKENS[0][:6]]))
    np.testing.assert_allclose(out[0, 4:], alone[0], atol=2e-5)


@pytest.mark.parametrize("rows", [1, 3, 32, 33])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_form_of_a_product_agrees(rows, dtype):
    x = jax.random.normal(jax.random.key(0), (rows, 24), dtype)
    w = jax.random.normal(jax.random.key(1), (40, 24), jnp.float32)
    expected = np.asarray(x, np.float64) @ np.asarray(w.astype(dtype), np.float64).T
    out = linear(x, w)
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    np.testing.assert_allclose(
        np.asarray(out, np.float64), expected, atol=tolerance, rtol=tolerance
    )
    assert linear(x, w, jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize("batch", [1, 3, 17])
def test_windows_are_written_per_row(batch):
    """One row, a few rows, many rows: three forms of the same write."""
    buffer = jnp.zeros((batch, 2, 9, 3))
    window = 1.0 + jax.random.uniform(jax.random.key(0), (batch, 2, 4, 3))
    start = (jnp.arange(batch, dtype=jnp.int32) * 2) % 6
    out = np.asarray(write_window(buffer, window, start, axis=2))
    for row in range(batch):
        expected = np.zeros((2, 9, 3), np.float32)
        expected[:, int(start[row]) : int(start[row]) + 4] = window[row]
        np.testing.assert_array_equal(out[row], expected)


def test_truncation_shares_what_is_left(llama):
    config, params = llama
    short_config, short = truncated(config, params, 2)
    assert short_config.num_layers == 2
    assert "layers_2" not in short
    assert short["layers_1"] is params["layers_1"]
    with pytest.raises(UserError, match=r"num_layers=9 must be between 1 and the model's 4 layers"):
        truncated(config, params, 9)


def test_abstract_params_match_real_ones():
    config = tiny_qwen2_config()
    real = init_params(config, jax.random.key(0))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), real)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(config))
    assert jax.tree.structure(real) == jax.tree.structure(
        logical_axes(config), is_leaf=lambda x: isinstance(x, tuple)
    )


def test_sharded_logits_equal_those_of_one_device():
    config = tiny_config(num_heads=4, num_kv_heads=4)
    params = tiny_params(config, spread=5.0)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    placed = jax.device_put(params, params_sharding(config, logical_axes(config), mesh))
    run = jax.jit(lambda p: Transformer(config).apply({"params": p}, jnp.array(TOKENS)))
    np.testing.assert_allclose(run(placed), run(params), atol=2e-5)


def test_an_axis_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match=r"no rule for axis 'experts'; have \['batch', 'embed'"):
        partition_spec(("experts", "embed"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "mamba"}, r"family='mamba' is not supported; use one of llama, qwen2"),
        ({"num_kv_heads": 3}, r"num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"head_dim": 7}, r"head_dim=7 must be even for RoPE"),
        ({"num_layers": 0}, r"num_layers=0 must be from 1 to 10000"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        tiny_config(**change)


def test_mesh_sizes_are_checked():
    with pytest.raises(UserError, match=r"mesh.tensor=0 must be at least 1"):
        MeshConfig(tensor=0)


def test_config_is_hashable():
    assert hash(tiny_config()) == hash(ModelConfig(**vars(tiny_config())))
