"""Chips that this machine lacks, to compile programs for ahead of time."""

from __future__ import annotations

import importlib.util
import os

from s2d_jax.errors import UserError

# What libtpu would ask the machine; any values will do. Several processes may compile at a time, since none takes a chip.
_NO_TPU_HERE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}

_MOST_SLICES, _MOST_CPU_DEVICES = 1024, 512


def tpu_devices(topology: str, slices: int = 1) -> list:
    """Chips that exist only for the compiler.

    Args:
        topology: such as "v5p:2x2x2" for 8 chips.
        slices: how many such slices, with a slower network between them.

    Raises:
        UserError: without libtpu, for a topology that it does not know, or an impossible number of slices.
    """
    from jax.experimental import topologies

    if not 1 <= slices <= _MOST_SLICES:
        raise UserError(f"--slices {slices} must be 1 to {_MOST_SLICES}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology {topology} needs libtpu: pip install 'jax[tpu]', or compile for fake CPU devices"
        )
    for name, value in _NO_TPU_HERE.items():
        os.environ.setdefault(name, value)
    more = {"num_slices": slices} if slices > 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices
    except Exception as error:
        words = " ".join(str(error).split())[:160]
        raise UserError(
            f"--topology {topology} is not known to libtpu ({words}); give one such as v5p:2x2x2"
        ) from None


def check_cpu_devices(count: int) -> None:
    """Raises UserError for more fake devices than a CPU can stand in for."""
    if count > _MOST_CPU_DEVICES:
        raise UserError(
            f"{count} devices are more than a CPU can stand in for ({_MOST_CPU_DEVICES}); give --topology"
        )
