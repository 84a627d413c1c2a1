"""Every round of decoding with trees against slow references: the drafted tree, the target's logits, acceptance, all caches."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
import reference_tree as reference
from reference_sampling import filtered
from reference_transformer import all_depths, logits
from tree_tiny import BY_NODE, EXITS, GREEDY, HOT, POLICIES, PROMPTS, THRESHOLDS, TREE, tiny_pair

from s2d_jax.config.decode import DecodeConfig
from s2d_jax.decode.loop import Decoder
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.generation.planner import Planner
from s2d_jax.weights.model import Model


@pytest.fixture(scope="module")
def pair():
    return tiny_pair()


class Slow:
    """A model in NumPy that remembers the texts it has read."""

    def __init__(self, model: Model):
        self.config = model.config
        self.params = jax.tree.map(np.asarray, model.params)
        self.depths = functools.lru_cache(8192)(self._depths)

    def _depths(self, text: tuple[int, ...]):
        return all_depths(self.config, self.params, text)

    def logits(self, text, layers: int) -> np.ndarray:
        """`[V]`: after the whole text, read at a depth."""
        states, *_ = self.depths(tuple(text))
        return logits(self.config, self.params, states[layers][-1:])[0]


@pytest.fixture(scope="module")
def slow_target(pair):
    return Slow(pair[0])


@pytest.fixture(scope="module")
def slow_draft(pair):
    return Slow(pair[1])


@dataclasses.dataclass
class Round:
    """Host copies of what a round starts from, proposes, computes and leaves; and how often it ran each segment."""

    before: object
    proposal: object
    verified: object
    after: object
    passes_E: np.ndarray


@functools.cache
def _compiled(static: Decoder, width: int):
    """Prefill and the parts of a round, shared by all configurations of the same static part."""
    prefill = functools.partial(static.prefill, prompt_width=width)
    return [jax.jit(part) for part in (prefill, static.propose, static.verify, static.accept)]


def _rounds(decoder: SpeculativeDecoder, prompts, sampling) -> list[Round]:
    static, width, args = decoder.prepare(prompts, sampling)
    params, request, *_ = args
    prefill, propose, verify, accept = _compiled(static, width)
    state, found = prefill(*args), []
    while not np.all(state.done_B):
        before = jax.device_get(state)
        proposal, state = propose(params, request, state)
        verified, state = verify(params, request, state, proposal)
        state = accept(request, state, verified)
        copies = jax.device_get((before, proposal, verified, state))
        counts = [static.drafter.stats(copies[i].draft_state)["segment_passes"] for i in (0, 3)]
        found.append(Round(*copies, counts[1] - counts[0]))
    return found


@pytest.fixture(scope="module")
def greedy_rounds(pair):
    @functools.cache
    def rounds(policy: str, batch: int = len(PROMPTS)):
        return _rounds(SpeculativeDecoder(*pair, POLICIES[policy]), PROMPTS[:batch], GREEDY)

    return rounds


def _text(state, row) -> list[int]:
    return state.tokens_BC[row, : state.length_B[row]].tolist()


def _exits_in_use(config: DecodeConfig):
    exits = config.exits or EXITS
    return exits, config.exit_thresholds or (*THRESHOLDS[: len(exits) - 1], 0.0)


def _levels(state, row, config: DecodeConfig, sampling) -> int:
    """How many levels a row may draft: not more than it may emit beside the target's own token."""
    if state.done_B[row]:
        return 0
    emitted = int(state.length_B[row]) - len(PROMPTS[row])
    return min(config.tree.depth, sampling.max_new_tokens - emitted - 1)


def _nested(tree, row):
    """The drafted tree of a row, with the fields of growth in each node."""
    root = reference.nested(tree.tokens_BM[row], tree.parent_BM[row], tree.valid_BM[row])
    for line in reference.lines(root):
        node = line[-1]
        node["path"] = tuple(below["token"] for below in line[1:])
        node["score"] = float(tree.score_BM[row, node["index"]])
        node["exit"] = int(tree.exit_BM[row, node["index"]])
        assert tree.depth_BM[row, node["index"]] == len(line) - 1
    return root


