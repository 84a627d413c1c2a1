"""Several processes that work as one: how they find each other, and how they agree.

Process 0 is the main process: it alone writes files, apart from checkpoints, which all write together.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # its client has no public name; Orbax takes it from here too
from jax.experimental import multihost_utils

from s2d_jax.errors import UserError

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# The main process may tokenize for hours while the others wait.
_LONGEST_WAIT_MS = 24 * 3600 * 1000
_GOOGLE_PCI_VENDOR = "0x1ae0"
SECONDS_TO_MEET = 300  # as JAX has it


def start_processes(
    environment: Mapping[str, str] = os.environ, *, preemption: bool = False
) -> None:
    """Joins the other processes of this run, if the environment names any. Call it before anything is computed.

    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID are used where they are set.
    Without them the hosts of a TPU pod find each other; any other machine runs one process.

    Args:
        environment: the variables.
        preemption: let JAX catch SIGTERM, for runs that ask `multihost_utils.reached_preemption_sync_point`; else it ends a
            process as usual.

    Raises:
        UserError: if only some of the variables are set, their values make no sense, or nobody can listen there.
    """
    jax.config.update("jax_enable_preemption_service", preemption)
    if (place := where_to_meet(environment)) is None:
        return
    named = _named(environment)
    if named is not None and named[2] == 0:
        _check_free(named[0])
    try:
        jax.distributed.initialize(
            *named or (None, None, None), initialization_timeout=SECONDS_TO_MEET
        )
    except RuntimeError as error:  # a pod's first host that has no address, too
        words = " ".join(str(error).split())[:160]
        raise UserError(
            f"the processes cannot meet at {place} ({words}); start all where it can be reached"
        ) from error


def _check_free(address: str) -> None:
    """Raises UserError if something listens at the port already: JAX would end without a word."""
    try:
        socket.create_server(("", int(address.rpartition(":")[2]))).close()
    except OSError as error:
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS={address} is taken on this machine; give a port that is free"
        ) from error


def where_to_meet(environment: Mapping[str, str] = os.environ) -> str | None:
    """Where the processes of this run find each other, in a few words; None without variables that say it, and without a TPU.

    Raises:
        UserError: as `start_processes` does.
    """
    if named := _named(environment):
        return f"JAX_COORDINATOR_ADDRESS={named[0]}"
    return "the first host of this TPU pod" if _is_pod_host(environment) else None


def _named(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """Address, number of processes, and index of this one; None if the variables name none."""
    given = {name: environment[name] for name in _VARIABLES if environment.get(name)}
    if not given:
        return None
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


def number_of_processes() -> int:
    """How many work together; as this and the next two functions tell it, no backend is started to know it."""
    return distributed.global_state.num_processes or 1


def process_number() -> int:
    """Which of them this is, from 0."""
    return distributed.global_state.process_id or 0


def is_main_process() -> bool:
    """Whether this process writes the run's files."""
    return process_number() == 0


def coordination() -> Any:
    """The client of JAX's coordination service; None where one process works alone."""
    return distributed.global_state.client


def wait_for_all(point: str) -> None:
    """Returns once every process has called it with the same `point`; each name may be used once."""
    if number_of_processes() > 1:
        coordination().wait_at_barrier(f"s2d/{point}", _LONGEST_WAIT_MS)


def text_of_main_process(name: str, text: str) -> str:
    """Gives every process the main process's text, without their devices; each name may be used once."""
    if number_of_processes() == 1:
        return text
    if is_main_process():
        coordination().key_value_set(f"s2d/{name}", text)
        return text
    return coordination().blocking_key_value_get(f"s2d/{name}", _LONGEST_WAIT_MS)


def of_main_process(value: float) -> float:
    """Gives every process the main process's value of a number, such as a reading of its clock."""
    if jax.process_count() == 1:
        return value
    return float(np.frombuffer(_sent(np.float64(value).tobytes()), np.float64)[0])


def bytes_of_main_process(data: bytes) -> bytes:
    """Gives every process the main process's bytes; what the others give counts nothing."""
    if jax.process_count() == 1:
        return data
    length = int(of_main_process(float(len(data))))
    return _sent(data[:length].ljust(length, b"\0"))


def _sent(data: bytes) -> bytes:
    """The main process's bytes, of a length that all know. They go as int32, since doubles would become floats on the way."""
    words = np.frombuffer(data.ljust(-(-len(data) // 4) * 4, b"\0"), np.int32)
    return np.asarray(multihost_utils.broadcast_one_to_all(words)).tobytes()[: len(data)]
