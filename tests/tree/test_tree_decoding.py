"""Trees on tiny models: greedy identity, requests, caches over time, and what the compiled loop must not contain."""

from __future__ import annotations

import dataclasses
import functools
import re

import pytest
from tiny import compilations, tiny_config, tiny_params
from tree_tiny import CAPACITY, EXITS, FULL, GREEDY, HOT, POLICIES, PROMPTS, TREE, tiny_pair

from s2d_jax.config.costs import RoundCosts
from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.config.tree import TreeShape
from s2d_jax.decode import programs as compilation
from s2d_jax.decode.programs import programs
from s2d_jax.decode.verifier import ChainVerifier
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.generation.planner import Planner
from s2d_jax.generation.session import Session
from s2d_jax.generation.stream import Stream
from s2d_jax.tree.verifier import TreeVerifier
from s2d_jax.weights.model import Model

MIXED = ("s2d", "s2d by node", "s2d static", "independent")
FIXED_OR_AT_A_LIMIT = ("sd@1", "independent static", "never early", "always first")
WIDE_POLICY = "s2d wide, catching up one by one"

single_rows = pytest.mark.exhaustive("a batch of one row writes the same caches under s2d")
compared = pytest.mark.exhaustive("test_tree_rounds.py compares every round of other policies")
s2d_stops = pytest.mark.exhaustive("rows end by the same rule under s2d")
other_trees = pytest.mark.exhaustive("s2d writes the same caches, and more of them")
one_segment = pytest.mark.exhaustive("a draft of one segment grows the same caches")


@pytest.fixture(scope="module")
def pair():
    return tiny_pair()


@pytest.fixture(scope="module")
def decoders(pair):
    return {policy: SpeculativeDecoder(*pair, config) for policy, config in POLICIES.items()}


@pytest.fixture(scope="module")
def plain(pair):
    """Greedy tokens of plain decoding, with passes of a given width."""

    @functools.cache
    def tokens(width, batch=4):
        decoder = SpeculativeDecoder(pair[0], None, DecodeConfig(verify_width=width))
        return decoder.generate(PROMPTS[:batch], GREEDY).token_ids

    return tokens


@pytest.mark.parametrize(
    ("policy", "batch"),
    [
        ("s2d", 4),
        *(pytest.param(p, 4, marks=compared) for p in MIXED[1:] + FIXED_OR_AT_A_LIMIT),
        *(pytest.param(policy, 1, marks=single_rows) for policy in MIXED),
        pytest.param(WIDE_POLICY, 4, marks=pytest.mark.exhaustive("other widths differ in size")),
    ],
)
def test_greedy_equals_the_width_matched_reference(decoders, plain, policy, batch):
    decoder, nodes = decoders[policy], POLICIES[policy].tree.nodes
    result = decoder.generate(PROMPTS[:batch], GREEDY)
    assert decoder.verify_width == nodes
    assert result.token_ids == plain(nodes, batch)
    assert all(len(ids) == GREEDY.max_new_tokens for ids in result.token_ids)
    assert result.stats.drafted_tokens == sum(result.stats.exit_histogram.values())
    assert result.stats.mean_acceptance_length > 1.3


def test_thresholds_at_their_limits(decoders):
    never = decoders["never early"].generate(PROMPTS, GREEDY).stats
    first = decoders["always first"].generate(PROMPTS, GREEDY).stats
    assert never.exit_histogram[1] == never.exit_histogram[2] == 0
    assert first.exit_histogram[2] == first.exit_histogram[3] == 0
    assert first.draft_forwards[2] == first.draft_forwards[3] == 0


@pytest.mark.exhaustive("test_lossless.py has a guarded tree with plain rounds")
def test_a_guarded_tree_pauses_and_returns(pair, plain):
    """Plain rounds are of width 1, so the reference has that width."""
    costs = RoundCosts((0.3, 0.5, 0.8), (1.0, 1.5, 1.6, 1.7), 0.05)
    config = dataclasses.replace(POLICIES["s2d by node"], guard=True, costs=costs)
    result = SpeculativeDecoder(*pair, config).generate(PROMPTS, GREEDY)
    assert result.token_ids == plain(1)
    assert 0.1 < result.stats.plain_rounds / result.stats.target_forwards < 0.9


# --- what a draft that is right gains


def _chain_shaped(depth: int) -> TreeShape:
    return TreeShape(depth=depth, top_k=1, nodes=depth + 1)


