"""Random trees of drawn children on 5 tokens, and the test that judges a rule of acceptance on them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import reference_tree as reference
from reference_sampling import filtered
from scipy import stats

from s2d_jax.config.sampling import SamplingParams
from s2d_jax.sampling import SamplingArrays
from s2d_jax.tree import acceptance as tree_acceptance
from s2d_jax.tree.nodes import Tree

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
def target_table() -> dict[tuple[int, ...], np.ndarray]:
    """After every text of at most two tokens."""
    rng = np.random.default_rng(3)
    texts = [(), *((a,) for a in range(VOCAB))]
    texts += [(a, b) for a in range(VOCAB) for b in range(VOCAB)]
    return {text: rng.normal(scale=1.2, size=VOCAB).astype(np.float32) for text in texts}


@functools.cache
def draft_table() -> dict[tuple[int, ...], np.ndarray]:
    """Like the target's so far that walks of all cases end at every depth."""
    rng = np.random.default_rng(10)
    return {
        text: (0.4 * row + rng.normal(scale=1.5, size=VOCAB)).astype(np.float32)
        for text, row in target_table().items()
    }


def listed_ids(case: Case) -> np.ndarray:
    return LISTED if case.trimmed else np.arange(VOCAB)


def q_of_case(case: Case, text) -> np.ndarray:
    """`[U]`, over the listed tokens only."""
    logits_V = -0.8 * target_table()[text] if case.opposed else draft_table()[text]
    return filtered(logits_V[listed_ids(case)], case.sampling)


@dataclasses.dataclass
class Drawn:
    """Rows of trees of 1 + width * DEPTH nodes, and their texts: a column per node, a level after the other."""

    token_BM: np.ndarray
    parent_BM: np.ndarray
    depth_BM: np.ndarray
    valid_BM: np.ndarray
    slot_BM: np.ndarray
    q_BLU: np.ndarray

    def arrays(self) -> Tree:
        """Invalid nodes hold a token that the target likes."""
        favourite = int(np.argmax(target_table()[()]))
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


def array_by_text(table) -> np.ndarray:
    return np.stack(list(table.values()))


def drawn_without_replacement(rng, q, rows, count) -> np.ndarray:
    """`count` entries of q for each row, in the order drawn (Gumbel top-k); -1 where none of positive probability is left."""
    with np.errstate(divide="ignore"):
        keys = np.log(q)[None] + rng.gumbel(size=(rows, len(q)))
    order = np.argsort(-keys, axis=1)[:, :count]
    possible = np.take_along_axis(keys, order, axis=1) > -np.inf
    order = np.where(possible, order, -1)
    return np.pad(order, ((0, 0), (0, count - order.shape[1])), constant_values=-1)


def draw_trees(case: Case, rng, rows: int, draw=drawn_without_replacement) -> Drawn:
    """Children counted from q vectors and drawn nodes above them, then drawn."""
    W, ids = case.width, listed_ids(case)
    M = 1 + W * DEPTH
    columns = {name: np.zeros((rows, M), np.int32) for name in ("token", "parent", "depth")}
    drawn = Drawn(
        *columns.values(),
        valid_BM=np.zeros((rows, M), bool),
        slot_BM=np.full((rows, M), -1, np.int32),
        q_BLU=np.full((rows, 1 + W, len(ids)), 0.7, np.float32),  # unused slots mean nothing
    )
    drawn.valid_BM[:, 0] = True
    drawn.slot_BM[:, 0] = 0

    def put(group, at, parent, depth, index_BX):
        """The children of one node in some rows, from column `at` on."""
        columns = np.arange(at, at + index_BX.shape[1])
        where = np.ix_(group, columns)
        drawn.token_BM[where] = np.where(index_BX >= 0, ids[index_BX], 0)
        drawn.parent_BM[where], drawn.depth_BM[where] = parent, depth
        drawn.valid_BM[where] = index_BX >= 0

    root_q = q_of_case(case, ())
    drawn.q_BLU[:, 0] = root_q
    (count,) = reference.child_counts([0.0], [root_q], W)
    first = draw(rng, root_q, rows, count)
    put(np.arange(rows), 1, 0, 1, first)
    for children in np.unique(first, axis=0):
        group = np.flatnonzero((first == children).all(axis=1))
        texts = [(int(ids[index]),) for index in children]
        scores = [float(np.log(root_q[index])) for index in children]
        rows_of_q = [q_of_case(case, text) for text in texts]
        at = 1 + W
        counts = reference.child_counts(scores, rows_of_q, W)
        for number, (q, below) in enumerate(zip(rows_of_q, counts, strict=True)):
            node = 1 + number
            drawn.slot_BM[group, node] = node
            drawn.q_BLU[group, node] = q
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


