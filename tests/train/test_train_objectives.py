"""The compiled step with teachers, lists of tokens and frozen trunks: what it minimises, and what it leaves alone."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from test_train_step import MODEL, ONE_DEVICE, UPDATE, arrays, config
from tiny import logits_at_exits, tiny_config, tiny_params

from s2d_jax.model.exit_parts import init_exit_parts
from s2d_jax.model.lora import LoraConfig, init_lora
from s2d_jax.sharding import MeshConfig, make_mesh
from train.config.sections import Config, ObjectiveSection
from train.data.batch import TopK
from train.objective.trainable import part_of
from train.step.trainer import Trainer

TEACHER = tiny_config(num_layers=2, num_kv_heads=4)
SHARES = np.array([0.25, 0.5, 0.25])
LISTED = np.arange(0, MODEL.vocab_size, 3, dtype=np.int32)


def with_objective(mesh=ONE_DEVICE, draft=None, model=None, **objective) -> Config:
    plain = config(mesh)
    return dataclasses.replace(
        plain,
        objective=ObjectiveSection(**objective),
        draft=dataclasses.replace(plain.draft, **(draft or {})),
        model=dataclasses.replace(plain.model, **(model or {})),
    )


def teacher_params(seed=5):
    return tiny_params(TEACHER, seed=seed, spread=4.0)


@functools.cache
def trainer_of(config: Config, num_teachers: int, listed: bool) -> Trainer:
    shapes = (TEACHER,) * num_teachers
    return Trainer(config, MODEL, make_mesh(config.mesh), shapes, LISTED if listed else None)


_STEPS = {}


def step_of(trainer: Trainer, *arguments):
    """Compiled once for each trainer."""
    if trainer not in _STEPS:
        _STEPS[trainer] = trainer.compile_step(*arguments)
    return _STEPS[trainer]


def metrics_of(config, *, teachers=(), params=None, top_k=(), listed=False, steps=1):
    """Metrics of every step and the parameters after the last, on the host."""
    trainer = trainer_of(config, len(teachers), listed)
    batch = jax.device_put(arrays().replace(top_k=top_k), trainer.batch_sharding)
    state = trainer.init_state(tiny_params(MODEL) if params is None else params)
    placed = jax.device_put(teachers, trainer.teacher_sharding)
    step = step_of(trainer, state, batch, placed)
    history = []
    for _ in range(steps):
        state, metrics = step(state, placed, batch, jnp.float32(0.5), UPDATE)
        history.append(jax.device_get(metrics))
    return history, jax.device_get(state.params)


def log_probs_of(model_config, params, exit_layers, entries=None):
    """Log-probabilities in float64 `[E, B, T, V]`, or over some entries."""
    logits = np.asarray(logits_at_exits(model_config, params, arrays(), exit_layers), np.float64)
    logits = logits if entries is None else logits[..., entries]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


ALSO = pytest.mark.exhaustive("test_objectives.py compares every divergence with NumPy")
DIVERGENCES = {
    "forward_kl": lambda p, q: (np.exp(p) * (p - q)).sum(-1),
    "reverse_kl": lambda p, q: (np.exp(q) * (q - p)).sum(-1),
    "tvd": lambda p, q: 0.5 * np.abs(np.exp(p) - np.exp(q)).sum(-1),
}


def distilling(mesh=ONE_DEVICE, teachers=("a", "b"), **changes):
    objective = {"ce_weight": 0.3, "distill_weight": 0.7, "teacher_dtype": "float32"}
    return with_objective(mesh, teachers=teachers, **{**objective, **changes})


def mean(values_EBT):
    """Per exit, over the tokens that count."""
    weights = arrays().weights_BT
    return (values_EBT * weights).sum((1, 2)) / weights.sum()


@pytest.mark.parametrize(
    "kind",
    [
        "forward_kl",
        *(pytest.param(kind, marks=ALSO) for kind in ("reverse_kl", "tvd")),
    ],
)
def test_distillation_is_the_mean_divergence_from_the_teachers_mixed_with_cross_entropy(kind):
    teachers = (teacher_params(5), teacher_params(6))
    ((metrics,), _) = metrics_of(distilling(divergence=kind), teachers=teachers)
    log_q = log_probs_of(MODEL, tiny_params(MODEL), (1, 2, 3))
    apart = [DIVERGENCES[kind](log_probs_of(TEACHER, t, (2,)), log_q) for t in teachers]
    divergence_E = mean(np.mean(apart, axis=0))
    targets = arrays().targets_BT[None, ..., None]
    ce_E = mean(-np.take_along_axis(log_q, np.repeat(targets, 3, 0), -1)[..., 0])
    np.testing.assert_allclose(metrics["divergence_E"], divergence_E, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss_E"], ce_E, rtol=1e-4)
    expected = (SHARES * (0.3 * ce_E + 0.7 * divergence_E)).sum()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)


@pytest.mark.exhaustive(
    "the divergence is compared with NumPy, and a run with a teacher tells its own"
)
def test_distilling_learns_the_teacher_and_leaves_it_alone():
    teacher = teacher_params()
    before = jax.device_get(teacher)
    given = distilling(teachers=("a",), ce_weight=0.0, distill_weight=1.0)
    history, _ = metrics_of(given, teachers=(teacher,), steps=40)
    first, last = (h["divergence_E"] for h in (history[0], history[-1]))
    assert (last < 0.6 * first).all()
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(teacher))


def top_k_of(log_p_BTV, K):
    ids = np.argsort(-log_p_BTV, axis=-1, kind="stable")[..., :K].astype(np.int32)
    return TopK(ids, np.take_along_axis(log_p_BTV, ids, -1).astype(np.float32))


@pytest.mark.parametrize(
    "kind", ["forward_kl", *(pytest.param(kind, marks=ALSO) for kind in ("reverse_kl", "tvd"))]
)
def test_stored_probabilities_of_all_tokens_equal_the_running_teacher(kind):
    given = distilling(teachers=("a",), divergence=kind, teacher_top_k=MODEL.vocab_size)
    stored = top_k_of(log_probs_of(TEACHER, teacher_params(), (2,))[0], MODEL.vocab_size)
    ((got,), _) = metrics_of(given, top_k=(stored,))
    twice = (teacher_params(),) * 2  # whose mean is the one's
    ((expected,), _) = metrics_of(distilling(divergence=kind), teachers=twice)
    np.testing.assert_allclose(got["loss"], expected["loss"], rtol=1e-3)
    np.testing.assert_allclose(got["grad_norm"], expected["grad_norm"], rtol=1e-2)


@pytest.mark.exhaustive("test_objectives.py compares stored tokens with NumPy")
def test_fewer_stored_tokens_are_a_lower_bound():
    log_p = log_probs_of(TEACHER, teacher_params(), (2,))[0]
    values = []
    for K in (4, 16, MODEL.vocab_size):
        given = distilling(teachers=("a",), divergence="forward_kl", teacher_top_k=K)
        ((metrics,), _) = metrics_of(given, top_k=(top_k_of(log_p, K),))
        values.append(metrics["divergence_E"])
    assert (values[0] < values[1]).all()
    assert (values[1] < values[2]).all()


def test_a_list_of_tokens_is_what_heads_and_teachers_are_read_over():
    given = distilling(teachers=("a",))
    ((metrics,), _) = metrics_of(given, teachers=(teacher_params(),), listed=True)
    log_q = log_probs_of(MODEL, tiny_params(MODEL), (1, 2, 3), LISTED)
    log_p = log_probs_of(TEACHER, teacher_params(), (2,), LISTED)
    np.testing.assert_allclose(
        metrics["divergence_E"], mean(DIVERGENCES["forward_kl"](log_p, log_q)), rtol=1e-4
    )
    targets = arrays().targets_BT
    listed = np.isin(targets, LISTED)
    index = np.where(listed, targets // 3, 0)[None, ..., None]
    ce = -np.take_along_axis(log_q, np.repeat(index, 3, 0), -1)[..., 0] * listed
    np.testing.assert_allclose(metrics["loss_E"], mean(ce), rtol=1e-4)
    best = LISTED[log_q.argmax(-1)]
    np.testing.assert_allclose(metrics["accuracy_E"], mean(best == targets), rtol=1e-5)


PARTS = {
    "exit_heads": {"draft": {"exit_heads": (1, 2)}},
    "exit_adapters": {"draft": {"exit_adapters": (1, 2), "adapter_rank": 4}},
    "lora": {"model": {"lora_rank": 2}},
}


IN_A_RUN = pytest.mark.exhaustive("test_train_teachers.py has a run whose heads and adapters learn")


def started(given: Config):
    params = init_exit_parts(MODEL, tiny_params(MODEL), given.draft.parts, jax.random.key(1))
    if given.model.lora_rank:
        params = init_lora(params, LoraConfig(given.model.lora_rank), jax.random.key(2))
    return params


@pytest.mark.parametrize(
    "part",
    [
        "lora",
        *(pytest.param(part, marks=IN_A_RUN) for part in ("exit_heads", "exit_adapters")),
    ],
)
def test_only_the_named_part_learns(part):
    given = with_objective(**PARTS[part])
    assert given.learned_parts == (part,)
    before = flatten_dict(jax.device_get(started(given)))
    history, after = metrics_of(given, params=started(given), steps=30)
    assert history[-1]["loss"] < history[0]["loss"]
    changed = {path for path, value in flatten_dict(after).items() if (value != before[path]).any()}
    assert {part_of(path) for path in changed} == {part}
    ((plain,), _) = metrics_of(config())  # the parts begin as if they were not there
    np.testing.assert_allclose(history[0]["loss"], plain["loss"], rtol=1e-4)


@pytest.mark.exhaustive("a run on a mesh with a teacher is tested in two processes")
def test_teachers_and_parts_are_alike_on_a_mesh():
    teachers = (teacher_params(5), teacher_params(6))
    draft = {"exit_heads": (1,), "exit_adapters": (2,), "adapter_rank": 4}
    found = []
    for mesh in (ONE_DEVICE, MeshConfig(data=2, fsdp=2, tensor=2)):
        given = distilling(mesh, draft=draft, model={"lora_rank": 2})
        assert set(given.learned_parts) == set(PARTS)
        found.append(metrics_of(given, teachers=teachers, params=started(given), steps=3))
    one, eight = found
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), eight, one)
    for got, expected in zip(eight[0], one[0], strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4), got, expected)


def test_moments_are_kept_for_what_learns_only():
    given = with_objective(**PARTS["exit_adapters"])
    trainer = Trainer(given, MODEL, make_mesh(given.mesh))
    moments = flatten_dict(trainer.abstract_state().opt_state[1].mu)
    assert {part_of(path) for path in moments} == {"exit_adapters"}


def test_a_frozen_trunk_is_not_differentiated():
    """Without a backward pass the step multiplies about a third as often."""

    def flops(given, params):
        trainer = trainer_of(given, 0, listed=False)
        step = step_of(trainer, trainer.init_state(params), arrays())
        return step.cost_analysis()["flops"]

    adapters = with_objective(**PARTS["exit_adapters"])
    assert flops(adapters, started(adapters)) < 0.5 * flops(config(), tiny_params(MODEL))