@pytest.mark.parametrize(
    "tree",
    [
        pytest.param(
            _chain_shaped(3),
            marks=pytest.mark.exhaustive("chains of one's own are in test_decoder.py"),
            id="chain-shaped",
        ),
        pytest.param(FULL, id="static"),
    ],
)
def test_the_target_as_its_own_draft_is_always_accepted(pair, tree):
    """At temperature 1 too, where the one child of a node is drawn from the target's own law (p and q differ by rounding)."""
    decoder = SpeculativeDecoder(pair[0], pair[0], DecodeConfig(tree=tree))
    # One token comes from prefill; then full rounds.
    sampling = dataclasses.replace(GREEDY, max_new_tokens=1 + 5 * (tree.depth + 1))
    stats = decoder.generate(PROMPTS, sampling).stats
    assert stats.mean_acceptance_length == tree.depth + 1
    assert stats.accepted_per_depth == stats.drafted_per_depth == (4 * 5,) * tree.depth
    if tree.top_k == 1:
        hot = dataclasses.replace(sampling, temperature=1.0)
        assert decoder.generate(PROMPTS, hot).stats.mean_acceptance_length > 3.92


@pytest.mark.parametrize(
    "exits",
    [
        pytest.param(None, id="s2d"),
        pytest.param(
            (3,), id="independent", marks=pytest.mark.exhaustive("several exits have what one has")
        ),
    ],
)
def test_a_tree_of_one_child_each_is_a_chain(pair, exits):
    chain = SpeculativeDecoder(*pair, DecodeConfig(exits, num_draft_tokens=3))
    tree = SpeculativeDecoder(*pair, DecodeConfig(exits, tree=_chain_shaped(3)))
    ours, theirs = (decoder.generate(PROMPTS, GREEDY) for decoder in (tree, chain))
    assert ours.token_ids == theirs.token_ids
    for name in ("target_forwards", "drafted_per_depth", "accepted_per_depth", "exit_histogram"):
        assert getattr(ours.stats, name) == getattr(theirs.stats, name)


@pytest.mark.exhaustive("every round of a tree is compared with the slow reference")
def test_a_tree_accepts_more_than_a_chain_of_its_depth(pair, decoders):
    chain = SpeculativeDecoder(*pair, DecodeConfig(num_draft_tokens=TREE.depth))
    ours, theirs = (d.generate(PROMPTS, GREEDY).stats for d in (decoders["s2d"], chain))
    assert ours.mean_acceptance_length > 1.1 * theirs.mean_acceptance_length


# --- requests


@pytest.mark.parametrize("policy", ["s2d", *(pytest.param(p, marks=s2d_stops) for p in MIXED[1:])])
@pytest.mark.parametrize("new_tokens", [1, 2, 3, 4])
def test_few_new_tokens(decoders, plain, policy, new_tokens):
    sampling = dataclasses.replace(GREEDY, max_new_tokens=new_tokens)
    whole = plain(POLICIES[policy].tree.nodes)
    found = decoders[policy].generate(PROMPTS, sampling).token_ids
    assert found == [ids[:new_tokens] for ids in whole]


@pytest.mark.parametrize("policy", ["s2d", *(pytest.param(p, marks=s2d_stops) for p in MIXED[1:])])
def test_stop_tokens_end_a_row_and_are_kept(decoders, plain, policy):
    """Every token of a text in turn: at the root, inside an accepted path, as the bonus token."""
    whole = plain(POLICIES[policy].tree.nodes)
    for place in range(12):
        stops = [ids[(place + 3 * row) % 14] for row, ids in enumerate(whole)]
        rows = [dataclasses.replace(GREEDY, stop_token_ids=(stop,)) for stop in stops]
        expected = [ids[: ids.index(stop) + 1] for ids, stop in zip(whole, stops, strict=True)]
        assert decoders[policy].generate(PROMPTS, rows).token_ids == expected


@pytest.mark.exhaustive("greedy trees stop at every place")
def test_stop_tokens_of_sampled_trees(decoders):
    decoder = decoders["s2d by node"]
    free = decoder.generate(PROMPTS, HOT).token_ids
    for place in (3, 9):
        stops = [ids[place] for ids in free]
        rows = [
            dataclasses.replace(HOT, seed=HOT.seed + row, stop_token_ids=(stop,))
            for row, stop in enumerate(stops)
        ]
        expected = [ids[: ids.index(stop) + 1] for ids, stop in zip(free, stops, strict=True)]
        assert decoder.generate(PROMPTS, rows).token_ids == expected


def test_generation_ends_at_the_context():
    config = tiny_config(num_layers=1, max_context=20)
    small = Model(config, tiny_params(config, spread=6.0), None, "small")
    decoder = SpeculativeDecoder(small, small, DecodeConfig(tree=TREE))
    assert len(decoder.generate([list(range(1, 16))], GREEDY).token_ids[0]) == 5