def row_keys(first: int, rows: int):
    return jax.vmap(jax.random.key)(first + jnp.arange(rows))


def product_rule(case: Case, drawn: Drawn, logits_BMV):
    """`(node_B, token_B)` by the function under test."""
    rows = len(logits_BMV)
    sampling = SamplingArrays.stack([case.sampling] * rows)
    vocabulary_U = jnp.asarray(LISTED) if case.trimmed else None
    accept = jax.jit(tree_acceptance.accept_without_replacement)
    inputs = (drawn.arrays(), jnp.asarray(drawn.q_BLU), logits_BMV, sampling)
    return jax.device_get(accept(*inputs, row_keys(0, rows), vocabulary_U))


def reference_rule(case: Case, drawn: Drawn, logits_BMV, **rule):
    """The same by the slow walk, with random numbers of its own."""
    rng, outcomes = np.random.default_rng(6), []
    ids = listed_ids(case)
    p_of_logits = functools.cache(lambda raw: filtered(np.frombuffer(raw, "f4"), case.sampling))
    for row in range(len(logits_BMV)):
        columns = (drawn.token_BM[row], drawn.parent_BM[row], drawn.valid_BM[row])
        root = reference.nested(*columns)

        def p_of(node, row=row):
            return p_of_logits(logits_BMV[row, node["index"]].tobytes())

        def q_of(node, row=row):
            q_V = np.zeros(VOCAB)
            if node["children"]:
                q_V[ids] = drawn.q_BLU[row, drawn.slot_BM[row, node["index"]]]
            return q_V

        def draw(p):
            return int(rng.choice(VOCAB, p=p))

        walk = reference.accept_without_replacement(root, p_of, q_of, rng.random, draw, **rule)
        outcomes.append(walk)
    return tuple(np.array(outcomes).T)


def law_of_texts(sampling: SamplingParams) -> np.ndarray:
    """`[V, V, V]`: the target's own law of three tokens."""
    p = np.stack([filtered(row, sampling) for row in array_by_text(target_table())])
    first, second, third = p[0], p[1 : 1 + VOCAB], p[1 + VOCAB :].reshape((VOCAB,) * 3)
    return first[:, None, None] * second[:, :, None] * third


def completed_counts(drawn: Drawn, node_B, token_B, sampling, rng) -> np.ndarray:
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
    p = np.stack([filtered(row, sampling) for row in array_by_text(target_table())])
    for place in (1, 2):
        missing = np.flatnonzero(emitted[:, place] < 0)
        before = np.where(place == 1, -1, emitted[missing, 1])
        cumulative = np.cumsum(p[_text_number(emitted[missing, 0], before)], axis=1)
        u = rng.random((len(missing), 1))
        emitted[missing, place] = np.minimum((u >= cumulative).sum(axis=1), VOCAB - 1)
    return emitted


def p_value_of(counts: np.ndarray, exact: np.ndarray) -> float:
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


def judged(case: Case, rule=product_rule, *, rows: int = SAMPLES, draw=drawn_without_replacement):
    """The p-value of three emitted tokens against the target's law."""
    rng = np.random.default_rng(5)
    drawn = draw_trees(case, rng, rows, draw)
    logits_BMV = array_by_text(target_table())[drawn.texts()]
    node_B, token_B = rule(case, drawn, logits_BMV)
    emitted = completed_counts(drawn, node_B, token_B, case.sampling, rng)
    if case.width > 1 and not case.opposed:  # the test means little unless walks end at every depth
        reached = np.bincount(drawn.depth_BM[np.arange(rows), node_B], minlength=DEPTH + 1)
        assert (reached > 0.01 * rows).all()
    counts = np.zeros((VOCAB,) * 3, np.int64)
    np.add.at(counts, tuple(emitted.T), 1)
    return p_value_of(counts, law_of_texts(case.sampling))