def _grown(config: DecodeConfig, slow: Slow, text, levels):
    """The tree that the reference grows, and the exits of expanded nodes by level."""
    exits, thresholds = _exits_in_use(config)
    reads = [lambda path, k=k: slow.logits([*text, *path], k) for k in exits]
    shape = config.tree
    if shape.paths:
        paths = [path[:levels] for path in shape.paths]
        return reference.grow_static(reads, thresholds, paths=paths, leaving=shape.leaving)
    sizes = {"depth": levels, "top_k": shape.top_k, "nodes": shape.nodes}
    return reference.grow_dynamic(reads, thresholds, **sizes, leaving=shape.leaving)


def _assert_same_tree(drafted, grown) -> None:
    """The same tokens below the same tokens, proposed by the same exits with the same probabilities."""
    ours, theirs = (
        {line[-1]["path"]: line[-1] for line in reference.lines(root)} for root in (drafted, grown)
    )
    assert ours.keys() == theirs.keys()
    for path in theirs.keys() - {()}:
        assert ours[path]["exit"] == theirs[path]["exit"]
        assert ours[path]["score"] == pytest.approx(theirs[path]["score"], abs=2e-3)


def _assert_cache(cache, row, layers, keys, values) -> None:
    """The valid positions of these layers are those of a recomputed text."""
    computed = int(cache.length_B[row])
    for ours, theirs in ((cache.keys, keys), (cache.values, values)):
        for array, layer in zip(ours, layers, strict=True):
            ours_TKH = array[row].swapaxes(0, 1)[:computed]
            np.testing.assert_allclose(ours_TKH, theirs[layer][:computed], rtol=5e-4, atol=5e-4)


def _assert_states(after, row, slow_target: Slow, slow_draft: Slow, exits) -> None:
    """Caches of target and draft, and what enters the draft's segments, are those of the emitted text."""
    text, bounds = _text(after, row), (0, *exits)
    _, keys, values = slow_target.depths(tuple(text))
    assert after.target_cache.length_B[row] == len(text) - 1
    _assert_cache(after.target_cache, row, range(slow_target.config.num_layers), keys, values)
    states, keys, values = slow_draft.depths(tuple(text))
    shallower, draft = len(text) - 1, after.draft_state
    for s, cache in enumerate(draft.segments):
        assert cache.length_B[row] <= shallower
        shallower = int(cache.length_B[row])
        _assert_cache(cache, row, range(bounds[s], bounds[s + 1]), keys, values)
        if s < len(draft.entries):
            entered, expected = draft.entries[s][row][:shallower], states[bounds[s + 1]]
            np.testing.assert_allclose(entered, expected[:shallower], rtol=5e-4, atol=5e-4)


# What they grow from is tested with other policies: paths and leaving by level, a single segment.
TOGETHER = ("s2d", "s2d by node", "s2d static by node", "independent")
COMBINED_ELSEWHERE = pytest.mark.exhaustive("paths, levels and single segments are tested apart")


