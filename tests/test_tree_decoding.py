"""Trees on tiny models: greedy identity, every round against slow references, and what the compiled loop must not contain."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
import tree_reference as reference
from numpy_sampling import filtered
from numpy_transformer import all_depths, logits
from tiny import noisy_draft, tiny_config, tiny_model, tiny_params, tiny_tokenizer

from s2d_jax.compilation import programs
from s2d_jax.config import DecodeConfig, SamplingParams, TreeShape, UserError
from s2d_jax.generation import SpeculativeDecoder
from s2d_jax.pretrained import Model

PROMPTS = [[5, 9, 2], [7, 7, 1, 3, 30, 12, 50], [33, 4, 21, 60, 2], [1]]
GREEDY = SamplingParams(max_new_tokens=30)
HOT = SamplingParams(temperature=1.0, max_new_tokens=20, seed=3)
EXITS, THRESHOLDS = (1, 2, 4), (0.4, 0.4, 0.0)

TREE = TreeShape(depth=3, top_k=3, nodes=10)
BY_NODE = dataclasses.replace(TREE, leaving="node")
WIDE = TreeShape(depth=4, top_k=4, nodes=24)
STATIC = TreeShape.static(((0, 0, 0), (0, 0, 1), (0, 1), (1, 0), (2,)))
STATIC_BY_NODE = dataclasses.replace(STATIC, leaving="node")

POLICIES = {
    "s2d": DecodeConfig(tree=TREE),
    "s2d by node": DecodeConfig(tree=BY_NODE),
    "s2d static": DecodeConfig(tree=STATIC),
    "s2d static by node": DecodeConfig(tree=STATIC_BY_NODE),
    "s2d wide, catching up one by one": DecodeConfig(tree=WIDE, catch_up_width=1),
    "two exits": DecodeConfig(tree=BY_NODE, exits=(1, 4), exit_thresholds=(0.5, 0.0)),
    "sd@1": DecodeConfig(tree=WIDE, exits=(1,)),
    "sd@2 static": DecodeConfig(tree=STATIC, exits=(2,)),
    "independent": DecodeConfig(tree=TREE, exits=(4,)),
    "independent static": DecodeConfig(tree=STATIC, exits=(4,)),
    "argmax": DecodeConfig(tree=TREE, draft_sampling="argmax"),
    "never early": DecodeConfig(tree=TREE, exit_thresholds=(1.0, 1.0, 0.0)),
    "always first": DecodeConfig(tree=BY_NODE, exit_thresholds=(0.0, 0.0, 0.0)),
}
MIXED = ("s2d", "s2d by node", "s2d static", "s2d wide, catching up one by one", "independent")


@pytest.fixture(scope="module")
def target() -> Model:
    return tiny_model(num_layers=4, spread=14.0)


@pytest.fixture(scope="module")
def draft(target):
    return noisy_draft(target, EXITS, THRESHOLDS)


@pytest.fixture(scope="module")
def plain(target):
    """Greedy tokens of plain decoding whose passes are as wide, by width."""

    @functools.cache
    def tokens(width, batch, sampling=GREEDY):
        config = DecodeConfig(verify_width=width)
        decoder = SpeculativeDecoder(target, None, config)
        return decoder.generate(PROMPTS[:batch], sampling).token_ids

    return tokens


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_greedy_equals_the_width_matched_reference(target, draft, plain, policy, batch):
    config = POLICIES[policy]
    decoder = SpeculativeDecoder(target, draft, config)
    result = decoder.generate(PROMPTS[:batch], GREEDY)
    assert decoder.verify_width == config.tree.nodes
    assert result.token_ids == plain(config.tree.nodes, batch)
    assert all(len(ids) == GREEDY.max_new_tokens for ids in result.token_ids)
    assert result.stats.mean_acceptance_length > 1.3


# --- round by round


@dataclasses.dataclass
class Round:
    """Host copies of what a round starts from, proposes, computes and leaves."""

    before: object
    proposal: object
    verified: object
    after: object


def _rounds(decoder: SpeculativeDecoder, prompts, sampling):
    static, width, args = decoder.prepare(prompts, sampling)
    params, request, *_ = args
    propose, verify, accept = map(jax.jit, (static.propose, static.verify, static.accept))
    state = jax.jit(lambda *args: static.prefill(*args, width))(*args)
    while not np.all(state.done_B):
        before = jax.device_get(state)
        proposal, state = propose(params, request, state)
        verified, state = verify(params, request, state, proposal)
        state = accept(request, state, verified)
        yield Round(*jax.device_get((before, proposal, verified, state)))


class Slow:
    """A model in NumPy, that remembers the texts it has read."""

    def __init__(self, model: Model):
        self.config = model.config
        self.params = jax.tree.map(np.asarray, model.params)
        self.depths = functools.lru_cache(4096)(self._depths)

    def _depths(self, text):
        return all_depths(self.config, self.params, text)

    def logits(self, text, layers: int) -> np.ndarray:
        """`[V]`: after the whole text, read at a depth."""
        states, *_ = self.depths(tuple(text))
        return logits(self.config, self.params, states[layers][-1:])[0]


@pytest.fixture(scope="module")
def slow_target(target):
    return Slow(target)


@pytest.fixture(scope="module")
def slow_draft(draft):
    return Slow(draft)


def _text(state, row) -> list[int]:
    return state.tokens_BC[row, : state.length_B[row]].tolist()


def _exits_in_use(config: DecodeConfig):
    exits = config.exits or EXITS
    return exits, config.exit_thresholds or (*THRESHOLDS[: len(exits) - 1], 0.0)


def _levels(state, row, config: DecodeConfig, sampling, prompts) -> int:
    """How many levels a row may draft: not more than it may emit beside the target's own token."""
    if state.done_B[row]:
        return 0
    emitted = int(state.length_B[row]) - len(prompts[row])
    return min(config.tree.depth, sampling.max_new_tokens - emitted - 1)


