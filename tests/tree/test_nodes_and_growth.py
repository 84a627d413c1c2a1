"""The pure functions of the attention tree on random trees, against nested dictionaries that share no code with them.

Every property is tested on 100 examples of 100 rows each, that is on the same 10,000 random trees: an example is a forest of
fixed shape, so that everything compiles once. Seeds are fixed. Where acceptance is random, one draw of each tree is compared
with that tree's own exact law: false alarms have a probability of ALPHA for each of the two rules.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_tree as reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_sampling import filtered
from scipy import stats

from s2d_jax.config.sampling import SamplingParams
from s2d_jax.model import tree_mask
from s2d_jax.model.kv_cache import KVCache
from s2d_jax.sampling import SamplingArrays
from s2d_jax.tree import acceptance as tree_acceptance
from s2d_jax.tree import nodes as trees
from s2d_jax.tree.nodes import Tree

EXAMPLES, ROWS = 100, 100  # 10,000 trees
NODES, MAX_DEPTH, VOCAB, CAPACITY = 16, 6, 20, 48
LISTED = np.array([0, 2, 3, 5, 6, 7, 9, 11, 12, 14, 15, 18])  # of a trimmed head
ALPHA = 1e-4

SAMPLINGS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=9),
    SamplingParams(temperature=1.3, top_p=0.8),
    SamplingParams(temperature=1.0, top_k=15, top_p=0.95, min_p=0.05),
    SamplingParams(),
]


@dataclasses.dataclass(frozen=True)
class Forest:
    """Random trees as arrays: rows of NODES nodes, with random logits for each."""

    parent_BM: np.ndarray
    depth_BM: np.ndarray
    valid_BM: np.ndarray
    token_BM: np.ndarray
    start_B: np.ndarray
    logits_BMV: np.ndarray
    sampling: list[SamplingParams]
    seed: int

    @classmethod
    def grown(cls, seed: int, bushiness: float, invalid: float, favoured: float) -> Forest:
        """Low `bushiness` gives chains, high one stars; `invalid` nodes take their subtrees with them.

        `favoured` is added to the logits of children, so that walks go deep.
        """
        rng = np.random.default_rng(seed)
        parent_BM, depth_BM, token_BM = (np.zeros((ROWS, NODES), np.int32) for _ in range(3))
        valid_BM = rng.random((ROWS, NODES)) >= invalid
        valid_BM[:, 0] = True
        token_BM[:, 0] = rng.integers(VOCAB, size=ROWS)
        logits_BMV = rng.normal(size=(ROWS, NODES, VOCAB)).astype(np.float32)
        # All rows draw at once, which is much quicker.
        anywhere_BM = (rng.random((ROWS, NODES)) < bushiness).tolist()
        place_BM = rng.random((ROWS, NODES)).tolist()
        all_BMV = np.tile(np.arange(VOCAB), (ROWS, NODES, 1))
        free_BMV = rng.permuted(all_BMV, axis=2).tolist()  # siblings differ
        for b in range(ROWS):
            depths, parents = [0], [0]
            for i in range(1, NODES):
                shallow = [j for j in range(i) if depths[j] < MAX_DEPTH]
                number = int(place_BM[b][i] * len(shallow)) if anywhere_BM[b][i] else -1
                parent = shallow[number]
                parents.append(parent)
                depths.append(depths[parent] + 1)
                token_BM[b, i] = free_BMV[b][parent].pop()
                valid_BM[b, i] &= valid_BM[b, parent]
                logits_BMV[b, parent, token_BM[b, i]] += favoured
            parent_BM[b], depth_BM[b] = parents, depths
        sampling = [SAMPLINGS[i] for i in rng.integers(len(SAMPLINGS), size=ROWS)]
        start_B = rng.integers(0, CAPACITY - NODES + 1, size=ROWS, dtype=np.int32)
        return cls(parent_BM, depth_BM, valid_BM, token_BM, start_B, logits_BMV, sampling, seed)

    def arrays(self) -> Tree:
        """What the product sees. Leaves were never run by the draft, so they have no slot."""
        leaf_BM = np.ones((ROWS, NODES), bool)
        for b in range(ROWS):
            leaf_BM[b, self.parent_BM[b, 1:][self.valid_BM[b, 1:]]] = False
        leaf_BM[:, 0] = False
        slot_BM = np.where(leaf_BM, -1, np.cumsum(~leaf_BM, axis=1) - 1)
        columns = {
            "tokens_BM": self.token_BM,
            "parent_BM": self.parent_BM,
            "depth_BM": self.depth_BM,
            "valid_BM": self.valid_BM,
            "slot_BM": slot_BM.astype(np.int32),
            "score_BM": np.zeros((ROWS, NODES), np.float32),
            "exit_BM": np.zeros((ROWS, NODES), np.int32),
        }
        return Tree(**{name: jnp.asarray(column) for name, column in columns.items()})

    def nested(self, row: int, *, all_nodes: bool = False):
        """As the reference sees it, without the invalid nodes unless they are asked for."""
        valid = None if all_nodes else self.valid_BM[row]
        return reference.nested(self.token_BM[row], self.parent_BM[row], valid)

    def p_of(self, row: int):
        return lambda node: filtered(self.logits_BMV[row, node["index"]], self.sampling[row])


forests = st.builds(
    Forest.grown,
    seed=st.integers(0, 2**32 - 1),
    bushiness=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    invalid=st.sampled_from([0.0, 0.1, 0.5]),
    favoured=st.sampled_from([0.0, 2.0, 4.0]),
)
each_forest = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


@jax.jit
def _shapes(tree: Tree, start_B):
    seen_BMM = trees.ancestors(tree.parent_BM, MAX_DEPTH)
    return (
        seen_BMM,
        trees.positions(tree.depth_BM, start_B + 1),
        tree_mask.mask(seen_BMM, start_B, CAPACITY),
    )


@each_forest
@given(forest=forests)
def test_ancestors_positions_and_mask(forest):
    """The root ends a text of `start + 1` tokens, so node i sits at cache position `start + i`."""
    found = jax.device_get(_shapes(forest.arrays(), forest.start_B))
    for row, (seen_MM, positions_M, mask_MS) in enumerate(zip(*found, strict=True)):
        root, start = forest.nested(row, all_nodes=True), int(forest.start_B[row])
        ancestors = reference.ancestors(root)
        assert {i: set(np.flatnonzero(seen_MM[i])) for i in range(NODES)} == ancestors
        assert dict(enumerate(positions_M)) == reference.positions(root, start + 1)
        visible = reference.visible(root, start, CAPACITY)
        assert dict(enumerate(mask_MS.tolist())) == visible


@jax.jit
def _paths(tree: Tree, node_B):
    return trees.path(tree.parent_BM, tree.depth_BM, node_B, MAX_DEPTH)


@functools.partial(jax.jit, static_argnums=3)
def _compacted(cache: KVCache, start_B, path_BY, rows):
    """The same for the first so many rows: how a cache is written depends on their number."""
    keys, values = ([x[:rows] for x in arrays] for arrays in (cache.keys, cache.values))
    few = KVCache(tuple(keys), tuple(values), cache.length_B[:rows])
    return few.keep_path(start_B[:rows], path_BY[:rows], NODES)


@each_forest
@given(forest=forests)
def test_paths_and_what_a_cache_keeps(forest):
    """Rows of different starts, one or four or a hundred of them, keys and values of two layers."""
    rng = np.random.default_rng(forest.seed)
    node_B = rng.integers(NODES, size=ROWS, dtype=np.int32)
    path_BY = np.asarray(_paths(forest.arrays(), node_B))
    layers = rng.normal(size=(4, ROWS, 2, CAPACITY, 2)).astype(np.float32)
    cache = KVCache((*layers[:2],), (*layers[2:],), np.asarray(forest.start_B))
    expected = layers.copy()
    for row in range(ROWS):
        root = forest.nested(row, all_nodes=True)
        line = reference.padded_line(root, int(node_B[row]), MAX_DEPTH)
        assert path_BY[row].tolist() == line
        where = reference.compacted(list(range(CAPACITY)), int(forest.start_B[row]), line)
        expected[:, row] = layers[:, row][:, :, where]
    for rows in (1, 4, ROWS):
        kept = _compacted(cache, forest.start_B, path_BY, rows)
        np.testing.assert_array_equal(np.stack((*kept.keys, *kept.values)), expected[:, :rows])
        np.testing.assert_array_equal(kept.length_B, forest.start_B[:rows])


@each_forest
@given(forest=forests)
def test_greedy_acceptance(forest):
    node_B, token_B = jax.jit(tree_acceptance.accept_greedy)(forest.arrays(), forest.logits_BMV)
    for row in range(ROWS):

        def logits_of(node, row=row):
            return forest.logits_BMV[row, node["index"]]

        expected = reference.accept_greedy(forest.nested(row), logits_of)
        assert (int(node_B[row]), int(token_B[row])) == expected


def _keys(forest: Forest):
    return jax.vmap(jax.random.key)(forest.seed % 2**31 + jnp.arange(ROWS))


def _place_in_law(law, outcome, rng) -> float:
    """Uniform in [0, 1] if the outcome was drawn from the law: the randomised probability integral transform."""
    assert sum(law.values()) == pytest.approx(1.0)
    assert law.get(outcome, 0.0) > 0.0, f"{outcome} is impossible: {law}"
    below = sum(mass for other, mass in law.items() if other < outcome)
    return below + rng.random() * law[outcome]


def _assert_places(places: list[float], trees: int) -> None:
    """They are those of so many trees, and uniform."""
    assert len(places) == trees
    assert stats.kstest(places, "uniform").pvalue > ALPHA


@pytest.mark.exhaustive("test_tree_acceptance.py has its law, and lossless chains and trees theirs")
def test_target_only_acceptance():
    """A token outside the filters is never emitted; at temperature 0 the walk is the greedy one."""
    places = []
    accept = jax.jit(tree_acceptance.accept_target_only)

    @each_forest
    @given(forest=forests)
    def collect(forest):
        rng = np.random.default_rng(forest.seed)
        sampling = SamplingArrays.stack(forest.sampling)
        outcome = accept(forest.arrays(), forest.logits_BMV, sampling, _keys(forest))
        for row, (node, token) in enumerate(zip(*map(np.asarray, outcome), strict=True)):
            law = reference.target_only_law(forest.nested(row), forest.p_of(row))
            places.append(_place_in_law(law, (int(node), int(token)), rng))

    collect()
    _assert_places(places, EXAMPLES * ROWS)


def _drawn_forest(forest: Forest, listed: np.ndarray | None):
    """The forest with its children drawn from a q of their parent, without replacement; and that q, by slot.

    Nodes for which no token is left are invalid. Temperature 0 is left to the greedy rule.
    """
    rng = np.random.default_rng(forest.seed + 1)
    sampling = [s if s.temperature else SAMPLINGS[0] for s in forest.sampling]
    ids = np.arange(VOCAB) if listed is None else listed
    near_BMV = forest.logits_BMV + rng.normal(size=forest.logits_BMV.shape)
    token_BM, valid_BM = forest.token_BM.copy(), forest.valid_BM.copy()
    q_BMU = np.zeros((ROWS, NODES, len(ids)), np.float32)
    for b in range(ROWS):
        for i in range(NODES):
            q = filtered(near_BMV[b, i, ids], sampling[b])
            q_BMU[b, i] = q
            children = [j for j in range(1, NODES) if forest.parent_BM[b, j] == i]
            with np.errstate(divide="ignore"):
                order = np.argsort(-(np.log(q) + rng.gumbel(size=len(q))))
            for rank, child in enumerate(children):
                possible = rank < len(order) and q[order[rank]] > 0
                token_BM[b, child] = ids[order[rank]] if possible else 0
                valid_BM[b, child] &= possible and valid_BM[b, i]
    drawn = dataclasses.replace(forest, token_BM=token_BM, valid_BM=valid_BM, sampling=sampling)
    slot_BM = np.asarray(drawn.arrays().slot_BM)
    q_BLU = np.full((ROWS, NODES, len(ids)), 0.7, np.float32)  # unused slots mean nothing
    for b in range(ROWS):
        q_BLU[b, slot_BM[b][slot_BM[b] >= 0]] = q_BMU[b, slot_BM[b] >= 0]
    q_BMV = np.zeros((ROWS, NODES, VOCAB))
    q_BMV[:, :, ids] = q_BMU
    return drawn, q_BLU, q_BMV


@pytest.mark.exhaustive("test_tree_acceptance.py has the law of whole and of trimmed heads")
@pytest.mark.parametrize("trimmed", [False, True])
def test_acceptance_of_children_drawn_without_replacement(trimmed):
    """Half of the 10,000 trees each: with the q of a whole head, and with that of a trimmed one."""
    places = []
    listed = LISTED if trimmed else None
    vocabulary_U = jnp.asarray(LISTED) if trimmed else None
    accept = jax.jit(tree_acceptance.accept_without_replacement)

    @settings(each_forest, max_examples=EXAMPLES // 2)
    @given(forest=forests)
    def collect(forest):
        rng = np.random.default_rng(forest.seed)
        drawn, q_BLU, q_BMV = _drawn_forest(forest, listed)
        sampling = SamplingArrays.stack(drawn.sampling)
        inputs = (drawn.arrays(), jnp.asarray(q_BLU), drawn.logits_BMV, sampling)
        outcome = accept(*inputs, _keys(forest), vocabulary_U)
        for row, (node, token) in enumerate(zip(*map(np.asarray, outcome), strict=True)):

            def q_of(node, row=row):
                return q_BMV[row, node["index"]]

            law = reference.without_replacement_law(drawn.nested(row), drawn.p_of(row), q_of)
            places.append(_place_in_law(law, (int(node), int(token)), rng))

    collect()
    _assert_places(places, EXAMPLES * ROWS // 2)
