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
import tree_reference as reference
from numpy_sampling import filtered
from scipy import stats

from s2d_jax import tree_acceptance
from s2d_jax.config import SamplingParams
from s2d_jax.proposal import SamplingArrays
from s2d_jax.tree import Tree

ALPHA = 1e-4
SAMPLES = 100_000
VOCAB, DEPTH = 5, 2
LISTED = np.array([0, 2, 3])

PLAIN = SamplingParams(temperature=1.0)
FILTERED = SamplingParams(temperature=0.8, top_k=4, top_p=0.9, min_p=0.05)
COLD = SamplingParams()


@dataclasses.dataclass(frozen=True)
class Case:
    """Which children are drawn, from what.

    Attributes:
        width: children of a level.
        sampling: of the target and the draft.
        trimmed: the draft knows LISTED only.
        dropped: the last child drawn at each node is invalid in half of the rows, whatever it is.
        opposed: the draft likes what the target does not.
    """

    width: int = 3
    sampling: SamplingParams = PLAIN
    trimmed: bool = False
    dropped: bool = False
    opposed: bool = False

    def __str__(self):
        parts = [f"width {self.width}", *(["filtered"] * (self.sampling is FILTERED))]
        parts += ["trimmed"] * self.trimmed + ["dropped"] * self.dropped
        return "-".join([*parts, *["opposed"] * self.opposed])


CASES = [
    Case(1),
    Case(2),
    Case(3),
    Case(4),
    Case(sampling=FILTERED),
    Case(trimmed=True),
    Case(dropped=True),
    Case(4, FILTERED, trimmed=True, dropped=True),
    Case(opposed=True),
]
TARGET_ONLY_CASES = [PLAIN, FILTERED]
FIXED_TREES = 12
LEVEL = ALPHA / (len(CASES) + len(TARGET_ONLY_CASES) + FIXED_TREES)


@functools.cache
def _target_logits() -> dict[tuple[int, ...], np.ndarray]:
    """After every text of at most two tokens."""
    rng = np.random.default_rng(3)
    texts = [(), *((a,) for a in range(VOCAB))]
    texts += [(a, b) for a in range(VOCAB) for b in range(VOCAB)]
    return {text: rng.normal(scale=1.2, size=VOCAB).astype(np.float32) for text in texts}


@functools.cache
def _draft_logits() -> dict[tuple[int, ...], np.ndarray]:
    """Like the target's so far that walks of all cases end at every depth."""
    rng = np.random.default_rng(10)
    return {
        text: (0.4 * row + rng.normal(scale=1.5, size=VOCAB)).astype(np.float32)
        for text, row in _target_logits().items()
    }


def _ids(case: Case) -> np.ndarray:
    return LISTED if case.trimmed else np.arange(VOCAB)


def _q(case: Case, text) -> np.ndarray:
    """`[K]`, over the listed tokens only."""
    logits_V = -0.8 * _target_logits()[text] if case.opposed else _draft_logits()[text]
    return filtered(logits_V[_ids(case)], case.sampling)


@dataclasses.dataclass
class Drawn:
    """Rows of trees of 1 + width * DEPTH nodes, and their texts: a column per node, a level after the other."""

    token_BM: np.ndarray
    parent_BM: np.ndarray
    depth_BM: np.ndarray
    valid_BM: np.ndarray
    slot_BM: np.ndarray
    q_BSK: np.ndarray

    def arrays(self) -> Tree:
        """Invalid nodes hold a token that the target likes."""
        favourite = int(np.argmax(_target_logits()[()]))
        nothing = np.zeros_like(self.token_BM)
        columns = {
            "tokens_BM": np.where(self.valid_BM, self.token_BM, favourite),
            "parent_BM": self.parent_BM,
            "depth_BM": self.depth_BM,
            "valid_BM": self.valid_BM,
            "slot_BM": self.slot_BM,
            "score_BM": nothing.astype(np.float32),
            "exit_BM": nothing,
        }
        return Tree(**{name: jnp.asarray(column) for name, column in columns.items()})

    def texts(self) -> np.ndarray:
        """int `[B, M]`: the number of each node's text, as `_text_number` counts them."""
        first_BM = np.where(self.depth_BM == 2, self._parents_token(), self.token_BM)
        second_BM = np.where(self.depth_BM == 2, self.token_BM, -1)
        return np.where(self.depth_BM == 0, 0, _text_number(first_BM, second_BM))

    def _parents_token(self):
        return np.take_along_axis(self.token_BM, self.parent_BM, axis=1)