def _nested(tree, row):
    """The drafted tree of a row, with the fields of growth in each node."""
    root = reference.nested(tree.tokens_BM[row], tree.parent_BM[row], tree.valid_BM[row])
    for line in reference.lines(root):
        node = line[-1]
        node["path"] = tuple(above["token"] for above in line[1:])
        node["score"] = float(tree.score_BM[row, node["index"]])
        node["exit"] = int(tree.exit_BM[row, node["index"]])
        assert tree.depth_BM[row, node["index"]] == len(line) - 1
    return root


def _by_path(root) -> dict:
    return {
        line[-1]["path"]: (line[-1]["exit"], line[-1]["score"]) for line in reference.lines(root)
    }


def _grown(config: DecodeConfig, slow: Slow, text, levels):
    """The tree that the reference grows, and the exits of expanded nodes."""
    exits, thresholds = _exits_in_use(config)
    reads = [lambda path, k=k: slow.logits([*text, *path], k) for k in exits]
    shape = config.tree
    if shape.paths:
        paths = [path[:levels] for path in shape.paths if levels]
        return reference.grow_static(reads, thresholds, paths=paths, leaving=shape.leaving)
    return reference.grow_dynamic(
        *(reads, thresholds),
        depth=levels,
        top_k=shape.top_k,
        nodes=shape.nodes,
        leaving=shape.leaving,
    )


def _check_cache(cache, row, computed, layers, keys, values):
    """The first `computed` positions of these layers are those of a recomputed text."""
    assert int(cache.length_B[row]) == computed
    for ours, theirs in ((cache.keys, keys), (cache.values, values)):
        for array, layer in zip(ours, layers, strict=True):
            ours_TKH = array[row].swapaxes(0, 1)[:computed]
            np.testing.assert_allclose(ours_TKH, theirs[layer][:computed], rtol=5e-4, atol=5e-4)


def _check_states(after, row, slow_target: Slow, slow_draft: Slow, bounds):
    """Caches of target and draft, and what enters the draft's segments, are those of the emitted text."""
    text = _text(after, row)
    _, keys, values = slow_target.depths(tuple(text))
    layers = range(slow_target.config.num_layers)
    _check_cache(after.target_cache, row, len(text) - 1, layers, keys, values)
    states, keys, values = slow_draft.depths(tuple(text))
    shallower = len(text) - 1
    for s, cache in enumerate(_segments(after.draft_state)):
        computed = int(cache.length_B[row])
        assert computed <= shallower
        _check_cache(cache, row, computed, range(bounds[s], bounds[s + 1]), keys, values)
        shallower = computed
        if s < len(_entries(after.draft_state)):
            entered = _entries(after.draft_state)[s][row][:computed]
            expected = states[bounds[s + 1]][:computed]
            np.testing.assert_allclose(entered, expected, rtol=5e-4, atol=5e-4)


