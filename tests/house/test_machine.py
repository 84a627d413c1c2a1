"""Which devices JAX uses, and an accelerator whose plugin it passes over: found, said once, and with the remedy."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from tiny import tiny_model, tiny_tokenizer

from s2d_jax import machine
from s2d_jax.cli import command as cli
from s2d_jax.cli.loading import load_target
from s2d_jax.cli.options import LoadingOptions
from s2d_jax.machine import devices_in_use, unused_accelerator
from s2d_jax.weights.export import save_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def installed(monkeypatch):
    """Versions of packages that seem to be installed, and no others, on a machine that computes on its CPU."""
    versions = {"jax": "0.12.0", "jaxlib": "0.12.0"}

    def version(package):
        if package not in versions:
            raise metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(
        machine, "metadata", SimpleNamespace(**vars(metadata) | {"version": version})
    )
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    return versions


def test_a_machine_without_plugins_is_as_meant(installed):
    assert unused_accelerator() is None


@pytest.mark.parametrize(
    ("package", "version", "words"),
    [
        (
            *("jax-cuda13-plugin", "0.12.0"),
            "CUDA GPU; jax-cuda13-plugin 0.12.0 found no CUDA GPU: check its driver",
        ),
        ("jax-cuda13-plugin", "0.12.0.dev1", "found no CUDA GPU: check its driver"),
        (
            *("jax-cuda12-plugin", "0.10.2"),
            "does not fit jaxlib 0.12.0: pip install --upgrade 'jax[cuda12]==0.12.0'",
        ),
        ("libtpu", "0.0.42", "not on a TPU; libtpu 0.0.42 found no TPU: check its driver"),
    ],
)
def test_a_plugin_that_is_passed_over_is_told_with_the_remedy(installed, package, version, words):
    installed[package] = version
    reason = unused_accelerator()
    assert reason.startswith("JAX computes on the CPU, not on a ")
    assert words in reason
    assert "\n" not in reason


def test_nothing_is_said_where_the_accelerator_is_used_or_the_user_chose(installed, monkeypatch):
    installed["jax-cuda13-plugin"] = "0.12.0"
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        assert unused_accelerator() is None
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert unused_accelerator() is None


def test_devices_are_counted_by_kind(monkeypatch):
    assert devices_in_use().startswith(f"8 x CPU ({machine.cpu_name()}, ")
    gpu = SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3", platform="gpu")
    with monkeypatch.context() as patch:
        patch.setattr(jax, "devices", lambda: [gpu])
        assert devices_in_use() == "1 x NVIDIA H100 80GB HBM3 (gpu)"
        patch.setattr(jax, "process_count", lambda: 2)
        patch.setattr(jax, "local_device_count", lambda: 4)
        patch.setattr(jax, "devices", lambda: [gpu] * 8)
        assert devices_in_use().endswith("8 x NVIDIA H100 80GB HBM3 (gpu), 4 of them on this host")


def test_who_loads_models_says_it_once_on_stderr(installed, tmp_path, capsys):
    model = tiny_model(300, 1)
    save_model(tmp_path / "model", model.config, model.params, tiny_tokenizer(300))
    installed["jax-cuda13-plugin"] = "0.12.0"
    cli.say_devices.cache_clear()
    for _ in range(2):
        load_target(str(tmp_path / "model"), LoadingOptions())
    said = capsys.readouterr()
    devices, warning = said.err.splitlines()
    assert devices == f"devices: {devices_in_use()}"
    assert warning.startswith("warning: JAX computes on the CPU, not on a CUDA GPU; ")
    assert said.out == ""


# The platform that a table of chips gives is no question to JAX, and `platform.platform()` asks about the system.
ASKS = re.compile(r"default_backend\(|(?<!chip)\.platform\b(?!\()|platform_dependent")
MAY_ASK = {"s2d_jax/backends.py", "s2d_jax/machine.py"}


def test_one_module_says_what_each_backend_gets():
    sources = [p for name in ("s2d_jax", "infer", "train") for p in (ROOT / name).rglob("*.py")]
    asking = {str(p.relative_to(ROOT)) for p in sources if ASKS.search(p.read_text("utf-8"))}
    assert asking == MAY_ASK
