"""The compiled step: what it optimises, and that it does not depend on mesh, accumulation or rematerialisation."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config, tiny_params

from s2d_jax.errors import UserError
from s2d_jax.model.transformer import Transformer
from s2d_jax.sharding import MeshConfig, make_mesh
from s2d_jax.weights.checkpoints import placed
from train.config.sections import (
    Config,
    DataSection,
    DraftSection,
    ModelSection,
    OptimSection,
    TrainSection,
)
from train.data.batch import Batch
from train.plan.step_memory import shapes_of_batch
from train.step.optimizer import learning_rate
from train.step.trainer import Trainer

ROWS, LENGTH = 8, 12
ONE_DEVICE = MeshConfig()
UPDATE = np.bool_(True)
MODEL = tiny_config(num_layers=3, num_kv_heads=4)
SHARDED = MeshConfig(fsdp=2, tensor=4)
COMPARED = pytest.mark.exhaustive("test_sharded_training.py compares every mesh for 20 steps")


def config(mesh=ONE_DEVICE, **train) -> Config:
    return Config(
        model=ModelSection(path="tiny", compute_dtype="float32", remat="none"),
        data=DataSection(paths=("none",), max_length=LENGTH),
        draft=DraftSection(exit_layers=(1, 2, 3), exit_weights=(1.0, 2.0, 1.0)),
        optim=OptimSection(learning_rate=1e-2, weight_decay=0.1),
        mesh=mesh,
        train=TrainSection(batch_size=ROWS, loss_chunk=5, **train),
    )


def arrays():
    """Rows of two documents and some padding."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, MODEL.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    segments = np.repeat([[1] * 5 + [2] * 5 + [0] * 2], ROWS, axis=0).astype(np.int32)
    positions = np.repeat([[*range(5), *range(5), 0, 1]], ROWS, axis=0).astype(np.int32)
    weights = (rng.random((ROWS, LENGTH)) < 0.6).astype(np.float32)
    weights[:, [4, 9, 10, 11]] = 0
    return Batch(tokens, np.roll(tokens, -1, axis=1), weights, positions, segments)


@functools.cache
def trainer_of(config: Config) -> Trainer:
    return Trainer(config, MODEL, make_mesh(config.mesh))


@functools.cache
def step_of(config: Config):
    trainer = trainer_of(config)
    state = placed(trainer.abstract_state(), trainer.state_sharding)
    return trainer.compile_step(state, shapes_of_batch(ROWS, LENGTH))


def begun(config: Config):
    """The first state of a run, its compiled step and a batch."""
    trainer = trainer_of(config)
    batch = jax.device_put(arrays(), trainer.batch_sharding)
    return trainer.init_state(tiny_params(MODEL)), step_of(config), batch


def run(config: Config, steps: int = 3):
    """Metrics of some steps and the final parameters, on the host."""
    state, step, batch = begun(config)
    history = []
    for index in range(steps):
        state, metrics = step(state, (), batch, jnp.float32((index + 1) / (steps + 1)), UPDATE)
        history.append(jax.device_get(metrics))
    return history, jax.device_get(state.params)


@pytest.fixture(scope="module")
def one_device():
    return run(config())


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(config(mesh=MeshConfig(data=8)), id="data", marks=COMPARED),
        pytest.param(config(mesh=MeshConfig(fsdp=8)), id="fsdp", marks=COMPARED),
        pytest.param(config(mesh=MeshConfig(2, 2, 2)), id="all axes", marks=COMPARED),
        pytest.param(
            config(mesh=SHARDED, accumulate=2), id="sharded and accumulated", marks=COMPARED
        ),
        pytest.param(config(accumulate=4), id="accumulated", marks=COMPARED),
    ],
)
def test_losses_and_parameters_equal_one_devices(one_device, other):
    history, params = run(other)
    for got, expected in zip(history, one_device[0], strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4), got, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), params, one_device[1])


