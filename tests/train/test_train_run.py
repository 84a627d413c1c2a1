"""Whole runs of `train.main` on a tiny model: what they write, how they resume, how they fail."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from disk import file_size_limit, tokenizer_refused
from rich.console import Console
from run_tiny import VOCAB, launch, metrics, write_source
from tiny import tiny_tokenizer

from s2d_jax.config.draft import DraftConfig
from s2d_jax.model.select_layers import truncated
from s2d_jax.model.transformer import Transformer
from s2d_jax.weights.checkpoints import Checkpoints
from s2d_jax.weights.load import load_draft, load_model
from s2d_jax.weights.runs import load_run
from train.config.files import load_config
from train.run import loop as run
from train.run.terminal import ProgressReport

EXITS = ["1", "2", "3"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A directory with a tiny model of 4 layers, its tokenizer, conversations and a config."""
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def told(source, tmp_path_factory):
    """A whole run, and what it printed."""
    run_dir, shown = tmp_path_factory.mktemp("runs") / "finished", io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert launch(source, run_dir) == 0
    return run_dir, shown.getvalue()


@pytest.fixture(scope="module")
def finished(told):
    return told[0]


@pytest.fixture(scope="module")
def cut_short(source, tmp_path_factory):
    """Killed after the checkpoint of step 4 and before that of step 8."""
    run_dir = tmp_path_factory.mktemp("runs") / "cut_short"
    with interrupted_at(5):
        assert launch(source, run_dir) == 130
    assert load_run(run_dir).source.endswith("step 4")
    return run_dir


@pytest.fixture
def interrupted(cut_short, tmp_path):
    """A copy to go on with."""
    return Path(shutil.copytree(cut_short, tmp_path / "run"))


def test_a_run_leaves_all_that_describes_it(source, finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        *("config.yaml", "model_config.json", "draft_config.json", "data.json"),
        *("tokenizer.json", "tokenizer_config.json", "metrics.jsonl", "checkpoints", "rows"),
    }
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["4", "8"]
    assert load_config(finished / "config.yaml").train.run_dir == str(finished)
    assert not list(finished.rglob("*partial*"))


def test_metrics_tell_loss_and_accuracy_per_exit(finished):
    rows = metrics(finished)
    assert [row["step"] for row in rows] == list(range(1, 9))
    for row in rows:
        assert list(row["loss_per_exit"]) == list(row["accuracy_per_exit"]) == EXITS
        assert row["loss"] == pytest.approx(np.mean(list(row["loss_per_exit"].values())), rel=1e-4)
        assert row["learning_rate"] > 0
        assert row["grad_norm"] > 0
        assert row["tokens_per_second"] > 0
    held_out = metrics(finished, held_out=True)
    assert [row["step"] for row in held_out] == [0, 4, 8]
    assert held_out[-1]["loss"] < 0.8 * held_out[0]["loss"]
    assert list(held_out[0]["agreement_per_exit"]) == EXITS


def test_without_a_terminal_there_are_lines_with_loss_and_time_left(told):
    run_dir, text = told
    assert text.count("devices: 8 x CPU (") == 1
    assert re.search(r"conversations read +│ +60 │", text)
    assert "tok/s  loss " in text
    assert "0 s left" in text
    assert "held-out loss" in text
    assert f"trained: {run_dir}" in text


