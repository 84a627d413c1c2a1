"""Runs that are stopped, killed or find their files damaged: what was saved stays good, and going on repeats the whole run."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from run_tiny import (
    deterministic,
    finish,
    last_step,
    launch,
    metrics,
    spawn,
    wait_for_step,
    write_source,
)

from s2d_jax.weights.checkpoints import Checkpoints
from s2d_jax.weights.runs import CHECKPOINTS, load_run
from train.run.preemption import PREEMPTED_STATUS

STEPS = 30
EVERY = ("--train.checkpoint-every", 5, "--train.eval-every", 30)


@pytest.fixture(scope="module")
def flags(pytestconfig):
    """Long enough that every kill still finds something to do."""
    return ("--train.max-steps", max(STEPS, 15 * pytestconfig.getoption("--kills")), *EVERY)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def whole(source, flags, tmp_path_factory):
    """A run that nothing interrupts."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert launch(source, run_dir, *flags) == 0
    return run_dir


# Subprocesses have as many devices as this one: the threads that share a product, hence its last bit, depend on their number.
DEVICES = len(jax.devices())


def check_same_run(run_dir: Path, whole: Path) -> None:
    """Every line of the metrics and every parameter, to the last bit."""
    for held_out in (False, True):
        assert deterministic(metrics(run_dir, held_out)) == deterministic(metrics(whole, held_out))
    jax.tree.map(np.testing.assert_array_equal, load_run(run_dir).params, load_run(whole).params)


@pytest.mark.exhaustive("two processes are stopped so, and go on, in test_processes.py")
def test_sigterm_saves_ends_with_its_own_status_and_the_rest_is_as_if_nothing_was(
    source, flags, whole, tmp_path
):
    run_dir = tmp_path / "run"
    process = spawn(source, run_dir, *flags, devices=DEVICES)
    wait_for_step(run_dir, 7, process)
    process.send_signal(signal.SIGTERM)
    ((status, out, told),) = finish([process])
    step = last_step(run_dir)
    assert status == PREEMPTED_STATUS == 75
    assert told == f"SIGTERM: saved at step {step}; go on with --train.resume\n"
    assert "trained:" not in out
    assert 7 <= step < flags[1]
    assert load_run(run_dir).source.endswith(f"step {step}")
    assert launch(source, run_dir, *flags, "--train.resume") == 0
    check_same_run(run_dir, whole)


def kill_at_random(process: subprocess.Popen, run_dir: Path, moment: str, rng) -> None:
    """SIGKILL while the process starts, while a checkpoint is half written, or between."""
    if moment == "start":
        deadline = time.monotonic() + rng.uniform(0.0, 6.0)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
    else:
        before = last_step(run_dir) if (run_dir / "metrics.jsonl").exists() else 0
        wait_for_step(run_dir, before + rng.randrange(1, 15), process)
        if moment == "save":
            stop_in_a_save(process, run_dir)
        else:
            time.sleep(rng.uniform(0.0, 0.03))
    process.kill()


def stop_in_a_save(process: subprocess.Popen, run_dir: Path) -> None:
    """Halts a process that is saving; what it has halted can't finish the save before it is killed."""
    while process.poll() is None:
        if half_written(run_dir):
            process.send_signal(signal.SIGSTOP)
            if half_written(run_dir):
                return
            process.send_signal(signal.SIGCONT)
        time.sleep(0.001)


def half_written(run_dir: Path) -> list[Path]:
    return list((run_dir / CHECKPOINTS).glob("*.orbax-checkpoint-tmp*"))


def is_saved(run_dir: Path) -> bool:
    checkpoints = Checkpoints(run_dir / CHECKPOINTS)
    try:
        return bool(checkpoints.steps)
    finally:
        checkpoints.close()


