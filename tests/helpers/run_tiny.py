"""Runs of `python -m train.main` on a tiny model: in this process, in one of their own, or in several that train together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from tiny import tiny_config, tiny_params, tiny_tokenizer

from s2d_jax.config.draft import DraftConfig
from s2d_jax.weights.export import export_draft
from s2d_jax.weights.model import Draft
from train.main import main

VOCAB = 300
ROOT = Path(__file__).parents[2]
_LONGEST = 300.0  # seconds; a process that takes longer hangs


def write_source(directory: Path) -> Path:
    """A directory with a tiny model of 4 layers, its tokenizer, conversations and a config."""
    config = tiny_config(VOCAB, num_layers=4)
    model = Draft(config, tiny_params(config), tiny_tokenizer(VOCAB), "tiny", DraftConfig((4,)))
    export_draft(model, directory / "model", {})
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rng = np.random.default_rng(0)
    with open(directory / "chat.jsonl", "w") as file:
        for _ in range(60):
            start = int(rng.integers(0, 8))
            messages = [
                {"role": "user", "content": words[start]},
                {"role": "assistant", "content": " ".join(words[start : start + 3])},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    (directory / "run.yaml").write_text(
        f"""
model: {{path: {directory / "model"}, num_layers: 3, compute_dtype: float32, remat: false}}
data: {{paths: [{directory / "chat.jsonl"}], max_length: 48, held_out_fraction: 0.1}}
draft: {{exit_layers: [1, 2, 3]}}
optim: {{learning_rate: 1e-2}}
train: {{batch_size: 4, max_steps: 8, checkpoint_every: 4, eval_every: 4, keep_checkpoints: 2}}
"""
    )
    return directory


def arguments(source: Path, run_dir: Path, *overrides: object) -> list[str]:
    config = str(source / "run.yaml")
    return ["--config", config, "--train.run-dir", str(run_dir), *map(str, overrides)]


def launch(source: Path, run_dir: Path, *overrides: object) -> int:
    """A run in this process; its exit status."""
    return main(arguments(source, run_dir, *overrides))


def spawn(source: Path, run_dir: Path, *overrides: object, devices: int = 1) -> subprocess.Popen:
    """A run in a process of its own."""
    return _start(_command(source, run_dir, *overrides), devices, {})


def spawn_together(runs: list[tuple], *, devices: int = 1) -> list[subprocess.Popen]:
    """Processes of one run on loopback; one tuple `(source, run_dir, *overrides)` each."""
    return start_together([_command(*run) for run in runs], devices=devices)


def start_together(commands: list[list[str]], *, devices: int) -> list[subprocess.Popen]:
    """Commands that find each other through the environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(len(commands))}
    return [
        _start(command, devices, {**shared, "JAX_PROCESS_ID": str(index)})
        for index, command in enumerate(commands)
    ]


def _command(source: Path, run_dir: Path, *overrides: object) -> list[str]:
    return [sys.executable, "-m", "train.main", *arguments(source, run_dir, *overrides)]


def _start(command: list[str], devices: int, environment: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Status, stdout and stderr of each; none is left running."""
    deadline = time.monotonic() + _LONGEST
    try:
        texts = [p.communicate(timeout=deadline - time.monotonic()) for p in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *text) for p, text in zip(processes, texts, strict=True)]


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    """Returns once metrics.jsonl tells of this step, or the process has ended."""
    deadline = time.monotonic() + _LONGEST
    while process.poll() is None and time.monotonic() < deadline:
        if (run_dir / "metrics.jsonl").exists() and last_step(run_dir) >= step:
            return
        time.sleep(0.005)


def last_step(run_dir: Path) -> int:
    """The newest step in metrics.jsonl, -1 before the first; the last line may be half written."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    steps = [json.loads(line)["step"] for line in lines[-3:] if line.endswith("\n")]
    return max(steps, default=-1)


def metrics(run_dir: Path, held_out: bool = False) -> list[dict]:
    """The lines of metrics.jsonl about training, or those about the held-out rows."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get("held_out", False) == held_out]


def deterministic(rows: list[dict]) -> list[dict]:
    """What does not depend on the clock."""
    timed = {"tokens_per_second", "elapsed_seconds"}
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]
