"""What one command refuses with a good line, all do: files of prompts, models, outputs; and before anything is loaded."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from infer_tiny import failing_run

from infer import export
from infer.accelerator_check import __main__ as accelerator_check
from infer.bench import __main__ as bench
from infer.bench import args as bench_args
from infer.bench import comparison
from infer.calibrate import __main__ as calibrate
from infer.calibrate import args as calibrate_args
from infer.calibrate import choosing
from infer.generate import __main__ as generate
from infer.generate import answering
from infer.generate import args as generate_args
from infer.trim import __main__ as trim
from infer.trim import args as trim_args
from infer.trim import listing
from s2d_jax.cli.command import status_of
from train.main import main as train
from train.memory.__main__ import main as memory
from train.plan.__main__ import main as plan

Refused = Callable[..., str]


@pytest.fixture
def refused(monkeypatch, capsys) -> Refused:
    """Runs a command that must fail; gives its one line."""

    def refused(command, *arguments) -> str:
        if command not in (train, memory, plan):
            return failing_run(command.main, monkeypatch, capsys, *arguments)
        assert command([str(argument) for argument in arguments]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")
        return line

    return refused


@pytest.fixture
def place(tmp_path) -> Path:
    """A directory with a file, a pipe and a configuration of training whose model does not exist."""
    (tmp_path / "file").write_text("kept")
    os.mkfifo(tmp_path / "fifo")
    settings = "model: {path: nowhere}\ndata: {paths: [nowhere.jsonl]}\ndraft: {exit_layers: [1]}\n"
    (tmp_path / "run.yaml").write_text(settings)
    return tmp_path


def left(place: Path) -> set[str]:
    return {path.name for path in place.iterdir()}


MODELS = ("--target", "nowhere", "--draft", "nowhere")
PAIR = {"target": ("nowhere",), "draft": "nowhere"}
READERS = {
    "generate": (answering.generate, generate_args.Args, "prompts", {**PAIR}),
    "as conversations": (
        answering.generate,
        generate_args.Args,
        "prompts",
        {**PAIR, "answering": generate_args.AnsweringOptions(as_conversations=True), "out": "new"},
    ),
    "bench": (comparison.bench, bench_args.Args, "questions", {**PAIR, "out": "new"}),
    "calibrate": (choosing.calibrate, calibrate_args.Args, "questions", {**PAIR, "out": "new"}),
    "trim": (listing.trim, trim_args.Args, "answers", {"draft": "nowhere", "out": "new.json"}),
}
DAMAGED = {
    "absent": (None, "does not exist; "),
    "directory": (None, " a directory"),
    "fifo": (None, "is a device or a pipe, a file is expected"),
    "utf-16": ('{"prompt": "a"}\n'.encode("utf-16"), "is UTF-16; convert it"),
    "bytes": (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "line 2: not UTF-8 at byte 28"),
    "gzip": (gzip.compress(b'{"prompt": "a"}\n' * 99)[:-9], "is damaged gzip"),
    "binary": (b"\x00\x01\x02\x03", "is not valid JSON"),
    "deep": (b"[" * 50_000, "nested too deeply"),
    "digits": (b'{"prompt": ' + b"9" * 5000 + b"}", "a number of thousands of digits"),
    "other rows": (b'{"a": 1}\n', "expected"),
    "null": (b'{"prompt": null, "response": null, "messages": null}', "expected"),
    "empty": (b"\n\n", "holds no "),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_of_prompts_are_one_line(reader, damage, place, capsys):
    command, flags, name, values = READERS[reader]
    data, told = DAMAGED[damage]
    path = place / damage
    if damage == "directory":
        path.mkdir()
    elif data is not None:
        path.write_bytes(data)
    before = left(place)
    values = {key: place / value if key == "out" else value for key, value in values.items()}
    args = flags(**values, **{name: (path,) if flags is trim_args.Args else path})
    assert status_of(lambda: command(args)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line
    assert str(path) in line
    assert left(place) == before


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (generate, (*MODELS, "--prompt", "a")),
        (bench, (*MODELS, "--questions", "{}/good", "--out", "{}/new")),
        (calibrate, (*MODELS, "--out", "{}/new")),
        (trim, ("--draft", "nowhere", "--answers", "{}/good", "--out", "{}/new.json")),
        (export, ("--run", "nowhere", "--out", "{}/new")),
        (accelerator_check, ("--model", "nowhere", "--out", "{}/new")),
        (train, ("--config", "{}/run.yaml", "--train.run-dir", "{}/new")),
        (memory, ("--target", "nowhere", "--topology", "cpu", "--out", "{}/new")),
        (plan, ("--config", "{}/run.yaml", "--devices", "1", "--json", "{}/new")),
    ],
)
def test_models_that_do_not_exist_are_one_line_and_leave_nothing(
    command, arguments, place, refused
):
    (place / "good").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    before = left(place)
    assert "nowhere" in refused(command, *(word.format(place) for word in arguments))
    assert left(place) == before


FILES = {
    "generate --out": (generate, (*MODELS, "--prompt", "a", "--out")),
    "calibrate --out": (calibrate, (*MODELS, "--out")),
    "trim --out": (trim, ("--draft", "nowhere", "--answers", "nowhere", "--out")),
    "plan --json": (plan, ("--config", "{}/run.yaml", "--devices", "1", "--json")),
}
DIRECTORIES = {
    "generate --explain-out": (generate, (*MODELS, "--prompt", "a", "--explain", "1", "--explain-out")),
    "generate --profile": (generate, (*MODELS, "--prompt", "a", "--profile")),
    "generate --compile-cache": (generate, (*MODELS, "--prompt", "a", "--compile-cache")),
    "bench --out": (bench, (*MODELS, "--out")),
    "bench --kernels --out": (bench, ("--kernels", "--out")),
    "bench --profile": (bench, (*MODELS, "--out", "{}/new", "--profile")),
    "bench --compile-cache": (bench, (*MODELS, "--out", "{}/new", "--compile-cache")),
    "calibrate --compile-cache": (calibrate, (*MODELS, "--compile-cache")),
    "export --out": (export, ("--run", "nowhere", "--out")),
    "accelerator_check --out": (accelerator_check, ("--model", "nowhere", "--out")),
    "train.run_dir": (train, ("--config", "{}/run.yaml", "--train.run-dir")),
    "memory --out": (memory, ("--topology", "cpu", "--out")),
}  # fmt: skip


@pytest.mark.parametrize("output", [*FILES, *DIRECTORIES])
def test_outputs_that_cannot_be_written_are_refused_before_a_model_is_looked_for(
    output, place, refused
):
    command, arguments = {**FILES, **DIRECTORIES}[output]
    arguments = [word.format(place) for word in arguments]
    before = left(place)
    wrong = [place / "file" / "x.json", "/dev/full", "gs://bucket/out.json"]
    wrong.append(place if output in FILES else place / "file")
    for value in wrong:
        line = refused(command, *arguments, value)
        assert "nowhere" not in line
        assert "gs:/" in line or str(value) in line
    assert left(place) == before
    assert (place / "file").read_text() == "kept"


COMMANDS = [generate, bench, calibrate, trim, export, accelerator_check, train, memory, plan]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_cache_that_cannot_be_kept_is_refused(command, place, refused, monkeypatch):
    arguments = {
        trim: ("--draft", "nowhere"),
        export: ("--run", "nowhere", "--out", "nowhere"),
        train: ("--config", place / "run.yaml"),
        plan: ("--config", place / "run.yaml"),
    }
    monkeypatch.setenv("S2D_CACHE_DIR", str(place / "file" / "x"))
    line = refused(command, *arguments.get(command, ()))
    assert line.startswith("error: $S2D_CACHE_DIR ")
    assert line.endswith("file is a file; choose another place")


def test_a_tilde_is_expanded_where_the_shell_leaves_it(place, refused, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    assert f"{place}/file is a file" in refused(bench, *MODELS, "--out=~/file")
    assert f"{place}/lost does not exist" in refused(generate, *MODELS, "--prompts=~/lost")
    assert f"{place}/file is a file" in refused(
        train, "--config=~/run.yaml", "--train.run-dir=~/file"
    )