@pytest.mark.parametrize(
    ("policy", "draft_sampling", "temperature"),
    [
        ("s2d", "sample", 0.0),
        ("s2d by node", "sample", 1.0),
        pytest.param(
            "s2d static", "argmax", 1.0, marks=pytest.mark.exhaustive("rows are apart in any tree")
        ),
    ],
)
def test_a_row_does_not_depend_on_its_neighbours(pair, policy, draft_sampling, temperature):
    """Same batch width, other neighbours: the same tokens."""
    rows = [SamplingParams(temperature=temperature, seed=s, max_new_tokens=30) for s in range(4)]
    config = dataclasses.replace(POLICIES[policy], draft_sampling=draft_sampling)
    decoder = SpeculativeDecoder(*pair, config)
    together = decoder.generate(PROMPTS, rows)
    short = [dataclasses.replace(row, max_new_tokens=1) for row in rows[1:]]
    alone = decoder.generate([PROMPTS[0], [2], [2], [2]], [rows[0], *short])
    moved = decoder.generate([*PROMPTS[1:], PROMPTS[0]], [*rows[1:], rows[0]])
    assert together.token_ids[0] == alone.token_ids[0] == moved.token_ids[3]


@pytest.mark.parametrize(
    ("policy", "draft_sampling"),
    [
        ("s2d by node", "sample"),
        pytest.param(
            "s2d static",
            "argmax",
            marks=pytest.mark.exhaustive("rows have their own sampling in any tree"),
        ),
    ],
)
def test_rows_have_their_own_sampling(pair, plain, policy, draft_sampling):
    """A greedy row in a sampled batch is greedy; the seed decides the others."""
    config = dataclasses.replace(POLICIES[policy], draft_sampling=draft_sampling)
    cold, other = (dataclasses.replace(HOT, **x) for x in ({"temperature": 0.0}, {"seed": 4}))
    one = SpeculativeDecoder(*pair, config).generate([PROMPTS[1]] * 4, [HOT, cold, HOT, other])
    assert one.token_ids[1] == plain(config.tree.nodes)[1][:20]
    assert one.token_ids[0] == one.token_ids[2] != one.token_ids[3]


# --- long runs, later turns, streams


@pytest.mark.parametrize("policy", ["s2d by node", pytest.param("independent", marks=one_segment)])
def test_caches_grow_when_they_are_full(pair, policy):
    """Rows end at different lengths; one that has ended must not be overwritten while others go on."""
    rows = [SamplingParams(max_new_tokens=n) for n in (125, 10, 40, 60)]
    roomy = SpeculativeDecoder(*pair, POLICIES[policy])
    tight = SpeculativeDecoder(*pair, dataclasses.replace(POLICIES[policy], initial_room=32))
    assert roomy.prepare(PROMPTS, rows)[2][2].shape == (4, 256)
    assert tight.prepare(PROMPTS, rows)[2][2].shape == (4, CAPACITY)
    found = tight.generate(PROMPTS, rows).token_ids
    assert found == roomy.generate(PROMPTS, rows).token_ids
    assert [len(ids) for ids in found] == [125, 10, 40, 60]
    reference = SpeculativeDecoder(pair[0], None, DecodeConfig(verify_width=TREE.nodes))
    assert found == reference.generate(PROMPTS, rows).token_ids


# Three turns of so many tokens fit into caches of CAPACITY.
TURN = SamplingParams(max_new_tokens=11)


@pytest.mark.parametrize("policy", ["s2d", "independent"])
def test_a_later_turn_equals_a_fresh_start(decoders, policy):
    decoder = decoders[policy]
    conversation = decoder.conversation()
    first = conversation.generate(PROMPTS, TURN)
    assert first.token_ids == decoder.generate(PROMPTS, TURN).token_ids
    # Rows 0 and 2 go on; row 1 is told another story from its fourth token on, row 3 says the same again.
    later = [[*p, *ids, 9, 8, 7] for p, ids in zip(PROMPTS, first.token_ids, strict=True)]
    later[1], later[3] = [7, 7, 1, 8, 8, 8, 8], PROMPTS[3]
    second, fresh = conversation.generate(later, TURN), decoder.generate(later, TURN)
    assert second.token_ids == fresh.token_ids
    assert [row.prefilled_tokens for row in second.row_stats] == [4, 4, 4, 1]
    assert second.stats.drafted_tokens == fresh.stats.drafted_tokens
    assert second.stats.exit_histogram == fresh.stats.exit_histogram
    third = [[*later[0], *second.token_ids[0], 5], *later[1:]]
    again = conversation.generate(third, TURN)
    assert again.token_ids == decoder.generate(third, TURN).token_ids


