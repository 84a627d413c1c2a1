"""`infer.generate --ray` on a Ray of two workers: answers of a run in one process, also when workers and drivers are killed."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import pickle
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from hf_tiny import expect_user_error
from infer_tiny import failing_run, run, save_tiny_models

from infer.generate import __main__ as generate
from infer.generate import journaled, ray_batches
from infer.generate.args import Args, RayOptions
from infer.generate.engine import engine_here
from infer.generate.journal import Journal, journal_of
from infer.generate.ray_batches import Decoding, decoders_that_fit

psutil = pytest.importorskip("psutil", reason="needs Ray: pip install 's2d-jax[ray]'")
if (
    importlib.util.find_spec("ray") is None
):  # its import would read the environment before `cluster` sets it
    pytest.skip("needs Ray: pip install 's2d-jax[ray]'", allow_module_level=True)

# Four batches, each with a program of its own: a worker takes a second or two for any of them, in which it can be killed.
WORDS = ("x", "one two", *("three " * count for count in (8, 10, 14, 16, 24)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def cluster():
    """The address of a Ray cluster of one machine, and the process whose descendants its processes are."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Sockets lie in it, whose paths may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="s2d-ray-"))
    (folder / "token").write_text(secrets.token_hex(32))
    with pytest.MonkeyPatch.context() as patch:
        # A token of its own: the user's is neither read nor made.
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "token"))
        patch.setenv("JAX_NUM_CPU_DEVICES", "2")  # of each worker
        command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block"]
        command += [f"--port={port}", f"--temp-dir={folder}", "--num-cpus=2"]
        command += ["--include-dashboard=false", "--disable-usage-stats", '--resources={"TPU": 8}']
        with (folder / "log").open("w") as log:
            head = psutil.Popen(
                [*command, "--object-store-memory=100000000"], stdout=log, stderr=log
            )
        try:
            wait_until(lambda: "Ray runtime started" in (folder / "log").read_text())
            yield f"127.0.0.1:{port}", head
        finally:
            processes = [*head.children(recursive=True), head]
            for process in processes:
                process.kill()
            _, alive = psutil.wait_procs(processes, timeout=10)
            shutil.rmtree(folder)
    assert not alive


def wait_until(found, seconds=200):
    patience = time.monotonic() + seconds
    while not (what := found()):
        assert time.monotonic() < patience
        time.sleep(0.002)
    return what


