"""Medusa heads on a frozen target: the loss against its definition in NumPy, and what a step may and may not change."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config, tiny_params

from s2d_jax.errors import UserError
from s2d_jax.model.transformer import Transformer
from s2d_jax.sharding import MeshConfig, make_mesh
from train.config.sections import OptimSection
from train.data.batch import Batch
from train.medusa import MedusaConfig, MedusaTrainer, head_targets, medusa_gradient

ROWS, LENGTH, HEADS = 8, 12, 3
MODEL = tiny_config(num_layers=2, num_kv_heads=4)
ONE_DEVICE = MeshConfig()
CONFIG = MedusaConfig(
    num_heads=HEADS,
    decay=0.5,
    target_dtype="float32",
    compute_dtype="float32",
    batch_size=ROWS,
    loss_chunk=5,
    optim=OptimSection(learning_rate=1e-2),
)


def rows(seed: int = 3) -> Batch:
    """Rows of two documents and some padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, MODEL.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    segments = np.repeat([[1] * 5 + [2] * 5 + [0] * 2], ROWS, axis=0).astype(np.int32)
    positions = np.repeat([[*range(5), *range(5), 0, 1]], ROWS, axis=0).astype(np.int32)
    weights = (rng.random((ROWS, LENGTH)) < 0.6).astype(np.float32)
    weights[:, [4, 9, 10, 11]] = 0
    return Batch(tokens, np.roll(tokens, -1, axis=1), weights, positions, segments)


def start(config: MedusaConfig = CONFIG, mesh: MeshConfig = ONE_DEVICE, model=MODEL):
    """State, trunk, batch and compiled step."""
    trainer = MedusaTrainer(config, model, make_mesh(mesh))
    params = tiny_params(model, spread=3.0)
    state, trunk = trainer.init_state(params), trainer.place_trunk(params)
    batch = jax.device_put(rows(), trainer.batch_sharding)
    return state, trunk, batch, trainer.compile_step(state, trunk, batch)


def run(config: MedusaConfig = CONFIG, mesh: MeshConfig = ONE_DEVICE, steps: int = 3):
    """Metrics of some steps and the heads after them, on the host."""
    state, trunk, batch, step = start(config, mesh)
    history = []
    for index in range(steps):
        state, metrics = step(state, trunk, batch, jnp.float32((index + 1) / (steps + 1)))
        history.append(jax.device_get(metrics))
    return history, jax.device_get(state.heads)


@pytest.fixture(scope="module")
def one_device():
    return run()


def expected_sums(heads, hidden, batch):
    """In float64, token by token: summed cross-entropy, correct predictions and number of counted tokens of each head."""
    loss, correct, counted = np.zeros(HEADS), np.zeros(HEADS), np.zeros(HEADS)
    for row, t, k in np.ndindex(ROWS, LENGTH, HEADS):
        predicted = t + k + 2  # the position that head k, counted from 0, speaks of
        inside = predicted < LENGTH and batch.segment_ids_BT[row, t] > 0
        if not inside or batch.segment_ids_BT[row, t] != batch.segment_ids_BT[row, predicted]:
            continue
        if not batch.weights_BT[row, predicted - 1]:  # weights are those of the next token
            continue
        h = np.asarray(hidden[row, t], np.float64)
        inner = np.asarray(heads["residual"][k], np.float64) @ h
        logits = np.asarray(heads["lm_head"][k], np.float64) @ (h + inner / (1 + np.exp(-inner)))
        token = batch.tokens_BT[row, predicted]
        loss[k] += np.log(np.exp(logits).sum()) - logits[token]
        correct[k] += logits.argmax() == token
        counted[k] += 1
    return loss, correct, counted


@jax.jit
def _exit_hiddens(params, batch):
    return Transformer(MODEL).apply(
        {"params": params},
        batch.tokens_BT,
        exit_layers=(MODEL.num_layers,),
        positions_BT=batch.positions_BT,
        segment_ids_BT=batch.segment_ids_BT,
        method="exit_hiddens",
    )


def target_states(batch, params):
    """The states after the final norm, from a plain forward pass."""
    (h,) = _exit_hiddens(params, batch)
    mean_square = jnp.mean(h * h, axis=-1, keepdims=True)
    scale = params["final_norm"]["scale"]
    return h * jax.lax.rsqrt(mean_square + MODEL.norm_eps) * scale[None, None]


