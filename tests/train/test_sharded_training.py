"""Eight devices compute what one computes; each holds its share; and what no rule names is refused."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hf_tiny import expect_user_error
from tiny import tiny_config, tiny_params

from s2d_jax.sharding import MeshConfig, make_mesh, optimizer_sharding, params_sharding, replicated
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
from train.step.trainer import Trainer, TrainState

ROWS, LENGTH, STEPS, RATE = 8, 12, 20, 0.3
MODEL = tiny_config(num_layers=3, num_heads=8, num_kv_heads=8, head_dim=8, ffw_dim=64)
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(fsdp=8),
    "tensor": MeshConfig(tensor=8),
    "all axes": MeshConfig(data=2, fsdp=2, tensor=2),
    "accumulated": MeshConfig(fsdp=4, tensor=2),
}


ONE_DEVICE = MeshConfig()
ADAMW = OptimSection(learning_rate=1e-3)
GRADIENTS = OptimSection(learning_rate=1e-3, beta1=0.0, clip_norm=1e9)


def config(mesh=ONE_DEVICE, *, optim=ADAMW, accumulate=1) -> Config:
    return Config(
        model=ModelSection(path="tiny", compute_dtype="float32", remat="none"),
        data=DataSection(paths=("none",), max_length=LENGTH),
        draft=DraftSection(exit_layers=(1, 2, 3), exit_weights=(1.0, 2.0, 1.0)),
        optim=optim,
        mesh=mesh,
        train=TrainSection(batch_size=ROWS, loss_chunk=5, accumulate=accumulate),
    )


def batches() -> list[Batch]:
    """Two in alternation: rows of two documents and some padding."""
    rng = np.random.default_rng(3)
    found = []
    for _ in range(2):
        tokens = rng.integers(0, MODEL.vocab_size, (ROWS, LENGTH)).astype(np.int32)
        segments = np.repeat([[1] * 5 + [2] * 5 + [0] * 2], ROWS, axis=0).astype(np.int32)
        positions = np.repeat([[*range(5), *range(5), 0, 1]], ROWS, axis=0).astype(np.int32)
        weights = (rng.random((ROWS, LENGTH)) < 0.6).astype(np.float32)
        weights[:, [4, 9, 10, 11]] = 0
        found.append(Batch(tokens, np.roll(tokens, -1, axis=1), weights, positions, segments))
    return found * (STEPS // 2)


@functools.cache
def compiled(config: Config):
    """A trainer and its step."""
    trainer = Trainer(config, MODEL, make_mesh(config.mesh))
    state = placed(trainer.abstract_state(), trainer.state_sharding)
    return trainer, trainer.compile_step(state, shapes_of_batch(ROWS, LENGTH))


@jax.jit
def copied(params):
    return jax.tree.map(jnp.copy, params)


@jax.jit
def descended(params, gradients):
    return jax.tree.map(lambda p, g: p - RATE * g, params, gradients)


def run(config: Config, plain_descent: bool = False):
    """Losses of 20 steps, the gradients of the first, and the last parameters, on the host.

    With `beta1` 0 and no clipping, Adam's first moment is the gradient itself: so the real step tells it, and the rule of
    plain gradient descent is applied here.
    """
    trainer, step = compiled(config)
    state = trainer.init_state(tiny_params(MODEL))
    losses, first = [], None
    for batch in batches():
        batch = jax.device_put(batch, trainer.batch_sharding)
        before = copied(state.params) if plain_descent else None
        state, metrics = step(state, (), batch, jnp.float32(0.5), jnp.bool_(True))
        losses.append(float(metrics["loss"]))
        gradients = state.opt_state[1].mu
        first = jax.device_get(gradients) if first is None else first
        if plain_descent:
            state = TrainState(descended(before, gradients), state.opt_state)
    return np.array(losses), first, jax.device_get(state.params)


@pytest.fixture(scope="module")
def descent_alone():
    return run(config(optim=GRADIENTS), plain_descent=True)


@pytest.fixture(scope="module")
def losses_alone():
    return run(config())[0]


def relative_errors(got, expected) -> list[float]:
    """Of each array, the norm of the difference by its own norm."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs]


def cases(*names: str) -> list:
    """All meshes; `make test` runs those named."""
    left = pytest.mark.exhaustive(
        "each axis is in `all axes`; test_processes.py has AdamW on a mesh"
    )
    return [name if name in names else pytest.param(name, marks=left) for name in MESHES]


@pytest.mark.parametrize("name", cases("all axes", "accumulated"))
def test_gradients_and_plain_descent_equal_one_devices(descent_alone, name):
    """f32: gradients to 1e-5, parameters after 20 steps of gradient descent to 1e-5, both by the norm of each array."""
    losses, gradients, params = descent_alone
    parts = 2 if name == "accumulated" else 1
    found = run(config(MESHES[name], optim=GRADIENTS, accumulate=parts), plain_descent=True)
    assert max(relative_errors(found[1], gradients)) < 1e-5
    assert max(relative_errors(found[2], params)) < 1e-5
    assert losses[-1] < losses[0] - 0.01, "twenty steps that change nothing would prove nothing"