def _text_number(first, second):
    """() is 0, then come the texts of one token, then those of two (`second` is -1 for none)."""
    return np.where(second < 0, 1 + first, 1 + VOCAB + VOCAB * first + second)


def _by_text(table) -> np.ndarray:
    return np.stack(list(table.values()))


def _without_replacement(rng, q, rows, count) -> np.ndarray:
    """`count` entries of q for each row, in the order drawn (Gumbel top-k); -1 where none of positive probability is left."""
    with np.errstate(divide="ignore"):
        keys = np.log(q)[None] + rng.gumbel(size=(rows, len(q)))
    order = np.argsort(-keys, axis=1)[:, :count]
    possible = np.take_along_axis(keys, order, axis=1) > -np.inf
    order = np.where(possible, order, -1)
    return np.pad(order, ((0, 0), (0, count - order.shape[1])), constant_values=-1)


def _draw(case: Case, rng, rows: int, draw=_without_replacement) -> Drawn:
    """Children counted from q vectors and drawn nodes above them, then drawn."""
    W, ids = case.width, _ids(case)
    M = 1 + W * DEPTH
    columns = {name: np.zeros((rows, M), np.int32) for name in ("token", "parent", "depth")}
    drawn = Drawn(
        *columns.values(),
        valid_BM=np.zeros((rows, M), bool),
        slot_BM=np.full((rows, M), -1, np.int32),
        q_BSK=np.full((rows, 1 + W, len(ids)), 0.7, np.float32),  # unused slots mean nothing
    )
    drawn.valid_BM[:, 0] = True
    drawn.slot_BM[:, 0] = 0

    def put(group, at, parent, depth, index_NC):
        """The children of one node in some rows, from column `at` on."""
        columns = np.arange(at, at + index_NC.shape[1])
        where = np.ix_(group, columns)
        drawn.token_BM[where] = np.where(index_NC >= 0, ids[index_NC], 0)
        drawn.parent_BM[where], drawn.depth_BM[where] = parent, depth
        drawn.valid_BM[where] = index_NC >= 0

    root_q = _q(case, ())
    drawn.q_BSK[:, 0] = root_q
    (count,) = reference.child_counts([0.0], [root_q], W)
    first = draw(rng, root_q, rows, count)
    put(np.arange(rows), 1, 0, 1, first)
    for children in np.unique(first, axis=0):
        group = np.flatnonzero((first == children).all(axis=1))
        texts = [(int(ids[index]),) for index in children]
        scores = [float(np.log(root_q[index])) for index in children]
        rows_of_q = [_q(case, text) for text in texts]
        at = 1 + W
        counts = reference.child_counts(scores, rows_of_q, W)
        for number, (q, below) in enumerate(zip(rows_of_q, counts, strict=True)):
            node = 1 + number
            drawn.slot_BM[group, node] = node
            drawn.q_BSK[group, node] = q
            put(group, at, node, 2, draw(rng, q, len(group), below))
            at += below
    if case.dropped:
        _drop_last_children(drawn, rng)
    return drawn


def _drop_last_children(drawn: Drawn, rng) -> None:
    rows, M = drawn.token_BM.shape
    unlucky_B = rng.random(rows) < 0.5
    for node in range(1, M):
        later = (drawn.parent_BM[:, node + 1 :] == drawn.parent_BM[:, node, None]).copy()
        later &= drawn.valid_BM[:, node + 1 :]
        drawn.valid_BM[:, node] &= ~unlucky_B | later.any(axis=1)
    parents_valid = np.take_along_axis(drawn.valid_BM, drawn.parent_BM, axis=1)
    drawn.valid_BM &= parents_valid


