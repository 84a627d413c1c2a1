"""`infer.generate` in two real processes: answers of one, written by the first, and what is lost when one of them dies."""

from __future__ import annotations

import json
import signal
import socket
import sys
import time

import pytest
from hf_tiny import expect_user_error
from infer_tiny import run, save_tiny_models
from run_tiny import finish, start_together

from infer.generate import __main__ as generate
from infer.generate.journal import journal_of
from s2d_jax.processes import start_processes

PROMPTS = ("one two", "three four five", "six")
SHORT = ("--max-new-tokens", 8)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"turns": [text, "and then"]} for text in PROMPTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """Twenty batches of two."""
    path = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": PROMPTS[i % 3]}, {"role": "assistant", "content": "old"}]}
        for i in range(40)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def together(*arguments, module="infer.generate"):
    """Two processes of one command, on a device each."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return start_together([command] * 2, devices=1)


def answered(results, out):
    """The rows of a command that both processes ended well; the second one showed nothing."""
    assert [status for status, *_ in results] == [0, 0], results
    (_, shown, _), (_, nothing, told) = results
    assert "written to" in shown
    # Gloo, in C++, writes to stdout.
    assert not [line for line in nothing.splitlines() if "Gloo" not in line]
    assert not [line for line in told.splitlines() if not line.startswith("starting")]
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def alone(monkeypatch, out, *arguments):
    run(generate.main, monkeypatch, *arguments, "--out", out)
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--temperature", 1), id="rows over data, sampled"),
        pytest.param(
            ("--mesh.tensor", 2, "--target-format", "int8"),
            id="int8 over tensor",
            marks=pytest.mark.exhaustive("rows over data are tested always"),
        ),
        pytest.param(
            ("--mesh.tensor", 2, "--mesh.draft", "split", "--tree", "--stream"),
            id="a split draft's trees, streamed",
            marks=pytest.mark.exhaustive("rows over data are tested always"),
        ),
    ],
)
def test_two_processes_answer_as_one_does(monkeypatch, models, prompts, tmp_path, flags):
    given = (
        "--target",
        models.large,
        "--draft",
        models.draft,
        "--prompts",
        prompts,
        *SHORT,
        *flags,
    )
    out = tmp_path / "two.jsonl"
    rows = answered(finish(together(*given, "--out", out)), out)
    mesh = {"--mesh.tensor", 2, "--mesh.draft", "split"}
    assert rows == alone(
        monkeypatch, tmp_path / "one.jsonl", *[flag for flag in given if flag not in mesh]
    )
    assert not journal_of(out).exists()


def begun(models, talks, out, batches, *flags):
    """Two processes that regenerate answers, once this many batches are on the disk."""
    given = ("--as-conversations", "--target", models.small, "--prompts", talks, "--batch-size", 2)
    processes = together(*given, "--max-new-tokens", 24, "--out", out, *flags)
    deadline = time.monotonic() + 200
    while lines(journal_of(out)) < 1 + batches and time.monotonic() < deadline:
        assert [process.poll() for process in processes] == [None, None]
        time.sleep(0.02)
    return processes


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize(
    ("victim", "stop", "says"),
    [
        pytest.param(1, signal.SIGKILL, "most often another process is gone", id="the second is killed"),
        pytest.param(
            0,
            signal.SIGKILL,
            "process 0 is gone; start all again",
            id="the first is killed",
            marks=pytest.mark.exhaustive("the second is killed always"),
        ),
        pytest.param(
            1,
            signal.SIGSTOP,
            "process 1 gives no sign of life for",
            id="the second falls silent",
            marks=pytest.mark.exhaustive("half a minute of silence"),
        ),
        pytest.param(
            0,
            signal.SIGSTOP,
            "process 0 gives no sign of life for",
            id="the first falls silent",
            marks=pytest.mark.exhaustive("half a minute of silence"),
        ),
    ],
)  # fmt: skip
def test_one_that_dies_ends_the_other_with_one_line_and_the_same_command_goes_on(
    monkeypatch, models, talks, tmp_path, victim, stop, says
):
    out = tmp_path / "answers.jsonl"
    processes = begun(models, talks, out, 3)
    processes[victim].send_signal(stop)
    other = processes[1 - victim]
    died = time.monotonic()
    _, told = other.communicate(timeout=120)
    assert time.monotonic() - died < 60
    processes[victim].kill()
    finish([processes[victim]])
    assert other.returncode != 0
    told = [line for line in told.splitlines() if not line.startswith(("starting", "decoding"))]
    assert says in told[-1]
    assert len([line for line in told if line.startswith("error: ")]) == 1
    assert not [line for line in told if "Traceback" in line or "absl" in line]
    kept = lines(journal_of(out)) - 1
    assert 3 <= kept < 20
    assert not out.exists()
    processes = begun(models, talks, out, kept)
    rows = answered(finish(processes), out)
    given = ("--as-conversations", "--target", models.small, "--prompts", talks, "--batch-size", 2)
    assert rows == alone(monkeypatch, tmp_path / "alone.jsonl", *given, "--max-new-tokens", 24)


def test_processes_that_were_given_other_prompts_are_told(models, prompts, talks, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "seven"}\n')
    commands = [
        [sys.executable, "-m", "infer.generate", "--target", models.small, "--prompts", str(file), *map(str, SHORT)]
        for file in (prompts, other)
    ]  # fmt: skip
    results = finish(start_together(commands, devices=1))
    assert [status for status, *_ in results] == [2, 2]
    for _, _, told in results:
        (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
        assert "process 1: prompts is" in line or line.startswith("error: prompts is")
        assert "start all processes with the same flags and files" in line


# A command whose processes have three seconds to meet.
IMPATIENT = """
import sys
from s2d_jax import processes
from s2d_jax.cli import together
together.SECONDS_TO_MEET = processes.SECONDS_TO_MEET = 3
together._SECONDS_WITHOUT_A_WORD = 1
sys.exit(together.done_together(lambda: print("worked"), lambda: "", "start all again"))
"""


@pytest.mark.parametrize(
    "index", [0, pytest.param(1, marks=pytest.mark.exhaustive("the first says the same"))]
)
def test_a_process_that_waits_for_another_in_vain_says_so_on_one_line(index):
    programs = ["pass", "pass"]
    programs[index] = IMPATIENT
    results = finish(start_together([[sys.executable, "-c", text] for text in programs], devices=1))
    status, shown, told = results[index]
    assert status != 0
    assert "worked" not in shown
    waits, ends = told.splitlines()
    assert waits.startswith("waiting for the other processes at JAX_COORDINATOR_ADDRESS=127.0.0.1:")
    assert "did not find each other at JAX_COORDINATOR_ADDRESS=127.0.0.1:" in ends
    assert "; start all within 3 s, where it can be reached, with one number" in ends


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with expect_user_error(f"JAX_COORDINATOR_ADDRESS={address} is taken on this machine; give"):
            start_processes(
                {
                    "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_NUM_PROCESSES": "2",
                    "JAX_PROCESS_ID": "0",
                }
            )


@pytest.mark.exhaustive("generation is what benchmarks run, and is tested always")
def test_a_benchmark_measures_what_both_compute(models, prompts, tmp_path):
    out = tmp_path / "bench"
    files = ("--target", models.large, "--draft", models.draft, "--questions", prompts)
    flags = (*SHORT, "--methods", "ar,s2d", "--mesh.tensor", 2, "--out", out)
    (first, _, told), (second, shown, _) = finish(together(*files, *flags, module="infer.bench"))
    assert (first, second) == (0, 0), told
    assert not [line for line in shown.splitlines() if "Gloo" not in line]
    report = json.loads((out / "report.json").read_text())
    assert report["settings"]["mesh.tensor"] == 2
    assert [row["prompts_not_identical"] for row in report["rows"]] == [[], []]


@pytest.mark.exhaustive("minutes: each part of a round is compiled twice")
def test_a_calibration_is_found_by_several_processes(monkeypatch, models, prompts, tmp_path):
    policies = tmp_path / "policies.json"
    pair = ("--target", models.large, "--draft", models.draft)
    effort = ("--prompts", 2, "--new-tokens", 8, "--no-trees", "--temperature", 0, "--minutes", 0.2)
    flags = ("--questions", prompts, *effort, "--out", policies)
    results = finish(together(*pair, *flags, module="infer.calibrate"))
    assert [status for status, *_ in results] == [0, 0], results
    (policy,) = json.loads(policies.read_text())["policies"]
    assert policy["key"]["device"].endswith(", data 2")
    out = tmp_path / "two.jsonl"
    given = (*pair, "--prompts", prompts, *SHORT)
    auto = ("--policy", "auto", "--policy-file", policies, "--out", out)
    rows = answered(finish(together(*given, *auto)), out)
    alone_rows = alone(monkeypatch, tmp_path / "one.jsonl", *given)
    assert [row["messages"] for row in rows] == [row["messages"] for row in alone_rows]


@pytest.mark.exhaustive("minutes: each of two processes compiles chains and trees")
@pytest.mark.parametrize(("data", "tensor", "kept"), [(2, 1, "f32"), (1, 2, "int8")])
def test_python_calls_in_two_processes_have_the_tokens_of_one(models, data, tensor, kept):
    """Both processes get all rows: of a call, a stream, and a conversation whose caches grow."""
    file = [sys.executable, "tests/helpers/decode_checks.py", models.large, models.draft]
    (alone_, *both) = [
        json.loads(line)["found"]
        for results in (
            finish(start_together([[*file, "1", "1", kept]], devices=1)),
            finish(start_together([[*file, str(data), str(tensor), kept]] * 2, devices=1)),
        )
        for status, out, told in results
        for line in out.splitlines()
        if line.startswith("{") or status
    ]
    assert both == [alone_, alone_]
    assert len(alone_) == 6
