"""Trees on the command lines of `infer`: methods, flags, `--explain`."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from infer_tiny import failing_run, run, save_tiny_models

from infer.bench import __main__ as bench
from infer.bench.methods import build_methods, check_trees, parse_methods
from infer.generate import __main__ as generate
from infer.generate.explain import _accepted, read_rounds
from infer.generate.explain_show import quoted, round_figure, rounds_text
from infer.generate.rounds import Node, Round
from s2d_jax.cli.figures import save_figure
from s2d_jax.cli.options import DraftingOptions
from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.config.tree import TreeShape
from s2d_jax.errors import UserError
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.sharding import MeshConfig, make_mesh
from s2d_jax.weights.load import load_draft, load_model

SMALL = ("--tree-depth", 3, "--tree-top-k", 3, "--tree-nodes", 10)
SMALL_SHAPE = TreeShape(3, 3, 10)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = ({"turns": ["one two"]}, {"turns": ["the quick brown fox"]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def paths_file(tmp_path, content) -> str:
    path = tmp_path / "paths.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_a_tree_is_a_suffix_of_what_drafts():
    assert parse_methods("s2d+tree,sd@6+tree:16,draft+tree,s2d:3")[1:3] == (
        "s2d+tree",
        "sd@6+tree:16",
    )
    for name in ("ar+tree", "auto+tree", "s2d+tree:", "s2d:4+tree", "s2d+trees", "+tree"):
        with pytest.raises(UserError, match=r"is unknown; use ar, .* \+tree:N one of N nodes"):
            parse_methods(name)


def test_methods_have_the_tree_that_their_name_says(models):
    target, draft = load_model(models.large), load_draft(models.draft)
    # Trees ignore the flags of chains: the heuristic, and twelve tokens.
    options = DraftingOptions(
        draft_length_rule="heuristic", max_draft_tokens=12, tree_depth=3, tree_top_k=6
    )
    names = ("s2d", "s2d+tree", "sd@1+tree:16", "draft+tree:8")
    chain, tree, fixed, whole = build_methods(names, target, draft, None, options)
    assert [m.name for m in (chain, tree, fixed, whole)] == list(names)
    assert [m.label for m in (tree, fixed)] == [
        "SoFT + S2D + tree",
        "SoFT L1 + SD + tree, 16 nodes",
    ]
    assert whole.label == "whole draft + SD + tree, 8 nodes"
    assert chain.decoder.config.tree is None
    assert chain.decoder.verify_width == 13
    assert tree.decoder.config == DecodeConfig(tree=TreeShape(3, 6, 60))
    assert [m.decoder.verify_width for m in (tree, fixed, whole)] == [60, 16, 8]
    assert fixed.decoder.exits == (1,)
    (other,) = build_methods(("draft+tree",), target, None, load_draft(models.draft), options)
    assert other.label == "draft + SD + tree"


def test_flags_become_a_shape(tmp_path):
    options = DraftingOptions(tree=True, tree_depth=2, tree_top_k=4, tree_nodes=9)
    assert options.config().tree == TreeShape(2, 4, 9)
    assert DraftingOptions().config().tree is None
    paths = paths_file(tmp_path, [[0], [1], [0, 0], [2, 1]])
    static = DraftingOptions(tree=True, tree_paths=paths, tree_leaving="node").config().tree
    assert static == TreeShape.static([(0,), (1,), (0, 0), (2, 1)], leaving="node")
    with pytest.raises(UserError, match="--tree-nodes follows from --tree-paths; leave one"):
        DraftingOptions(tree=True, tree_paths=paths, tree_nodes=9).config()
    with pytest.raises(UserError, match="--num-draft-tokens counts a chain's tokens; a tree has"):
        DraftingOptions(tree=True, num_draft_tokens=2).config()
    with pytest.raises(
        UserError, match=r"--tree is set by method here; add \+tree, as in --methods"
    ):
        check_trees(("s2d",), DraftingOptions(tree=True))
    costs = {"draft_step_costs": ".1", "verify_costs": "1,1.1,1.2,1.3,1.4,1.5"}
    with pytest.raises(
        UserError, match=r"--draft-step-costs is for chains; leave it out, or s2d\+tree"
    ):
        check_trees(("s2d", "s2d+tree"), DraftingOptions(guard=True, **costs))
    with pytest.raises(UserError, match="--tree-paths says which nodes a tree has; leave out :9"):
        check_trees(("s2d+tree:9",), DraftingOptions(tree_paths=paths))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[0], [1", "is not valid JSON"),
        ({"paths": [[0]]}, "is not a list of paths; write a list of lists"),
        ([[0], 1], "is not a list of paths"),
        ([[0], ["1"]], "has the rank '1'"),
        ([[0], [True]], "has the rank True"),
        ([[0], [-1]], "rank -1; ranks count from 0"),
        ([], "has no paths"),
    ],
)
def test_files_that_hold_no_paths(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        DraftingOptions(tree=True, tree_paths=paths_file(tmp_path, content)).config()
    with pytest.raises(UserError, match="does not exist"):
        DraftingOptions(tree=True, tree_paths=str(tmp_path / "missing.json")).config()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tree",), "--tree is set by method here; add +tree, as in --methods s2d,s2d+tree"),
        (("--tree-nodes", 9), "--tree-nodes shapes trees; add a method with one"),
        (("--methods", "s2d+tree:3"), "nodes=3 of a tree must be 5"),
        (("--methods", "s2d+tree:0"), "nodes=0 of a tree must be 5"),
        (("--methods", "s2d+tree", "--tree-leaving", "never"), "never"),
        (("--methods", "s2d+tree"), "method 's2d' needs a draft"),
        (("--methods", "sd@4+tree", "--draft", "{draft}"), "has no exit 4; use sd@1, sd@2"),
    ],
)
def test_mistakes_of_bench_get_one_line(
    models, questions, tmp_path, monkeypatch, capsys, flags, message
):
    filled = [str(flag).format(**vars(models)) for flag in flags]
    rest = ("--target", models.small, "--questions", questions, "--out", tmp_path / "out")
    assert message in failing_run(bench.main, monkeypatch, capsys, *filled, *rest)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tree",), "--tree is a tree of drafted tokens; give --draft DIR"),
        (
            ("--draft", "{draft}", "--tree-depth", 3),
            "--tree-depth shapes a tree, and --tree is not",
        ),
        (("--draft", "{draft}", "--tree", "--draft-length-rule", "heuristic"), "is for chains"),
        (("--draft", "{draft}", "--tree", "--policy", "auto"), "policy='auto' decides tree itself"),
        (("--explain", 2), "--explain shows what a draft proposes"),
        (("--explain", -1), "explain -1 must be 0 or more"),
        (
            ("--draft", "{draft}", "--explain", 2, "--draft-length-rule", "heuristic"),
            "--explain shows trees, and greedy chains of a fixed length; add --tree",
        ),
        (
            ("--draft", "{draft}", "--explain", 2, "--temperature", 1),
            "add --tree, or use temperature 0",
        ),
    ],
)
def test_mistakes_of_generate_get_one_line(models, monkeypatch, capsys, flags, message):
    filled = [str(flag).format(**vars(models)) for flag in flags]
    rest = ("--target", models.small, "--prompt", "one two")
    assert message in failing_run(generate.main, monkeypatch, capsys, *filled, *rest)


@pytest.mark.exhaustive("the README's benchmark has a tree, and test_infer_bench.py chains")
def test_bench_compares_chains_and_trees(models, questions, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    # Two methods of six positions a pass and two of ten: fewer references.
    names = "s2d:5,s2d+tree,sd@1+tree:6,draft+tree"
    flags = ("--target", models.large, "--draft", models.draft, "--questions", questions)
    rest = ("--methods", names, *SMALL, "--max-new-tokens", 10, "--raw", "--out", out)
    run(bench.main, monkeypatch, *flags, *rest)
    report = json.loads((out / "report.json").read_text())
    rows = {row["method"]: row for row in report["rows"]}
    assert list(rows) == ["ar", *names.split(",")]
    assert all(row["identical_to_baseline"] for row in rows.values())
    for name, row in rows.items():
        if "+tree" in name:
            # Of each round that drafted: the verified nodes beside the root.
            assert row["drafted_tokens"] > 3 * row["accepted_tokens"] >= 0
            assert len(row["accepted_per_depth"]) == 3
    assert rows["s2d+tree"]["mean_acceptance_length"] >= rows["s2d:5"]["mean_acceptance_length"]
    assert (report["settings"]["tree_depth"], report["settings"]["tree_nodes"]) == (3, 10)
    shown = capsys.readouterr().out
    assert "SoFT L1 + SD + tree, 6 nodes" in " ".join(shown.split())
    assert max(len(line) for line in shown.splitlines()) <= 100


def test_bench_times_the_phases_of_trees(models, questions, tmp_path, monkeypatch):
    flags = ("--target", models.large, "--draft", models.draft, "--questions", questions)
    rest = ("--methods", "s2d+tree", *SMALL, "--max-new-tokens", 10, "--raw", "--out", tmp_path)
    run(bench.main, monkeypatch, *flags, *rest, "--max-questions", 1, "--phase-questions", 1)
    _, tree = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert {"draft", "verify", "rest"} <= tree["seconds_by_phase"].keys()


def test_answers_with_a_tree_are_the_targets_own(models, tmp_path, monkeypatch):
    answers = []
    for number, flags in enumerate(((), ("--draft", models.draft, "--tree", *SMALL))):
        out = tmp_path / f"{number}.jsonl"
        prompts = ("--prompt", "one two", "--prompt", "user asks", "--max-new-tokens", 12)
        flags += ("--batch-size", 1, "--out", out)
        run(generate.main, monkeypatch, "--target", models.large, *prompts, *flags)
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        answers.append([row["response"] for row in rows])
    assert answers[0] == answers[1]


STATIC_SHAPE = TreeShape.static([(0, 0), (1,), (2, 1)])
OTHER_PAIRS = pytest.mark.exhaustive("each shape and each temperature is explained without it")


def decoder_of(models, **changes) -> SpeculativeDecoder:
    config = DecodeConfig(**changes)
    return SpeculativeDecoder(load_model(models.large), load_draft(models.draft), config)


@pytest.mark.parametrize(
    ("changes", "temperature"),
    [
        ({"tree": SMALL_SHAPE}, 0.0),
        ({"tree": STATIC_SHAPE}, 0.9),
        ({"num_draft_tokens": 5}, 0.0),
        pytest.param({"tree": SMALL_SHAPE}, 0.9, marks=OTHER_PAIRS),
        pytest.param({"tree": STATIC_SHAPE}, 0.0, marks=OTHER_PAIRS),
    ],
)
def test_rounds_are_those_of_generate(models, changes, temperature):
    decoder = decoder_of(models, **changes)
    params = SamplingParams(temperature=temperature, max_new_tokens=12, seed=3)
    prompt = decoder.target.tokenizer.encode("one two three")
    rounds = read_rounds(decoder, prompt, params, 100)
    expected = decoder.generate([prompt], [params])
    emitted = expected.token_ids[0][:1]  # prefill's
    for number, round in enumerate(rounds, start=1):
        assert round.number == number
        assert round.nodes[0].token_id == emitted[-1]
        path = [node for node in round.nodes[1:] if node.accepted]
        assert [node.depth for node in path] == list(range(1, len(path) + 1))
        emitted += [node.token_id for node in path]
        emitted += [] if round.own_token_id is None else [round.own_token_id]
        for node in round.nodes[1:]:
            parent = round.nodes[node.parent]
            assert node.depth == parent.depth + 1
            assert parent.accepted or not node.accepted
            assert 0 < node.probability <= 1 + 1e-5
            assert node.exit in decoder.exits
        for index in range(len(round.nodes)):
            children = [round.nodes[child].token_id for child in round.children(index)]
            assert len(set(children)) == len(children)
    assert emitted == expected.token_ids[0]
    assert len(rounds) == expected.stats.target_forwards
    if temperature == 0:  # the first child is the most probable one
        assert all(r.children(0)[0] == 1 for r in rounds if len(r.nodes) > 1)
    assert len(read_rounds(decoder, prompt, params, 2)) == 2


@pytest.mark.exhaustive("rounds are explained on one device, and meshes decode the same rounds")
@pytest.mark.parametrize(
    ("data", "tensor", "changes"),
    [
        (2, 1, {"tree": SMALL_SHAPE}),
        (1, 2, {"num_draft_tokens": 5}),
        (2, 2, {"tree": SMALL_SHAPE}),
        (2, 2, {"num_draft_tokens": 5}),
    ],
)
def test_rounds_on_a_mesh_are_those_of_one_device(models, data, tensor, changes):
    decoder, params = decoder_of(models, **changes), SamplingParams(max_new_tokens=12)
    prompt = decoder.target.tokenizer.encode("one two three")
    mesh = make_mesh(MeshConfig(data=data, tensor=tensor))
    target = load_model(models.large, mesh=mesh)
    on_mesh = SpeculativeDecoder(target, decoder.draft, decoder.config)
    one, many = (read_rounds(each, prompt, params, 5) for each in (decoder, on_mesh))
    assert len(one) == len(many) > 0
    for ours, expected in zip(many, one, strict=True):
        assert ours.own_token_id == expected.own_token_id
        for node, other in zip(ours.nodes, expected.nodes, strict=True):
            about = other.probability and pytest.approx(other.probability, rel=1e-4)
            assert node == dataclasses.replace(other, probability=about)


@pytest.mark.exhaustive("each of the flags alone is tested on one device")
def test_a_look_inside_and_a_stream_on_a_mesh(models, tmp_path, monkeypatch, capsys):
    flags = ("--target", models.large, "--draft", models.draft, "--prompt", "one two")
    looks = ("--explain", 2, "--explain-out", tmp_path / "trees", "--profile", tmp_path / "trace")
    rest = ("--max-new-tokens", 10, "--stream", *looks, "--mesh.data", 2, "--mesh.tensor", 2)
    run(generate.main, monkeypatch, *flags, *rest)
    assert "round 2: " in capsys.readouterr().out
    assert len(json.loads((tmp_path / "trees" / "large" / "trees.json").read_text())) == 2
    assert list((tmp_path / "trace" / "large").rglob("perfetto_trace.json.gz"))


def test_explained_rounds_are_shown_and_written(models, tmp_path, monkeypatch, capsys):
    out = tmp_path / "trees"
    flags = ("--target", models.large, "--draft", models.draft, "--tree", *SMALL)
    rest = ("--prompt", "one two", "--max-new-tokens", 10, "--explain", 2, "--explain-out", out)
    run(generate.main, monkeypatch, *flags, *rest)
    shown = capsys.readouterr().out
    assert "round 1: " in shown
    assert max(len(line) for line in shown.splitlines() if "exit" in line) <= 100
    text = (out / "large" / "trees.txt").read_text(encoding="utf-8")
    listed = json.loads((out / "large" / "trees.json").read_text(encoding="utf-8"))
    assert len(listed) == 2
    for number, round in enumerate(listed, start=1):
        assert f"round {number}: {len(round['nodes']) - 1} drafted" in text
        assert (out / "large" / f"round_{number}.png").stat().st_size > 0
    accepted = sum(node["accepted"] for round in listed for node in round["nodes"][1:])
    assert text.count("✓") == accepted
    assert text.count("→") == sum(round["own_token_id"] is not None for round in listed)


def made_round() -> Round:
    return Round(
        number=3,
        nodes=(
            Node(0, 0, 5, " the", None, None, True),
            Node(0, 1, 6, " quick\n", 0.75, 6, True),
            Node(0, 1, 7, "$x_1", 0.125, 6, False),
            Node(1, 2, 8, "猫", 0.5, 9, False),
            Node(1, 2, 9, " " + "a" * 40, 0.25, 9, True),
        ),
        own_token_id=10,
        own_text=" fox",
    )


def test_a_round_as_text():
    assert rounds_text([made_round()]).splitlines() == [
        "round 3: 4 drafted, 2 accepted, 3 emitted",
        "' the'",
        "├── ✓ ' quick\\n'  0.75  exit 6",
        "│   ├──   '猫'  0.50  exit 9",
        "│   └── ✓ ' " + "a" * 22 + "…'  0.25  exit 9",
        "│       └── → ' fox'  target",
        "└──   '$x_1'  0.12  exit 6",
    ]
    assert quoted("abcdef", 4) == "'abc…'"


def test_a_round_as_a_picture(tmp_path):
    save_figure(
        round_figure(made_round(), (6, 9, 12)), tmp_path / "round.png"
    )  # no warning about the cat
    assert (tmp_path / "round.png").stat().st_size > 0
    (axes,) = round_figure(made_round(), (6, 9, 12)).axes
    assert {"' the'", "' fox'", "'$x_1' 0.12"} <= {text.get_text() for text in axes.texts}
    thick = [line for line in axes.lines if line.get_linewidth() == 3.0]
    assert len(thick) == 3  # two accepted nodes, and the target's own token


def test_the_accepted_path_is_the_one_that_was_emitted():
    # Two children of the root; token 4 is below both, and an invalid node has token 5.
    tree = SimpleNamespace(
        tokens_BM=np.array([1, 2, 3, 4, 4, 5]),
        parent_BM=np.array([0, 0, 0, 1, 2, 4]),
        valid_BM=np.array([True, True, True, True, True, False]),
    )
    assert _accepted(tree, [3, 4, 5]) == [0, 2, 4]
    assert _accepted(tree, [2, 1]) == [0, 1]  # the root's own token is not a child of node 1
    assert _accepted(tree, [1]) == [0]
    assert _accepted(tree, [3, 4]) == [0, 2, 4]
