"""Runs one command on machines of a Ray cluster, as the processes of one run: for training, or a target over several hosts.

    python docs/launch/ray_processes.py --hosts 4 --resources TPU=4 -- -m train.main --config FILE --train.run-dir runs/soft

Each process gets JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. What they print is shown, and the exit status
is that of the first one that failed. A model that fits on one machine needs none of this: see `infer.generate --ray`.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from typing import Any

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


class Host:
    """A process of the run."""

    def address(self) -> str:
        """This machine, and a port that is free now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def run(self, command: list[str], folder: str, variables: dict[str, str]) -> int:
        """Runs `python` with these arguments in this folder; its exit status."""
        environment = {**os.environ, **variables}
        return subprocess.run([sys.executable, *command], cwd=folder, env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--address", default="auto", help="of the cluster; auto is the one of this machine"
    )
    parser.add_argument("--hosts", type=int, required=True, help="how many processes")
    parser.add_argument(
        "--resources", default="CPU=1", help="what each process asks for, such as TPU=4 or GPU=8"
    )
    parser.add_argument("command", nargs="+", help="arguments of python, after --")
    args = parser.parse_args()
    amounts: dict[str, Any] = {"CPU": 1.0}
    for part in args.resources.split(","):
        name, _, amount = part.partition("=")
        if not name or not amount.replace(".", "", 1).isdigit():
            parser.error(f"--resources {args.resources} is no list of amounts; write it like TPU=4")
        amounts[name] = float(amount)
    ray.init(address=args.address)
    group = placement_group([amounts] * args.hosts, strategy="SPREAD")
    ready = group.ready()
    if not ray.wait([ready], timeout=10)[0]:  # a cluster may grow, so it is no error
        free = ray.available_resources()
        asked = ",".join(f"{name}={amount:g}" for name, amount in amounts.items())
        has = ",".join(f"{name}={free.get(name, 0):g}" for name in amounts)
        print(f"waiting for {args.hosts} times {asked}; {has} are free", file=sys.stderr)
    ray.get(ready)
    named = {name: amount for name, amount in amounts.items() if name not in ("CPU", "GPU")}
    hosts = [
        ray.remote(Host).options(
            num_cpus=amounts["CPU"],
            num_gpus=amounts.get("GPU", 0),
            resources=named,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, index),
        ).remote()
        for index in range(args.hosts)
    ]  # fmt: skip
    shared = {
        "JAX_COORDINATOR_ADDRESS": ray.get(hosts[0].address.remote()),
        "JAX_NUM_PROCESSES": str(args.hosts),
    }
    running = [
        host.run.remote(args.command, os.getcwd(), {**shared, "JAX_PROCESS_ID": str(index)})
        for index, host in enumerate(hosts)
    ]
    numbers, first_failure = {call: index for index, call in enumerate(running)}, 0
    while running:  # one that fails ends the others, each with a line
        (ended, *_), running = ray.wait(running)
        try:
            status = ray.get(ended)
        except ray.exceptions.RayActorError:  # its machine is lost, or Ray's worker on it
            print(f"error: process {numbers[ended]} is lost; start all again", file=sys.stderr)
            status = 1
        first_failure = first_failure or status
    return first_failure


if __name__ == "__main__":
    sys.exit(main())