@pytest.mark.parametrize(
    "policy",
    [pytest.param(name, marks=[COMBINED_ELSEWHERE] * (name not in TOGETHER)) for name in POLICIES],
)
def test_every_round_equals_the_slow_references(greedy_rounds, slow_target, slow_draft, policy):
    config, depths, top = POLICIES[policy], set(), slow_target.config.num_layers
    exits, _ = _exits_in_use(config)
    for round in greedy_rounds(policy):
        for row in range(len(PROMPTS)):
            text, levels = _text(round.before, row), _levels(round.before, row, config, GREEDY)
            _assert_states(round.after, row, slow_target, slow_draft, exits)
            if round.before.done_B[row]:
                assert _text(round.after, row) == text
                continue
            assert round.proposal.num_draft_B[row] == levels
            drafted = _nested(round.proposal.tree, row)
            grown, _ = _grown(config, slow_draft, text, levels)
            _assert_same_tree(drafted, grown)

            def logits_of(node, text=text):
                return slow_target.logits([*text, *node["path"]], top)

            for line in reference.lines(drafted):
                found_V = round.verified.logits_BTV[row, line[-1]["index"]]
                np.testing.assert_allclose(found_V, logits_of(line[-1]), rtol=1e-3, atol=2e-3)
            node, token = reference.accept_greedy(drafted, logits_of)
            (line,) = (x for x in reference.lines(drafted) if x[-1]["index"] == node)
            assert _text(round.after, row) == [*text, *line[-1]["path"], token]
            depths.add(len(line) - 1)
            # The first segment keeps all of the path that it has computed.
            ran = [x for x in line if round.proposal.tree.slot_BM[row, x["index"]] >= 0]
            kept = len(text) - 1 + len(ran) if levels else len(text) - 1
            first = round.after.draft_state.segments[0].length_B[row]
            assert first == kept or levels == 0
    assert depths >= {0, 1, 2}


FILTERS = {"temperature": 0.8, "top_k": 5}
OTHER_FILTERS = pytest.mark.exhaustive("either rule of leaving, filtered or not, is in the rest")


