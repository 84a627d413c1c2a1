"""Replayed trees against a slow reference, against real decoding, and by hand; what the search makes of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tiny import noisy_draft, tiny_model
from tiny_trace import COSTS, answer_of, certain

from s2d_jax.calibration.candidates import Candidate, candidates, relative_tree_costs
from s2d_jax.calibration.record import record_trace
from s2d_jax.calibration.replay import predict
from s2d_jax.calibration.replay_tree import Forest, replay_tree
from s2d_jax.calibration.trace import AnswerTrace, Trace
from s2d_jax.config.costs import RoundCosts
from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.draft import DraftConfig
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.config.tree import TreeShape
from s2d_jax.draft.guard import worst_case
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.weights.model import Draft

PROMPTS = [[5, 9, 2], [7, 7, 1, 3, 30, 12, 50], [33, 4, 21, 60, 2], [1]]
EXITS = (1, 2, 4)
WIDTHS = (1, 2, 4, 9)
TOKENS = 72  # of every trace: one size of caches


@pytest.fixture(scope="module")
def target():
    return tiny_model(num_layers=4, spread=14.0)


@pytest.fixture(scope="module")
def draft(target):
    """The target with noise: often right, sometimes wrong."""
    return noisy_draft(target, EXITS, (0.4, 0.4, 0.0))


def with_tree(*shape, **fields) -> DecodeConfig:
    return DecodeConfig(tree=TreeShape(*shape), **fields)


def random_trace(rng, exits: int, length: int = 30) -> Trace:
    """Two answers of a draft that knows something."""

    def answer():
        probs = np.sort(rng.dirichlet(np.full(12, 0.3), size=(exits, length)), axis=-1)[..., ::-1]
        rank = np.minimum(rng.geometric(0.5, size=(exits, length)) - 1, 4)
        log_probs = np.log(probs[..., :4] + 1e-9).astype(np.float32)
        return AnswerTrace(0, probs[..., 0], (rank == 0).astype(float), log_probs, rank)

    return Trace(tuple(range(1, exits + 1)), (answer(), answer()), length + 1)


def slow_growth(trace, config, start: int, levels: int, stand_ins):
    """One tree, node by node: how many of its tokens are accepted, and the exit that each level leaves at.

    A node is `(score, level, path of numbers within levels, position that tells about it, whether it is the target's)`.
    """
    tree, exits = config.tree, range(len(config.exits))
    join = lambda name: np.concatenate([getattr(a, name) for a in trace.answers], axis=1)  # noqa: E731
    sure, rank, log_probs = join("confidence"), join("rank"), join("log_probs")
    beam, found, left = [(0.0, True)], [], []
    for level in range(levels):
        positions = [
            start + level if own else stand_ins[level][start, slot]
            for slot, (_, own) in enumerate(beam)
        ]
        nodes_exits = []
        for at in positions:
            nodes_exits.append(
                next(e for e in exits if e == exits[-1] or sure[e, at] > config.exit_thresholds[e])
            )
        if tree.leaving == "level":
            nodes_exits = [min(nodes_exits)] * len(beam)
        left.append(max(nodes_exits))
        children = []
        for (score, own), at, exit in zip(beam, positions, nodes_exits, strict=True):
            for r in range(tree.top_k):
                total = score + float(log_probs[exit, at, r])
                children.append((total, own and rank[exit, at] == r))
        found += [(-s, level, number, own) for number, (s, own) in enumerate(children)]
        best = sorted(range(len(children)), key=lambda i: (-children[i][0], i))[: tree.top_k]
        beam = [children[i] for i in sorted(best)]
    chosen = sorted(found)[: tree.nodes - 1]
    return sum(own for *_, own in chosen), left


@pytest.mark.parametrize("leaving", ["level", "node"])
def test_trees_grow_as_a_slow_reference_does(leaving):
    rng = np.random.default_rng(1)
    for exits, thresholds in ((1, (0.0,)), (3, (0.6, 0.5, 0.0))):
        trace = random_trace(rng, exits)
        names, count = tuple(range(1, exits + 1)), 60
        for depth, k, nodes in ((2, 2, 5), (4, 3, 9), (4, 4, 30), (3, 4, 37)):
            shape = TreeShape(depth, k, nodes, leaving=leaving)
            config = DecodeConfig(exits=names, exit_thresholds=thresholds, tree=shape)
            grown = Forest(trace, seed=3).grown(config)
            draws = np.random.default_rng(3)
            stand_ins = [draws.integers(count, size=(count, 1 if n == 0 else k)) for n in range(6)]
            accepted = grown.accepted(nodes)
            for start in range(count - depth):
                for levels in range(1, depth + 1):
                    expected = slow_growth(trace, config, start, levels, stand_ins)
                    assert accepted[start, levels - 1] == expected[0]
                    assert grown.exit_TY[start, :levels].tolist() == expected[1]
            assert len(np.unique(accepted[:, depth - 1])) > 1


def test_a_tree_replayed_by_hand():
    # The target's tokens are the second most probable at every other position; trees of two levels with two children each.
    rank = np.array([[1, 0, 1, 0, 1, 0, 10, 0]])
    trace = Trace((4,), (answer_of(rank, np.full((1, 8), 0.9), among=2),), 9)
    config = with_tree(2, 2, 7, exits=(4,))
    found = replay_tree(Forest(trace, 0), COSTS, Candidate("", "", config))
    # Rounds: tokens 1-3, 4-6; then two are left, one level may be drafted, and the target's own is not in it: 7; then 8 alone.
    root, level = 0.4 - 2 * 0.05, 0.5 - 2 * 0.06  # the shallower exits are not read
    assert found.mean_acceptance_length == pytest.approx(8 / 4)
    assert found.mean_draft_length == pytest.approx(6 * 3 / 4)
    seconds = 2 * (1.6 + root + level) + (1.6 + root) + 1.0
    assert found.speedup == pytest.approx(8 / seconds)


def test_costs_of_other_exits_follow_from_those_of_all():
    measured = COSTS.tree
    assert measured.segment_seconds((1, 2, 4), 1) == pytest.approx([0.05, 0.1, 0.1])
    assert measured.segment_seconds((2, 4), 2) == pytest.approx([0.3 - 0.12, 0.2 - 0.06])
    # Between the measured two and ten nodes of a level.
    assert measured.segment_seconds((1,), 6) == pytest.approx([0.175 - 0.07])
    (step,) = measured.mean_level_seconds((1,), TreeShape(4, 10, 16))
    assert step == pytest.approx((0.1 + 3 * 0.2) / 4)
    costs = relative_tree_costs(COSTS, (1, 2, 4), TreeShape(3, 2, 10))
    assert costs.draft_step == pytest.approx((0.4 / 3, 0.85 / 3, 1.4 / 3), abs=1e-4)
    assert costs.verify == pytest.approx((1.0, 1.65, 1.65, 1.65))
    # What the guard counts for a failed tree covers trees of fewer levels.
    assert worst_case(costs.draft_step, costs.verify) == pytest.approx(
        [1.1167, 1.5833, 2.05], abs=1e-3
    )


def recorded(target, draft, temperature: float = 0.0):
    """A trace of the target's own answers, and the sampling that made them."""
    sampling = SamplingParams(max_new_tokens=TOKENS, temperature=temperature)
    plain = SpeculativeDecoder(target).generate(PROMPTS, sampling)
    sequences = [[*p, *ids] for p, ids in zip(PROMPTS, plain.token_ids, strict=True)]
    lengths = [len(p) for p in PROMPTS]
    trace = record_trace(target, draft, sequences, lengths, TOKENS, temperature, lambda: None)
    return trace, sampling, plain.token_ids


