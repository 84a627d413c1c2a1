"""Runs of several processes: how they find each other, agree, and end together.

Process 0 is the main process: it alone writes the run's files, apart from checkpoints, which all write together.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # its client has no public name; Orbax takes it from here too
from jax.experimental import multihost_utils

from s2d_jax.errors import UserError

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_FAILURE = "s2d/failure"
_SECONDS_BETWEEN_LOOKS = 1.0
# The main process may tokenize for hours while the others wait.
_LONGEST_WAIT_MS = 24 * 3600 * 1000
_GOOGLE_PCI_VENDOR = "0x1ae0"


def start_processes(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes of this run, if the environment names any. Call it before anything is computed.

    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID are used where they are set.
    Without them the hosts of a TPU pod find each other; any other machine runs one process.

    Raises:
        UserError: if only some of the variables are set, or their values make no sense.
    """
    given = {name: environment[name] for name in _VARIABLES if environment.get(name)}
    if given:
        jax.distributed.initialize(*_parsed(given))
    elif _is_pod_host(environment):
        jax.distributed.initialize()


def _parsed(given: dict[str, str]) -> tuple[str, int, int]:
    """Address, number of processes, and index of this one."""
    if missing := [name for name in _VARIABLES if name not in given]:
        raise UserError(
            f"{', '.join(given)} is set but {', '.join(missing)} is not; set all three, or none for a single process"
        )
    address, count, index = (given[name] for name in _VARIABLES)
    if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdigit():
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address!r} must be host:port of process 0")
    if not count.isdigit() or int(count) < 1:
        raise UserError(f"JAX_NUM_PROCESSES={count!r} must be a whole number of at least 1")
    if not index.isdigit() or int(index) >= int(count):
        raise UserError(
            f"JAX_PROCESS_ID={index!r} must be a whole number from 0 to {int(count) - 1}, one for each process"
        )
    return address, int(count), int(index)


def _is_pod_host(environment: Mapping[str, str]) -> bool:
    """Whether TPU chips are attached to this machine, unless JAX is told to compute elsewhere."""
    if "tpu" not in environment.get("JAX_PLATFORMS", "tpu"):
        return False
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(path.read_text().strip() == _GOOGLE_PCI_VENDOR for path in vendors)


def is_main_process() -> bool:
    """Whether this process writes the run's files."""
    return jax.process_index() == 0


def _client() -> Any:
    """The client of JAX's coordination service, in a run of several processes."""
    return distributed.global_state.client


def wait_for_all(point: str) -> None:
    """Returns once every process has called it with the same `point`; each name may be used once."""
    if jax.process_count() > 1:
        _client().wait_at_barrier(f"s2d/{point}", _LONGEST_WAIT_MS)


def of_main_process(value: float) -> float:
    """Gives every process the main process's value of a number, such as a reading of its clock."""
    if jax.process_count() == 1:
        return value
    # Doubles would become floats on the way.
    halves = np.frombuffer(np.float64(value).tobytes(), np.int32)
    halves = np.asarray(multihost_utils.broadcast_one_to_all(halves))
    return float(np.frombuffer(halves.tobytes(), np.float64)[0])


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """A failure inside the block ends all processes of the run, which might otherwise wait for the failed one.

    Each prints why, on one line, and exits with the status of the one that failed first.
    """
    if jax.process_count() == 1:
        yield
        return
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(over,), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def end_all(status: int, message: str) -> None:
    """Tells the other processes of the run, if there are any, and ends this one without waiting for them."""
    client = distributed.global_state.client
    if client is None:
        return
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first, or process 0 is gone
        client.key_value_set(_FAILURE, f"{status} process {jax.process_index()}: {message}")
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main_process():
        time.sleep(2 * _SECONDS_BETWEEN_LOOKS)  # the others read the message from this process
    os._exit(status)


def _watch(over: threading.Event) -> None:
    """Ends this process once another has failed."""
    client = _client()
    while not over.wait(_SECONDS_BETWEEN_LOOKS):
        try:
            status, _, message = client.key_value_try_get(_FAILURE).partition(" ")
        except jax.errors.JaxRuntimeError:  # nobody failed
            continue
        if over.is_set():
            return
        print(f"error: {message}", file=sys.stderr, flush=True)
        if is_main_process():
            time.sleep(2 * _SECONDS_BETWEEN_LOOKS)
        os._exit(int(status))