@pytest.mark.parametrize("name", cases())
def test_losses_of_twenty_steps_equal_one_devices(losses_alone, name):
    """f32, AdamW with clipping: to 1e-4."""
    parts = 2 if name == "accumulated" else 1
    losses = run(config(MESHES[name], accumulate=parts))[0]
    np.testing.assert_allclose(losses, losses_alone, rtol=1e-4)


def test_eight_devices_hold_an_eighth_of_parameters_and_moments():
    trainer = Trainer(config(MeshConfig(fsdp=8)), MODEL, make_mesh(MeshConfig(fsdp=8)))
    state = trainer.init_state(tiny_params(MODEL))
    arrays = jax.tree.leaves(state)
    whole = sum(x.nbytes for x in arrays)
    held = [sum(x.addressable_shards[i].data.nbytes for x in arrays) for i in range(8)]
    assert whole > 3 * sum(x.nbytes for x in jax.tree.leaves(state.params)) * 0.99
    assert max(held) <= whole / 7


def test_eight_devices_hold_a_seventh_of_the_papers_draft_at_most():
    """The first 12 layers of Vicuna-7B: norms and counters are on every device."""
    model = tiny_config(
        32_000, 12, embed_dim=4096, ffw_dim=11_008, num_heads=32, num_kv_heads=32, head_dim=128
    )
    trainer = Trainer(config(MeshConfig(fsdp=8)), model, make_mesh(MeshConfig(fsdp=8)))
    shapes, shardings = trainer.abstract_state(), trainer.state_sharding
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    whole = held = 0
    for x, sharding in leaves:
        whole += x.size * x.dtype.itemsize
        held += int(np.prod(sharding.shard_shape(x.shape))) * x.dtype.itemsize
    assert held <= whole / 7


def test_optimizer_state_that_belongs_to_no_parameter_is_refused():
    mesh = make_mesh(MeshConfig(fsdp=8))
    params = tiny_params(MODEL)
    shardings = jax.tree.map(lambda _: replicated(mesh), params)
    history = optax.GradientTransformation(
        lambda _: {"losses": jnp.zeros(100)}, lambda updates, state, params=None: (updates, state)
    )
    state = jax.eval_shape(history.init, params)
    with pytest.raises(ValueError, match=r"no rule for optimizer state of shape \(100,\), which"):
        optimizer_sharding(history, state, shardings, mesh)


def fake_devices(slices: int, per_slice: int) -> list:
    """What a mesh asks of devices; they lie mixed."""
    return [
        SimpleNamespace(
            id=s * per_slice + i, slice_index=s, process_index=s, platform="cpu", device_kind="cpu"
        )
        for i in range(per_slice)
        for s in range(slices)
    ]


@pytest.mark.parametrize("slices", [None, 2])
def test_the_data_axis_lies_between_slices(monkeypatch, slices):
    laid, any_mesh = [], make_mesh(ONE_DEVICE)

    def made(devices, *_, **__):
        laid.extend(devices)
        return any_mesh  # JAX makes no mesh of devices that are none

    monkeypatch.setattr("s2d_jax.sharding.Mesh", made)
    make_mesh(MeshConfig(data=4, fsdp=2, slices=slices), fake_devices(2, 4))
    found = [[[d.slice_index for d in tensor] for tensor in fsdp] for fsdp in laid]
    assert found == [[[0], [0]], [[0], [0]], [[1], [1]], [[1], [1]]]


@pytest.mark.parametrize(
    ("mesh", "devices", "message"),
    [
        ({"fsdp": 8}, fake_devices(2, 4), "mesh.data=1 does not divide over 2 slices; choose a mu"),
        ({"data": 8, "slices": 4}, fake_devices(2, 4), "mesh.slices=4, but the devices lie in 2 sl"),
        ({"data": 4}, fake_devices(2, 4), "takes 4 of 8 devices, which belong to several processes"),
        ({"data": 2, "slices": 2}, None, "mesh.slices=2, but the devices lie in 1 processes; set it"),
    ],
)  # fmt: skip
def test_a_mesh_that_does_not_fit_the_slices_is_refused(mesh, devices, message):
    with expect_user_error(message):
        make_mesh(MeshConfig(**mesh), devices)


def test_slices_that_do_not_divide_are_refused_at_once():
    with expect_user_error("mesh.data=3 does not divide over 2 slices; choose a multiple of 2, or"):
        MeshConfig(data=3, slices=2)


def test_a_batch_is_split_by_rule():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    trainer = Trainer(config(MeshConfig(data=2, fsdp=2, tensor=2)), MODEL, mesh)
    assert trainer.batch_sharding.shard_shape((ROWS, LENGTH)) == (ROWS // 4, LENGTH)
    axes = dataclasses.replace(MODEL, num_layers=1)
    with pytest.raises(ValueError, match="no rule for axis 'experts'"):
        params_sharding(axes, {"router": ("experts", "embed")}, mesh)


def test_with_fsdp_parameters_travel_and_activations_stay_split_over_rows():
    text = compiled(config(MeshConfig(fsdp=8)))[1].as_text()
    assert f"f32[{ROWS * LENGTH // 8},{MODEL.embed_dim}]" in text
    # No product takes all rows; the embedding's lookup may, a part of the columns at a time.
    for columns in (MODEL.embed_dim, MODEL.ffw_dim):
        assert f"f32[{ROWS * LENGTH},{columns}]" not in text
