"""What a measurement ran on."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import flax
import jax

from s2d_jax.backends import platform_of
from s2d_jax.machine import cpu_name, usable_cores
from s2d_jax.version import __version__


def environment(dtype: str) -> dict[str, Any]:
    """Machine, versions, dtype of activations, and the commit of the code if it is in a git work tree."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": usable_cores(),
        "backend": platform_of(None),
        "devices": [device.device_kind for device in jax.devices()],
        "dtype": dtype,
        **versions(),
        "system": platform.platform(),
        "commit": _commit(),
    }


def versions() -> dict[str, str]:
    """The versions of s2d-jax and of the packages that it computes with."""
    return {
        "s2d_jax": __version__,
        "jax": jax.__version__,
        "jaxlib": metadata.version("jaxlib"),
        "flax": flax.__version__,
        "python": platform.python_version(),
    }


def _commit() -> str | None:
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
