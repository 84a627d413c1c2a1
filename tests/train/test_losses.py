"""The sorted loss against its definition in NumPy, in value and in gradient, and what it does not compute."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.objective.divergences import cross_entropy
from train.objective.labels import Labels
from train.objective.sorted_loss import sorted_loss, values_of_positions

B, T, D, V, E = 3, 7, 5, 11, 3
EXIT_WEIGHTS = (1.0, 0.5, 2.0)


def token_values(learned, fixed, h_EBWD, labels):
    logits = (h_EBWD @ learned["kernel"].T).astype(jnp.float32)
    targets_EBW = jnp.broadcast_to(labels.targets_BT[None], logits.shape[:-1])
    ce_EBW = cross_entropy(jax.nn.log_softmax(logits), targets_EBW)
    correct_EBW = (jnp.argmax(logits, -1) == targets_EBW).astype(jnp.float32)
    return {"loss": ce_EBW, "correct": correct_EBW}


@pytest.fixture
def problem():
    """Head, states and labels; the rows count 7, 3 and 0 positions."""
    rng = np.random.default_rng(0)
    head = {"kernel": rng.normal(size=(V, D)).astype(np.float32)}
    hiddens = tuple(rng.normal(size=(B, T, D)).astype(np.float32) for _ in range(E))
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    weights = np.array([[1] * 7, [0, 1, 0, 0, 1, 1, 0], [0] * 7], np.float32)
    return jax.device_put((head, hiddens, Labels(targets, weights)))


def reference(head, hiddens, labels):
    """Per exit and position, in float64: -log p(target), and whether the argmax is the target."""
    targets, losses, corrects = np.asarray(labels.targets_BT), [], []
    for h in hiddens:
        logits = np.asarray(h, np.float64) @ np.asarray(head["kernel"], np.float64).T
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses.append(-np.take_along_axis(log_probs, targets[..., None], -1)[..., 0])
        corrects.append(logits.argmax(-1) == targets)
    return np.array(losses), np.array(corrects)


def loss_of(problem, chunk, exit_weights=EXIT_WEIGHTS, **options):
    head, hiddens, labels = problem
    weights = {"exit_weights": exit_weights, "chunk": chunk}
    return sorted_loss(token_values, head, None, hiddens, labels, **weights, **options)


@functools.partial(jax.jit, static_argnums=(1, 2))
def compiled_loss(problem, chunk, exit_weights):
    return loss_of(problem, chunk, exit_weights)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_sorted_loss_is_the_weighted_mean_of_the_exits_losses(problem, chunk):
    loss, sums = compiled_loss(problem, chunk, EXIT_WEIGHTS)
    losses, corrects = reference(*problem)
    weights = np.asarray(problem[2].weights_BT)
    losses_E = (losses * weights).sum((1, 2))
    expected = (np.array(EXIT_WEIGHTS) * losses_E).sum() / sum(EXIT_WEIGHTS)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(sums["loss"], losses_E, rtol=1e-5)
    np.testing.assert_array_equal(sums["correct"], (corrects * weights).sum((1, 2)))


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_values_come_back_to_their_positions(problem, chunk):
    labels = problem[2]
    read = jax.jit(lambda problem: values_of_positions(token_values, *problem, chunk=chunk))
    values = read(problem)
    losses, corrects = reference(*problem)
    counts = np.asarray(labels.weights_BT) > 0
    np.testing.assert_allclose(values["loss"], np.where(counts, losses, 0), rtol=1e-5)
    np.testing.assert_array_equal(values["correct"], np.where(counts, corrects, 0))


def test_equal_weights_are_the_unweighted_mean(problem):
    loss, sums = compiled_loss(problem, 4, (1.0,) * E)
    np.testing.assert_allclose(loss, np.asarray(sums["loss"]).mean(), rtol=1e-5)


def plain_loss(head, hiddens, labels):
    total = jnp.float32(0)
    for h, share in zip(hiddens, EXIT_WEIGHTS, strict=True):
        values = token_values(head, None, h[None], labels)["loss"][0]
        total = total + share * jnp.sum(values * labels.weights_BT)
    return 3.0 * total / sum(EXIT_WEIGHTS)


@pytest.mark.parametrize("chunk", [2, 7])
def test_gradient_equals_that_of_the_plain_definition(problem, chunk):
    head, hiddens, labels = problem
    expected = jax.jit(jax.grad(plain_loss, argnums=(0, 1)))(head, hiddens, labels)

    def chunked(head, hiddens):
        return 3.0 * loss_of((head, hiddens, labels), chunk)[0]

    got = jax.jit(jax.grad(chunked, argnums=(0, 1)))(head, hiddens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)


def test_frozen_states_get_no_gradient_and_cost_none(problem):
    head, hiddens, labels = problem
    expected = jax.jit(jax.grad(plain_loss))(head, hiddens, labels)

    def chunked(head):
        return 3.0 * loss_of((head, hiddens, labels), 3, through_hiddens=False)[0]

    gradient = jax.jit(jax.grad(chunked))
    np.testing.assert_allclose(gradient(head)["kernel"], expected["kernel"], atol=1e-5)
    assert f"f32[{E},{B},9,{D}]" not in gradient.lower(head).as_text("hlo")


@pytest.mark.parametrize(
    ("counted", "chunk", "expected"), [(7, 3, 3), (3, 3, 1), (4, 3, 2), (0, 3, 0)]
)
def test_only_chunks_that_count_are_read(problem, counted, chunk, expected):
    head, hiddens, labels = problem
    weights, seen = np.zeros((B, T), np.float32), []
    weights[1, T - counted :] = 1.0

    def counting(learned, fixed, h_EBWD, labels):
        jax.debug.callback(lambda: seen.append(1), ordered=False)
        return token_values(learned, fixed, h_EBWD, labels)

    labels = labels.replace(weights_BT=jnp.asarray(weights))
    loss, _ = sorted_loss(
        counting, head, None, hiddens, labels, exit_weights=EXIT_WEIGHTS, chunk=chunk
    )
    jax.block_until_ready(loss)
    jax.effects_barrier()
    assert len(seen) == expected


def test_no_array_holds_the_logits_of_all_positions(problem):
    head, hiddens, labels = problem

    def loss(head, hiddens):
        return loss_of((head, hiddens, labels), 1)[0]

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(head, hiddens).compile().as_text()
    assert f"f32[{E},{B},1,{V}]" in text
    assert f"{T},{V}]" not in text
    assert f"[{B * T},{V}]" not in text