def _keys(first: int, rows: int):
    return jax.vmap(jax.random.key)(first + jnp.arange(rows))


def _product_rule(case: Case, drawn: Drawn, logits_BMV):
    """`(node_B, token_B)` by the function under test."""
    rows = len(logits_BMV)
    sampling = SamplingArrays.stack([case.sampling] * rows)
    vocabulary_K = jnp.asarray(LISTED) if case.trimmed else None
    accept = jax.jit(tree_acceptance.accept_without_replacement)
    inputs = (drawn.arrays(), jnp.asarray(drawn.q_BSK), logits_BMV, sampling)
    return jax.device_get(accept(*inputs, _keys(0, rows), vocabulary_K))


def _reference_rule(case: Case, drawn: Drawn, logits_BMV, **rule):
    """The same by the slow walk, with random numbers of its own."""
    rng, outcomes = np.random.default_rng(6), []
    ids = _ids(case)
    p_of_logits = functools.cache(lambda raw: filtered(np.frombuffer(raw, "f4"), case.sampling))
    for row in range(len(logits_BMV)):
        columns = (drawn.token_BM[row], drawn.parent_BM[row], drawn.valid_BM[row])
        root = reference.nested(*columns)

        def p_of(node, row=row):
            return p_of_logits(logits_BMV[row, node["index"]].tobytes())

        def q_of(node, row=row):
            q_V = np.zeros(VOCAB)
            if node["children"]:
                q_V[ids] = drawn.q_BSK[row, drawn.slot_BM[row, node["index"]]]
            return q_V

        def draw(p):
            return int(rng.choice(VOCAB, p=p))

        walk = reference.accept_without_replacement(root, p_of, q_of, rng.random, draw, **rule)
        outcomes.append(walk)
    return tuple(np.array(outcomes).T)


def _law_of_texts(sampling: SamplingParams) -> np.ndarray:
    """`[V, V, V]`: the target's own law of three tokens."""
    p = np.stack([filtered(row, sampling) for row in _by_text(_target_logits())])
    first, second, third = p[0], p[1 : 1 + VOCAB], p[1 + VOCAB :].reshape((VOCAB,) * 3)
    return first[:, None, None] * second[:, :, None] * third


def _completed(drawn: Drawn, node_B, token_B, sampling, rng) -> np.ndarray:
    """`[B, 3]`: what is emitted, with tokens drawn from the target where a round emitted fewer than three."""
    rows = np.arange(len(node_B))
    depth_B = drawn.depth_BM[rows, node_B]
    parent_B = drawn.parent_BM[rows, node_B]
    second = drawn.token_BM[rows, node_B]
    first = np.where(depth_B == 2, drawn.token_BM[rows, parent_B], second)
    emitted = np.full((len(rows), 3), -1)
    emitted[depth_B >= 1, 0] = first[depth_B >= 1]
    emitted[depth_B == 2, 1] = second[depth_B == 2]
    emitted[rows, depth_B] = token_B
    p = np.stack([filtered(row, sampling) for row in _by_text(_target_logits())])
    for place in (1, 2):
        missing = np.flatnonzero(emitted[:, place] < 0)
        before = np.where(place == 1, -1, emitted[missing, 1])
        cumulative = np.cumsum(p[_text_number(emitted[missing, 0], before)], axis=1)
        u = rng.random((len(missing), 1))
        emitted[missing, place] = np.minimum((u >= cumulative).sum(axis=1), VOCAB - 1)
    return emitted


