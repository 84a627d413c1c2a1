"""`python -m infer.bench` on tiny models, and its arithmetic on made-up samples."""

from __future__ import annotations

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
from infer_tiny import failing_run, run, save_tiny_models

from infer.bench import __main__ as bench
from infer.bench import comparison
from infer.bench.measure import Sample
from infer.bench.methods import parse_methods
from infer.bench.report import make_rows
from s2d_jax.calibration.timing import warm_run
from s2d_jax.cli.short_text import rates, shares
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.decode import programs as compilation
from s2d_jax.errors import UserError
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.generation.stats import GenerationStats
from s2d_jax.weights.load import load_model

QUESTIONS = (
    {"question_id": 81, "category": "writing", "turns": ["one two", "three"]},
    {"question_id": 82, "category": "maths", "turns": ["the quick brown fox"], "reference": ["4"]},
)
ROW_KEYS = {
    *("method", "target", "temperature", "tokens_per_second", "speedup", "mean_acceptance_length"),
    *("accepted_per_depth", "exit_histogram", "identical_to_baseline", "prompts", "new_tokens"),
    *("seconds_by_phase", "decode_only_speedup"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return path


def test_two_targets_are_measured_with_one_loaded_draft(
    models, questions, tmp_path, monkeypatch, capsys
):
    loaded, load_draft = [], comparison.load_listed_draft

    def counting(path, *rest):
        loaded.append(path)
        return load_draft(path, *rest)

    monkeypatch.setattr(comparison, "load_listed_draft", counting)
    out = tmp_path / "out"
    targets = (
        "--target",
        models.large,
        "--target",
        models.draft,
    )  # of one shape: programs serve both
    flags = ("--draft", models.draft, "--questions", questions, "--out", out)
    methods = ("--methods", "ar,sd@1,s2d", "--max-new-tokens", 8, "--raw")
    run(bench.main, monkeypatch, *targets, *flags, *methods)

    assert loaded == [models.draft, None]  # no independent draft
    report = json.loads((out / "report.json").read_text())
    assert {"cpu", "cores", "threads", "jax", "dtype", "commit"} <= set(report["environment"])
    # What was loaded, not that no flag was given.
    formats = [report["settings"][f"{role}_format"] for role in ("target", "draft")]
    assert formats == ["f32", "f32"]
    assert not any(name.startswith("mesh") for name in report["settings"])
    rows = report["rows"]
    assert [row["method"] for row in rows] == ["ar", "sd@1", "s2d"] * 2
    assert [row["target"] for row in rows] == [models.large] * 3 + [models.draft] * 3
    for row in rows:
        assert set(row) >= ROW_KEYS
        assert row["identical_to_baseline"] is True
        assert row["prompts"] == 2
        assert row["mean_acceptance_length"] >= 1
        assert {"prefill", "decode"} <= set(row["seconds_by_phase"])
        assert set(row["categories"]) == {"writing", "maths"}
    assert all(row["speedup"] == 1 == row["decode_only_speedup"] for row in rows[::3])
    assert all(row["exit_histogram"].keys() == {"1", "2"} for row in rows[2::3])
    assert len({row["new_tokens"] for row in rows[:3]}) == 1
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    small_order = [(s["question_id"], s["method"]) for s in samples if s["target"] == models.large]
    rotated = (("ar", "sd@1", "s2d"), ("sd@1", "s2d", "ar"))  # question by question
    assert small_order == [(81, m) for m in rotated[0]] + [(82, m) for m in rotated[1]]
    for name in ("report.md", "samples.jsonl", "speedup.png", "exits.png", "acceptance.png"):
        assert (out / name).stat().st_size > 0
    assert not [path for path in out.iterdir() if "partial" in path.name]
    shown = capsys.readouterr().out
    assert "SoFT + S2D" in shown
    assert max(len(line) for line in shown.splitlines()) <= 100


def test_one_new_token_and_a_second_turn_beyond_the_context(models, tmp_path, monkeypatch, capsys):
    long = {"question_id": 1, "turns": ["one two", "three " * 200]}
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(long) + "\n")
    flags = ("--target", models.large, "--questions", path, "--out", tmp_path / "out", "--raw")
    run(bench.main, monkeypatch, *flags, "--methods", "ar", "--max-new-tokens", 1)
    (row,) = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert (row["new_tokens"], row["decode_only_speedup"], row["turns_left_out"]) == (1, None, 1)
    assert "1 later turns left out: longer than its context" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("out", "turns", "message"),
    [
        (
            "file/report",
            ["one"],
            "--out .*file/report cannot be written: .*file is a file; choose another place",
        ),
        ("out", ["three " * 200], "the target's context is 256; shorten the prompt"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_measured(
    models, tmp_path, monkeypatch, capsys, out, turns, message
):
    (tmp_path / "file").write_text("")
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"turns": t}) + "\n" for t in (["one"], turns)))
    monkeypatch.setattr(SpeculativeDecoder, "generate", None)
    flags = ("--target", models.small, "--questions", path, "--out", tmp_path / out, "--raw")
    error = failing_run(bench.main, monkeypatch, capsys, *flags, "--methods", "ar")
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


