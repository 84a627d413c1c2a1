"""Acceptance in a tree is exact: what is emitted follows the target, by enumeration and by chi-square on 5 tokens.

False-alarm rate: each statistical case is tested at ALPHA / number of cases (Bonferroni), so correct rules fail the whole file
with probability at most ALPHA; seeds are fixed, so they then fail always or never. Known wrong rules fail the very same test.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_tree as reference
from random_trees import (
    CASES,
    COLD,
    FIXED_TREES,
    LEVEL,
    PLAIN,
    SAMPLES,
    TARGET_ONLY_CASES,
    VOCAB,
    Case,
    Drawn,
    array_by_text,
    completed_counts,
    draft_table,
    draw_trees,
    drawn_without_replacement,
    judged,
    law_of_texts,
    listed_ids,
    p_value_of,
    product_rule,
    q_of_case,
    reference_rule,
    row_keys,
    target_table,
)
from reference_sampling import filtered

from s2d_jax.config.sampling import SamplingParams
from s2d_jax.sampling import SamplingArrays
from s2d_jax.tree import acceptance as tree_acceptance

APART = ("width 4", "width 3-filtered", "width 3-trimmed", "width 3-dropped")
ALL_AT_ONCE = [pytest.mark.exhaustive("one case is wide, filtered, trimmed and dropped at once")]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=str(case), marks=ALL_AT_ONCE * (str(case) in APART)) for case in CASES],
)
def test_children_drawn_without_replacement_keep_the_targets_law(case):
    assert judged(case) > LEVEL


@pytest.mark.exhaustive("shows only that the reference is right")
def test_the_reference_walk_passes_the_same_test():
    assert judged(Case(opposed=True), reference_rule, rows=SAMPLES // 3) > LEVEL


def test_q_that_is_not_renormalised_is_caught():
    wrong = functools.partial(reference_rule, renormalise=False)
    assert judged(Case(opposed=True), wrong, rows=SAMPLES // 3) < LEVEL


def test_reranking_what_was_drawn_is_caught():
    """One child more than wanted is drawn, and the one of least q is dropped."""

    def reranked(rng, q, rows, count):
        drawn = drawn_without_replacement(rng, q, rows, count + 1)
        own_q = np.where(drawn >= 0, q[drawn], -1.0)
        best = np.argsort(-own_q, axis=1)[:, :count]
        return np.take_along_axis(drawn, best, axis=1)

    assert judged(Case(2), draw=reranked) < LEVEL


@pytest.mark.exhaustive("another fault is caught in every run")
def test_children_in_another_order_than_drawn_are_caught():
    def sorted_by_q(rng, q, rows, count):
        drawn = drawn_without_replacement(rng, q, rows, count)
        own_q = np.where(drawn >= 0, q[drawn], -1.0)
        return np.take_along_axis(drawn, np.argsort(-own_q, axis=1), axis=1)

    assert judged(Case(3), draw=sorted_by_q) < LEVEL


# A tree whose shape does not depend on what is drawn: node, parent.
_STATIC_PARENTS = (0, 0, 0, 0, 1, 1, 2)
_STATIC_RANKS = (0, 0, 1, 2, 0, 1, 0)


def _static_tree(rows: int) -> Drawn:
    """The draft's most probable children; the last node of every second row is invalid."""
    tokens: list[int] = [0]
    for parent, rank in list(zip(_STATIC_PARENTS, _STATIC_RANKS, strict=True))[1:]:
        text = () if parent == 0 else (tokens[parent],)
        tokens.append(int(np.argsort(-draft_table()[text])[rank]))
    depth = [0, 1, 1, 1, 2, 2, 2]
    columns = [np.tile(np.array(x, np.int32), (rows, 1)) for x in (tokens, _STATIC_PARENTS, depth)]
    valid_BM = np.ones(columns[0].shape, bool)
    valid_BM[::2, -1] = False
    slot_BM = np.tile(np.array([0, 1, 2, -1, -1, -1, -1], np.int32), (rows, 1))
    return Drawn(*columns, valid_BM, slot_BM, np.zeros((rows, 1, 1)))


