"""Chips that this machine lacks, known to their compilers only: programs for them are compiled here, and run elsewhere."""

from __future__ import annotations

import importlib.util
import os

import jax

from s2d_jax.compilers.chips import chip_named
from s2d_jax.errors import UserError

# What libtpu would ask the machine; any values will do. Several processes may compile at a time, since none takes a chip.
_NO_TPU_HERE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
# Kernels cannot be timed here, so the compiler takes those that it estimates to be the fastest.
_NO_GPU_HERE = "--xla_gpu_autotune_level=0"
_MOST_SLICES, _MOST_GPUS, _GPUS_PER_HOST = 1024, 1024, 8
_MOST_CPU_DEVICES = 512

# An H100 SXM5 as XLA describes chips to itself. Without a driver and a runtime of 12.9, loops stay out of command buffers.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  clock_rate_ghz: 1.98
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 85028765696
  driver_version: "12.9.0"
  runtime_version: "12.9.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def topology_devices(topology: str, slices: int = 1) -> list:
    """Chips that exist only for the compiler.

    Args:
        topology: such as "v5p:2x2x2" for 8 chips of a TPU, or "h100:8" for 8 GPUs.
        slices: how many such TPU slices, with a slower network between them.

    Raises:
        UserError: without the chip's compiler, for a topology that it does not know, or an impossible number of slices.
    """
    if not 1 <= slices <= _MOST_SLICES:
        raise UserError(f"--slices {slices} must be 1 to {_MOST_SLICES}")
    name, _, size = topology.partition(":")
    chip = chip_named(name)
    if chip is None or chip.platform == "tpu":
        return _tpu_devices(topology, slices)
    if slices > 1:
        raise UserError(
            f"--slices {slices} is for TPUs; give the number of GPUs, such as --topology h100:16"
        )
    return _gpu_devices(topology, size or "1")


def _tpu_devices(topology: str, slices: int) -> list:
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology {topology} needs libtpu: pip install 's2d-jax[compilers]', or compile for fake CPU devices"
        )
    for name, value in _NO_TPU_HERE.items():
        os.environ.setdefault(name, value)
    more = {"num_slices": slices} if slices > 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices
    except Exception as error:
        words = " ".join(str(error).split())[:160]
        raise UserError(
            f"--topology {topology} is not known to libtpu ({words}); give one such as v5p:2x2x2, or h100:8"
        ) from None


def _gpu_devices(topology: str, size: str) -> list:
    from jax.experimental import topologies

    if not topology.startswith("h100"):
        raise UserError(f"--topology {topology}: of GPUs, only h100 is described here; give h100:8")
    if not size.isdigit() or not 1 <= int(size) <= _MOST_GPUS:
        raise UserError(f"--topology {topology}: give a number of GPUs from 1 to {_MOST_GPUS}")
    if importlib.util.find_spec("jax_plugins.xla_cuda12") is None:
        raise UserError(
            f"--topology {topology} needs XLA's compiler for CUDA: pip install 's2d-jax[compilers]'"
        )
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_autotune_level" not in flags:  # read when the compiler is loaded
        os.environ["XLA_FLAGS"] = f"{flags} {_NO_GPU_HERE}".strip()
    hosts = -(-int(size) // _GPUS_PER_HOST)
    if hosts > 1 and int(size) % _GPUS_PER_HOST:
        raise UserError(
            f"--topology {topology}: more than {_GPUS_PER_HOST} GPUs must be whole hosts of {_GPUS_PER_HOST}"
        )
    shape = f"1x{hosts}x{int(size) // hosts}"
    try:
        return topologies.get_topology_desc(
            platform="cuda", target_config=_H100, topology=shape
        ).devices
    except jax.errors.JaxRuntimeError as error:
        words = " ".join(str(error).split())[:160]
        raise UserError(
            f"--topology {topology} cannot be compiled for ({words}); set JAX_PLATFORMS=cpu"
        ) from None


def check_cpu_devices(count: int) -> None:
    """Raises UserError for more fake devices than a CPU can stand in for."""
    if count > _MOST_CPU_DEVICES:
        raise UserError(
            f"{count} devices are more than a CPU can stand in for ({_MOST_CPU_DEVICES}); give --topology"
        )