def test_an_independent_draft_and_sampling(models, questions, tmp_path, monkeypatch):
    flags = ("--independent-draft", models.small, "--questions", questions, "--max-questions", 1)
    rest = ("--methods", "draft", "--temperature", 1, "--max-new-tokens", 8, "--raw")
    rest += ("--out", tmp_path, "--phase-questions", 1)
    run(bench.main, monkeypatch, "--target", models.large, *flags, *rest)
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["ar", "draft"]
    assert rows[1]["label"] == "small + SD"
    phases = rows[1]["seconds_by_phase"]
    assert phases.keys() == {"prefill", "decode", "draft", "verify", "rest"}
    assert phases["draft"] + phases["verify"] + phases["rest"] == pytest.approx(phases["decode"])
    assert rows[1]["identical_to_baseline"] is None


def test_a_run_that_compiled_is_repeated(models, monkeypatch):
    monkeypatch.setattr(compilation, "_CACHE", {})
    decoder = SpeculativeDecoder(load_model(models.large))
    compiled = []
    for _ in range(2):
        result, seconds = warm_run(decoder, [5] * 7, SamplingParams(max_new_tokens=3))
        assert result.stats.seconds["compile"] == 0
        compiled.append(seconds)
    assert compiled[0] > 0
    assert compiled[1] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--target", "{small}", "--methods", "ar,fast"), "method 'fast' is unknown; use ar,"),
        (("--target", "{small}", "--methods", "s2d,s2d"), "method 's2d' is given twice"),
        (("--target", "{small}", "--methods", "s2d"), "method 's2d' needs a draft"),
        (("--methods", "ar"), "no --target was given"),
        (("--target", "{small}", "--categories", "poems"), "category 'poems' is not in"),
        (("--target", "{small}", "--repeats", "0"), "repeats 0"),
        (
            ("--target", "{small}", "--draft", "{draft}", "--methods", "sd@4"),
            "has no exit 4; use sd@1, sd@2",
        ),
        (("--target", "{small}", "--draft", "{stranger}"), "different tokenizers"),
    ],
)
def test_mistakes_get_one_line(models, questions, tmp_path, monkeypatch, capsys, flags, message):
    filled = [flag.format(**vars(models)) for flag in flags]
    out = tmp_path / "out"
    line = failing_run(
        bench.main, monkeypatch, capsys, *filled, "--questions", questions, "--out", out
    )
    assert message in line
    assert not out.exists()


def sample(method, question_id, seconds, emitted, passes, identical=True):
    stats = GenerationStats(
        prompt_tokens=5,
        emitted_tokens=emitted,
        target_forwards=passes,
        plain_rounds=0,
        draft_forwards={6: 8},
        drafted_tokens=10,
        accepted_tokens=6,
        drafted_per_depth=(5, 5),
        accepted_per_depth=(4, 2),
        exit_histogram={6: 10},
        draft_steps={6: 12},
        seconds={"compile": 0.0, "total": seconds, "prefill": 1.0, "decode": seconds - 1.0},
    )
    return Sample(method, question_id, "", stats, ("text",), 2.0, identical)


