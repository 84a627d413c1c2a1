"""What decides how fast this machine computes: its CPU, and the devices that JAX uses."""

from __future__ import annotations

import collections
import os
import platform
import re
from importlib import metadata
from pathlib import Path

import jax

# The packages through which JAX reaches accelerators: what each is for, and the extra of `jax` that installs it.
_PLUGINS = {
    "jax-cuda13-plugin": ("CUDA GPU", "cuda13"),
    "jax-cuda12-plugin": ("CUDA GPU", "cuda12"),
    "libtpu": ("TPU", "tpu"),
}


def cpu_name() -> str:
    """The model of the CPU, as its maker calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def usable_cores() -> int:
    """How many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def memory_of_a_device() -> int:
    """Bytes that one device has for arrays: an accelerator's own memory, or all of this machine's for a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def device_kind() -> str:
    """What measured costs depend on. All CPUs call themselves "cpu" in JAX; theirs is the model's name and the cores in use."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{device.device_kind} x {jax.device_count()}"
    return f"{cpu_name()} x {usable_cores()}"


def devices_in_use() -> str:
    """The devices that JAX computes on, in a few words: `4 x NVIDIA H100 80GB HBM3 (gpu)`. Initialises JAX."""
    counted = collections.Counter((d.device_kind, d.platform) for d in jax.devices())
    named = []
    for (kind, platform_name), count in counted.items():
        cpu = platform_name == "cpu"
        what = f"CPU ({cpu_name()}, {usable_cores()} cores)" if cpu else f"{kind} ({platform_name})"
        named.append(f"{count} x {what}" if count > 1 or not cpu else what)
    here = "" if jax.process_count() == 1 else f", {jax.local_device_count()} of them on this host"
    return ", ".join(named) + here


def unused_accelerator() -> str | None:
    """Why JAX computes on the CPU although a plugin for an accelerator is installed, and the remedy; else None.

    Where JAX_PLATFORMS is set, the user has chosen the platform, and the result is None.
    """
    if jax.default_backend() != "cpu" or os.environ.get("JAX_PLATFORMS"):
        return None
    for package, (accelerator, extra) in _PLUGINS.items():
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        jaxlib = metadata.version("jaxlib")
        remedy = f"pip install --upgrade 'jax[{extra}]=={metadata.version('jax')}'"
        # JAX takes plugins for CUDA of its own version only; libtpu numbers its versions separately.
        if extra != "tpu" and _release(version) != _release(jaxlib):
            why = f"{package} {version} does not fit jaxlib {jaxlib}: {remedy}"
        else:
            why = (
                f"{package} {version} found no {accelerator}: check its driver, and that this process may see it; "
                "or set JAX_PLATFORMS=cpu"
            )
        return f"JAX computes on the CPU, not on a {accelerator}; {why}"
    return None


def device_notice() -> list[str]:
    """What a command says once: a line with the devices in use, and a warning if an accelerator is passed over."""
    lines = [f"devices: {devices_in_use()}"]
    if (reason := unused_accelerator()) is not None:
        lines.append(f"warning: {reason}")
    return lines


def _release(version: str) -> list[str]:
    """The numbers in a version: 0.10.2 for 0.10.2+cuda and for 0.10.2.dev1."""
    return re.findall(r"\d+", version.split("+")[0].split(".dev")[0])