def _p_value(counts: np.ndarray, exact: np.ndarray) -> float:
    """Chi-square with cells of fewer than 10 expected samples pooled; what is impossible must not appear."""
    counts, expected = counts.ravel(), exact.ravel() * counts.sum()
    assert counts[expected < 1e-9].sum() == 0, "something of probability 0 was emitted"
    sparse = expected < 10
    counts = np.append(counts[~sparse], counts[sparse].sum())
    expected = np.append(expected[~sparse], expected[sparse].sum())
    if expected[-1] == 0:
        counts, expected = counts[:-1], expected[:-1]
    if len(counts) == 1:  # no choice is left
        return 1.0
    return stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue


def _judged(case: Case, rule=_product_rule, *, rows: int = SAMPLES, draw=_without_replacement):
    """The p-value of three emitted tokens against the target's law."""
    rng = np.random.default_rng(5)
    drawn = _draw(case, rng, rows, draw)
    logits_BMV = _by_text(_target_logits())[drawn.texts()]
    node_B, token_B = rule(case, drawn, logits_BMV)
    emitted = _completed(drawn, node_B, token_B, case.sampling, rng)
    if case.width > 1 and not case.opposed:  # the test means little unless walks end at every depth
        reached = np.bincount(drawn.depth_BM[np.arange(rows), node_B], minlength=DEPTH + 1)
        assert (reached > 0.01 * rows).all()
    counts = np.zeros((VOCAB,) * 3, np.int64)
    np.add.at(counts, tuple(emitted.T), 1)
    return _p_value(counts, _law_of_texts(case.sampling))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_children_drawn_without_replacement_keep_the_targets_law(case):
    assert _judged(case) > LEVEL