def test_speedup_is_the_ratio_of_mean_speeds():
    samples = [
        sample("ar", 1, 11.0, 11, 10),
        sample("ar", 2, 6.0, 21, 20),
        sample("s2d", 1, 6.0, 11, 5),
        sample("s2d", 2, 3.0, 21, 5, identical=False),
    ]
    methods = [SimpleNamespace(name=name, label=name) for name in ("ar", "s2d")]
    plain, fast = make_rows("t", 0.0, methods, samples, {"s2d": {"draft": 0.75}})
    assert plain["tokens_per_second"] == pytest.approx((1 + 21 / 6) / 2)
    assert fast["speedup"] == pytest.approx((11 / 6 + 7) / (1 + 21 / 6))
    # After prefill, whose second and whose token are left out.
    assert fast["decode_only_speedup"] == pytest.approx((10 / 5 + 20 / 2) / (10 / 10 + 20 / 5))
    assert fast["mean_acceptance_length"] == pytest.approx((10 + 20) / 10)
    assert fast["accepted_per_depth"] == pytest.approx([0.8, 0.4])
    assert fast["seconds_by_phase"] == {"prefill": 2.0, "decode": 7.0, "draft": 5.25}
    assert fast["compile_seconds"] == 4
    assert fast["exit_histogram"] == {6: 20}
    assert plain["identical_to_baseline"] is True
    assert fast["identical_to_baseline"] is False
    assert fast["prompts_not_identical"] == [2]
    unchecked = [dataclasses.replace(s, identical=None) for s in samples]
    assert make_rows("t", 1.0, methods, unchecked, {})[1]["identical_to_baseline"] is None


def test_the_baseline_comes_first_and_is_always_there():
    assert parse_methods("s2d, sd@6") == ("ar", "s2d", "sd@6")
    assert parse_methods("s2d,ar") == ("ar", "s2d")
    assert parse_methods("s2d:2,sd@6:3,s2d:5") == ("ar", "s2d:2", "sd@6:3", "s2d:5")
    with pytest.raises(UserError, match="method '' is unknown"):
        parse_methods("ar,")


def test_numbers_as_text():
    assert shares({9: 1, 6: 3}) == "6:\xa075%  9:\xa025%"
    assert shares({6: 0}) == shares({}) == "-"
    assert rates((0.8, 1.0)) == ".80 1.00"


@pytest.mark.exhaustive("a mesh is measured beside its calibration, and every method without one")
def test_every_method_is_measured_on_a_mesh(models, questions, tmp_path, monkeypatch, capsys):
    flags = ("--target", models.large, "--draft", models.draft, "--questions", questions)
    rest = ("--phase-questions", 1, "--max-new-tokens", 8, "--raw")
    settings = {}
    for how, methods in (("whole", "ar,s2d,s2d+tree,sd@1,draft"), ("split", "s2d")):
        out = tmp_path / how
        mesh = ("--mesh.data", 2, "--mesh.tensor", 2, "--mesh.draft", how, "--methods", methods)
        run(bench.main, monkeypatch, *flags, *rest, *mesh, "--out", out)
        report = json.loads((out / "report.json").read_text())
        assert all(row["identical_to_baseline"] for row in report["rows"])
        assert all({"draft", "verify"} <= row["seconds_by_phase"].keys() for row in report["rows"])
        settings[how] = {k: v for k, v in report["settings"].items() if k.startswith("mesh.")}
        assert "2 prompts, data 2, tensor 2" in " ".join(capsys.readouterr().out.split())
    assert settings["whole"] == {"mesh.data": 2, "mesh.tensor": 2, "mesh.draft": "whole"}
    assert settings["split"] == {**settings["whole"], "mesh.draft": "split"}


def test_kernels_are_timed_on_one_device(tmp_path, monkeypatch, capsys):
    flags = ("--kernels", "--mesh.data", 2, "--out", tmp_path)
    said = failing_run(bench.main, monkeypatch, capsys, *flags)
    assert "--kernels times products on one device; leave --mesh.* out" in said