def test_kill_9_at_random_moments_never_leaves_an_unusable_run(
    source, flags, whole, tmp_path, pytestconfig
):
    """`--kills N` kills N times. After each the same command works again, with `--train.resume` once there is a checkpoint."""
    run_dir, rng, half_saved = tmp_path / "run", random.Random(0), 0
    for kill in range(pytestconfig.getoption("--kills")):
        resume = is_saved(run_dir)
        process = spawn(source, run_dir, *flags, "--train.resume", resume, devices=DEVICES)
        kill_at_random(process, run_dir, ("save", "step", "start")[kill % 3], rng)
        ((status, _, told),) = finish([process])
        assert status in (-signal.SIGKILL, 0), told
        assert is_saved(run_dir) or not resume, "a checkpoint was lost"
        half_saved += bool(half_written(run_dir))
        if is_saved(run_dir):
            load_run(run_dir)
    resume = is_saved(run_dir)
    assert launch(source, run_dir, *flags, "--train.resume", resume) == 0
    print(f"{half_saved} kills left a checkpoint half written")
    assert half_saved > 0, "no kill came in the middle of a save"
    check_same_run(run_dir, whole)
    assert not list(run_dir.rglob("*partial*"))
    assert not list(run_dir.rglob("*orbax-checkpoint-tmp*"))


@pytest.fixture(scope="module")
def eight_steps(source, tmp_path_factory):
    """A run of 8 steps with checkpoints 4 and 8."""
    run_dir = tmp_path_factory.mktemp("runs") / "eight"
    assert launch(source, run_dir) == 0
    return run_dir


@pytest.fixture
def finished(eight_steps, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(eight_steps, tmp_path / "run"))


def test_an_older_checkpoint_that_was_half_deleted_does_no_harm(source, finished, capsys):
    """Orbax deletes file by file, so kill -9 may leave such a one."""
    old = finished / CHECKPOINTS / "4"
    (old / "_CHECKPOINT_METADATA").unlink()
    shutil.rmtree(old / "params")
    again = ("--train.resume", "--train.max-steps", 12)
    assert launch(source, finished, *again) == 0
    assert [path.name for path in sorted((finished / CHECKPOINTS).iterdir())] == ["12", "8"]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.exhaustive("test_data_cache.py damages rows in the same ways")
def test_damaged_rows_are_named_before_a_run_goes_on(source, finished, capsys):
    file = next((finished / "rows").glob("*.arrow"))
    good, saved = file.read_bytes(), load_run(finished).params
    again = ("--train.resume", "--train.max-steps", 12)
    capsys.readouterr()
    for damage in (flip_a_bit, cut_in_half, Path.unlink):
        damage(file)
        assert launch(source, finished, *again) == 2, damage
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {finished / 'rows'} is damaged (")
        assert file.name in line
        assert line.endswith("or start another run")
        jax.tree.map(np.testing.assert_array_equal, load_run(finished).params, saved)
        file.write_bytes(good)
    assert launch(source, finished, *again) == 0


def test_metrics_outlive_a_rewrite_that_the_disk_refuses(source, finished, monkeypatch, capsys):
    """A resumed run drops later lines; if it dies while it does so, the earlier ones are still there."""
    before = (finished / "metrics.jsonl").read_text()

    def full(old, new):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("s2d_jax.files.os.replace", full)
        assert launch(source, finished, "--train.resume") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert (finished / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "model_config.json",
            b"{}",
            "model_config.json lacks family; put back the file that training",
        ),
        ("draft_config.json", b"[1]", "draft_config.json holds a JSON list, an object is expected"),
        ("config.yaml", b"", "config.yaml: model is missing; it has no default"),
        ("config.yaml", b"\x80\x81", "config.yaml, line 1: not UTF-8"),
        ("metrics.jsonl", b"garbage\n", "metrics.jsonl, line 1 is not valid JSON"),
    ],
)
def test_a_run_that_was_changed_is_not_resumed(source, finished, capsys, name, content, message):
    file = finished / name
    good = file.read_bytes()
    file.write_bytes(content)
    try:
        assert launch(source, finished, "--train.resume") == 2
    finally:
        file.write_bytes(good)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {finished}")
    assert message in line
