"""The acceptance rules as pure functions: worked examples, and the one-token law of speculative sampling."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2d_jax import sampling
from s2d_jax.decode import acceptance
from s2d_jax.decode.acceptance import accept_greedy, leading
from s2d_jax.draft.drafter import Proposal
from s2d_jax.draft.request import is_stop
from s2d_jax.sampling import one_hot

DRAWS = 100_000

# One program each, instead of one for every operation in them.
accept_sampled, sample = jax.jit(acceptance.accept_sampled), jax.jit(sampling.sample)
split = jax.jit(sampling.split, static_argnums=1)


@functools.partial(jax.jit, static_argnums=0)
def _keys(count):
    return jax.vmap(jax.random.key)(jnp.arange(count))


def _chain(tokens_BG, num_draft_B, probs_BGV=None) -> Proposal:
    """Drafted by one exit."""
    num_draft_B = jnp.asarray(num_draft_B, jnp.int32)
    return Proposal(tokens_BG, num_draft_B, probs_BGV, jnp.zeros_like(tokens_BG))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_leading_counts_until_the_first_refusal(data):
    accept = data.draw(st.lists(st.booleans(), min_size=1, max_size=6))
    num_draft = data.draw(st.integers(0, len(accept)))
    expected = 0
    while expected < num_draft and accept[expected]:
        expected += 1
    counted = leading(jnp.array([accept]), jnp.array([num_draft], jnp.int32))
    assert int(counted[0]) == expected


def test_greedy_example():
    """The target prefers 4, 2, 7, 1 after 0, 1, 2, 3 drafted tokens."""
    logits_BTV = jnp.stack([one_hot(jnp.array([4, 2, 7, 1]), 8)] * 4)
    drafted = jnp.array([[4, 2, 7], [4, 3, 7], [4, 2, 7], [0, 2, 7]], jnp.int32)
    proposal = _chain(drafted, [3, 3, 2, 3])
    num_accepted_B, next_token_B = accept_greedy(proposal, logits_BTV)
    np.testing.assert_array_equal(num_accepted_B, [3, 1, 2, 0])
    np.testing.assert_array_equal(next_token_B, [1, 2, 7, 4])


@pytest.mark.parametrize("argmax", [False, True])
def test_one_token_law(argmax):
    """p = (.5, .3, .2), q = (.6, .1, .3): what is emitted first follows p; its rate within 5 sigma (false alarms 1e-6)."""
    p, q = np.array([0.5, 0.3, 0.2], np.float32), np.array([0.6, 0.1, 0.3], np.float32)
    draft_key_B, accept_key_B = split(_keys(DRAWS), 2)
    q_BV = jnp.broadcast_to(jnp.array(q), (DRAWS, 3))
    tokens_B = jnp.zeros(DRAWS, jnp.int32) if argmax else sample(q_BV, draft_key_B)
    probs_BGV = None if argmax else q_BV[:, None]
    proposal = _chain(tokens_B[:, None], [1] * DRAWS, probs_BGV)
    p_BTV = jnp.broadcast_to(jnp.array(p), (DRAWS, 2, 3))
    num_accepted_B, next_token_B = accept_sampled(proposal, p_BTV, accept_key_B)
    first_B = jnp.where(num_accepted_B == 1, tokens_B, next_token_B)
    rates = np.bincount(first_B, minlength=3) / DRAWS
    np.testing.assert_allclose(rates, p, atol=5 * 0.5 / np.sqrt(DRAWS))
    accepted = 0.5 if argmax else np.minimum(p, q).sum()
    assert float(num_accepted_B.mean()) == pytest.approx(accepted, abs=5 * 0.5 / np.sqrt(DRAWS))


def test_equal_p_and_q_accept_everything_and_rounding_leaves_no_nan():
    probs_BV = jax.nn.softmax(jax.random.normal(jax.random.key(0), (1000, 16)))
    tokens_B = sample(probs_BV, _keys(1000))
    proposal = _chain(tokens_B[:, None], [1] * 1000, probs_BV[:, None])
    p_BTV = jnp.stack([probs_BV, probs_BV], axis=1)
    num_accepted_B, next_token_B = accept_sampled(proposal, p_BTV, _keys(1000))
    assert (num_accepted_B == 1).all()
    assert ((next_token_B >= 0) & (next_token_B < 16)).all()


def test_nothing_drafted_draws_from_the_target():
    p_BTV = jnp.broadcast_to(one_hot(jnp.array([2, 0]), 4), (5, 2, 4))
    empty = _chain(jnp.ones((5, 1), jnp.int32), [0] * 5)
    num_accepted_B, next_token_B = accept_sampled(empty, p_BTV, _keys(5))
    assert (num_accepted_B == 0).all()
    assert (next_token_B == 2).all()


def test_stop_tokens_are_looked_up_per_row():
    stops_BZ = jnp.array([[3, -1], [4, 5]], jnp.int32)
    np.testing.assert_array_equal(is_stop(jnp.array([3, 3], jnp.int32), stops_BZ), [True, False])
    windows = is_stop(jnp.array([[1, 3], [5, 4]], jnp.int32), stops_BZ)
    np.testing.assert_array_equal(windows, [[False, True], [True, True]])