@pytest.mark.parametrize(
    ("tree", "filters"),
    [
        pytest.param(TREE, {}, id="by level-plain"),
        pytest.param(BY_NODE, FILTERS, id="by node-filtered"),
        pytest.param(BY_NODE, {}, id="by node-plain", marks=OTHER_FILTERS),
        pytest.param(TREE, FILTERS, id="by level-filtered", marks=OTHER_FILTERS),
    ],
)
def test_drawn_children_are_counted_before_they_are_drawn(pair, slow_draft, tree, filters):
    """Counts follow from q vectors and the nodes above; all that is drawn is verified; q is kept for acceptance."""
    config, sampling = DecodeConfig(tree=tree), dataclasses.replace(HOT, **filters)
    width = min(tree.top_k, (tree.nodes - 1) // tree.depth)
    for round in _rounds(SpeculativeDecoder(*pair, config), PROMPTS, sampling):
        for row in range(len(PROMPTS)):
            text, frontier = _text(round.before, row), [_nested(round.proposal.tree, row)]
            reads = [
                lambda path, k=k, text=text: slow_draft.logits([*text, *path], k) for k in EXITS
            ]
            for _ in range(_levels(round.before, row, config, sampling)):
                left = reference.left_at(frontier, reads, THRESHOLDS, tree.leaving)
                pairs = list(zip(frontier, left, strict=True))
                q = [filtered(reads[number](node["path"]), sampling) for node, number in pairs]
                scores = [node["score"] for node in frontier]
                counts = reference.child_counts(scores, q, width)
                assert [len(node["children"]) for node in frontier] == counts
                for (node, number), own_q in zip(pairs, q, strict=True):
                    _assert_drawn_from(own_q, node, number, round.proposal, row)
                frontier = [child for node in frontier for child in node["children"]]


def _assert_drawn_from(q, node, number, proposal, row) -> None:
    tokens = [child["token"] for child in node["children"]]
    assert len(set(tokens)) == len(tokens)
    if tokens:
        kept_q = proposal.draft_probs_BLU[row, proposal.tree.slot_BM[row, node["index"]]]
        np.testing.assert_allclose(kept_q, q, atol=2e-4)
    for child in node["children"]:
        assert child["exit"] == number
        assert child["score"] == pytest.approx(node["score"] + np.log(q[child["token"]]), abs=5e-3)


@pytest.mark.parametrize(("policy", "batch"), [("s2d", 1), ("s2d", 4), ("s2d by node", 4)])
def test_segments_that_nobody_needs_are_skipped(greedy_rounds, slow_draft, policy, batch):
    """Segment s runs for a level if in any row a node of it leaves at exit s or deeper, and not otherwise."""
    config, skipped = POLICIES[policy], 0
    for round in greedy_rounds(policy, batch):
        deepest = [-1] * config.tree.depth
        for row in range(batch):
            levels = _levels(round.before, row, config, GREEDY)
            if levels > 0:
                _, used = _grown(config, slow_draft, _text(round.before, row), levels)
                deepest = [
                    max(all_rows, *own, -1)
                    for all_rows, own in zip(deepest, used + [[]] * config.tree.depth, strict=False)
                ]
        needed = np.array([sum(level >= s for level in deepest) for s in range(len(EXITS))])
        assert round.passes_E[0] == needed[0]
        assert (round.passes_E >= needed).all()
        assert (round.passes_E[needed == 0] == 0).all()
        skipped += (needed < needed[0]).sum()
    assert skipped > 0 or batch > 1


def test_statistics_count_what_happened(pair, greedy_rounds):
    """Nodes that were verified, levels reached by drafting and by acceptance, expanded nodes by exit."""
    policy, depth = "s2d by node", TREE.depth
    nodes, levels, accepted, ran = 0, np.zeros(depth, int), np.zeros(depth, int), 0
    for round in greedy_rounds(policy):
        live = ~round.before.done_B
        nodes += int(round.proposal.tree.valid_BM[live, 1:].sum())
        gained = (round.after.length_B - round.before.length_B)[live]
        for below in range(depth):
            levels[below] += int((round.proposal.num_draft_B[live] > below).sum())
            accepted[below] += int((gained > below + 1).sum())
        # A level of the root, then up to top_k nodes of each further level.
        ran += sum(1 + TREE.top_k * (n - 1) for n in round.proposal.num_draft_B[live] if n)
    stats = SpeculativeDecoder(*pair, POLICIES[policy]).generate(PROMPTS, GREEDY).stats
    assert stats.drafted_tokens == nodes
    assert stats.drafted_per_depth == tuple(levels)
    assert stats.accepted_per_depth == tuple(accepted)
    assert stats.accepted_tokens == accepted.sum()
    assert stats.emitted_tokens == 4 * 30
    assert stats.mean_acceptance_length == (4 * 29) / stats.target_forwards
    assert set(stats.exit_histogram) == set(EXITS)
    assert sum(stats.exit_histogram.values()) == nodes
    assert set(stats.draft_steps) == set(EXITS)
    assert sum(stats.draft_steps.values()) == ran
    assert min(stats.draft_steps.values()) > 0.02 * ran


def test_tokens_behind_a_stop_token_are_not_accepted(pair):
    """Each row stops at what it says third: deeper levels of the tree may have been right, and are not counted."""
    decoder = SpeculativeDecoder(*pair, POLICIES["independent"])
    said = decoder.generate(PROMPTS, GREEDY).token_ids
    rows = [dataclasses.replace(GREEDY, stop_token_ids=(ids[2],)) for ids in said]
    result = decoder.generate(PROMPTS, rows)
    for stats in result.row_stats:
        emitted = stats.emitted_tokens - 1  # prefill's
        assert stats.accepted_tokens <= emitted
        assert emitted <= stats.accepted_tokens + stats.target_forwards


def test_the_guard_charges_every_level_as_the_deepest(pair):
    """A level that goes to a deeper exit takes along the levels before it that did not."""
    decoder = Planner(*pair, POLICIES["s2d"]).decoder(greedy=True)
    steps_BE = np.array([[2, 0, 1], [3, 0, 0], [1, 1, 0], [0, 0, 0]], np.int32)
    charged = [[0, 0, 3], [3, 0, 0], [0, 2, 0], [0, 0, 0]]
    np.testing.assert_array_equal(decoder.verifier.charged(steps_BE), charged)