def _segments(draft_state):
    return draft_state.segments


def _entries(draft_state):
    return draft_state.entries


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "argmax"])
def test_every_round_equals_the_slow_references(target, draft, slow_target, slow_draft, policy):
    """The drafted tree with its exits, the target's logits at every node, acceptance, and all caches after it."""
    config = POLICIES[policy]
    exits, _ = _exits_in_use(config)
    decoder = SpeculativeDecoder(target, draft, config)
    depths = set()
    for round in _rounds(decoder, PROMPTS, GREEDY):
        tree = round.proposal.tree
        for row in range(len(PROMPTS)):
            text, levels = (
                _text(round.before, row),
                _levels(round.before, row, config, GREEDY, PROMPTS),
            )
            if round.before.done_B[row]:
                assert _text(round.after, row) == text
                continue
            assert round.proposal.num_draft_B[row] == levels
            drafted = _nested(tree, row)
            expected, _ = _grown(config, slow_draft, text, levels)
            ours, theirs = _by_path(drafted), _by_path(expected)
            assert ours.keys() == theirs.keys()
            for path in theirs.keys() - {()}:
                assert ours[path][0] == theirs[path][0]
                assert ours[path][1] == pytest.approx(theirs[path][1], abs=2e-3)

            def logits_of(node, text=text):
                return slow_target.logits([*text, *node["path"]], slow_target.config.num_layers)

            for line in reference.lines(drafted):
                found_V = round.verified.logits_BTV[row, line[-1]["index"]]
                np.testing.assert_allclose(found_V, logits_of(line[-1]), rtol=1e-3, atol=2e-3)
            node, token = reference.accept_greedy(drafted, logits_of)
            (line,) = (x for x in reference.lines(drafted) if x[-1]["index"] == node)
            assert _text(round.after, row) == [*text, *line[-1]["path"], token]
            depths.add(len(line) - 1)
            _check_states(round.after, row, slow_target, slow_draft, (0, *exits))
    assert depths >= {0, 1, 2}


