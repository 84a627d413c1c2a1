"""Chips that this machine lacks, for tests that only compile for them."""

from __future__ import annotations

import pytest

from s2d_jax.compilers.topologies import topology_devices


def chips(topology: str) -> list:
    """The devices of "v5p:2x2x2", "h100:8" and so on; skips the test where their compiler is not installed."""
    module = "jax_plugins.xla_cuda12" if topology.startswith("h100") else "libtpu"
    pytest.importorskip(module, reason=f"install s2d-jax[compilers] to compile for {topology}")
    return topology_devices(topology)
