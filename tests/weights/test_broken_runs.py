"""Saved runs that are not as training left them: loaded, exported or resumed, each fault is one line that names the file."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest
from hf_tiny import expect_user_error
from infer_tiny import failing_run
from tiny import tiny_config, tiny_params, tiny_tokenizer

from infer.export import main as export
from s2d_jax.config.draft import DraftConfig
from s2d_jax.errors import UserError
from s2d_jax.weights.checkpoints import Checkpoints
from s2d_jax.weights.runs import CHECKPOINTS, load_run, write_run
from train.run.metrics import MetricsFile, read_metrics

CONFIG = tiny_config(num_layers=2, tie_embeddings=True)
GONE = object()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run with checkpoints 3, 5 and 9; that of step 9 holds a NaN."""
    run = tmp_path_factory.mktemp("runs") / "run"
    write_run(run, CONFIG, DraftConfig((1, 2)), tiny_tokenizer(64))
    (run / "config.yaml").write_text("model: {path: base}\n")
    with contextlib.closing(Checkpoints(run / CHECKPOINTS, keep=3)) as checkpoints:
        for step in (3, 5, 9):
            params = tiny_params(CONFIG)
            if step == 9:
                scale = params["layers_1"]["mlp_norm"]["scale"]
                params["layers_1"]["mlp_norm"]["scale"] = scale.at[3].set(jnp.nan)
            checkpoints.save(step, {"elapsed_seconds": 1.0}, 1.0 + step, params=params)
        checkpoints.wait()
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A run that a test may damage; its newest checkpoint is 5."""
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(copy / CHECKPOINTS / "9")
    return copy


def edit(file: Path, **changes: object) -> None:
    raw = json.loads(file.read_text())
    for name, value in changes.items():
        raw.pop(name, None) if value is GONE else raw.update({name: value})
    file.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("model_config.json", {"num_layers": GONE}, "lacks num_layers; put back the file"),
        ("model_config.json", {"rope_scaling": GONE}, "lacks rope_scaling; put back"),
        ("model_config.json", {"width": 3}, "has an unknown field 'width'"),
        ("model_config.json", {"num_layers": "2"}, "num_layers='2' must be a whole number"),
        ("model_config.json", {"eos_token_ids": 3.5}, "eos_token_ids=3.5 must be"),
        ("model_config.json", {"eos_token_ids": [64]}, r"eos_token_ids=\(64,\) must be ids of the"),
        ("model_config.json", {"norm_eps": math.nan}, "norm_eps=nan must be a finite number"),
        ("model_config.json", {"rope_scaling": [1]}, r"rope_scaling: \[1\] must be an object"),
        ("model_config.json", {"rope_scaling": {}}, "rope_scaling lacks factor"),
        (
            "model_config.json",
            {"num_layers": 10**9},
            "num_layers=1000000000 must be from 1 to 10000",
        ),
        ("draft_config.json", {"exit_layers": GONE}, "lacks exit_layers"),
        ("draft_config.json", {"exit_layers": {"1": 2}}, "exit_layers=.* must be a list"),
        ("draft_config.json", {"exit_layers": [1, 5]}, "exceeds num_layers=2"),
        ("draft_config.json", {"exit_thresholds": [2, 0]}, r"must lie in \[0, 1\]"),
        ("draft_config.json", {"parts": 3}, "parts: 3 must be an object"),
        ("draft_config.json", {"lora": {"rank": "2"}}, "lora: rank='2' must be a whole number"),
        (
            "draft_config.json",
            {"vocabulary_subset": [1]},
            r"draft vocabulary: \[1\] must be an obj",
        ),
    ],
)
def test_a_changed_description(run, name, changes, message):
    edit(run / name, **changes)
    with expect_user_error(rf"{name}.*{message}") as found:
        load_run(run)
    assert str(found.value).count(str(run)) == 1


@pytest.mark.parametrize("layers", [1, 3, 9_999])
def test_another_depth_than_the_checkpoints(run, layers):
    """Seen before anything is made for each layer."""
    edit(run / "model_config.json", num_layers=layers)
    edit(run / "draft_config.json", exit_layers=[1], exit_thresholds=[0.0])
    with expect_user_error(
        rf"checkpoint 5 in .* is of a draft of 2 layers, .* num_layers={layers}"
    ):
        load_run(run)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\x00", b"[" * 5_000, b"9" * 5_000])
@pytest.mark.parametrize("name", ["model_config.json", "draft_config.json", "config.yaml"])
def test_a_file_of_something_else_is_told_by_the_export(run, monkeypatch, capsys, name, content):
    (run / name).write_bytes(content)
    line = failing_run(export, monkeypatch, capsys, "--run", run, "--out", run.parent / "out")
    assert str(run / name) in line
    assert not (run.parent / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {path: 3}", "model: path=3 must be a text"),
        ("model: {path: base, layers: [x]}", r"model: layers=\['x'\] must be a list of whole"),
        ("data: {}", "lacks model"),
        ("model: {path: base}\nwhen: 2024-01-01", "holds a value that JSON cannot"),
    ],
)
def test_a_config_of_something_else_is_told_by_the_export(run, monkeypatch, capsys, text, message):
    (run / "config.yaml").write_text(text)
    line = failing_run(export, monkeypatch, capsys, "--run", run, "--out", run.parent / "out")
    with expect_user_error(message):
        raise UserError(line)


@pytest.mark.parametrize("content", [b"", bytes(range(128, 228))], ids=["empty", "random"])
@pytest.mark.parametrize("file", ["params/_METADATA", "params/manifest.ocdbt", "metrics/metrics"])
def test_damaged_files_of_a_checkpoint(run, file, content):
    (run / CHECKPOINTS / "5" / file).write_bytes(content)
    expected = (
        "delete it, and the checkpoint stays without its score"
        if file == "metrics/metrics"
        else r"checkpoint 5 in .* is damaged \(.+\); .* take step 3 \(--step 3\), or delete"
    )
    with expect_user_error(expected):
        load_run(run)


def test_the_newest_checkpoint_that_is_whole_is_named(finished, tmp_path):
    """A NaN is as bad as a missing file, and a checkpoint that is damaged too is not recommended."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    for file in (run / CHECKPOINTS / "5" / "params").rglob("d/*"):
        file.write_bytes(b"")
    with expect_user_error(
        r"checkpoint 9 in .* is damaged \(params.layers_1.mlp_norm.scale holds 1 values that are no finite numbers\); "
        r".* take step 3 \(--step 3\), or delete .*checkpoints/5, .*checkpoints/9 to go on from there"
    ):
        load_run(run)
    shutil.rmtree(run / CHECKPOINTS / "3")
    with expect_user_error("no other is whole, so train again in another directory"):
        load_run(run)


def row(step: int, **more: object) -> dict:
    return {"step": step, "loss_per_exit": {"1": 2.0, "2": 1.5}, **more}


HELD_OUT = row(0, held_out=True, agreement_per_exit={"1": 0.5, "2": None}, mat_per_exit={"1": None})


def test_metrics_are_kept_up_to_a_step_and_half_a_line_is_none(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [HELD_OUT, row(1), row(2), row(3)]
    file.write_text("".join(json.dumps(each) + "\n" for each in rows) + '{"step": 4, "lo')
    assert read_metrics(file) == rows
    MetricsFile(file, last_step=2).close()
    assert read_metrics(file) == rows[:3]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"garbage", "line 2 is not valid JSON"),
        (b"[1]", r"line 2: \[1\] must be an object"),
        (b"{}", "line 2 lacks step"),
        (b'{"step": "1"}', "line 2: step='1' must be a whole number"),
        (b'{"step": 1}', "line 2 lacks loss_per_exit"),
        (b'{"step": 1, "loss_per_exit": {"1": 2}}', "line 2: loss_per_exit lacks 2"),
        (b'{"step": 1, "loss_per_exit": {"1": "x", "2": 1}}', "loss_per_exit: 1='x' must be a num"),
        (
            b'{"step": 1, "held_out": true, "loss_per_exit": {"1": 2, "2": 3}}',
            "lacks agreement_per",
        ),
        (b"\xff\xfe\xfa", "line 2: not UTF-8"),
        (b"[" * 100_000, "line 2 is not usable JSON"),
    ],
)
def test_metrics_that_training_did_not_write(tmp_path, line, message):
    """Told before the run goes on; the file stays as it is."""
    file = tmp_path / "metrics.jsonl"
    content = json.dumps(row(0)).encode() + b"\n" + line + b"\n"
    file.write_bytes(content)
    with expect_user_error(rf"metrics.jsonl.*{message}"):
        MetricsFile(file, last_step=5)
    assert file.read_bytes() == content


def test_a_file_of_something_else_in_place_of_an_exit(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0, "loss_per_exit": {"last": 2.0}}\n')
    with expect_user_error("must be an object of layer counts"):
        read_metrics(file)
