"""Every form of attention computes what the dense one does, and the dense one what its definition says."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config, tiny_params

from s2d_jax.backends import BACKENDS, CPU, TPU, compiling_for
from s2d_jax.model.attention_forms import (
    attend,
    dense,
    flash_gpu,
    flash_tpu,
    used_blocks,
    used_splits,
)
from s2d_jax.model.attention_forms.request import Causal, Request
from s2d_jax.model.kv_cache import KVCache
from s2d_jax.model.remat import RematPolicy
from s2d_jax.model.transformer import Transformer, apply_model
from s2d_jax.model.tree_mask import mask as tree_mask
from s2d_jax.sharding import MeshConfig, make_mesh, split_over

USED_PART = ("used_blocks", "used_splits")
CAPACITY = 300  # the third block of 128 is cut off
USED = np.array([290, 40, 129], np.int32)
TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 2e-2}


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels for chips run on the CPU, with small blocks."""
    call = functools.partial(used_blocks.pl.pallas_call, interpret=True)
    monkeypatch.setattr(used_blocks.pl, "pallas_call", call)
    monkeypatch.setattr(used_blocks, "_BLOCKS", (128,))
    splash = functools.partial(flash_tpu.kernels.make_splash_mha, interpret=True)
    monkeypatch.setattr(flash_tpu.kernels, "make_splash_mha", splash)
    triton = functools.partial(flash_gpu.kernels.mha, interpret=True)
    monkeypatch.setattr(flash_gpu.kernels, "mha", triton)


def normal(*shape: int, dtype=jnp.float32, seed: int = 0) -> jax.Array:
    drawn = np.random.default_rng([seed, *shape]).normal(size=shape)
    return jnp.asarray(drawn, jnp.float32).astype(dtype)


def tree_of(T: int) -> np.ndarray:
    """bool [T, T]: a random tree's nodes, and who descends from whom."""
    rng, ancestors_MM = np.random.default_rng(T), np.eye(T, dtype=bool)
    for node in range(1, T):
        ancestors_MM[node] |= ancestors_MM[rng.integers(0, node)]
    return ancestors_MM


def over_cache(T: int, *, heads=(4, 2), dtype=jnp.float32, tree: bool = False, **more) -> Request:
    """The last T of the used positions of each row look at all before them, or along the branches of a tree."""
    N, K = heads
    B, start_B = len(USED), jnp.asarray(USED - T)
    nodes_TT = tree_of(T) if tree else np.tril(np.ones((T, T), bool))
    return Request(
        normal(B, T, N, 16, dtype=dtype),
        normal(B, K, CAPACITY, 16, dtype=dtype, seed=1),
        normal(B, K, CAPACITY, 16, dtype=dtype, seed=2),
        tree_mask(jnp.broadcast_to(nodes_TT, (B, T, T)), start_B, CAPACITY),
        used_B=jnp.asarray(USED),
        positions_BT=start_B[:, None] + jnp.asarray(nodes_TT.sum(1) - 1, jnp.int32)[None],
        **more,
    )


def of_rows(T: int, *, heads=(4, 2), rows: int = 2, dtype=jnp.float32, cut=(), **more) -> Request:
    """A pass without a cache; `cut` says where segments begin, other than the first."""
    (N, K), ids_T = heads, np.zeros(T, np.int32)
    for begin in cut:
        ids_T[begin:] += 1
    return Request(
        normal(rows, T, N, 16, dtype=dtype),
        normal(rows, K, T, 16, dtype=dtype, seed=1),
        normal(rows, K, T, 16, dtype=dtype, seed=2),
        Causal(jnp.broadcast_to(jnp.asarray(ids_T), (rows, T)) if cut else None),
        **more,
    )


def computed(form, request: Request) -> jax.Array:
    """Compiled, which is quicker than one small operation after another."""
    arrays = {x.name: getattr(request, x.name) for x in dataclasses.fields(request)}
    arrays = {name: x for name, x in arrays.items() if isinstance(x, jax.Array)}
    return jax.jit(lambda xs: form.attend(dataclasses.replace(request, **xs)))(arrays)


