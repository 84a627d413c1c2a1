"""Filters against Hugging Face's own logits processors, and sampling with a key per row."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_tree import drawn_children
from scipy import stats

from s2d_jax import sampling
from s2d_jax.config.sampling import SamplingParams, one_for_each
from s2d_jax.errors import UserError
from s2d_jax.sampling import SamplingArrays, fold_in, top_k

# One program each, instead of one for every operation in them.
probabilities, sample = jax.jit(sampling.probabilities), jax.jit(sampling.sample)
draw, split, uniform = (
    jax.jit(function, static_argnums=last)
    for function, last in ((sampling.draw, 2), (sampling.split, 1), (sampling.uniform, 1))
)

CASES = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.0, top_k=5),
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=1.0, top_k=1000),
    SamplingParams(temperature=1.0, top_p=0.8),
    SamplingParams(temperature=1.0, top_p=0.01),
    SamplingParams(temperature=1.3, min_p=0.2),
    SamplingParams(temperature=0.6, top_k=20, top_p=0.9, min_p=0.05),
]


def _logits(rows: int, vocab: int = 100) -> jax.Array:
    return 3 * jax.random.normal(jax.random.key(0), (rows, 2, vocab))


def _hugging_face(logits_V: np.ndarray, case: SamplingParams) -> np.ndarray:
    torch = pytest.importorskip("torch")
    from transformers import generation as hf

    scores = torch.tensor(logits_V)[None]
    scores = hf.TemperatureLogitsWarper(case.temperature)(None, scores)
    if case.top_k:
        scores = hf.TopKLogitsWarper(case.top_k)(None, scores)
    if case.top_p < 1:
        scores = hf.TopPLogitsWarper(case.top_p)(None, scores)
    if case.min_p:
        scores = hf.MinPLogitsWarper(case.min_p)(None, scores)
    return torch.softmax(scores, dim=-1)[0].numpy()


def test_filters_equal_hugging_faces_row_by_row():
    logits_BTV = _logits(len(CASES))
    probs_BTV = np.asarray(probabilities(logits_BTV, SamplingArrays.stack(CASES)))
    for row, case in enumerate(CASES):
        for t in range(2):
            expected = _hugging_face(np.asarray(logits_BTV[row, t]), case)
            np.testing.assert_array_equal(probs_BTV[row, t] > 0, expected > 0, err_msg=str(case))
            np.testing.assert_allclose(probs_BTV[row, t], expected, atol=2e-6, err_msg=str(case))


def test_a_greedy_row_is_one_hot_at_the_first_of_tied_tokens():
    logits_BTV = jnp.zeros((2, 1, 6)).at[:, 0, 2].set(1.0).at[:, 0, 4].set(1.0)
    rows = [SamplingParams(), SamplingParams(temperature=1.0, top_k=1)]
    probs_BTV = probabilities(logits_BTV, SamplingArrays.stack(rows))
    np.testing.assert_array_equal(probs_BTV[0, 0], [0, 0, 1, 0, 0, 0])
    np.testing.assert_allclose(
        probs_BTV[1, 0], [0, 0, 0.5, 0, 0.5, 0]
    )  # ties with the last kept stay


def test_impossible_tokens_stay_impossible():
    logits_BTV = _logits(1, 8).at[0, :, 5:].set(-jnp.inf)
    arrays = SamplingArrays.stack([SamplingParams(temperature=2.0, top_p=0.999, top_k=7)])
    probs_BTV = probabilities(logits_BTV, arrays)
    assert (np.asarray(probs_BTV)[0, :, 5:] == 0).all()
    keys = jax.vmap(jax.random.key)(jnp.arange(500))
    drawn = sample(jnp.broadcast_to(probs_BTV[0, 0], (500, 8)), keys)
    assert int(drawn.max()) < 5


def test_rows_draw_from_their_own_keys():
    key_B = jax.vmap(jax.random.key)(jnp.array([3, 4, 3]))
    u_BG = uniform(fold_in(key_B, jnp.array([7, 7, 7])), 4)
    np.testing.assert_array_equal(u_BG[0], u_BG[2])
    assert (u_BG[0] != u_BG[1]).all()
    first, second = split(key_B, 2)
    assert (uniform(first, 1) != uniform(second, 1)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1.0}, r"temperature=-1.0 must be 0 or more"),
        ({"top_k": -1}, r"top_k=-1 must be 0 \(off\) or more"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"min_p": 1.0}, r"min_p=1.0 must be in \[0, 1\)"),
        ({"max_new_tokens": 0}, r"max_new_tokens=0 must be at least 1"),
        ({"seed": -1}, r"seed=-1 must be 0 or more, of at most 64 bits"),
    ],
)
def test_bad_parameters_die_at_construction(change, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**change)


@pytest.mark.parametrize("vocab", [50, 1000, 5000])
def test_the_largest_entries_with_ties(vocab):
    rng = np.random.default_rng(vocab)
    x = rng.integers(0, 40, (3, 4, vocab)).astype(np.float32)  # many entries are equal
    x[1, 2, rng.random(vocab) < 0.9] = -np.inf
    values, index = jax.jit(top_k, static_argnums=1)(x, 7)
    expected = np.argsort(-x, axis=-1, kind="stable")[..., :7]
    np.testing.assert_array_equal(index, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(x, expected, axis=-1))


@pytest.mark.parametrize(("vocab", "count"), [(6, 1), (6, 3), (300, 1), (300, 3)])
def test_draws_follow_their_law(vocab, count):
    """Without replacement and in order, against enumeration, at a false-alarm rate of 1e-4; 300 entries are several blocks."""
    draws, places = 40_000, np.linspace(0, vocab - 1, 5).astype(int)
    probs_V = np.zeros(vocab)
    probs_V[places] = 0.4, 0.3, 0.15, 0.1, 0.05
    keys = jax.random.split(jax.random.key(vocab + count), draws)
    probs_BTV = jnp.broadcast_to(jnp.asarray(probs_V, jnp.float32), (draws, 1, vocab))
    drawn = np.asarray(draw(probs_BTV, keys, count))[:, 0]
    law = {tuple(tokens): chance for tokens, chance in drawn_children(probs_V, count)}
    counts = collections.Counter(map(tuple, drawn.tolist()))
    assert counts.keys() <= law.keys()
    expected = [draws * chance for chance in law.values()]
    seen = [counts[tokens] for tokens in law]
    assert stats.chisquare(seen, np.asarray(expected) * draws / sum(expected)).pvalue > 1e-4


def test_all_that_is_left_is_drawn_before_anything_impossible():
    probs = jnp.zeros((200, 2, 300)).at[:, :, jnp.array([7, 130, 299])].set(1e-30)
    keys = jax.random.split(jax.random.key(0), 200)
    drawn = np.asarray(draw(probs, keys, 5))
    np.testing.assert_array_equal(
        np.sort(drawn[..., :3]), np.broadcast_to([7, 130, 299], (200, 2, 3))
    )
    assert (drawn >= 0).all()
    assert (drawn < 300).all()


def test_what_a_vector_draws_is_independent_of_its_neighbours():
    """Two vectors of one row share a key, not their numbers: pairs of equal draws are as rare as chance has them."""
    probs = jnp.full((20_000, 2, 4), 0.25)
    drawn = draw(probs, jax.random.split(jax.random.key(1), 20_000), 1)[..., 0]
    equal = int((drawn[:, 0] == drawn[:, 1]).sum())
    assert stats.binomtest(equal, 20_000, 0.25).pvalue > 1e-4


@pytest.mark.parametrize(
    "case",
    [
        *(
            SamplingParams(temperature=t)
            for t in (1e-5, 1e-8, 1e-10, 1e-20, 1.2e-38, 1e-40, 1e-300)
        ),
        SamplingParams(temperature=np.float32(1e-30)),
        *(SamplingParams(temperature=1.0, top_p=p) for p in (1e-30, 1e-40, 1e-45, 1e-300)),
        SamplingParams(temperature=1.0, min_p=1 - 1e-12),
        SamplingParams(temperature=1e-12, top_k=3, top_p=0.9, min_p=0.1),
    ],
    ids=repr,
)
def test_what_leaves_only_the_mode_is_one_hot_at_it(case):
    logits_BTV = _logits(1) + 20
    probs_BTV = np.asarray(probabilities(logits_BTV, SamplingArrays.stack([case])))
    expected_BTV = np.eye(logits_BTV.shape[-1])[np.asarray(logits_BTV.argmax(axis=-1))]
    np.testing.assert_array_equal(probs_BTV, expected_BTV)


@pytest.mark.parametrize(
    ("case", "same"),
    [
        (SamplingParams(temperature=1.0, top_k=2**31), SamplingParams(temperature=1.0)),
        (SamplingParams(temperature=1.0, top_k=10**30), SamplingParams(temperature=1.0)),
        (SamplingParams(temperature=1.0, min_p=1e-300), SamplingParams(temperature=1.0)),
        (SamplingParams(temperature=1.0, top_p=1 - 1e-15), SamplingParams(temperature=1.0)),
    ],
    ids=repr,
)
def test_numbers_beyond_32_bits_mean_what_they_say(case, same):
    logits_BTV = _logits(1)
    ours, theirs = (probabilities(logits_BTV, SamplingArrays.stack([c])) for c in (case, same))
    np.testing.assert_array_equal(ours, theirs)


def test_the_hottest_distribution_is_uniform():
    probs_BTV = probabilities(_logits(1), SamplingArrays.stack([SamplingParams(temperature=1e300)]))
    np.testing.assert_allclose(probs_BTV, 0.01, rtol=1e-6)


def test_seeds_of_32_bits_give_the_keys_of_jax():
    seeds = [0, 1, 7, 2**31 - 1, 2**32 - 1]
    ours = jax.random.key_data(sampling.keys_of(seeds))
    for key, seed in zip(ours, seeds, strict=True):
        np.testing.assert_array_equal(key, jax.random.key_data(jax.random.key(np.uint32(seed))))


def test_seeds_of_64_bits_are_those_of_jax_in_64_bits():
    seeds = [2**32, 2**40 + 5, 2**64 - 1]
    ours = jax.random.key_data(sampling.keys_of(seeds))
    with jax.enable_x64(True):
        theirs = [jax.random.key_data(jax.random.key(np.uint64(seed))) for seed in seeds]
        with_x64 = jax.random.key_data(sampling.keys_of(seeds))
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(ours, with_x64)


def test_seeds_of_rows_go_on_from_0_after_the_largest():
    rows = one_for_each(SamplingParams(seed=2**64 - 2), 4)
    assert [row.seed for row in rows] == [2**64 - 2, 2**64 - 1, 0, 1]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("temperature", np.inf, "must be a finite number"),
        ("temperature", np.float32("nan"), "must be a finite number"),
        ("temperature", None, "must be a finite number"),
        ("temperature", "warm", "must be a finite number"),
        ("temperature", True, "must be a finite number"),
        ("top_k", 2.5, "must be a whole number"),
        ("top_k", None, "must be a whole number"),
        ("top_p", 0.0, r"must be in \(0, 1\]"),
        ("seed", -1, "must be 0 or more, of at most 64 bits"),
        ("seed", 2**64, "must be 0 or more, of at most 64 bits"),
        ("seed", 1.5, "must be a whole number"),
        ("max_new_tokens", None, "must be a whole number"),
        ("stop_token_ids", (5, 2**31), "is no token id"),
        ("stop_token_ids", (-3,), "is no token id"),
    ],
)
def test_other_numbers_are_refused_in_a_line(field, value, expected):
    with pytest.raises(UserError, match=f"^{field}.*{expected}") as refused:
        SamplingParams(**{field: value})
    assert str(refused.value).isprintable()
