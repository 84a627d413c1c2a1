"""Several processes train as one: the same losses, one writer, one end; and checkpoints that fit any number of them."""

from __future__ import annotations

import json
import math
import signal
import sys

import jax
import numpy as np
import pytest
from hf_tiny import expect_user_error
from run_tiny import (
    finish,
    last_step,
    launch,
    metrics,
    spawn_together,
    start_together,
    wait_for_step,
    write_source,
)

from s2d_jax.processes import start_processes
from s2d_jax.weights.runs import load_run
from train.run.preemption import PREEMPTED_STATUS
from train.run.terminal import ProgressReport

_FROM_GLOO = "[Gloo] Rank is connected to peer ranks. Expected number of connected peer ranks is :"
# At a low rate rounding grows slowly.
STEPS = (
    *("--optim.learning-rate", "1e-3", "--train.max-steps", 16, "--train.batch-size", 8),
    *("--train.eval-every", 8, "--train.checkpoint-every", 8),
)
FOUR = ("--mesh.data", 2, "--mesh.slices", 2, "--mesh.fsdp", 2)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def teacher(source):
    teacher = ("--objective.teachers", source / "model", "--objective.teacher-dtype", "float32")
    return (*teacher, "--objective.distill-weight", 0.9, "--objective.ce-weight", 0.1)


def check_equal(run_dir, alone):
    for held_out in (False, True):
        got, expected = metrics(run_dir, held_out), metrics(alone, held_out)
        assert [row["step"] for row in got] == [row["step"] for row in expected]
        for one, other in zip(got, expected, strict=True):
            for name in {"loss", "loss_per_exit", "divergence_per_exit"} & set(other):
                # A divergence near 0 is a difference of logarithms, which rounding moves by some 1e-7.
                assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    trained, expected = (load_run(path).params for path in (run_dir, alone))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), trained, expected)


def test_two_processes_stop_together_and_one_goes_on(source, teacher, tmp_path):
    """SIGTERM reaches one of them; both save at the same step. Each reads its share of the rows and of stored values."""
    run_dir, flags = tmp_path / "run", (*teacher, "--objective.teacher-top-k", 8, *STEPS)
    assert launch(source, tmp_path / "alone", *flags) == 0
    processes = spawn_together([(source, run_dir, *FOUR, *flags)] * 2, devices=2)
    wait_for_step(run_dir, 3, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    (first, out, told), (second, nothing, _) = finish(processes)
    assert (first, second) == (PREEMPTED_STATUS, PREEMPTED_STATUS), told
    step = last_step(run_dir)
    assert 3 <= step < 16
    assert f"SIGTERM: saved at step {step}; go on with --train.resume" in told
    assert load_run(run_dir).source.endswith(f"step {step}")
    # The second wrote nothing; what its collectives say comes from C++, whose threads write into each other's lines.
    assert "compiling for 4 device(s)" in out
    words = nothing.split()
    assert not [w for w in words if w not in _FROM_GLOO.split() and not w.isdigit()]
    assert launch(source, run_dir, *flags, "--train.resume") == 0
    check_equal(run_dir, tmp_path / "alone")


SMALL_PARTS = ("--draft.exit-adapters", 1, "--draft.adapter-rank", 4, "--model.lora-rank", 4)


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(
            SMALL_PARTS,
            id="small parts",
            marks=pytest.mark.exhaustive(
                "two processes that become one are tested above in every run"
            ),
        ),
        pytest.param(
            (),
            id="the whole draft",
            marks=pytest.mark.exhaustive("the trunk learns where small parts do above"),
        ),
    ],
)
def test_one_process_stops_and_two_go_on(source, teacher, tmp_path, monkeypatch, parts):
    """What learns, learns from a teacher that runs; four devices hold it and the teacher."""
    run_dir, flags = tmp_path / "run", (*teacher, *parts, *STEPS)
    assert launch(source, tmp_path / "alone", *flags) == 0

    def update(self, share, row):
        if row["step"] == 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProgressReport, "update", update)
        assert launch(source, run_dir, *flags) == 130
    again = (source, run_dir, *FOUR, "--train.accumulate", 2, *flags, "--train.resume")
    results = finish(spawn_together([again] * 2, devices=2))
    assert [status for status, *_ in results] == [0, 0], results
    assert "resuming" in results[0][1]
    assert "after step 8" in results[0][1]
    check_equal(run_dir, tmp_path / "alone")


def test_a_failure_of_one_process_ends_all_with_one_line_each(source, tmp_path):
    run_dir = tmp_path / "run"
    good = (source, run_dir, "--mesh.data", 2)
    results = finish(spawn_together([good, (*good, "--model.path", "/nowhere/model")]))
    words = 'model.path is "/nowhere/model" here, and '
    for (status, _, told), begins in zip(results, ("error: process 1: ", "error: "), strict=True):
        lines = [line for line in told.splitlines() if line.startswith("error")]
        assert status == 2
        assert len(lines) == 1
        assert lines[0].startswith(begins + words)
    assert not run_dir.exists()


def test_each_process_reads_its_own_rows_and_the_data_axis_lies_between_them():
    results = finish(
        start_together([[sys.executable, "tests/helpers/process_checks.py"]] * 2, devices=2)
    )
    assert [status for status, *_ in results] == [0, 0], results
    seen = [json.loads(line) for _, out, _ in results for line in out.splitlines() if "{" in line]
    assert [s["main"] for s in seen] == [True, False]
    assert [s["rows"] for s in seen] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [s["total"] for s in seen] == [4 * sum(range(8))] * 2
    assert [s["number"] for s in seen] == [math.pi, math.pi]
    assert seen[0]["owners"] == seen[1]["owners"] == [[0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES is set but JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID is"),
        (
            {"COORDINATOR_ADDRESS": "host:1", "PROCESS_ID": "0"},
            r"JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID is set but JAX_NUM_PROCESSES is not; set all three",
        ),
        (
            {"COORDINATOR_ADDRESS": "host", "NUM_PROCESSES": "2", "PROCESS_ID": "0"},
            "JAX_COORDINATOR_ADDRESS='host' must be host:port of process 0",
        ),
        (
            {"COORDINATOR_ADDRESS": "host:1", "NUM_PROCESSES": "two", "PROCESS_ID": "0"},
            "JAX_NUM_PROCESSES='two' must be a whole number of at least 1",
        ),
        (
            {"COORDINATOR_ADDRESS": "host:1", "NUM_PROCESSES": "2", "PROCESS_ID": "2"},
            "JAX_PROCESS_ID='2' must be a whole number from 0 to 1, one for each process",
        ),
    ],
)  # fmt: skip
def test_an_environment_that_makes_no_sense_is_named(environment, message):
    with expect_user_error(message):
        start_processes({f"JAX_{name}": value for name, value in environment.items()})


def test_without_an_environment_there_is_one_process():
    start_processes({})
    assert jax.process_count() == 1