def by_definition(request: Request) -> np.ndarray:
    """One query after another, in f64."""
    q, k, v = (np.asarray(x, np.float64) for x in (request.q_BTNH, request.k_BKSH, request.v_BKSH))
    (B, T, N, H), K = q.shape, k.shape[1]
    causal, looks = isinstance(request.looks, Causal), request.looks
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(B, T, N):
        if causal:
            ids = (
                np.zeros(T) if looks.segment_ids_BT is None else np.asarray(looks.segment_ids_BT[b])
            )
            seen, at = [s for s in range(t + 1) if ids[s] == ids[t]], t
        else:
            seen = np.flatnonzero(np.asarray(looks[b, t])).tolist()
            at = None if request.positions_BT is None else int(request.positions_BT[b, t])
        if request.window is not None:
            seen = [s for s in seen if at - s < request.window]
        head = n // (N // K)
        scores = k[b, head, seen] @ q[b, t, n]
        scores = scores * (H**-0.5 if request.scale is None else request.scale)
        if request.soft_cap is not None:
            scores = request.soft_cap * np.tanh(scores / request.soft_cap)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, head, seen]
    return out


VARIANTS = [
    {},
    {"window": 7},
    {"window": 130, "soft_cap": 1.5},
    {"scale": 0.7, "soft_cap": 3.0},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("make", [over_cache, functools.partial(of_rows, cut=(3,))])
def test_dense_is_the_definition(make, variant):
    request = make(5, **variant)
    np.testing.assert_allclose(computed(dense, request), by_definition(request), atol=2e-6)


@pytest.mark.parametrize(
    ("T", "heads", "dtype", "tree", "variant"),
    [
        (1, (4, 4), jnp.float32, False, {}),
        (1, (6, 2), jnp.bfloat16, False, {"window": 100}),
        (5, (4, 2), jnp.float32, True, {"window": 7}),
        (5, (4, 1), jnp.bfloat16, False, {"soft_cap": 1.5}),
        (16, (4, 2), jnp.float32, True, {"scale": 0.7, "soft_cap": 3.0}),
        (16, (4, 2), jnp.float32, False, {"window": 130}),
        (16, (9, 3), jnp.bfloat16, True, {}),
    ],
)
@pytest.mark.parametrize("name", USED_PART)
def test_kernels_of_the_used_part_equal_dense(interpreted, name, T, heads, dtype, tree, variant):
    request = over_cache(T, heads=heads, dtype=dtype, tree=tree, **variant)
    form = attend.form_named(name)
    assert form.takes(request)
    mixed = computed(form, request)
    assert mixed.dtype == dtype
    exact = computed(dense, request).astype(jnp.float32)
    np.testing.assert_allclose(mixed.astype(jnp.float32), exact, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("name", USED_PART)
def test_only_the_used_part_is_read(interpreted, name, window):
    """What is not used is NaN, before the window's first block and behind the last used position."""
    request = over_cache(5, window=window)
    exact = computed(dense, request)
    each = np.arange(CAPACITY)
    oldest = np.zeros_like(USED) if window is None else np.maximum(0, USED - 5 - window + 1)
    unread_BS = (each >= USED[:, None]) | (each < (oldest // 128 * 128)[:, None])
    assert unread_BS[0, :128].all() == (window is not None)
    poisoned = [
        jnp.where(unread_BS[:, None, :, None], jnp.nan, x) for x in (request.k_BKSH, request.v_BKSH)
    ]
    request = dataclasses.replace(request, k_BKSH=poisoned[0], v_BKSH=poisoned[1])
    np.testing.assert_allclose(computed(attend.form_named(name), request), exact, atol=2e-6)


def test_a_used_block_is_fetched_once_and_no_other():
    """The kernel fetches a block when its number differs from that of the step before."""
    first, used = jnp.array([0, 1, 0]), jnp.array([290, 256, 1])
    numbers = [
        [int(used_blocks.block_read(row, step, first, used, block=128)) for step in range(4)]
        for row in range(3)
    ]
    assert numbers == [[0, 1, 2, 2], [1, 1, 1, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize("used", [0, 40])
@pytest.mark.parametrize("name", USED_PART)
def test_a_query_that_sees_nothing_gets_something_finite(interpreted, name, used):
    request = over_cache(5)
    blind = dataclasses.replace(
        request, looks=jnp.zeros_like(request.looks), used_B=jnp.full(3, used, jnp.int32)
    )
    assert np.isfinite(computed(attend.form_named(name), blind)).all()


@pytest.mark.parametrize("name", USED_PART)
def test_without_lengths_all_keys_are_used(interpreted, name):
    request = dataclasses.replace(over_cache(1), used_B=None)
    looks = jnp.ones_like(request.looks)
    request = dataclasses.replace(request, looks=looks)
    found = computed(attend.form_named(name), request)
    np.testing.assert_allclose(found, computed(dense, request), atol=2e-6)


def gradients(form, request: Request):
    """Of a sum in which every result counts differently, by queries, keys and values."""
    at = jnp.cos(jnp.arange(request.q_BTNH.size, dtype=jnp.float32)).reshape(request.q_BTNH.shape)

    def total(q, k, v):
        changed = dataclasses.replace(request, q_BTNH=q, k_BKSH=k, v_BKSH=v)
        mixed = form.attend(changed).astype(jnp.float32)
        return jnp.sum(mixed * at), mixed

    grads, mixed = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(
        request.q_BTNH, request.k_BKSH, request.v_BKSH
    )
    return mixed, *(x.astype(jnp.float32) for x in grads)


@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [
        ("flash_tpu", jnp.float32, {"cut": (100, 130)}),
        ("flash_tpu", jnp.float32, {"cut": (100,), "window": 70, "soft_cap": 1.5, "scale": 0.7}),
        ("flash_tpu", jnp.bfloat16, {"window": 128, "heads": (3, 1)}),
        ("flash_gpu", jnp.float32, {"cut": (100, 130), "scale": 0.7}),
        ("flash_gpu", jnp.bfloat16, {"heads": (3, 1)}),
    ],
)
def test_flash_equals_dense_with_its_gradient(interpreted, name, dtype, options):
    request = of_rows(256, rows=1, dtype=dtype, **options)
    found, exact = gradients(attend.form_named(name), request), gradients(dense, request)
    for got, expected in zip(found, exact, strict=True):
        atol = TOLERANCE[dtype] * 10 * float(jnp.abs(expected).max())
        np.testing.assert_allclose(got, expected, atol=atol)


@pytest.mark.parametrize(
    ("request_", "name"),
    [
        (of_rows(128), "flash_tpu"),
        (of_rows(128, window=5, soft_cap=1.0), "flash_tpu"),
        (of_rows(100), "dense"),
        (over_cache(5), "dense"),
    ],
    ids=["rows", "window and cap", "no whole block", "cache"],
)
def test_the_first_form_that_takes_it_is_used(monkeypatch, request_, name):
    used = []
    for form in attend.FORMS:
        fake = functools.partial(lambda form, r: used.append(form) or r.q_BTNH, form)
        monkeypatch.setattr(attend.form_named(form), "attend", fake)
    with compiling_for("tpu"):
        attend.attention(
            *(request_.q_BTNH, request_.k_BKSH, request_.v_BKSH, request_.looks),
            window=request_.window,
            soft_cap=request_.soft_cap,
        )
    assert used == [name]


def test_flash_on_a_gpu_declines_what_its_kernel_lacks():
    long = of_rows(flash_gpu.LEAST_LENGTH, heads=(1, 1), rows=1)
    assert flash_gpu.takes(long)
    for change in ({"window": 5}, {"soft_cap": 1.0}):
        assert not flash_gpu.takes(dataclasses.replace(long, **change))
    assert not flash_gpu.takes(of_rows(flash_gpu.LEAST_LENGTH // 2, heads=(1, 1), rows=1))


def test_kernels_decline_what_does_not_divide_over_a_mesh():
    mesh = make_mesh(MeshConfig(data=2, tensor=2))
    assert flash_tpu.takes(of_rows(128, mesh=mesh))
    assert not flash_tpu.takes(of_rows(128, rows=3, mesh=mesh))
    assert not flash_tpu.takes(of_rows(128, heads=(3, 3), mesh=mesh))
    assert used_blocks.takes(over_cache(1, mesh=mesh))
    assert not used_blocks.takes(over_cache(1, heads=(3, 3), mesh=mesh))


def test_used_splits_decline_what_does_not_fit():
    assert used_splits.takes(over_cache(16))
    assert not used_splits.takes(over_cache(16, heads=(18, 2)))
    assert not used_splits.takes(over_cache(16, mesh=make_mesh(MeshConfig(tensor=2))))
    odd = over_cache(16)
    assert not used_splits.takes(dataclasses.replace(odd, q_BTNH=odd.q_BTNH[..., :12]))


def test_used_blocks_decline_more_queries_than_fit():
    assert used_blocks.takes(over_cache(16))
    assert not used_blocks.takes(over_cache(16, heads=(512, 2)))


def test_every_backend_names_forms_that_exist_and_ends_with_dense():
    for backend in BACKENDS.values():
        for names in (backend.attention, backend.cached_attention):
            assert set(names) <= set(attend.FORMS)
            assert names[-1] == "dense"
    assert CPU.attention == CPU.cached_attention == ("dense",)


def test_what_no_form_takes_is_said(monkeypatch):
    request = of_rows(100)
    monkeypatch.setattr(attend, "forms", lambda: dataclasses.replace(TPU, attention=("flash_tpu",)))
    with pytest.raises(ValueError, match="none of flash_tpu takes queries"):
        attend.attention(request.q_BTNH, request.k_BKSH, request.v_BKSH, request.looks)


def test_a_window_over_a_mask_needs_positions():
    request = over_cache(1)
    with pytest.raises(ValueError, match="window=4 over a mask needs positions_BT"):
        attend.attention(request.q_BTNH, request.k_BKSH, request.v_BKSH, request.looks, window=4)


CONFIG = tiny_config(num_layers=2)


def test_a_model_decodes_with_used_blocks(interpreted, monkeypatch):
    """Every cached pass of the model goes through the function, with the lengths that its caches have."""
    model, params = Transformer(CONFIG), tiny_params(CONFIG)
    cache = KVCache.create(2, 2, CONFIG.num_kv_heads, 200, CONFIG.head_dim, dtype=jnp.float32)
    filled = [normal(*x.shape, seed=i) for i, x in enumerate((*cache.keys, *cache.values))]
    cache = cache.replace(keys=tuple(filled[:2]), values=tuple(filled[2:]))
    cache = cache.replace(length_B=jnp.array([150, 3], jnp.int32))
    h_BTD = normal(2, 5, CONFIG.embed_dim)

    @functools.partial(jax.jit, static_argnums=0)
    def run(names, params, h_BTD, cache):
        forms = dataclasses.replace(TPU, cached_attention=names)
        monkeypatch.setattr(attend, "forms", lambda: forms)
        return apply_model(model, params, "run_blocks", h_BTD, cache, 0, 2)[0]

    found, expected = (run(names, params, h_BTD, cache) for names in (("used_blocks",), ("dense",)))
    np.testing.assert_allclose(found, expected, atol=2e-5)


def exits_for(platform: str, T: int, rows: int, remat: RematPolicy = "none"):
    """The function that computes the states after each layer as on `platform`, and its arguments."""
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, 60, (rows, T)), jnp.int32)
    ids_BT = jnp.asarray(np.arange(T)[None] // 100 + np.zeros((rows, 1)), jnp.int32)

    def exits(params, tokens_BT, ids_BT):
        with compiling_for(platform):
            return apply_model(
                Transformer(CONFIG),
                params,
                "exit_hiddens",
                tokens_BT,
                exit_layers=(1, 2),
                segment_ids_BT=ids_BT,
                remat=remat,
            )

    return exits, (tiny_params(CONFIG), tokens_BT, ids_BT)


@pytest.mark.parametrize("split", [False, True])
def test_a_model_trains_with_flash(interpreted, split):
    mesh = make_mesh(MeshConfig(data=2, tensor=2))
    run, inputs = exits_for("tpu", 128, 2)
    with jax.set_mesh(mesh) if split else contextlib.nullcontext():
        found = jax.jit(run)(*inputs)
    exact, _ = exits_for("cpu", 128, 2)
    for got, expected in zip(found, jax.jit(exact)(*inputs), strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(expected), atol=2e-5)


@pytest.mark.parametrize("remat", ["none", "block"])
@pytest.mark.parametrize(("platform", "squares"), [("tpu", False), ("cpu", True)])
def test_long_rows_have_no_square_of_their_length(platform, squares, remat):
    """Neither a mask nor scores of T x T, forwards or backwards."""
    T = 1152  # in no block of a kernel
    run, inputs = exits_for(platform, T, 1, remat)

    def loss(*inputs):
        return sum(jnp.sum(x) for x in run(*inputs))

    traced = jax.make_jaxpr(jax.grad(loss))(*inputs)
    assert (f"{T},{T}]" in str(traced)) == squares


def test_used_blocks_on_a_mesh(interpreted):
    """Each device computes its own heads; the mesh is that of the program's inputs."""
    mesh, request = make_mesh(MeshConfig(tensor=2)), over_cache(5, window=100)
    exact = computed(dense, request)
    with split_over(mesh):
        split = dataclasses.replace(request, mesh=attend.mesh_in_use())
    assert split.mesh is mesh
    found = jax.jit(lambda: used_blocks.attend(split))()
    np.testing.assert_allclose(found, exact, atol=2e-6)
