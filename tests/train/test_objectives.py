"""Every loss of a position against its definition in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.objective.divergences import at_tokens, cross_entropy, divergence, restricted, with_rest

V, K = 9, 4


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.fixture
def distributions():
    """log p and log q in float64, `[2, 3, V]`."""
    rng = np.random.default_rng(1)
    return log_softmax(rng.normal(size=(2, 3, V)) * 2), log_softmax(rng.normal(size=(2, 3, V)) * 2)


DEFINITIONS = {
    "forward_kl": lambda p, q: (p * np.log(p / q)).sum(-1),
    "reverse_kl": lambda p, q: (q * np.log(q / p)).sum(-1),
    "tvd": lambda p, q: 0.5 * np.abs(p - q).sum(-1),
}


def f32(*arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def test_cross_entropy(distributions):
    _, log_q = distributions
    targets = np.array([[0, 3, 8], [1, 1, 5]])
    expected = -np.take_along_axis(log_q, targets[..., None], -1)[..., 0]
    got = cross_entropy(*f32(log_q), jnp.asarray(targets, jnp.int32))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", DEFINITIONS)
def test_divergences(distributions, kind):
    log_p, log_q = distributions
    expected = DEFINITIONS[kind](np.exp(log_p), np.exp(log_q))
    np.testing.assert_allclose(divergence(kind, *f32(log_p, log_q)), expected, rtol=1e-4)
    np.testing.assert_allclose(divergence(kind, *f32(log_p, log_p)), 0, atol=1e-6)


@pytest.mark.parametrize("kind", DEFINITIONS)
def test_gradient_by_the_drafts_logits(distributions, kind):
    """Against differences of the NumPy definition in float64."""
    log_p, logits = distributions[0][0, 0], distributions[1][0, 0] * 1.7

    def value(logits):
        return DEFINITIONS[kind](np.exp(log_p), np.exp(log_softmax(logits)))

    step = 1e-5
    units = np.eye(V) * step
    expected = [(value(logits + unit) - value(logits - unit)) / (2 * step) for unit in units]

    def ours(logits):
        return divergence(kind, jnp.asarray(log_p, jnp.float32), jax.nn.log_softmax(logits))

    got = jax.grad(ours)(*f32(logits))
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("kind", DEFINITIONS)
def test_probabilities_of_zero_give_finite_values_and_gradients(kind):
    log_p = jnp.log(jnp.asarray([0.5, 0.5, 0.0]))
    value, gradient = jax.value_and_grad(
        lambda logits: divergence(kind, log_p, jax.nn.log_softmax(logits))
    )(jnp.asarray([0.0, -200.0, 3.0]))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("kind", DEFINITIONS)
def test_top_k_and_the_rest_are_the_divergence_of_the_lumped_distributions(distributions, kind):
    log_p, log_q = distributions
    ids = np.argsort(-log_p, axis=-1)[..., :K]
    lump = lambda x: np.concatenate(  # noqa: E731
        [x, 1 - x.sum(-1, keepdims=True)], -1
    )
    p, q = (lump(np.take_along_axis(np.exp(x), ids, -1)) for x in (log_p, log_q))
    expected = DEFINITIONS[kind](p, q)
    top = np.take_along_axis(log_p, ids, -1)
    read = at_tokens(*f32(log_q), jnp.asarray(ids, jnp.int32))
    got = divergence(kind, with_rest(*f32(top)), with_rest(read))
    np.testing.assert_allclose(got, expected, rtol=1e-3)
    whole = DEFINITIONS[kind](np.exp(log_p), np.exp(log_q))
    assert (expected <= whole + 1e-9).all()


def test_unlisted_tokens_are_left_out_and_the_others_add_up_to_one(distributions):
    log_p, _ = distributions
    ids = np.argsort(-log_p, axis=-1)[..., :K]
    known = ids % 2 == 0
    top = np.take_along_axis(np.exp(log_p), ids, -1)
    rest = 1 - top.sum(-1, keepdims=True)
    kept = np.concatenate([np.where(known, top, 0), rest], -1)
    got = restricted(with_rest(*f32(np.log(top))), jnp.asarray(known))
    np.testing.assert_allclose(np.exp(got), kept / kept.sum(-1, keepdims=True), rtol=1e-4)