def test_a_later_turn_under_a_policy_of_another_kind_starts_anew(pair, decoders):
    """A whole draft keeps other caches for chains than for trees; calibration may choose one for each temperature."""
    chain = Planner(*pair, DecodeConfig((3,), num_draft_tokens=3))
    tree, session = decoders["independent"], Session()
    first = Stream(session, chain.plan(PROMPTS, TURN), keep=True).finish()
    later = [[*p, *ids, 9, 8] for p, ids in zip(PROMPTS, first.token_ids, strict=True)]
    second = Stream(session, tree._planner.plan(later, TURN), keep=True).finish()
    assert second.token_ids == tree.generate(later, TURN).token_ids
    assert [row.prefilled_tokens for row in second.row_stats] == [len(ids) for ids in later]


@pytest.mark.parametrize("sampling", [GREEDY, HOT], ids=["greedy", "sampled"])
def test_a_stream_is_generate_in_portions(decoders, sampling):
    whole = decoders["s2d by node"].generate(PROMPTS, sampling)
    for rounds in (1, 8):
        stream = decoders["s2d by node"].stream(PROMPTS, sampling, rounds_per_look=rounds)
        token_ids = [[] for _ in PROMPTS]
        for delta in stream:
            token_ids[delta.row] += delta.token_ids
        assert token_ids == whole.token_ids == stream.result.token_ids
        ours, theirs = (dataclasses.replace(x.stats, seconds={}) for x in (stream.result, whole))
        assert ours == theirs
        assert stream.result.stats.seconds["compile"] == 0


# --- the compiled loop


def _copies(text: str, kept: dict[str, str]) -> dict[str, list[str]]:
    found = {what: re.findall(rf"= {re.escape(s)}\S* copy\(", text) for what, s in kept.items()}
    return {what: copies for what, copies in found.items() if copies}


@pytest.mark.parametrize(
    ("policy", "temperature", "batch"),
    [
        *(("s2d", 0.0, batch) for batch in (4, 1)),
        ("s2d by node", 1.0, 4),
        pytest.param("s2d by node", 1.0, 1, marks=single_rows),
        *(pytest.param(p, 0.0, 4, marks=other_trees) for p in ("s2d static", "independent")),
        *(pytest.param(p, 0.0, 1, marks=single_rows) for p in ("s2d static", "independent")),
    ],
)
def test_no_cache_is_copied_in_the_compiled_round(pair, decoders, policy, temperature, batch):
    sampling = dataclasses.replace(GREEDY, temperature=temperature)
    static, width, args = decoders[policy].prepare(PROMPTS[:batch], sampling)
    (_, run), _ = programs(static, width, args)
    c, text = pair[0].config, run.as_text()
    assert args[2].shape == (batch, CAPACITY)
    kept = {
        "keys and values": f"f32[{batch},{c.num_kv_heads},{CAPACITY},{c.head_dim}]",
        "segment entries": f"f32[{batch},{CAPACITY},{c.embed_dim}]",
        "draft probabilities": f"f32[{batch},{1 + static.drafter.growth.num_slots},{c.vocab_size}]",
    }
    assert kept["keys and values"] in text
    assert policy == "independent" or kept["segment entries"] in text
    assert temperature == 0 or kept["draft probabilities"] in text
    assert not _copies(text, kept)
    cache_bytes = 2 * c.num_layers * batch * c.num_kv_heads * CAPACITY * c.head_dim * 4
    assert run.memory_analysis().alias_size_in_bytes >= 2 * cache_bytes


def test_other_thresholds_and_sampling_compile_nothing(pair, monkeypatch):
    monkeypatch.setattr(compilation, "_CACHE", {})  # programs are shared by all decoders
    first = SpeculativeDecoder(*pair, POLICIES["s2d by node"])
    assert first.generate([[1, 2, 3]], HOT).stats.seconds["compile"] > 0
    other = dataclasses.replace(POLICIES["s2d by node"], exit_thresholds=(0.9, 0.2, 0.0))
    decoder = SpeculativeDecoder(*pair, other)
    filters = {"top_k": 5, "top_p": 0.9, "min_p": 0.1, "stop_token_ids": (63,)}
    sampling = SamplingParams(temperature=0.7, max_new_tokens=20, **filters)
    with compilations() as compiled:
        result = decoder.generate([list(range(32))], sampling)
    assert result.stats.seconds["compile"] == 0
    assert not compiled


def test_chains_keep_their_own_verifier(pair, decoders):
    """A chain has no part of the tree's machinery."""
    chain, *_ = SpeculativeDecoder(*pair).prepare(PROMPTS, GREEDY)
    tree, *_ = decoders["s2d"].prepare(PROMPTS, GREEDY)
    assert type(chain.verifier) is ChainVerifier
    assert type(tree.verifier) is TreeVerifier
    assert tuple(decoders["s2d"].exits) == EXITS