@pytest.fixture(scope="module")
def greedy(target, draft):
    return recorded(target, draft)


@pytest.fixture(scope="module")
def itself(target, draft):
    """A draft that is the target, and what is recorded of it."""
    draft = dataclasses.replace(draft, params=target.params)
    return draft, recorded(target, draft)


def replayed_rounds(trace, config) -> int:
    found = replay_tree(Forest(trace, 0), COSTS, Candidate("", "", config))
    return round(sum(a.accepted.shape[1] for a in trace.answers) / found.mean_acceptance_length)


def guarded(config: DecodeConfig) -> DecodeConfig:
    steps, depth = (0.05, 0.1, 0.15)[-len(config.exits or (1, 2, 4)) :], config.tree.depth
    costs = RoundCosts(steps, (1.0, *(1.3,) * depth), 0.02)
    return dataclasses.replace(config, costs=costs, guard=True)


LIKE_ANOTHER = pytest.mark.exhaustive("a case like another, of other size")


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(with_tree(1, 8, 9, exits=(2,)), marks=LIKE_ANOTHER),
        pytest.param(with_tree(4, 1, 5, exits=(4,)), marks=LIKE_ANOTHER),
        with_tree(2, 3, 13, exits=(2,)),
        with_tree(1, 4, 5, exits=(1, 2, 4), exit_thresholds=(0.6, 0.6, 0.0)),
        pytest.param(guarded(with_tree(2, 4, 21, exits=(4,))), marks=LIKE_ANOTHER),
        guarded(with_tree(2, 2, 7, exits=(1,))),
    ],
    ids=lambda config: f"{config.tree.depth}x{config.tree.top_k} {config.exits} {config.guard}",
)
def test_rounds_are_exact_where_other_paths_do_not_matter(target, draft, greedy, config):
    """Trees of one level, of one child each, and of two levels that are verified whole: greedy."""
    trace, sampling, plain = greedy
    result = SpeculativeDecoder(target, draft, config).generate(PROMPTS, sampling)
    assert result.token_ids == plain
    assert result.stats.target_forwards == replayed_rounds(trace, config)
    assert result.stats.accepted_tokens > (4 if config.guard else 20)


