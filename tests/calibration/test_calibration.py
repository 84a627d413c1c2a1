"""Replayed chains against hand computation and against real decoding; policies kept and found again; the command line."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import noisy_pair
import numpy as np
import pytest
from infer_tiny import failing_run, run, save_tiny_models
from noisy_pair import EXITS, GREEDY, PROMPTS
from tiny_trace import COSTS, certain, coins

from infer.bench import __main__ as bench
from infer.calibrate import __main__ as command
from infer.calibrate import choosing
from infer.generate import __main__ as generate
from s2d_jax.calibration import choose
from s2d_jax.calibration import time_trees as tree_costs
from s2d_jax.calibration.candidates import Candidate, best_of_families, candidates
from s2d_jax.calibration.record import record_trace
from s2d_jax.calibration.replay import gain_limits, predict, replay
from s2d_jax.config.costs import RoundCosts
from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.config.tree import TreeShape
from s2d_jax.draft.length import DraftingArrays, decide
from s2d_jax.errors import UserError
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.generation.policy import (
    Policy,
    PolicyKey,
    find_policy,
    fingerprint,
    read_policies,
    write_policies,
)
from s2d_jax.weights.model import Draft, Model

WIDTHS = (1, 2, 4, 9)
BEFORE_TREES = """{
    "exits": [1, 2], "exit_thresholds": [0.5, 0.0], "num_draft_tokens": 2, "draft_length_rule": "fixed",
    "max_draft_tokens": null, "min_confidence": 0.4, "gain_rate": 1.0, "guard": true, "narrow_widths": [1],
    "costs": {
        "draft_step": [0.1, 0.2], "verify": [1.0, 1.5, 1.5], "catch_up": 0.01,
        "acceptance": [[0.0, 1.0], [0.0, 1.0]], "next_acceptance": 0.7
    },
    "draft_sampling": "sample", "catch_up_width": 4, "prefill_chunk": 512, "initial_room": 512
}"""


@pytest.fixture(scope="module")
def target() -> Model:
    return noisy_pair.make_target()


@pytest.fixture(scope="module")
def draft(target) -> Draft:
    return noisy_pair.make_draft(target)


def config(**fields) -> DecodeConfig:
    return DecodeConfig(narrow_widths=(1,), **fields)


def test_a_chain_replayed_by_hand():
    trace = certain(1, 1, 0, 1, 1, 1, 1)
    found = replay(
        trace, COSTS, Candidate("", "", config(exits=(4,), num_draft_tokens=2)), coins(trace)
    )
    # Rounds: 2 accepted, 3 emitted, twice (tokens 1-3, 4-6); then one token is left: nothing is drafted, a plain round.
    # A draft step costs .3 (.25 of it the pass); after a round that accepted all, one more pass.
    seconds = (1.2 + 0.6) + (1.2 + 0.6 + 0.25) + 1.0
    assert found.mean_acceptance_length == pytest.approx(7 / 3)
    assert found.mean_draft_length == pytest.approx(4 / 3)
    assert found.speedup == pytest.approx(7 / seconds)


def test_rejections_end_a_chain_and_low_confidence_its_drafting():
    trace = certain(0, 0, 0, 0, confidence=0.3)
    fields = {"exits": (4,), "num_draft_tokens": 3}
    fixed = replay(trace, COSTS, Candidate("", "", config(**fields)), coins(trace))
    assert (fixed.mean_acceptance_length, fixed.mean_draft_length) == (1, (3 + 2 + 1) / 4)
    rule = config(draft_length_rule="confidence", **fields)
    assert replay(trace, COSTS, Candidate("", "", rule), coins(trace)).mean_draft_length == 3 / 4


def test_gain_limits_are_the_rule_of_the_loop():
    costs = RoundCosts((0.1, 0.3), (1.0, 1.4, 1.4, 1.9, 1.9), next_acceptance=0.6)
    own = config(draft_length_rule="expected_gain", num_draft_tokens=4, costs=costs, gain_rate=1.3)
    drafting = DraftingArrays.create(own, [np.inf] * 400, 4, 2)
    rng = np.random.default_rng(0)
    hope, sure = rng.random(400).astype(np.float32), rng.random(400).astype(np.float32)
    exits = rng.integers(2, size=400).astype(np.int32)
    draw_above, more_above = gain_limits(costs, 1.3, 3)
    for i in range(3):
        limit_B = jnp.full(400, 3, jnp.int32)
        draw_B, more_B, hope_B = jax.jit(decide)(drafting, i, hope, sure, exits, limit_B)
        for row, exit in enumerate(exits):
            assert draw_B[row] == (hope_B[row] >= draw_above[exit][i])
            assert more_B[row] == (draw_B[row] & (hope_B[row] > more_above[exit][i]))


@pytest.fixture(scope="module")
def plain(target):
    return SpeculativeDecoder(target).generate(PROMPTS, GREEDY)


@pytest.fixture(scope="module")
def trace(target, draft, plain):
    """Of the plain greedy answers."""
    sequences = [[*p, *ids] for p, ids in zip(PROMPTS, plain.token_ids, strict=True)]
    lengths = [len(p) for p in PROMPTS]
    return record_trace(target, draft, sequences, lengths, 30, 0.0, lambda: None)


# Those without a guard and with all exits run one program, since all have costs.
@pytest.mark.parametrize(
    "fields",
    [
        {"exits": (1,), "num_draft_tokens": 3},
        {"exits": (2,), "draft_length_rule": "confidence", "min_confidence": 0.6},
        {
            "draft_length_rule": "heuristic",
            "num_draft_tokens": 2,
            "max_draft_tokens": 5,
            "exit_thresholds": (0.6, 0.0),
        },
        {"draft_length_rule": "confidence", "exit_thresholds": (0.5, 0.0)},
        {
            "draft_length_rule": "expected_gain",
            "gain_rate": 1.4,
            "exit_thresholds": (0.5, 0.0),
        },
        {"exits": (2,), "num_draft_tokens": 4, "guard": True},
        {
            "draft_length_rule": "expected_gain",
            "exit_thresholds": (0.5, 0.0),
            "guard": True,
        },
    ],
    ids=str,
)
def test_the_replay_counts_the_rounds_of_real_decoding(target, draft, plain, trace, fields):
    """Greedy: one teacher-forced pass predicts exactly how many rounds the real loop takes, for every rule."""
    fields = {"exits": EXITS, **fields}
    exits = len(fields["exits"])
    width = fields.get("max_draft_tokens", fields.get("num_draft_tokens", 5))
    verify, steps = (1.0, *(1.2,) * width), (0.1, 0.2)[-exits:]
    own = config(**fields, costs=RoundCosts(steps, verify, 0.02, next_acceptance=0.6))
    result = SpeculativeDecoder(target, draft, own).generate(PROMPTS, GREEDY)
    assert result.token_ids == plain.token_ids
    found = replay(trace, COSTS, Candidate("", "", own), coins(trace))
    emitted = sum(answer.accepted.shape[1] for answer in trace.answers)
    assert emitted == 4 * 29
    assert result.stats.target_forwards == round(emitted / found.mean_acceptance_length)


def test_a_sampled_trace_holds_exact_acceptance_probabilities(target, draft):
    """The mean over emitted tokens of min(1, q / p) is that of sum(min(p, q)); here p = q, and all are accepted."""
    sampling = SamplingParams(temperature=1.0, max_new_tokens=20)
    ids = SpeculativeDecoder(target).generate(PROMPTS[:1], sampling).token_ids[0]
    itself = dataclasses.replace(draft, params=target.params)
    trace = record_trace(
        target, itself, [[*PROMPTS[0], *ids]], [len(PROMPTS[0])], 20, 1.0, lambda: None
    )
    assert trace.answers[0].accepted.shape == (2, 19)
    np.testing.assert_allclose(trace.answers[0].accepted[1], 1.0, atol=1e-4)
    assert trace.answers[0].accepted[0].mean() < 0.9


def test_the_search_finds_what_pays():
    good, bad = certain(*[1] * 40), certain(*[0] * 40)
    best = predict(good, COSTS, candidates(COSTS, good, WIDTHS), repeats=1, seed=0)[0]
    assert best.mean_draft_length > 4
    assert best.speedup > 1.8
    worst = predict(bad, COSTS, candidates(COSTS, bad, WIDTHS), repeats=1, seed=0)
    assert worst[0].candidate.config is None or worst[0].speedup == 1.0
    families = best_of_families(worst, 3)
    assert len({entry.candidate.family for entry in families}) == 3


def key(**changes) -> PolicyKey:
    return dataclasses.replace(PolicyKey("t", "d", "float32/float32", "cpu x 2", 0.0), **changes)


def test_policies_are_kept_and_found_again(tmp_path):
    file = tmp_path / "sorted_draft.json"
    file.write_text(json.dumps({"format": 1, "exit_layers": [1, 2]}))
    costs = RoundCosts((0.1, 0.2), (1.0, 1.5, 1.5), 0.01, ((0.0, 0.5, 1.0),) * 2, 0.7)
    speculate = DecodeConfig(
        exits=(1, 2), exit_thresholds=(0.5, 0.0), num_draft_tokens=2, costs=costs, guard=True
    )
    greedy, warm, hot = (key(temperature=t) for t in (0.0, 0.5, 1.0))
    write_policies(file, [Policy(greedy, speculate, {"why": 1}), Policy(warm, None, {})])
    write_policies(file, [Policy(hot, speculate, {}), Policy(greedy, None, {"why": 2})])
    assert json.loads(file.read_text())["exit_layers"] == [1, 2]
    policies = read_policies(file)
    assert len(policies) == 3
    assert find_policy(policies, greedy).evidence == {"why": 2}
    assert find_policy(policies, key(temperature=0.9)).config == speculate
    assert find_policy(policies, key(temperature=0.6)).config is None
    assert find_policy(policies, key(device="another")) is None
    assert [path.name for path in tmp_path.iterdir()] == ["sorted_draft.json"]
    file.write_text('{"policies": [{"key": {}}]}')
    with pytest.raises(UserError, match=r"policies\[0\]: key lacks target; calibrate"):
        read_policies(file)


def test_trees_are_kept_and_policies_from_before_them_are_read(tmp_path):
    file = tmp_path / "policies.json"
    shape = TreeShape(3, 4, 16, leaving="node")
    costs = RoundCosts((0.1,), (1.0, 1.5, 1.5, 1.5))
    with_tree = DecodeConfig(exits=(2,), tree=shape, costs=costs, guard=True, narrow_widths=(1,))
    fixed = DecodeConfig(tree=TreeShape.static([(0, 0), (1,)]), draft_sampling="argmax")
    write_policies(file, [Policy(key(), with_tree, {}), Policy(key(device="gpu"), fixed, {})])
    assert [policy.config for policy in read_policies(file)] == [with_tree, fixed]
    content = json.loads(file.read_text())
    content["policies"][0]["config"]["tree"]["nodes"] = 1
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"policies\[0\]: config: tree: nodes=1 of a tree"):
        read_policies(file)
    entry = {"key": dataclasses.asdict(key()), "config": json.loads(BEFORE_TREES), "evidence": {}}
    file.write_text(json.dumps({"policies": [entry]}))
    (policy,) = read_policies(file)
    assert policy.config.tree is None
    assert policy.config.num_draft_tokens == 2


def test_auto_decodes_with_the_tree_of_its_policy(target, draft, plain, tmp_path):
    file = tmp_path / "policies.json"
    costs = RoundCosts((0.05, 0.1), (1.0, 1.2, 1.2, 1.2), 0.01)
    chosen = DecodeConfig(
        exits=EXITS, tree=TreeShape(3, 4, 12), costs=costs, guard=True, narrow_widths=(1,)
    )
    write_policies(file, [Policy(PolicyKey.of(target, draft, 0.0), chosen, {})])
    auto = SpeculativeDecoder(target, draft, DecodeConfig(policy="auto", policy_file=str(file)))
    result = auto.generate(PROMPTS, GREEDY)
    assert result.token_ids == plain.token_ids
    assert auto.verify_width == 12
    assert len(result.stats.accepted_per_depth) == 3
    assert result.stats.accepted_tokens > 20


def test_fingerprints_tell_weights_apart(target):
    first = str(fingerprint(target))
    assert first == str(fingerprint(dataclasses.replace(target, source="elsewhere")))
    changed = jax.tree.map(lambda x: x, target.params)
    changed["layers_1"] = jax.tree.map(lambda x: x + 1, changed["layers_1"])
    assert str(fingerprint(dataclasses.replace(target, params=changed))) != first
    other = dataclasses.replace(target.config, rope_theta=5_000.0)
    assert str(fingerprint(dataclasses.replace(target, config=other))) != first


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_tiny_models(tmp_path_factory.mktemp("models"))


def test_calibrate_then_auto(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(choose, "WIDTHS", (1, 3))
    monkeypatch.setattr(choose, "CONFIRMED", 1)
    monkeypatch.setattr(tree_costs, "MEASURED_NODES", (8, 16))
    questions = tmp_path / "q.jsonl"
    questions.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("one", "two")))
    flags = ("--target", models.large, "--draft", models.draft)
    missing = failing_run(
        *(generate.main, monkeypatch, capsys, *flags, "--prompt", "x", "--policy", "auto")
    )
    assert "has no policy for" in missing
    assert "python -m infer.calibrate --target" in missing
    small = ("--prompts", 2, "--new-tokens", 12, "--temperature", 0)
    bars, make_bar, print_table = [], choosing.counting_bar, choosing.print_table

    def kept_bar(*columns):
        bars.append(make_bar(*columns))
        return bars[-1]

    def print_below(*args, **kwargs):
        assert not bars[-1].live.is_started, "a live bar would draw over the table"
        print_table(*args, **kwargs)

    monkeypatch.setattr(choosing, "counting_bar", kept_bar)
    monkeypatch.setattr(choosing, "print_table", print_below)
    run(command.main, monkeypatch, *flags, "--questions", questions, *small)
    shown = capsys.readouterr().out
    assert "predicted" in shown
    assert all(len(line) <= 100 for line in shown.splitlines() if "│" in line)
    stored = json.loads((tmp_path.parent / models.draft / "sorted_draft.json").read_text())
    (entry,) = stored["policies"]
    assert entry["evidence"]["seconds"]["verify"].keys() == {"1", "3"}
    assert entry["evidence"]["seconds"]["tree"]["verify"].keys() == {"8", "16"}
    assert entry["evidence"]["confirmed"]
    assert entry["evidence"]["trace"]["among_the_best"].keys() == {"1", "2"}
    assert entry["evidence"]["trace"]["positions"] == 22
    short = ("--max-new-tokens", 8)
    run(generate.main, monkeypatch, *flags, "--prompt", "x", "--policy", "auto", *short)
    out = tmp_path / "bench"
    limits = ("--questions", questions, *short, "--out", out)
    run(bench.main, monkeypatch, *flags, *limits, "--methods", "ar,auto")
    rows = json.loads((out / "report.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["ar", "auto"]
    hot = (*flags, *limits, "--methods", "auto", "--temperature", 1)
    assert "has no policy for" in failing_run(bench.main, monkeypatch, capsys, *hot)
