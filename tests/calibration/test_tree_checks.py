"""The scripts in docs/checks that measure trees, on tiny models."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from extreme_plots import TARGETS, metrics_rows
from figure_checks import faults
from infer_tiny import save_tiny_models

from s2d_jax.cli.options import DraftingOptions, LoadingOptions, SamplingOptions
from s2d_jax.errors import UserError

CHECKS = Path(__file__).parents[2] / "docs" / "checks"
SMALL = {"tree_depth": 3, "tree_top_k": 3, "tree_nodes": 10}


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, CHECKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    turns = ("one two", "the quick brown fox", "user asks", "three four")
    path.write_text("".join(json.dumps({"turns": [turn]}) + "\n" for turn in turns))
    return path


@pytest.mark.parametrize("name", ["tree_sweep", "greedy_identity", "tree_overhead"])
def test_command_lines_are_read(monkeypatch, name):
    check, seen = script(name), []
    flags = ["--target", "t", "--draft", "d", "--tree-depth", "3", "--tree-leaving", "node"]
    if name != "tree_overhead":
        flags += ["--questions", "q.jsonl", "--out", "o"]
    monkeypatch.setattr(sys, "argv", [name, *flags])
    check.run_command_line(check.Args, seen.append)
    assert (seen[0].drafting.tree_depth, seen[0].drafting.tree_leaving) == (3, "node")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"method": "foo"}, "method 'foo:2' is unknown"),
        ({"nodes": "1"}, "--nodes 1 is no tree; give 2 or more"),
        ({"repeats": 0}, "repeats=0 must be at least 1"),
        ({"drafting": DraftingOptions(tree=True)}, "--tree is set by method here"),
    ],
    ids=str,
)
def test_what_cannot_be_swept_is_said_before_anything_is_loaded(tmp_path, flags, message):
    sweep = script("tree_sweep")
    with pytest.raises(UserError, match=message):
        sweep.main(sweep.Args(target="t", draft="d", questions=tmp_path, out=tmp_path, **flags))


@pytest.mark.exhaustive("half a minute; what it prints and how it reads flags is tested always")
@pytest.mark.exhaustive("a script that makes figures of the documentation")
def test_sweep(models, questions, tmp_path, capsys):
    sweep = script("tree_sweep")
    args = sweep.Args(
        target=models.large,
        draft=models.draft,
        questions=questions,
        out=tmp_path / "sweep",
        nodes="3,6",
        chains="2",
        max_questions=1,
        repeats=2,
        raw=True,
        sampling=SamplingOptions(max_new_tokens=8),
        drafting=DraftingOptions(tree_depth=3, tree_top_k=3),
    )
    sweep.main(args)
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines() if "│" in line) <= 100
    report = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["ar", "s2d:2", "s2d+tree:3", "s2d+tree:6"]
    assert [row["nodes"] for row in rows.values()] == [1, 3, 3, 6]
    assert [row["depth"] for row in rows.values()] == [0, 2, 2, 3]  # 3 nodes: 2 levels
    assert rows["ar"]["speedup"] == rows["ar"]["mat"] == 1
    assert sum(rows["s2d+tree:6"]["shares"].values()) == pytest.approx(1)
    assert "The best tree has" in (tmp_path / "sweep" / "sweep.md").read_text()
    assert (tmp_path / "sweep" / "sweep.png").stat().st_size > 0


def test_a_sweep_says_why_the_best_is_the_best():
    sweep = script("tree_sweep")

    def row(nodes, depth, tree, speedup, mat, milliseconds):
        rest = {"shares": {}, "identical": None, "tokens_per_second": 1.0, "decode_speedup": 1.0}
        return sweep.Row(
            *("name", "label", nodes, depth, tree),
            speedup=speedup,
            mat=mat,
            round_milliseconds=milliseconds,
            **rest,
        )

    rows = [
        row(1, 0, False, 1.0, 1.0, 10),
        row(5, 4, False, 1.5, 2.0, 20),
        row(3, 2, False, 1.6, 1.8, 15),
        row(8, 4, True, 1.6, 2.4, 25),
        row(16, 4, True, 2.0, 3.0, 30),
        row(60, 4, True, 1.2, 3.6, 60),
    ]
    assert sweep.explain_best(rows) == [
        "The best tree has 16 nodes: speedup 2.00, MAT 3.00.",
        "Against 8 nodes its round takes 1.20 times as long and emits 1.25 times as many tokens.",
        "Against 60 nodes its round takes 0.50 times as long and emits 0.83 times as many tokens.",
        "The best chain has 2 tokens: speedup 1.60, MAT 1.80; the tree is 1.25 times as fast.",
        "At depth 4 the chain's MAT is 2.00, that of 60 nodes 3.60: 1.80 times.",
    ]
    assert sweep.explain_best(rows[:3]) == []


@pytest.mark.exhaustive(
    "a script of the documentation; trees of every kind decode greedily in tests/tree"
)
def test_identity(models, questions, tmp_path, capsys):
    check = script("greedy_identity")
    args = check.Args(
        target=models.large,
        draft=models.draft,
        questions=questions,
        out=tmp_path / "identity.json",
        batch=2,
        prompts=4,
        new_tokens=10,
        methods="ar,s2d:2,s2d+tree",
        drafting=DraftingOptions(**SMALL),
    )
    check.main(args)
    shown = capsys.readouterr().out
    for line in ("s2d:2", "s2d+tree"):
        assert line in shown
    report = json.loads((tmp_path / "identity.json").read_text())
    references = [f"reference of width {width}" for width in (1, 3, 10)]
    assert list(report["divergences"]) == [
        *(f"ar, {reference}" for reference in references),
        *(f"{m}, {r}" for m, r in zip(args.methods.split(",")[1:], references[1:], strict=True)),
    ]
    assert all(len(answers) == 4 for answers in report["tokens"].values())
    assert report["mat"]["s2d+tree"] >= 1


def test_where_answers_part(models):
    check = script("greedy_identity")
    target = check.load_target(models.large, LoadingOptions())
    prompts, reference = [[1, 2], [3, 4]], [[5, 6, 7], [8, 9]]
    found = check.divergences_of(target, prompts, [[5, 9, 7], [8, 9]], reference)
    assert [(one["prompt"], one["position"]) for one in found] == [(0, 1)]
    assert found[0]["margin"] == pytest.approx(check.top_two_margin(target, [1, 2, 5]))
    assert found[0]["margin"] > 0
    (shorter,) = check.divergences_of(target, prompts, [[5, 6, 7], [8]], reference)
    assert shorter["position"] == 1


@pytest.mark.parametrize(
    ("path", "changes", "names"),
    [
        pytest.param(
            "draft",
            {},
            ["exit 1", "exit 2"],
            marks=pytest.mark.exhaustive("the other draft has all parts of a row"),
        ),
        ("small", {"tree_leaving": "node"}, ["exit 1"]),
    ],
)
def test_overhead(models, tmp_path, capsys, path, changes, names):
    check = script("tree_overhead")
    args = check.Args(
        target=models.large,
        draft=getattr(models, path),
        rounds=2,
        repeats=2,
        out=tmp_path / "overhead.json",
        drafting=DraftingOptions(tree=True, **SMALL, **changes),
    )
    check.main(args)
    rows = json.loads((tmp_path / "overhead.json").read_text())["rows"]
    assert [row["name"] for row in rows] == names
    for row in rows:
        assert row["nodes"] == 10
        assert min(row["round"], row["target"], row["levels"], row["own"], row["draft"]) > 0
        assert row["own_share_spread"][0] <= row["own_share"] <= row["own_share_spread"][1]
        assert row["left_share"] < 1
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines()) <= 100
    with pytest.raises(UserError, match="exit 7 is not in use"):
        check.main(check.dataclasses.replace(args, exit=7))


@pytest.mark.parametrize("nodes", [(8,), (2, 3, 4, 8, 16, 24, 32, 48, 60, 250)])
def test_the_picture_of_a_sweep_is_readable(nodes):
    sweep = script("tree_sweep")

    def row(nodes, depth, tree, speedup, mat):
        measured = {"tokens_per_second": 1.0, "decode_speedup": 1.0, "round_milliseconds": 1.0}
        rest = {**measured, "shares": {}, "identical": None}
        return sweep.Row("name", "label", nodes, depth, tree, speedup=speedup, mat=mat, **rest)

    rows = [row(1, 0, False, 1.0, 1.0), row(3, 2, False, 0.4, 2.0), row(5, 4, False, 1.9, 3.0)]
    rows += [row(n, 4, True, 0.3 + 40 / n, min(1 + n / 5, 6.3)) for n in nodes]
    args = sweep.Args(target=TARGETS[0], questions=Path("q.jsonl"), out=Path("out"))
    assert faults(sweep.figure(args, rows)) == []


def test_the_picture_of_several_runs_is_readable():
    compare = script("compare_runs")
    runs = {
        "a": metrics_rows(1, 0, 1),
        "b" * 60: metrics_rows(300, 100, 5),
        "c": metrics_rows(9, 90_000, 5),
    }
    held_out = {name: [row for row in rows if "held_out" in row] for name, rows in runs.items()}
    figure = compare.curves(held_out)
    assert faults(figure) == []
    assert [len(axes.lines) for axes in figure.axes] == [11, 11]  # all five exits