@pytest.mark.exhaustive("a useless chain is given up in test_draft_length.py by the same rule")
def test_a_useless_tree_costs_what_the_guard_allows(target):
    other = tiny_model(num_layers=4, spread=14.0, seed=5)
    useless = Draft(other.config, other.params, None, "random", DraftConfig((1, 2, 4)))
    costs = RoundCosts((0.2, 0.3, 0.4), (1.0, 1.5, 1.5, 1.5), 0.01)
    config = with_tree(3, 4, 12, costs=costs, guard=True)
    sampling = SamplingParams(max_new_tokens=200)
    stats = SpeculativeDecoder(target, useless, config).generate(PROMPTS, sampling).stats
    trees = stats.target_forwards - stats.plain_rounds
    assert trees > 4
    # At most so much, if each tree had all levels and left at the last exit, and the draft had missed all plain rounds.
    spent = stats.plain_rounds * 1.01 + trees * (1.5 + 3 * 0.4)
    assert spent < 1.02 * stats.emitted_tokens + 4 * 2 * (0.5 + 3 * 0.4)


@pytest.mark.exhaustive("other trees are replayed exactly, or to a tenth")
def test_a_draft_that_is_the_target_is_accepted_as_far_as_its_tree_holds_it(target, itself):
    draft, (trace, sampling, _) = itself
    config = with_tree(5, 4, 16, exits=(4,))
    result = SpeculativeDecoder(target, draft, config).generate(PROMPTS, sampling)
    assert result.stats.target_forwards == pytest.approx(replayed_rounds(trace, config), rel=0.05)
    assert result.stats.mean_acceptance_length > 2.5


@pytest.mark.parametrize(
    ("config", "temperature"),
    [
        (with_tree(4, 4, 12, exits=(2,)), 0.0),
        pytest.param(
            *(with_tree(5, 2, 8, exits=(1, 2, 4), exit_thresholds=(0.4, 0.4, 0.0)), 0.0),
            marks=LIKE_ANOTHER,
        ),
        (with_tree(4, 8, 24, exits=(4,), draft_sampling="argmax"), 1.0),
    ],
    ids=["one exit", "three", "sampled"],
)
def test_tokens_per_pass_are_predicted_within_a_tenth(target, draft, greedy, config, temperature):
    """Where other paths compete, and what they say is drawn from elsewhere."""
    trace, sampling, _ = greedy if temperature == 0 else recorded(target, draft, temperature)
    result = SpeculativeDecoder(target, draft, config).generate(PROMPTS, sampling)
    predicted = replay_tree(Forest(trace, 0), COSTS, Candidate("", "", config))
    measured = result.stats.mean_acceptance_length
    assert predicted.mean_acceptance_length == pytest.approx(measured, rel=0.1)
    assert measured > 1.5


def test_the_trace_knows_the_children(itself):
    _, (trace, *_) = itself
    for answer in trace.answers:
        assert answer.log_probs.shape == (3, TOKENS - 1, 10)
        assert (answer.rank[2] == 0).all()
        np.testing.assert_allclose(np.exp(answer.log_probs[..., 0]), answer.confidence, rtol=1e-5)
        assert (np.diff(answer.log_probs, axis=-1) <= 0).all()
        np.testing.assert_array_equal(answer.rank == 0, answer.accepted == 1.0)


def best(trace, costs=COSTS):
    return predict(trace, costs, candidates(costs, trace, WIDTHS), repeats=1, seed=0)[0]


def test_trees_win_where_the_target_takes_the_second_or_third():
    rank = np.random.default_rng(0).integers(3, size=(1, 120))
    trace = Trace((4,), (answer_of(rank, np.full((1, 120), 0.95), among=3),), 121)
    assert best(trace).candidate.config.tree is not None
    dear = dataclasses.replace(COSTS.tree, verify={8: 4.0, 60: 5.0})
    without = best(trace, dataclasses.replace(COSTS, tree=dear)).candidate.config
    assert without is None or without.tree is None


def test_chains_win_where_the_first_is_always_right_and_nothing_where_none_is():
    chain = best(certain(*[1] * 60)).candidate
    assert chain.config is not None
    assert chain.config.tree is None
    nothing = best(certain(*[0] * 60))
    assert nothing.speedup == 1.0


def test_the_search_has_all_shapes():
    rng = np.random.default_rng(0)
    trace = random_trace(rng, 3, 40)
    found = candidates(COSTS, dataclasses.replace(trace, exits=(1, 2, 4)), WIDTHS)
    trees = [c for c in found if c.config is not None and c.config.tree is not None]
    # Of the top 4 that this trace knows. Trees of 8, 12, 16, 32 and 60 nodes that fit, of 2 to 6 levels each: top 2 have at
    # most 7, 11, 15, 19 and 23 nodes, top 4 at most 21, 37, 53, 69 and 85.
    fitting = (0 + 1 + 2 + 3 + 3) + (3 + 4 + 4 + 5 + 5)
    assert len(trees) == fitting * (3 + 2 * 16)
    assert len({c.name for c in found}) == len(found)
    assert all(c.config.guard and c.config.draft_sampling == "argmax" for c in trees)
