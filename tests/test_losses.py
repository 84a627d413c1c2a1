"""The sorted loss against its definition in NumPy, in value and in gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.losses import exit_sums, sorted_loss

B, T, D, V, E = 2, 7, 5, 11, 3
EXIT_WEIGHTS = (1.0, 0.5, 2.0)


def read_logits(head, h):
    return (h @ head["kernel"].T).astype(jnp.float32)


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    head = {"kernel": jnp.asarray(rng.normal(size=(V, D)), jnp.float32)}
    hiddens = tuple(jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32) for _ in range(E))
    targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 2, (B, T)), jnp.float32)
    return head, hiddens, targets, weights


def reference(head, hiddens, targets, weights):
    """Per exit, in float64: sum over counted tokens of -log p(target), and correct predictions."""
    targets, weights, losses, corrects = np.asarray(targets), np.asarray(weights), [], []
    for h in hiddens:
        logits = np.asarray(h, np.float64) @ np.asarray(head["kernel"], np.float64).T
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        picked = np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
        losses.append(-(picked * weights).sum())
        corrects.append(((logits.argmax(-1) == targets) * weights).sum())
    return np.array(losses), np.array(corrects)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_sorted_loss_is_the_weighted_mean_of_the_exits_cross_entropies(problem, chunk):
    loss, sums = sorted_loss(read_logits, *problem, exit_weights=EXIT_WEIGHTS, chunk=chunk)
    losses, corrects = reference(*problem)
    expected = (np.array(EXIT_WEIGHTS) * losses).sum() / sum(EXIT_WEIGHTS)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(sums.loss_E, losses, rtol=1e-5)
    np.testing.assert_array_equal(sums.correct_E, corrects)
    evaluated = exit_sums(read_logits, *problem, chunk=chunk)
    np.testing.assert_allclose(evaluated.loss_E, losses, rtol=1e-5)
    np.testing.assert_array_equal(evaluated.correct_E, corrects)


def test_equal_weights_are_the_unweighted_mean(problem):
    loss, _ = sorted_loss(read_logits, *problem, exit_weights=(1.0,) * E, chunk=4)
    np.testing.assert_allclose(loss, reference(*problem)[0].mean(), rtol=1e-5)


@pytest.mark.parametrize("chunk", [2, 7])
def test_gradient_equals_that_of_the_plain_definition(problem, chunk):
    head, hiddens, targets, weights = problem

    def plain(head, hiddens):
        total = jnp.float32(0)
        for h, share in zip(hiddens, EXIT_WEIGHTS, strict=True):
            log_probs = jax.nn.log_softmax(read_logits(head, h))
            picked = jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
            total = total - share * jnp.sum(picked * weights)
        return 3.0 * total / sum(EXIT_WEIGHTS)

    def chunked(head, hiddens):
        arguments = (read_logits, head, hiddens, targets, weights)
        return 3.0 * sorted_loss(*arguments, exit_weights=EXIT_WEIGHTS, chunk=chunk)[0]

    expected = jax.grad(plain, argnums=(0, 1))(head, hiddens)
    got = jax.jit(jax.grad(chunked, argnums=(0, 1)))(head, hiddens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)


def test_no_array_holds_the_logits_of_all_positions(problem):
    head, hiddens, targets, weights = problem

    def loss(head, hiddens):
        arguments = (read_logits, head, hiddens, targets, weights)
        return sorted_loss(*arguments, exit_weights=EXIT_WEIGHTS, chunk=1)[0]

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(head, hiddens).compile().as_text()
    assert f"f32[{E},{B},1,{V}]" in text
    assert f"{T},{V}]" not in text
    assert f"[{B * T},{V}]" not in text