def test_the_reference_walk_passes_the_same_test():
    assert _judged(Case(opposed=True), _reference_rule, rows=SAMPLES // 3) > LEVEL


def test_q_that_is_not_renormalised_is_caught():
    wrong = functools.partial(_reference_rule, renormalise=False)
    assert _judged(Case(opposed=True), wrong, rows=SAMPLES // 3) < LEVEL


def test_reranking_what_was_drawn_is_caught():
    """One child more than wanted is drawn, and the one of least q is dropped."""

    def reranked(rng, q, rows, count):
        drawn = _without_replacement(rng, q, rows, count + 1)
        own_q = np.where(drawn >= 0, q[drawn], -1.0)
        best = np.argsort(-own_q, axis=1)[:, :count]
        return np.take_along_axis(drawn, best, axis=1)

    assert _judged(Case(2), draw=reranked) < LEVEL


def test_children_in_another_order_than_drawn_are_caught():
    def sorted_by_q(rng, q, rows, count):
        drawn = _without_replacement(rng, q, rows, count)
        own_q = np.where(drawn >= 0, q[drawn], -1.0)
        return np.take_along_axis(drawn, np.argsort(-own_q, axis=1), axis=1)

    assert _judged(Case(3), draw=sorted_by_q) < LEVEL


# A tree whose shape does not depend on what is drawn: node, parent.
_STATIC_PARENTS = (0, 0, 0, 0, 1, 1, 2)
_STATIC_RANKS = (0, 0, 1, 2, 0, 1, 0)


def _static_tree(rows: int) -> Drawn:
    """The draft's most probable children; the last node of every second row is invalid."""
    tokens: list[int] = [0]
    for parent, rank in list(zip(_STATIC_PARENTS, _STATIC_RANKS, strict=True))[1:]:
        text = () if parent == 0 else (tokens[parent],)
        tokens.append(int(np.argsort(-_draft_logits()[text])[rank]))
    depth = [0, 1, 1, 1, 2, 2, 2]
    columns = [np.tile(np.array(x, np.int32), (rows, 1)) for x in (tokens, _STATIC_PARENTS, depth)]
    valid_BM = np.ones(columns[0].shape, bool)
    valid_BM[::2, -1] = False
    slot_BM = np.tile(np.array([0, 1, 2, -1, -1, -1, -1], np.int32), (rows, 1))
    return Drawn(*columns, valid_BM, slot_BM, np.zeros((rows, 1, 1)))


def _judged_target_only(sampling: SamplingParams, accept) -> float:
    rng = np.random.default_rng(7)
    drawn = _static_tree(SAMPLES)
    logits_BMV = _by_text(_target_logits())[drawn.texts()]
    arrays = SamplingArrays.stack([sampling] * SAMPLES)
    outcome = jax.jit(accept)(drawn.arrays(), logits_BMV, arrays, _keys(0, SAMPLES))
    emitted = _completed(drawn, *jax.device_get(outcome), sampling, rng)
    counts = np.zeros((VOCAB,) * 3, np.int64)
    np.add.at(counts, tuple(emitted.T), 1)
    return _p_value(counts, _law_of_texts(sampling))


@pytest.mark.parametrize("sampling", TARGET_ONLY_CASES, ids=["plain", "filtered"])
def test_most_probable_children_keep_the_targets_law(sampling):
    assert _judged_target_only(sampling, tree_acceptance.accept_target_only) > LEVEL


def test_a_greedy_walk_is_caught_at_temperature_one():
    def greedy(tree, logits_BMV, sampling, key_B):
        return tree_acceptance.accept_greedy(tree, logits_BMV)

    assert _judged_target_only(PLAIN, greedy) < LEVEL


@pytest.mark.parametrize("seed", range(FIXED_TREES))
def test_the_law_of_one_tree(seed):
    """Given the tree, node and token follow the law of the rule itself: another one of the same marginals would fail."""
    case = dataclasses.replace(CASES[seed % len(CASES)], dropped=False)
    rows = SAMPLES // 2
    drawn = _draw(case, np.random.default_rng(100 + seed), 1)
    for field in dataclasses.fields(drawn):
        row = getattr(drawn, field.name)
        setattr(drawn, field.name, np.broadcast_to(row, (rows, *row.shape[1:])))
    logits_BMV = _by_text(_target_logits())[drawn.texts()]
    node_B, token_B = _product_rule(case, drawn, logits_BMV)
    root = reference.nested(drawn.token_BM[0], drawn.parent_BM[0], drawn.valid_BM[0])

    def p_of(node):
        return filtered(logits_BMV[0, node["index"]], case.sampling)

    def q_of(node):
        q_V = np.zeros(VOCAB)
        if node["children"]:
            q_V[_ids(case)] = drawn.q_BSK[0, drawn.slot_BM[0, node["index"]]]
        return q_V

    law = reference.without_replacement_law(root, p_of, q_of)
    exact = np.zeros((drawn.token_BM.shape[1], VOCAB))
    for outcome, mass in law.items():
        exact[outcome] = mass
    counts = np.zeros(exact.shape, np.int64)
    np.add.at(counts, (node_B, token_B), 1)
    assert _p_value(counts, exact) > LEVEL


def test_rows_of_temperature_0_walk_greedily():
    """q is one-hot then, so a node has one child."""
    case = Case(2, COLD)
    drawn = _draw(case, np.random.default_rng(0), 8)
    assert drawn.valid_BM.sum(axis=1).tolist() == [3] * 8
    logits_BMV = _by_text(_target_logits())[drawn.texts()]
    greedy = tree_acceptance.accept_greedy(drawn.arrays(), jnp.asarray(logits_BMV))
    arrays = SamplingArrays.stack([COLD] * 8)
    only = tree_acceptance.accept_target_only(
        drawn.arrays(), jnp.asarray(logits_BMV), arrays, _keys(0, 8)
    )
    for outcome in (_product_rule(case, drawn, logits_BMV), only):
        np.testing.assert_array_equal(np.stack(outcome), np.stack(greedy))


def test_a_draft_that_equals_the_target_is_always_accepted():
    """The first child that was drawn, at every depth: p - q leaves nothing to reject by."""
    case, rows = Case(2), 1000
    drawn = _draw(case, np.random.default_rng(1), rows)
    q_V = _q(case, ())
    drawn.q_BSK[:] = q_V
    logits_BMV = np.broadcast_to(np.log(q_V).astype(np.float32), (*drawn.token_BM.shape, VOCAB))
    node_B, token_B = _product_rule(case, drawn, logits_BMV)
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
