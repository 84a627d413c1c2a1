"""A second process compiles nothing; streaming and traces from the command lines."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from infer_tiny import failing_run, run, save_tiny_models

from infer.bench import __main__ as bench
from infer.generate import __main__ as generate
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.weights.load import load_model

ROOT = Path(__file__).parents[2]
SHORT = ("--max-new-tokens", 8)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_tiny_models(tmp_path_factory.mktemp("models"))


def test_a_second_process_compiles_nothing_new(models, tmp_path):
    command = [sys.executable, "-m", "infer.generate", "--stream", "--prompt", "one two"]
    command += ["--target", models.small, "--max-new-tokens", "8"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    written, answers = [], []
    for _ in range(2):
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        answers.append(done.stdout.splitlines()[0])
        written.append({path.name for path in (tmp_path / "cache").glob("*-cache")})
    assert len(written[0]) >= 2  # prefill and loop, and small programs
    assert written[1] == written[0]
    assert answers[0] == answers[1]


def test_streamed_answers_are_those_of_batches(models, tmp_path, monkeypatch, capsys):
    path = tmp_path / "prompts.jsonl"
    rows = ({"turns": ["one two", "three four"]}, {"prompt": "fox"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--target", models.small, "--prompts", path, *SHORT)
    outs = [tmp_path / "batches.jsonl", tmp_path / "streamed.jsonl"]
    run(generate.main, monkeypatch, *flags, "--out", outs[0])
    capsys.readouterr()
    run(generate.main, monkeypatch, *flags, "--out", outs[1], "--stream")
    shown = capsys.readouterr().out
    batches, streamed = ([json.loads(x) for x in out.read_text().splitlines()] for out in outs)
    assert [row["messages"] for row in streamed] == [row["messages"] for row in batches]
    for row in streamed:
        for answer in row.get("responses", [row["response"]]):
            assert answer in shown


def test_stop_text_from_the_command_line(models, tmp_path, monkeypatch, capsys):
    target = load_model(models.small)
    sampling = SamplingParams(max_new_tokens=8)
    ids = target.tokenizer.encode("one two")
    text = SpeculativeDecoder(target).generate([ids], sampling).texts[0]
    stop, out = text[3:5], tmp_path / "out.jsonl"
    flags = ("--target", models.small, "--prompt", "one two", "--raw", "--out", out, *SHORT)
    run(generate.main, monkeypatch, *flags, "--stop", stop)
    assert json.loads(out.read_text())["response"] == text[: text.index(stop)]
    line = failing_run(generate.main, monkeypatch, capsys, *flags, "--stop", "")
    assert "must be texts that are not empty" in line


def traces(directory: Path) -> None:
    """Both forms of a trace: XPlane for TensorBoard, and events that parse for Perfetto."""
    (plane,) = directory.rglob("*.xplane.pb")
    assert plane.stat().st_size > 1000
    (events,) = directory.rglob("perfetto_trace.json.gz")
    named = [
        e for e in json.loads(gzip.decompress(events.read_bytes()))["traceEvents"] if "ts" in e
    ]
    assert len(named) > 10


def test_profiles_are_traces(models, tmp_path, monkeypatch):
    out = tmp_path / "generate"
    flags = ("--target", models.small, "--prompt", "one two", *SHORT)
    run(generate.main, monkeypatch, *flags, "--profile", out)
    traces(out / "small")
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"prompt": "one two"}) + "\n")
    flags = ("--target", models.small, "--questions", questions, "--methods", "ar", *SHORT)
    out = tmp_path / "bench"
    flags = (*flags, "--out", tmp_path / "report", "--skip-identity-check")
    run(bench.main, monkeypatch, *flags, "--profile", out)
    traces(out / "small" / "ar")