def test_a_terminal_shows_the_time_left_and_the_speed(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    shown, now = io.StringIO(), [0.0]
    console = Console(
        file=shown, force_terminal=True, width=160, color_system=None, get_time=lambda: now[0]
    )
    with ProgressReport(console) as report:
        report.say("a line that stays")
        for share in (0.25, 0.5, 0.75):
            now[0] += 100.0
            row = {"step": int(share * 100), "tokens_per_second": 1234.5, "loss": 2.5}
            report.update(share, {**row, "loss_per_exit": {"6": 3.0, "12": 2.0}})
    last = shown.getvalue().split("\r")[-1]
    assert "a line that stays" in shown.getvalue()
    # A quarter of the run takes 100 seconds.
    assert re.search(r"training .* 75% 0:05:00 0:01:40 step 75  1,234 tok/s", last)
    assert "loss 2.500 (6: 3.000, 12: 2.000)" in last


@pytest.mark.parametrize(
    ("num_layers", "exits"),
    [
        (3, ("1", "2", "3")),
        pytest.param(
            None,
            ("1", "2", "4"),
            marks=pytest.mark.exhaustive("other runs have the first layers, or chosen ones"),
        ),
    ],
)
def test_training_starts_from_the_weights_of_the_source(source, tmp_path, num_layers, exits):
    """The first layers, or the whole model; steps of no size leave them as they were."""
    run_dir = tmp_path / "run"
    depth = ("--model.num-layers", num_layers, "--draft.exit-layers", *exits)
    still = ("--optim.learning-rate", "1e-30", "--train.max-steps", 1)
    assert launch(source, run_dir, *depth, *still) == 0
    model, draft = load_model(source / "model"), load_run(run_dir)
    config, params = truncated(model.config, model.params, num_layers or 4)
    assert draft.config == config
    assert draft.draft_config.exit_layers == tuple(map(int, exits))
    jax.tree.map(
        lambda ours, start: np.testing.assert_allclose(ours, start, rtol=0, atol=1e-20),
        draft.params,
        params,
    )


def test_a_resumed_run_repeats_an_uninterrupted_one(source, finished, interrupted):
    run_dir = interrupted
    assert launch(source, run_dir, "--train.resume") == 0
    for got, expected in zip(metrics(run_dir), metrics(finished), strict=True):
        for name in (
            "step",
            "loss",
            "loss_per_exit",
            "accuracy_per_exit",
            "learning_rate",
            "grad_norm",
        ):
            assert got[name] == expected[name]
    assert metrics(run_dir, held_out=True) == metrics(finished, held_out=True)
    jax.tree.map(np.testing.assert_array_equal, load_run(run_dir).params, load_run(finished).params)


@pytest.mark.exhaustive("one process goes on with what two have left in test_processes.py")
def test_a_run_resumes_on_another_mesh(source, finished, interrupted):
    mesh = ("--mesh.data", 2, "--mesh.fsdp", 2, "--mesh.tensor", 2)
    assert launch(source, interrupted, "--train.resume", *mesh) == 0
    losses = [[row["loss"] for row in metrics(path)] for path in (interrupted, finished)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@contextlib.contextmanager
def interrupted_at(step: int):
    """Ctrl-C while step `step` is reported."""

    def update(self, share, row):
        if row["step"] == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressReport, "update", update)
        yield


def test_load_run_reads_each_exit_of_the_trained_draft(finished):
    draft = load_run(finished)
    assert draft.draft_config == DraftConfig((1, 2, 3))
    assert draft.config.num_layers == 3
    assert draft.tokenizer.encode("one two") == tiny_tokenizer(VOCAB).encode("one two")
    earlier = load_run(finished, 4, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(earlier.params)} == {np.dtype("bfloat16")}
    assert earlier.source.endswith("step 4")


def test_export_writes_what_load_draft_reads(finished, tmp_path, monkeypatch, capsys):
    from infer import export

    arguments = ["export", "--run", str(finished), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    export.main()
    assert "with exits 1, 2, 3 to" in capsys.readouterr().out
    trained, exported = load_run(finished), load_draft(tmp_path / "out")
    assert exported.draft_config == trained.draft_config
    assert exported.config == trained.config
    read = jax.jit(Transformer(trained.config).apply)
    tokens = np.arange(12, dtype=np.int32)[None]
    logits = [read({"params": draft.params}, tokens) for draft in (trained, exported)]
    np.testing.assert_array_equal(*logits)
    provenance = json.loads((tmp_path / "out" / "sorted_draft.json").read_text())["provenance"]
    assert provenance["run"].endswith("step 8")
    assert provenance["config"]["optim"]["learning_rate"] == 1e-2


def test_minutes_end_a_run_and_its_schedule(source, tmp_path, monkeypatch):
    # Read at the start and three times in each step, the second of them for the time that has passed.
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: 0.02 * next(ticks))
    monkeypatch.setattr(run, "time", clock)
    run_dir = tmp_path / "run"
    minutes = ("--train.max-steps", 100_000, "--train.max-minutes", 0.02)
    rarely = ("--train.eval-every", 100_000, "--train.checkpoint-every", 100_000)
    assert launch(source, run_dir, *minutes, *rarely) == 0
    rows = metrics(run_dir)
    assert [row["elapsed_seconds"] for row in rows[-2:]] == pytest.approx([1.18, 1.24])  # of 1.2
    assert rows[-1]["learning_rate"] < 0.2 * max(row["learning_rate"] for row in rows)
    assert load_run(run_dir).source.endswith(f"step {rows[-1]['step']}")


def one_error(capsys) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_nan_stops_and_keeps_the_last_good_checkpoint(source, interrupted, capsys):
    run_dir, good = interrupted, load_run(interrupted).params
    explode = ("--train.resume", "--optim.learning-rate", "1e30")
    # The loss that step 5 reports is that of the parameters before its update.
    for every, when in ((1, "after the update of step 5"), (4, "at step 6")):
        capsys.readouterr()
        flags = ("--train.checkpoint-every", every, "--train.keep-checkpoints", 1)
        assert launch(source, run_dir, *explode, *flags) == 2
        message = one_error(capsys)
        assert f"{when}: training stopped; the last good checkpoint is step 4; resume" in message
        assert "lower --optim.learning-rate" in message
        assert "nan" in message
        jax.tree.map(np.testing.assert_array_equal, load_run(run_dir).params, good)
    assert launch(source, run_dir, "--train.resume") == 0
    assert [row["step"] for row in metrics(run_dir)] == list(range(1, 9))


@pytest.mark.exhaustive("a loss that is not finite is tested in an earlier step")
def test_a_last_step_that_diverges_is_no_success(source, tmp_path, capsys):
    for held_out in (0.0, 0.1):
        run_dir = tmp_path / f"run {held_out}"
        flags = ("--data.held-out-fraction", held_out, "--train.max-steps", 1)
        assert launch(source, run_dir, *flags, "--optim.learning-rate", "1e30") == 2
        said = capsys.readouterr()
        assert "trained:" not in said.out
        where = "on the held-out rows after step 1" if held_out else "after the update of step 1"
        assert f"{where}: training stopped; no checkpoint was written yet; start again" in said.err
        assert len(said.err.splitlines()) == 1
        assert "NaN" not in (run_dir / "metrics.jsonl").read_text()
    assert launch(source, run_dir, *flags) == 0


@pytest.mark.exhaustive("test_checkpoint.py has a full disk in the background, and what it says")
def test_a_disk_that_refuses_arrays_keeps_the_earlier_checkpoint(
    source, interrupted, capsys, caplog, monkeypatch
):
    """TensorStore writes the arrays, in threads of its own, and its errors are no OSErrors."""
    run_dir = interrupted
    capsys.readouterr()
    save = Checkpoints.save
    with contextlib.ExitStack() as limit, monkeypatch.context() as patch:

        def limited(self, *arguments, **trees):
            limit.enter_context(file_size_limit(20_000))
            save(self, *arguments, **trees)

        patch.setattr(Checkpoints, "save", limited)
        assert launch(source, run_dir, "--train.resume") == 2
    message = one_error(capsys)
    assert "File too large; checkpoints [4] are intact; check the directory and resume" in message
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["4"]
    assert launch(source, run_dir, "--train.resume") == 0


def test_a_start_that_the_disk_refuses_leaves_nothing(source, tmp_path, capsys, monkeypatch):
    run_dir = tmp_path / "run"
    with tokenizer_refused(monkeypatch):
        assert launch(source, run_dir) == 2
        assert "File too large" in one_error(capsys)
        assert not run_dir.exists()
        run_dir.mkdir()
        (run_dir / "notes.txt").touch()
        assert launch(source, run_dir) == 2
    assert [path.name for path in run_dir.iterdir()] == ["notes.txt"]


def test_a_config_that_cannot_be_written_leaves_nothing(source, tmp_path, capsys, monkeypatch):
    replace = os.replace

    def full(old, new):
        if Path(new).name == "config.yaml":
            raise OSError(28, "No space left on device")
        replace(old, new)

    monkeypatch.setattr("s2d_jax.weights.checkpoints.os.replace", full)
    assert launch(source, tmp_path / "run") == 2
    assert "No space left on device" in one_error(capsys)
    assert not (tmp_path / "run").exists()


# Of several reads of a damaged checkpoint Orbax awaits one failure only; the others complain when they are collected.
@pytest.mark.exhaustive("test_checkpoint.py and test_broken_runs.py name damaged checkpoints")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_named_when_a_run_resumes(source, finished, tmp_path, capsys):
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    for name in ("params/_METADATA", "opt_state/manifest.ocdbt", "_CHECKPOINT_METADATA"):
        file = run_dir / "checkpoints" / "8" / name
        good = file.read_bytes()
        file.write_bytes(good[:20])
        assert launch(source, run_dir, "--train.resume") == 2, name
        message = one_error(capsys)
        assert "checkpoint 8 in " in message
        assert f"or delete {run_dir / 'checkpoints' / '8'} to go on from there" in message
        file.write_bytes(good)
    shutil.rmtree(run_dir / "checkpoints" / "8")
    assert launch(source, run_dir, "--train.resume") == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--model.num-layers", "None"), "ends before the draft's 4 layers; add exit 4, or set"),
        (("--model.num-layers", "None", "--draft.exit-layers", "2", "5"), "exceeds num_layers=4"),
        (("--model.num-layers", "5", "--draft.exit-layers", "5"), "num_layers=5 must be between 1"),
        (("--data.max-length", "512"), "data.max_length=512 exceeds the model's context of 256"),
        (("--train.batch-size", "64"), "train.batch_size=64 exceeds the"),
        (("--mesh.fsdp", "4", "--mesh.data", "4", "--train.batch-size", "16"), "needs 16 devices"),
        (("--mesh.tensor", "4"), "num_kv_heads=2 does not divide by mesh axis tensor=4"),
        (("--data.paths", "nowhere.json"), "nowhere.json does not exist"),
        (("--train.resume",), "holds no checkpoint; train first"),
    ],
)
def test_a_bad_run_is_refused_in_one_line_and_leaves_nothing(
    source, tmp_path, capsys, overrides, message
):
    assert launch(source, tmp_path / "run", *overrides) == 2
    assert message in one_error(capsys)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_overwritten_and_keeps_its_data_when_resumed(
    source, finished, capsys
):
    assert launch(source, finished) == 2
    assert "holds checkpoints [4, 8]; add --train.resume, or choose" in one_error(capsys)
    assert launch(source, finished, "--train.resume", "--train.seed", 3) == 2
    assert "train.seed=3 differs from 0 in" in one_error(capsys)
    assert launch(source, finished, "--train.resume", "--data.weights", 2) == 2
    assert "data.weights=(2.0,) differs from () in" in one_error(capsys)