@pytest.mark.exhaustive("test_remat.py compares every policy")
def test_remat_changes_nothing(one_device):
    plain = config()
    remat = dataclasses.replace(plain, model=dataclasses.replace(plain.model, remat="block"))
    history, params = run(remat)
    expected = [m["loss"] for m in one_device[0]]
    np.testing.assert_allclose([m["loss"] for m in history], expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), params, one_device[1])


def test_loss_is_the_weighted_mean_of_what_each_exit_reads(one_device):
    batch, params = arrays(), tiny_params(MODEL)
    model = Transformer(MODEL)

    @jax.jit
    def read(params):
        hiddens = model.apply(
            {"params": params},
            batch.tokens_BT,
            exit_layers=(1, 2, 3),
            positions_BT=batch.positions_BT,
            segment_ids_BT=batch.segment_ids_BT,
            method="exit_hiddens",
        )
        return [model.apply({"params": params}, h, method="logits") for h in hiddens]

    losses, accuracies = [], []
    for logits in read(params):
        logits = np.asarray(logits, np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        picked = np.take_along_axis(log_probs, batch.targets_BT[..., None], -1)[..., 0]
        losses.append(-(picked * batch.weights_BT).sum() / batch.weights_BT.sum())
        correct = logits.argmax(-1) == batch.targets_BT
        accuracies.append((correct * batch.weights_BT).sum() / batch.weights_BT.sum())
    metrics = one_device[0][0]
    np.testing.assert_allclose(metrics["loss_E"], losses, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy_E"], accuracies, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], np.average(losses, weights=[1, 2, 1]), rtol=1e-5)
    assert metrics["tokens"] == ROWS * 10


def test_no_attention_across_documents():
    """A packed document's loss equals its loss alone."""
    batch, trainer = arrays(), trainer_of(config())
    params = jax.device_put(tiny_params(MODEL), trainer.state_sharding.params)
    second = dataclasses.replace(batch, weights_BT=batch.weights_BT * (batch.segment_ids_BT == 2))
    alone = jax.tree.map(lambda x: np.pad(x[:, 5:10], ((0, 0), (0, LENGTH - 5))), second)
    evaluate = trainer.compile_eval(params, jax.device_put(batch, trainer.batch_sharding))
    packed = evaluate(params, jax.device_put(second, trainer.batch_sharding))
    apart = evaluate(params, jax.device_put(alone, trainer.batch_sharding))
    assert np.any(packed["ce"])
    np.testing.assert_allclose(packed["ce"][..., 5:10], apart["ce"][..., :5], rtol=1e-5)
    np.testing.assert_array_equal(packed["best"][..., 5:10], apart["best"][..., :5])


def test_training_learns_and_clips(one_device):
    history, _ = run(config(), steps=30)
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert np.isfinite([m["grad_norm"] for m in history]).all()


def test_bfloat16_computes_over_float32_masters(one_device):
    plain = config()
    half = dataclasses.replace(
        plain, model=dataclasses.replace(plain.model, compute_dtype="bfloat16")
    )
    history, params = run(half)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    expected = [m["loss"] for m in one_device[0]]
    np.testing.assert_allclose([m["loss"] for m in history], expected, rtol=1e-2)


def test_the_state_is_donated_and_sharded():
    state, step, batch = begun(config(SHARDED, accumulate=2))
    kernel = state.params["layers_0"]["attn"]["q_proj"]["kernel"]
    moment = state.opt_state[1].mu["layers_0"]["attn"]["q_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (8, 16)
    assert moment.sharding == kernel.sharding
    step(state, (), batch, jnp.float32(0.5), UPDATE)
    assert kernel.is_deleted()
    assert moment.is_deleted()


def reference_step(params, moments, grads, count, rate, section):
    """AdamW after clipping by the global norm, in float64; Loshchilov & Hutter 2019, algorithm 2."""
    norm = np.sqrt(sum((g**2).sum() for g in grads))
    assert norm > section.clip_norm, "the test is about clipping"
    new_params, new_moments = [], []
    for p, (m, v), g in zip(params, moments, grads, strict=True):
        g = g * (section.clip_norm / norm)
        m = section.beta1 * m + (1 - section.beta1) * g
        v = section.beta2 * v + (1 - section.beta2) * g**2
        m_hat, v_hat = m / (1 - section.beta1**count), v / (1 - section.beta2**count)
        step = m_hat / (np.sqrt(v_hat) + section.epsilon)
        decay = section.weight_decay if p.ndim == 2 else 0.0
        new_params.append(p - rate * (step + decay * p))
        new_moments.append((m, v))
    return new_params, new_moments


def test_steps_equal_a_numpy_reference():
    """Warm-up, then the cosine; epsilon is of the size of clipped gradients, else Adam would hide the clipping."""
    section = OptimSection(
        learning_rate=0.05,
        weight_decay=0.2,
        clip_norm=0.1,
        epsilon=1e-3,
        beta1=0.8,
        beta2=0.9,
        warmup_fraction=0.5,
        final_fraction=0.1,
    )
    trainer = Trainer(dataclasses.replace(config(), optim=section), MODEL, make_mesh(MeshConfig()))
    batch = jax.device_put(arrays(), trainer.batch_sharding)
    scale = 1 / batch.weights_BT.sum()
    gradient = jax.jit(jax.grad(lambda params: trainer._loss(params, {}, (), batch, scale)[0]))
    state = trainer.init_state(tiny_params(MODEL))
    step = trainer.compile_step(state, batch)
    wide = lambda tree: [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]  # noqa: E731
    params = wide(state.params)
    moments = [(np.zeros_like(p), np.zeros_like(p)) for p in params]
    rates = {0.25: 0.025, 0.75: 0.05 * (0.1 + 0.9 * 0.5), 1.0: 0.005}
    for count, (progress, rate) in enumerate(rates.items(), start=1):
        grads = wide(gradient(state.params))
        params, moments = reference_step(params, moments, grads, count, rate, section)
        state, metrics = step(state, (), batch, jnp.float32(progress), UPDATE)
        assert float(metrics["learning_rate"]) == pytest.approx(rate, rel=1e-5)
        assert float(metrics["grad_norm"]) == pytest.approx(
            np.sqrt(sum((g**2).sum() for g in grads)), rel=1e-4
        )
        for ours, expected in zip(wide(state.params), params, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_step_that_does_not_update_gives_the_state_back():
    state, step, batch = begun(config())
    state, first = step(state, (), batch, jnp.float32(0.5), UPDATE)
    before = jax.tree.map(np.array, state)  # a copy: the next call donates the state
    state, tried = step(state, (), batch, jnp.float32(0.5), ~UPDATE)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)
    state, taken = step(state, (), batch, jnp.float32(0.5), UPDATE)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(tried), jax.device_get(taken))
    assert taken["loss"] < first["loss"]
    norm = np.sqrt(
        sum((np.asarray(x, np.float64) ** 2).sum() for x in jax.tree.leaves(before.params))
    )
    assert float(tried["param_norm"]) == pytest.approx(norm, rel=1e-5)


def test_schedule_warms_up_and_follows_a_cosine():
    section = OptimSection(learning_rate=2.0, warmup_fraction=0.1, final_fraction=0.1)
    rates = [float(learning_rate(jnp.float32(p), section)) for p in (0.05, 0.1, 0.55, 1.0, 1.5)]
    middle = 2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert rates == pytest.approx([1.0, 2.0, middle, 0.2, 0.2], rel=1e-5)


def test_a_mesh_larger_than_the_machine_is_refused():
    with pytest.raises(UserError, match="needs 16 devices, 8 are present"):
        make_mesh(MeshConfig(data=16))