def _judged_target_only(sampling: SamplingParams, accept) -> float:
    rng = np.random.default_rng(7)
    drawn = _static_tree(SAMPLES)
    logits_BMV = array_by_text(target_table())[drawn.texts()]
    arrays = SamplingArrays.stack([sampling] * SAMPLES)
    outcome = jax.jit(accept)(drawn.arrays(), logits_BMV, arrays, row_keys(0, SAMPLES))
    emitted = completed_counts(drawn, *jax.device_get(outcome), sampling, rng)
    counts = np.zeros((VOCAB,) * 3, np.int64)
    np.add.at(counts, tuple(emitted.T), 1)
    return p_value_of(counts, law_of_texts(sampling))


@pytest.mark.parametrize("sampling", TARGET_ONLY_CASES, ids=["plain", "filtered"])
def test_most_probable_children_keep_the_targets_law(sampling):
    assert _judged_target_only(sampling, tree_acceptance.accept_target_only) > LEVEL


def test_a_greedy_walk_is_caught_at_temperature_one():
    def greedy(tree, logits_BMV, sampling, key_B):
        return tree_acceptance.accept_greedy(tree, logits_BMV)

    assert _judged_target_only(PLAIN, greedy) < LEVEL


HALF = pytest.mark.exhaustive("half of the trees are judged always")


@pytest.mark.parametrize(
    "seed",
    [pytest.param(seed, marks=HALF if seed % 2 else ()) for seed in range(FIXED_TREES)],
)
def test_the_law_of_one_tree(seed):
    """Given the tree, node and token follow the law of the rule itself: another one of the same marginals would fail."""
    case = dataclasses.replace(CASES[seed % len(CASES)], dropped=False)
    rows = SAMPLES // 2
    drawn = draw_trees(case, np.random.default_rng(100 + seed), 1)
    for field in dataclasses.fields(drawn):
        row = getattr(drawn, field.name)
        setattr(drawn, field.name, np.broadcast_to(row, (rows, *row.shape[1:])))
    logits_BMV = array_by_text(target_table())[drawn.texts()]
    node_B, token_B = product_rule(case, drawn, logits_BMV)
    root = reference.nested(drawn.token_BM[0], drawn.parent_BM[0], drawn.valid_BM[0])

    def p_of(node):
        return filtered(logits_BMV[0, node["index"]], case.sampling)

    def q_of(node):
        q_V = np.zeros(VOCAB)
        if node["children"]:
            q_V[listed_ids(case)] = drawn.q_BLU[0, drawn.slot_BM[0, node["index"]]]
        return q_V

    law = reference.without_replacement_law(root, p_of, q_of)
    exact = np.zeros((drawn.token_BM.shape[1], VOCAB))
    for outcome, mass in law.items():
        exact[outcome] = mass
    counts = np.zeros(exact.shape, np.int64)
    np.add.at(counts, (node_B, token_B), 1)
    assert p_value_of(counts, exact) > LEVEL


def test_rows_of_temperature_0_walk_greedily():
    """q is one-hot then, so a node has one child."""
    case = Case(2, COLD)
    drawn = draw_trees(case, np.random.default_rng(0), 8)
    assert drawn.valid_BM.sum(axis=1).tolist() == [3] * 8
    logits_BMV = array_by_text(target_table())[drawn.texts()]
    greedy = tree_acceptance.accept_greedy(drawn.arrays(), jnp.asarray(logits_BMV))
    arrays = SamplingArrays.stack([COLD] * 8)
    only = tree_acceptance.accept_target_only(
        drawn.arrays(), jnp.asarray(logits_BMV), arrays, row_keys(0, 8)
    )
    for outcome in (product_rule(case, drawn, logits_BMV), only):
        np.testing.assert_array_equal(np.stack(outcome), np.stack(greedy))


def test_a_draft_that_equals_the_target_is_always_accepted():
    """The first child that was drawn, at every depth: p - q leaves nothing to reject by."""
    case, rows = Case(2), 1000
    drawn = draw_trees(case, np.random.default_rng(1), rows)
    q_V = q_of_case(case, ())
    drawn.q_BLU[:] = q_V
    logits_BMV = np.broadcast_to(np.log(q_V).astype(np.float32), (*drawn.token_BM.shape, VOCAB))
    node_B, token_B = product_rule(case, drawn, logits_BMV)
    for row in range(rows):
        node = 0
        while (children := np.flatnonzero(_is_child(drawn, row, node))).size:
            node = children[0]
        assert node_B[row] == node
    assert ((token_B >= 0) & (token_B < VOCAB)).all()


def _is_child(drawn: Drawn, row: int, node: int) -> np.ndarray:
    is_child = drawn.valid_BM[row] & (drawn.parent_BM[row] == node)
    is_child[0] = False
    return is_child