@pytest.mark.parametrize("sampling", [HOT, dataclasses.replace(HOT, temperature=0.8, top_k=5)])
@pytest.mark.parametrize("tree", [TREE, BY_NODE], ids=["level", "node"])
def test_drawn_children_are_counted_before_they_are_drawn(
    target, draft, slow_draft, tree, sampling
):
    """Counts follow from q vectors and the nodes above; all that is drawn is verified; q is kept for acceptance."""
    config = DecodeConfig(tree=tree)
    width = min(tree.top_k, (tree.nodes - 1) // tree.depth)
    reads_of = lambda text: [  # noqa: E731
        lambda path, k=k: slow_draft.logits([*text, *path], k) for k in EXITS
    ]
    decoder = SpeculativeDecoder(target, draft, config)
    rows = [dataclasses.replace(sampling, seed=seed) for seed in range(len(PROMPTS))]
    for round in _rounds(decoder, PROMPTS, rows):
        tree_BM = round.proposal.tree
        for row in range(len(PROMPTS)):
            levels = _levels(round.before, row, config, sampling, PROMPTS)
            if levels <= 0:
                continue
            text = _text(round.before, row)
            reads = reads_of(text)
            frontier = [_nested(tree_BM, row)]
            for _ in range(levels):
                left = reference.left_at(frontier, reads, THRESHOLDS, tree.leaving)
                q = [
                    filtered(reads[e](node["path"]), sampling)
                    for node, e in zip(frontier, left, strict=True)
                ]
                counts = reference.child_counts([node["score"] for node in frontier], q, width)
                assert [len(node["children"]) for node in frontier] == counts
                for node, own_q, e in zip(frontier, q, left, strict=True):
                    tokens = [child["token"] for child in node["children"]]
                    assert len(set(tokens)) == len(tokens)
                    if tokens:
                        slot = tree_BM.slot_BM[row, node["index"]]
                        kept_q = round.proposal.draft_probs_BSK[row, slot]
                        np.testing.assert_allclose(kept_q, own_q, atol=2e-4)
                    for child in node["children"]:
                        assert own_q[child["token"]] > 0
                        score = node["score"] + np.log(own_q[child["token"]])
                        assert child["score"] == pytest.approx(score, abs=5e-3)
                        assert child["exit"] == e
                frontier = [child for node in frontier for child in node["children"]]
            text_after = _text(round.after, row)
            assert text_after[: len(text)] == text


@pytest.mark.parametrize("policy", ["s2d", "s2d by node", "s2d static"])
def test_segments_that_nobody_needs_are_skipped(target, draft, slow_draft, policy):
    """With one row, segment s runs for a level if one of its nodes leaves at exit s or deeper, and not otherwise."""
    config = POLICIES[policy]
    decoder = SpeculativeDecoder(target, draft, config)
    deepest_of_levels = []
    for round in _rounds(decoder, PROMPTS[:1], GREEDY):
        text, levels = _text(round.before, 0), _levels(round.before, 0, config, GREEDY, PROMPTS)
        if not levels:
            continue
        _, used = _grown(config, slow_draft, text, levels)
        before, after = (
            np.asarray(decoder.prepare(PROMPTS[:1], GREEDY)[0].drafter.stats(s)["segment_passes"])
            for s in (round.before.draft_state, round.after.draft_state)
        )
        passes = after - before
        deepest = max(used)
        assert (passes[: deepest + 1] > 0).all()
        assert (passes[deepest + 1 :] == 0).all()
        deepest_of_levels.append(deepest)
    assert len(set(deepest_of_levels)) > 1


def test_exits_are_really_mixed(target, draft):
    """The identity tests would prove little if every level left at one exit."""
    for policy in ("s2d", "s2d by node"):
        stats = SpeculativeDecoder(target, draft, POLICIES[policy]).generate(PROMPTS, GREEDY).stats
        histogram = stats.exit_histogram
        assert min(histogram.values()) > 0.02 * sum(histogram.values())


def test_thresholds_at_their_limits(target, draft):
    never = SpeculativeDecoder(target, draft, POLICIES["never early"]).generate(PROMPTS, GREEDY)
    first = SpeculativeDecoder(target, draft, POLICIES["always first"]).generate(PROMPTS, GREEDY)
    assert never.stats.exit_histogram[1] == never.stats.exit_histogram[2] == 0
    assert first.stats.exit_histogram[2] == first.stats.exit_histogram[4] == 0
    assert first.stats.draft_forwards[2] == first.stats.draft_forwards[4] == 0


def test_statistics_count_what_happened(target, draft):
    """Per row: nodes verified, levels reached by drafting and acceptance, expanded nodes by exit."""
    config = POLICIES["s2d by node"]
    decoder = SpeculativeDecoder(target, draft, config)
    nodes, levels, accepted = 0, np.zeros(3, int), np.zeros(3, int)
    for round in _rounds(decoder, PROMPTS, GREEDY):
        live = ~round.before.done_B
        nodes += int(round.proposal.tree.valid_BM[live, 1:].sum())
        for depth in range(3):
            levels[depth] += int((round.proposal.num_draft_B[live] > depth).sum())
            gained = (round.after.length_B - round.before.length_B)[live]
            accepted[depth] += int((gained > depth + 1).sum())
    result = decoder.generate(PROMPTS, GREEDY)
    stats = result.stats
    assert stats.drafted_tokens == nodes
    assert stats.drafted_per_depth == tuple(levels)
    assert stats.accepted_per_depth == tuple(accepted)
    assert stats.accepted_tokens == accepted.sum()
    assert stats.emitted_tokens == 4 * 30
    assert stats.mean_acceptance_length == (4 * 29) / stats.target_forwards
    assert set(stats.exit_histogram) == set(EXITS)


# --- what a draft that is right gains


def _chain_shaped(depth: int) -> TreeShape:
    return TreeShape(depth=depth, top_k=1, nodes=depth + 1)


@pytest.mark.parametrize("tree", [_chain_shaped(4), STATIC], ids=["chain-shaped", "static"])
def test_the_target_as_its_own_draft_is_always_accepted(target, tree):
    config = DecodeConfig(tree=tree)
    # One token comes from prefill; then full rounds.
    sampling = dataclasses.replace(GREEDY, max_new_tokens=1 + 6 * (tree.depth + 1))
    stats = SpeculativeDecoder(target, target, config).generate(PROMPTS, sampling).stats
    assert stats.mean_acceptance_length == tree.depth + 1
    assert stats.accepted_per_depth == stats.drafted_per_depth == (4 * 6,) * tree.depth


def test_drawing_from_the_targets_own_law_is_always_accepted(target):
    tree = _chain_shaped(4)
    sampling = dataclasses.replace(HOT, max_new_tokens=1 + 6 * 5)
    decoder = SpeculativeDecoder(target, target, DecodeConfig(tree=tree))
    stats = decoder.generate(PROMPTS, sampling).stats
    assert stats.mean_acceptance_length > 4.9  # p and q differ by rounding


@pytest.mark.parametrize("exits", [None, (2,), (4,)])
def test_a_tree_of_one_child_each_is_a_chain(target, draft, exits):
    chain = SpeculativeDecoder(target, draft, DecodeConfig(exits, num_draft_tokens=3))
    tree = SpeculativeDecoder(target, draft, DecodeConfig(exits, tree=_chain_shaped(3)))
    ours, theirs = (decoder.generate(PROMPTS, GREEDY) for decoder in (tree, chain))
    assert ours.token_ids == theirs.token_ids
    assert ours.stats.target_forwards == theirs.stats.target_forwards
    assert ours.stats.accepted_per_depth == theirs.stats.accepted_per_depth
    assert ours.stats.exit_histogram == theirs.stats.exit_histogram


def test_a_tree_accepts_more_than_a_chain_of_its_depth(target, draft):
    chain = SpeculativeDecoder(target, draft, DecodeConfig(num_draft_tokens=4))
    tree = SpeculativeDecoder(target, draft, DecodeConfig(tree=WIDE))
    ours, theirs = (decoder.generate(PROMPTS, GREEDY).stats for decoder in (tree, chain))
    assert ours.mean_acceptance_length > 1.1 * theirs.mean_acceptance_length


# --- requests


@pytest.mark.parametrize("policy", MIXED)
@pytest.mark.parametrize("new_tokens", [1, 2, 3, 4])
def test_few_new_tokens(target, draft, plain, policy, new_tokens):
    decoder = SpeculativeDecoder(target, draft, POLICIES[policy])
    sampling = dataclasses.replace(GREEDY, max_new_tokens=new_tokens)
    whole = plain(decoder.verify_width, 4)
    assert decoder.generate(PROMPTS, sampling).token_ids == [ids[:new_tokens] for ids in whole]


@pytest.mark.parametrize("policy", MIXED)
def test_stop_tokens_end_a_row_and_are_kept(target, draft, plain, policy):
    """Every token of a text in turn: at the root, inside an accepted path, as the bonus token."""
    decoder = SpeculativeDecoder(target, draft, POLICIES[policy])
    whole = plain(decoder.verify_width, 4)
    for place in range(12):
        rows = [
            dataclasses.replace(GREEDY, stop_token_ids=(ids[(place + 3 * row) % 14],))
            for row, ids in enumerate(whole)
        ]
        expected = [
            ids[: ids.index(row.stop_token_ids[0]) + 1]
            for ids, row in zip(whole, rows, strict=True)
        ]
        assert decoder.generate(PROMPTS, rows).token_ids == expected


def test_stop_tokens_of_sampled_trees(target, draft):
    decoder = SpeculativeDecoder(target, draft, POLICIES["s2d"])
    ids = decoder.generate(PROMPTS[1:2], HOT).token_ids[0]
    for place in (3, 9):
        cut = dataclasses.replace(HOT, stop_token_ids=(ids[place],))
        found = decoder.generate(PROMPTS[1:2], cut).token_ids[0]
        assert found == ids[: ids.index(ids[place]) + 1]


def test_generation_ends_at_the_context(draft):
    config = tiny_config(num_layers=4, max_context=20)
    small = Model(config, tiny_params(config, spread=6.0), None, "small")
    decoder = SpeculativeDecoder(small, draft, POLICIES["s2d"])
    assert len(decoder.generate([list(range(1, 16))], GREEDY).token_ids[0]) == 5


@pytest.mark.parametrize("policy", ["s2d", "s2d by node", "independent", "argmax"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_its_neighbours(target, draft, policy, temperature):
    """Same batch width, other neighbours: the same tokens."""
    rows = [SamplingParams(temperature=temperature, seed=s, max_new_tokens=30) for s in range(4)]
    decoder = SpeculativeDecoder(target, draft, POLICIES[policy])
    together = decoder.generate(PROMPTS, rows)
    short = [dataclasses.replace(row, max_new_tokens=1) for row in rows[1:]]
    alone = decoder.generate([PROMPTS[0], [2], [2], [2]], [rows[0], *short])
    moved = decoder.generate([*PROMPTS[1:], PROMPTS[0]], [*rows[1:], rows[0]])
    assert together.token_ids[0] == alone.token_ids[0] == moved.token_ids[3]


@pytest.mark.parametrize("policy", ["s2d", "argmax"])
def test_rows_have_their_own_sampling(target, draft, policy):
    """A greedy row in a sampled batch is greedy; the seed decides the others."""
    decoder = SpeculativeDecoder(target, draft, POLICIES[policy])
    cold = dataclasses.replace(HOT, temperature=0.0)
    other = dataclasses.replace(HOT, seed=4)
    one = decoder.generate([PROMPTS[1]] * 4, [HOT, cold, HOT, other])
    greedy = SpeculativeDecoder(target).generate([PROMPTS[1]], cold)
    assert one.token_ids[1] == greedy.token_ids[0]
    assert one.token_ids[0] == one.token_ids[2] != one.token_ids[3]


# --- long runs, later turns, streams


@pytest.fixture(scope="module")
def long_pair():
    target = tiny_model(300, 2, spread=14.0, max_context=2048)
    target = dataclasses.replace(target, tokenizer=tiny_tokenizer(300))
    draft = noisy_draft(target, (1, 2), (0.5, 0.0))
    return target, dataclasses.replace(draft, tokenizer=target.tokenizer)


@pytest.mark.parametrize("exits", [None, (1,), (2,)], ids=["s2d", "fixed", "independent"])
def test_caches_grow_when_they_are_full(long_pair, exits):
    """Rows end at different lengths; one that has ended must not be overwritten while the other goes on."""
    prompts = [list(range(3, 63)), PROMPTS[1]]
    rows = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (35, 150)]
    config = DecodeConfig(exits, tree=BY_NODE)
    roomy = SpeculativeDecoder(*long_pair, config).generate(prompts, rows)
    tight = SpeculativeDecoder(*long_pair, dataclasses.replace(config, initial_room=32))
    assert tight.prepare(prompts, rows)[2][2].shape == (2, 192)
    assert tight.generate(prompts, rows).token_ids == roomy.token_ids
    assert [len(ids) for ids in roomy.token_ids] == [35, 150]
    plain = SpeculativeDecoder(long_pair[0], None, DecodeConfig(verify_width=TREE.nodes))
    assert plain.generate(prompts, rows).token_ids == roomy.token_ids


@pytest.mark.parametrize("exits", [None, (1,), (2,)], ids=["s2d", "fixed", "independent"])
def test_a_later_turn_equals_a_fresh_start(long_pair, exits):
    sampling = SamplingParams(max_new_tokens=12, ignore_eos=True)
    decoder = SpeculativeDecoder(*long_pair, DecodeConfig(exits, tree=TREE))
    conversation = decoder.conversation()
    first = conversation.generate(PROMPTS[:2], sampling)
    assert first.token_ids == decoder.generate(PROMPTS[:2], sampling).token_ids
    # Row 0 goes on; row 1 is told another story from its fourth token on.
    later = [[*PROMPTS[0], *first.token_ids[0], 9, 8, 7], [7, 7, 1, 8, 8, 8, 8]]
    second = conversation.generate(later, sampling)
    fresh = decoder.generate(later, sampling)
    assert second.token_ids == fresh.token_ids
    assert [row.prefilled_tokens for row in second.row_stats] == [4, 4]
    assert second.stats.drafted_tokens == fresh.stats.drafted_tokens
    assert second.stats.exit_histogram == fresh.stats.exit_histogram
    third = [[*later[0], *second.token_ids[0], 5], later[1]]
    again = conversation.generate(third, sampling)
    assert again.token_ids == decoder.generate(third, sampling).token_ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_is_generate_in_portions(long_pair, temperature):
    sampling = SamplingParams(temperature=temperature, max_new_tokens=40, ignore_eos=True)
    decoder = SpeculativeDecoder(*long_pair, DecodeConfig(tree=TREE))
    whole = decoder.generate(PROMPTS[:2], sampling)
    for rounds in (1, 8):
        stream = decoder.stream(PROMPTS[:2], sampling, rounds_per_look=rounds)
        token_ids = [[], []]
        for delta in stream:
            token_ids[delta.row] += delta.token_ids
        assert token_ids == whole.token_ids == stream.result.token_ids
        stats = stream.result.stats
        assert stats.seconds["compile"] == 0
        assert dataclasses.replace(stats, seconds={}) == dataclasses.replace(
            whole.stats, seconds={}
        )


def test_timed_rounds_give_the_same_tokens(target, draft):
    decoder = SpeculativeDecoder(target, draft, POLICIES["s2d"])
    timed = decoder.generate(PROMPTS, GREEDY, time_rounds=True)
    assert timed.token_ids == decoder.generate(PROMPTS, GREEDY).token_ids
    assert {"prefill", "draft", "verify", "rest"} <= set(timed.stats.seconds)


# --- the compiled loop


def _copies(text: str, kept: dict[str, str]) -> dict[str, list[str]]:
    found = {what: re.findall(rf"= {re.escape(s)}\S* copy\(", text) for what, s in kept.items()}
    return {what: copies for what, copies in found.items() if copies}


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("policy", ["s2d", "s2d by node", "s2d static", "independent"])
def test_no_cache_is_copied_in_the_compiled_round(target, draft, policy, greedy, batch):
    decoder = SpeculativeDecoder(target, draft, POLICIES[policy])
    sampling = dataclasses.replace(GREEDY, temperature=0.0 if greedy else 1.0)
    static, width, args = decoder.prepare(PROMPTS[:batch], sampling)
    (_, run), _ = programs(static, width, args)
    c = target.config
    capacity = args[2].shape[1]
    assert capacity == 128  # 32 prompt positions + 30 tokens + margin 64
    kept = {
        "keys and values": f"f32[{batch},{c.num_kv_heads},{capacity},{c.head_dim}]",
        "segment entries": f"f32[{batch},{capacity},{c.embed_dim}]",
    }
    text = run.as_text()
    assert kept["keys and values"] in text
    assert not _copies(text, kept)
    cache_bytes = 2 * 4 * batch * c.num_kv_heads * capacity * c.head_dim * 4
    assert run.memory_analysis().alias_size_in_bytes >= 2 * cache_bytes


def test_other_thresholds_and_sampling_compile_nothing(target, draft):
    own_shape = TreeShape(depth=2, top_k=2, nodes=6)  # programs are shared by all decoders
    first = SpeculativeDecoder(target, draft, DecodeConfig(tree=own_shape))
    assert first.generate([[1, 2, 3]], HOT).stats.seconds["compile"] > 0
    other = DecodeConfig(tree=own_shape, exit_thresholds=(0.9, 0.2, 0.0))
    decoder = SpeculativeDecoder(target, draft, other)
    sampling = SamplingParams(
        temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, max_new_tokens=20, stop_token_ids=(63,)
    )
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compilations.append(event) if "compile" in event else None
    )
    try:
        result = decoder.generate([list(range(32))], sampling)
    finally:
        jax.monitoring.clear_event_listeners()
    assert result.stats.seconds["compile"] == 0
    assert not [event for event in compilations if "backend_compile" in event]


def test_chains_keep_their_own_decoder(target, draft):
    """A chain has no part of the tree's machinery."""
    chain, *_ = SpeculativeDecoder(target, draft).prepare(PROMPTS, GREEDY)
    tree, *_ = SpeculativeDecoder(target, draft, POLICIES["s2d"]).prepare(PROMPTS, GREEDY)
    assert type(chain).__name__ == "Decoder"
    assert type(tree).__name__ == "TreeDecoder"


# --- shapes that cannot be


@pytest.mark.parametrize(
    "values",
    [
        {"depth": 0},
        {"top_k": 0},
        {"nodes": 1},
        {"leaving": "never"},
        {"paths": ((0,), (-1,))},
        {"paths": ((),)},
    ],
    ids=str,
)
def test_impossible_shapes_are_refused(values):
    with pytest.raises(UserError) as error:
        TreeShape(**values)
    assert "\n" not in str(error.value)
    assert next(iter(values)) in str(error.value)


def test_trees_need_the_fixed_rule():
    with pytest.raises(UserError, match="draft_length_rule"):
        DecodeConfig(tree=TREE, draft_length_rule="heuristic")


def test_a_static_shape_adds_ancestors():
    shape = TreeShape.static(((1, 0, 2), (0,)))
    assert set(shape.paths) == {(0,), (1,), (1, 0), (1, 0, 2)}
    assert (shape.depth, shape.nodes) == (3, 5)
    assert shape.top_k >= 3
