"""The launch scripts of docs/launch: each starts two processes on this machine, with stand-ins for what a cluster brings."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from infer_tiny import save_tiny_models

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "docs" / "launch"
# What Slurm has of two machines.
SCONTROL = '#!/bin/bash\n[ "$1 $2" = "show hostnames" ] && printf "127.0.0.1\\nelsewhere\\n"\n'
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=0 "$@" & first=$!
SLURM_PROCID=1 "$@" & second=$!
wait $first && wait $second
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def talks(tmp_path):
    path = tmp_path / "talks.jsonl"
    rows = [{"turns": [text]} for text in ("one two", "three", "four five six")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def environment(**more):
    own = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}  # fmt: skip
    path = f"{Path(sys.executable).parent}:{own['PATH']}"
    return {**own, "PATH": path, **more}


def regenerate(models, talks, out):
    flags = ("--as-conversations", "--target", models.small, "--prompts", talks, "--out", out)
    return ["infer.generate", *map(str, flags), "--max-new-tokens", "6", "--batch-size", "2"]


def check(done, out):
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert len(out.read_text().splitlines()) == 3
    assert "3 conversations written to" in done.stdout


@pytest.mark.exhaustive("two processes; those of other tests find each other in the same way")
def test_slurm(models, talks, tmp_path):
    for name, text in {"scontrol": SCONTROL, "srun": SRUN}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    given = environment(SLURM_JOB_NODELIST="n[1-2]", SLURM_NTASKS="2", PORT=free_port())
    given["PATH"] = f"{tmp_path}:{given['PATH']}"
    out = tmp_path / "answers.jsonl"
    command = ["bash", str(LAUNCH / "slurm.sbatch"), *regenerate(models, talks, out)]
    check(
        subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=200),
        out,
    )


def jobset():
    """The pod of jobset.yaml, and how many of them there are."""
    described = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    (hosts,) = described["spec"]["replicatedJobs"]
    job = hosts["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    (container,) = job["template"]["spec"]["containers"]
    return described, hosts, job, container


def test_a_jobset_names_its_first_pod_and_counts_its_pods():
    described, hosts, job, container = jobset()
    variables = {each["name"]: each for each in container["env"]}
    assert set(variables) == {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"}
    name = described["metadata"]["name"]
    port = container["ports"][0]["containerPort"]
    assert (
        variables["JAX_COORDINATOR_ADDRESS"]["value"] == f"{name}-{hosts['name']}-0-0.{name}:{port}"
    )
    assert variables["JAX_NUM_PROCESSES"]["value"] == str(job["completions"])


@pytest.mark.exhaustive("two processes; those of other tests find each other in the same way")
def test_the_command_of_a_jobset(models, talks, tmp_path):
    *_, container = jobset()
    out = tmp_path / "answers.jsonl"
    text = container["args"][0]
    for name, path in {"DIR": models.small, "CONVERSATIONS": talks, "ANSWERS.jsonl": out}.items():
        text = text.replace(f" {name}", f" {path}")
    text = text.replace("--out", "--max-new-tokens 6 --out")
    address = f"127.0.0.1:{free_port()}"
    pods = [
        subprocess.Popen(
            [*container["command"], text],
            cwd=ROOT,
            env=environment(
                JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(index)
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    ends = [pod.communicate(timeout=200) for pod in pods]
    check(subprocess.CompletedProcess([], pods[0].returncode, *ends[0]), out)


@pytest.mark.exhaustive("starts a Ray cluster")
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 's2d-jax[ray]'")  # fmt: skip
def test_processes_on_a_ray_cluster(models, talks, tmp_path):
    out = tmp_path / "answers.jsonl"
    command = [sys.executable, str(LAUNCH / "ray_processes.py"), "--address", "local", "--hosts", "2"]  # fmt: skip
    module, *flags = regenerate(models, talks, out)

    def launched():
        return subprocess.run(
            [*command, "--", "-m", module, *flags],
            cwd=ROOT,
            env=environment(RAY_AUTH_MODE="disabled"),
            capture_output=True,
            text=True,
            timeout=300,
        )

    check(launched(), out)
    again = launched()
    assert again.returncode == 2
    assert "is there already; choose another --out" in again.stdout + again.stderr