def random_heads(seed: int = 5):
    rng = np.random.default_rng(seed)
    shapes = {"residual": (MODEL.embed_dim, MODEL.embed_dim), "lm_head": (64, MODEL.embed_dim)}
    return {
        name: jnp.asarray(rng.normal(size=(HEADS, *shape)) * 0.3, jnp.float32)
        for name, shape in shapes.items()
    }


def test_targets_stop_at_the_borders_of_documents_and_rows():
    batch = Batch(
        tokens_BT=jnp.arange(10, 18, dtype=jnp.int32)[None],
        targets_BT=jnp.asarray([[11, 12, 13, 14, 15, 16, 17, 0]], jnp.int32),
        weights_BT=jnp.asarray([[1, 0, 1, 0, 1, 1, 1, 0]], jnp.float32),
        positions_BT=jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 3]], jnp.int32),
        segment_ids_BT=jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 2]], jnp.int32),
    )
    targets, weights = head_targets(batch, 3)
    said = [
        {(t, int(targets[k, 0, t])) for t in np.flatnonzero(np.asarray(weights[k, 0]))}
        for k in range(3)
    ]
    # Token 13 is an assistant's, 12 is not; 15 to 17 are, but not for positions of the first document.
    assert said == [{(1, 13), (4, 16), (5, 17)}, {(0, 13), (4, 17)}, set()]


def test_heads_beyond_the_length_of_a_row_have_nothing_to_say():
    batch = jax.tree.map(lambda x: jnp.asarray(x[:, :2]), rows())
    targets, weights = head_targets(batch, 4)  # the first head still has the target of position 1
    assert targets.shape == weights.shape == (4, ROWS, 2)
    assert not np.asarray(weights[1:]).any()


@pytest.mark.parametrize("chunk", [1, 5, 12, 100])
def test_sums_and_gradient_equal_their_definition(chunk):
    batch, params, heads = rows(), tiny_params(MODEL, spread=3.0), random_heads()
    hidden = target_states(batch, params)
    loss, correct, counted = expected_sums(heads, np.asarray(hidden), batch)
    assert (counted > 5).all()
    scale = jnp.asarray([0.5, 1.5, 0.25], jnp.float32)
    targets, weights = head_targets(jax.tree.map(jnp.asarray, batch), HEADS)
    sums, grads = medusa_gradient(heads, hidden, targets, weights, scale, chunk=chunk)
    np.testing.assert_allclose(sums.loss_Y, loss, rtol=1e-5)
    np.testing.assert_array_equal(sums.correct_Y, correct)

    rng = np.random.default_rng(0)
    direction = {name: rng.normal(size=x.shape) for name, x in heads.items()}
    step, losses = 1e-5, []
    for sign in (1, -1):
        moved = {
            name: np.asarray(x, np.float64) + sign * step * direction[name]
            for name, x in heads.items()
        }
        losses.append(
            (np.asarray(scale) * expected_sums(moved, np.asarray(hidden), batch)[0]).sum()
        )
    slope = sum((np.asarray(g, np.float64) * direction[name]).sum() for name, g in grads.items())
    assert slope == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-4)


def test_a_step_reports_the_papers_loss(one_device):
    batch, params = rows(), tiny_params(MODEL, spread=3.0)
    heads = {
        "residual": np.zeros((HEADS, MODEL.embed_dim, MODEL.embed_dim)),
        "lm_head": np.repeat(np.asarray(params["lm_head"]["kernel"])[None], HEADS, axis=0),
    }
    loss, correct, counted = expected_sums(heads, np.asarray(target_states(batch, params)), batch)
    metrics = one_device[0][0]
    np.testing.assert_allclose(metrics["loss_Y"], loss / counted, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy_Y"], correct / counted, rtol=1e-5)
    expected = (np.array([0.5, 0.25, 0.125]) * loss / counted).sum()
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["tokens"] == ROWS * 10


def test_default_weights_are_powers_of_the_papers_constant():
    assert MedusaConfig().loss_weights == pytest.approx([0.8, 0.64, 0.512, 0.4096, 0.32768])


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_untrained_heads_predict_what_the_target_does(tied):
    model = dataclasses.replace(MODEL, tie_embeddings=tied)
    trainer = MedusaTrainer(CONFIG, model, make_mesh(ONE_DEVICE))
    params = tiny_params(model)
    heads = trainer.init_state(params).heads
    own = params["embed"]["embedding"] if tied else params["lm_head"]["kernel"]
    for k in range(HEADS):
        np.testing.assert_array_equal(heads["lm_head"][k], own)
    assert not np.asarray(heads["residual"]).any()


def test_the_heads_learn_and_the_target_stays():
    state, trunk, batch, step = start()
    before = jax.tree.map(np.array, trunk)
    losses = []
    for _ in range(60):
        state, metrics = step(state, trunk, batch, jnp.float32(0.2))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.2 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(trunk), before)