@pytest.fixture
def source(tmp_path):
    """Conversations of one and of two turns; the first turns make four batches of two, the second ones two."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"turns": [words, "and then"][: 1 + i % 2], "id": f"row {i}"} for i, words in enumerate(WORDS)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags_of(models, source, out):
    files = ("--target", models.small, "--prompts", source, "--out", out)
    return (*files, "--batch-size", 2, "--max-new-tokens", 6)


def answer(monkeypatch, models, source, out, *flags):
    run(generate.main, monkeypatch, *flags_of(models, source, out), *flags)


def busy_workers(head):
    """The processes that are amid a batch; Ray puts what a process does into its title."""

    def answering():
        titles = {process: title(process) for process in head.children(recursive=True)}
        return {p for p, text in titles.items() if "Decoding" in text and ".submit" in text}

    before = answering()
    time.sleep(0.2)  # what has only just begun, or is as good as done, is busy once
    return list(before & answering())


def title(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # has ended meanwhile
        return ""


def watch_entries(patch, act=lambda entries: None):
    """Calls `act(entries so far)` when another entry is on the disk; returns the list of all entries."""
    add, entries = Journal.add, []

    def watched(self, batch):
        add(self, batch)
        entries.append(batch)
        act(entries)

    patch.setattr(Journal, "add", watched)
    return entries


def die_at(count):
    def act(entries):
        if len(entries) == count:
            raise SystemExit(137)

    return act


def kill_a_worker(head):
    """At the first entry, SIGKILL for a worker in the middle of a batch."""

    def act(entries):
        if len(entries) == 1:
            os.kill(wait_until(lambda: busy_workers(head))[0].pid, signal.SIGKILL)

    return act


def each_once(entries, batches):
    keys = Counter((entry["turn"], tuple(entry["talks"])) for entry in entries)
    return len(keys) == batches and set(keys.values()) == {1}


@pytest.mark.exhaustive("half a minute alone, and up to three beside other tests on two cores")
def test_a_killed_workers_batch_is_answered_again_and_written_once(
    models, cluster, source, tmp_path, monkeypatch, capfd
):
    """The journal was begun by a process without Ray, which also was killed."""
    address, head = cluster
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    source.write_text("".join(json.dumps({"prompt": row["turns"][0]}) + "\n" for row in rows))
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    answer(monkeypatch, models, source, whole, "--as-conversations")
    with monkeypatch.context() as patch:
        first = watch_entries(patch, die_at(1))
        with pytest.raises(SystemExit):
            answer(patch, models, source, out, "--as-conversations")
    capfd.readouterr()
    with monkeypatch.context() as patch:
        second = watch_entries(patch, kill_a_worker(head))
        flags = ("--as-conversations", "--ray", address, "--ray-workers", 2)
        answer(patch, models, source, out, *flags)
    assert out.read_bytes() == whole.read_bytes()
    assert each_once(first + second, batches=4)
    assert not journal_of(out).exists()
    shown, said = capfd.readouterr()
    assert f"resuming {journal_of(out)}: 2 answers are there" in shown
    assert "1 of 3 batches were answered again, after their workers died" in said
    assert not re.search(r"raylet|WARNING|core_worker|\bINFO\b", shown + said)


def test_resources_that_no_machine_has_are_refused(
    models, cluster, source, tmp_path, monkeypatch, capsys
):
    start = (*flags_of(models, source, tmp_path / "out"), "--ray", cluster[0])
    error = failing_run(generate.main, monkeypatch, capsys, *start, "--ray-resources", "GPU=1")
    assert error.endswith(
        "--ray-resources CPU=1,GPU=1: no machine of the cluster has all of it (the most on one: CPU=2,GPU=0); ask for less, "
        "or start such a machine first"
    )
    assert os.listdir(tmp_path) == [source.name]


@pytest.mark.exhaustive("a minute, with a driver in a process of its own")
def test_kill_9_of_a_driver_and_of_a_worker(models, cluster, source, tmp_path, monkeypatch, capfd):
    address, head = cluster
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    sampled = ("--temperature", 0.9, "--seed", 5, "--draft", models.draft)
    answer(monkeypatch, models, source, whole, *sampled)
    on_ray = (*sampled, "--mesh.data", 2, "--ray", address, "--ray-resources", "TPU=4,CPU=1")
    command = [sys.executable, "-m", "infer.generate", *flags_of(models, source, out), *on_ray]
    # A driver that computed anything would fail: JAX has no such platform. Workers have the environment of the cluster.
    environment = {**os.environ, "JAX_PLATFORMS": "nowhere"}
    driver = subprocess.Popen(list(map(str, command)), env=environment)
    journal = journal_of(out)
    try:
        wait_until(
            lambda: driver.poll() or (journal.exists() and journal.read_bytes().count(b"\n") > 1)
        )
        assert driver.poll() is None
    finally:
        driver.kill()
        driver.wait()
    first = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    with monkeypatch.context() as patch:
        second = watch_entries(patch, kill_a_worker(head))
        answer(patch, models, source, out, *on_ray)
    assert out.read_bytes() == whole.read_bytes()
    assert each_once(first + second, batches=6)
    assert "batches were answered again" in capfd.readouterr().err


@pytest.mark.exhaustive("the error of a decoder in this process is tested always")
def test_a_workers_mistake_is_one_line(models, cluster, source, tmp_path, monkeypatch, capsys):
    start = (*flags_of(models, source, tmp_path / "out"), "--ray", cluster[0])
    flags = ("--draft", models.draft, "--exits", 7)
    error = failing_run(generate.main, monkeypatch, capsys, *start, *flags)
    assert "error: the worker on " in error
    assert "exits=(7,): the draft has no exit at [7]" in error


def test_a_decoder_tells_the_users_mistake_for_every_batch(models, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    decoding = Decoding(Args(target=(str(tmp_path / "nowhere"),)), None)
    told = decoding(pyarrow.table({"job": [b"one", b"another"]})).to_pylist()
    lines = {pickle.loads(row["result"]) for row in told}
    assert len(lines) == 1
    assert re.match(r"the worker on \S+: .*nowhere", lines.pop())


@pytest.fixture
def twice(monkeypatch):
    """Not a cluster but a decoder in this process, which answers every batch twice, and the last one first."""

    @contextlib.contextmanager
    def engine(args):
        with engine_here(args) as here:

            def answered(jobs):
                for done in reversed(list(here.answer(jobs))):
                    yield done
                    yield done

            yield dataclasses.replace(here, models=None, answer=answered)

    monkeypatch.setattr(journaled, "ray_engine", engine)


@pytest.mark.parametrize(
    "batches",
    [pytest.param(1, marks=pytest.mark.exhaustive("several batches are answered always")), 5],
)
def test_prompts_are_answered_through_a_journal_as_without_one(
    models, source, tmp_path, monkeypatch, capsys, twice, batches
):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    flags = ("--temperature", 0.9, "--seed", 5, "--draft", models.draft)
    answer(monkeypatch, models, source, whole, *flags)
    with monkeypatch.context() as patch:
        first = watch_entries(patch, die_at(batches))
        with pytest.raises(SystemExit):
            answer(patch, models, source, out, *flags, "--ray", "auto")
    other = (*flags_of(models, source, out), *flags, "--ray", "auto", "--seed", 6)
    error = failing_run(generate.main, monkeypatch, capsys, *other)
    assert "was begun with seed=5, not 6; go on with the same" in error
    with monkeypatch.context() as patch:
        second = watch_entries(patch)
        answer(patch, models, source, out, *flags, "--ray", "auto")
    assert out.read_bytes() == whole.read_bytes()
    assert each_once(first + second, batches=6)
    assert not journal_of(out).exists()


def test_workers_with_other_weights_are_refused(tmp_path):
    settings, models = {"seed": 0}, {"target_weights": "a"}
    for _ in range(2):  # the second finds what the first began
        with Journal(tmp_path / "a.journal", settings, later=tuple(models)) as journal:
            journal.settle(models)
            journal.settle(models)
            with expect_user_error('was begun with target_weights="a", not "b"'):
                journal.settle({"target_weights": "b"})
    with expect_user_error("was begun with seed=0, not 1"):
        Journal(tmp_path / "a.journal", {"seed": 1}, later=tuple(models))


def test_a_journal_of_other_batches_is_refused(tmp_path):
    with Journal(tmp_path / "a.journal", {}) as journal:
        journal.add({"turn": 0, "talks": [1, 2], "answers": []})
        journal.add({"turn": 1, "talks": [1], "answers": []})
        journal.add({"turn": 1, "talks": [1], "answers": []})
    with Journal(tmp_path / "a.journal", {}) as journal:
        assert journal.kept(0, [[0], [1, 2]]) == {1: journal.batches[0]}
        for turn, groups in ((0, [[0], [1], [2]]), (1, [[1]])):
            with expect_user_error("a.journal holds other batches than these conversations have"):
                journal.kept(turn, groups)


def test_decoders_that_fit():
    machines = [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 2.0, "GPU": 4.0}, {"CPU": 64.0}]
    assert decoders_that_fit({"CPU": 1.0}, machines) == [8, 2, 64]
    assert decoders_that_fit({"CPU": 1.0, "GPU": 1.0}, machines) == [4, 2, 0]
    for asked in ({"CPU": 1.0, "TPU": 4.0}, {"CPU": 16.0, "GPU": 1.0}):
        with expect_user_error("no machine of the cluster has all of it"):
            decoders_that_fit(asked, machines)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ray-workers", 2), "are of a cluster; give --ray, too"),
        (("--ray", "auto", "--ray-workers", 0), "ray-workers 0 must be at least 1"),
        (("--ray", "auto", "--ray-resources", "GPU"), "is not a list of amounts; write it like"),
        (("--ray", "auto", "--ray-resources", "GPU=-1"), "is not a list of amounts; write it"),
        (("--ray", "auto", "--ray-resources", "GPU=1.5"), "is not a list of amounts; write it"),
        (("--ray", "ray://head:10001"), "on a machine of the cluster with --ray auto"),
        (("--ray", "auto", "--stream"), "--stream does not go with --ray; leave it out"),
        (("--ray", "auto", "--explain", 2), "--explain does not go with --ray; leave it out"),
        (("--ray", "auto", "--target", "b"), "--ray has 2 targets; give one --target"),
        (("--ray", "auto", "--exits", 1), "need a draft; give --draft DIR"),
        (("--ray", "127.0.0.1"), "is no HOST:PORT"),
    ],
)
def test_mistakes_get_one_line(models, source, tmp_path, monkeypatch, capsys, flags, message):
    start = flags_of(models, source, tmp_path / "out")
    assert message in failing_run(generate.main, monkeypatch, capsys, *start, *flags)
    assert os.listdir(tmp_path) == [source.name]


def test_answers_on_a_cluster_need_a_file(monkeypatch, capsys):
    flags = ("--target", "a", "--prompt", "b", "--ray", "auto")
    error = failing_run(generate.main, monkeypatch, capsys, *flags)
    assert "--ray keeps its answers in a file; give --out FILE.jsonl" in error


def test_without_ray_its_extra_is_named(models, source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ray_batches.importlib.util, "find_spec", lambda name: None)
    start = (*flags_of(models, source, tmp_path / "out"), "--ray", "auto")
    error = failing_run(generate.main, monkeypatch, capsys, *start)
    assert "--ray needs Ray, which is not installed; pip install 's2d-jax[ray]'" in error


def test_amounts_have_rays_names():
    assert RayOptions().asked() == {"CPU": 1.0}
    assert RayOptions(ray="auto", ray_resources="TPU=4, CPU=0.5").asked() == {"CPU": 0.5, "TPU": 4}