TOGETHER = pytest.mark.exhaustive("the axes and the accumulation are tested together")


@pytest.mark.parametrize(
    ("mesh", "accumulate"),
    [
        pytest.param(MeshConfig(data=8), 1, marks=TOGETHER),
        pytest.param(MeshConfig(fsdp=8), 1, marks=TOGETHER),
        pytest.param(MeshConfig(data=2, fsdp=2, tensor=2), 1, marks=TOGETHER),
        (MeshConfig(fsdp=2, tensor=4), 2),
        pytest.param(MeshConfig(), 4, marks=TOGETHER),
    ],
    ids=["data", "fsdp", "all axes", "sharded and accumulated", "accumulated"],
)
def test_meshes_and_accumulation_change_nothing(one_device, mesh, accumulate):
    history, heads = run(dataclasses.replace(CONFIG, accumulate=accumulate), mesh)
    for got, expected in zip(history, one_device[0], strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4), got, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), heads, one_device[1])


def test_target_and_heads_are_split_and_only_the_heads_are_float32():
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    config = dataclasses.replace(CONFIG, target_dtype="bfloat16", compute_dtype="bfloat16")
    state, trunk, batch, step = start(config, mesh)
    head, moment = state.heads["lm_head"], state.opt_state[1].mu["lm_head"]
    assert head.sharding.shard_shape(head.shape) == (HEADS, 32, 16)
    assert moment.sharding == head.sharding
    assert state.heads["residual"].sharding.shard_shape((HEADS, 32, 32)) == (HEADS, 16, 16)
    assert {leaf.dtype for leaf in jax.tree.leaves(trunk)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.heads)} == {jnp.dtype("float32")}
    _, metrics = step(state, trunk, batch, jnp.float32(0.5))
    assert np.isfinite(metrics["loss"])
    assert head.is_deleted()  # the state is donated
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(trunk))


def test_the_step_holds_no_logits_of_all_heads_or_of_a_whole_row():
    """At a vocabulary that dwarfs the rest, temporaries stay below one head's logits of the whole batch."""
    model = dataclasses.replace(MODEL, vocab_size=4096)
    config = dataclasses.replace(CONFIG, loss_chunk=2)
    trainer = MedusaTrainer(config, model, make_mesh(ONE_DEVICE))
    shape = jax.ShapeDtypeStruct((ROWS, 96), jnp.int32)
    batch = Batch(shape, shape, jax.ShapeDtypeStruct(shape.shape, jnp.float32), shape, shape)
    step = trainer.compile_step(trainer.abstract_state(), trainer.abstract_trunk(), batch)
    heads = 4 * HEADS * (4096 + model.embed_dim) * model.embed_dim  # the gradient
    row_logits = 4 * ROWS * 96 * 4096
    assert step.memory_analysis().temp_size_in_bytes < 3 * heads + row_logits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 0}, "num_heads=0 must be 1 to 64"),
        ({"decay": 0.0}, "decay=0.0 must be above 0"),
        ({"accumulate": 3}, "batch_size=8 does not divide into accumulate=3 parts"),
    ],
)
def test_impossible_values_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_meshes_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="= 2 rows do not divide over data x fsdp = 8"):
        MedusaTrainer(
            dataclasses.replace(CONFIG, accumulate=4), MODEL, make_mesh(MeshConfig(fsdp=8))
        )
    narrow = dataclasses.replace(MODEL, embed_dim=36)
    with pytest.raises(UserError, match="embed_dim=36 does not divide by mesh axis tensor=8"):
        MedusaTrainer(CONFIG, narrow, make_mesh(MeshConfig(tensor=8)))
