"""The package as users get it: a wheel in an environment of its own, far from the repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from infer_tiny import save_tiny_models

from s2d_jax.version import __version__

ROOT = Path(__file__).parents[2]


def _run(command, **options) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    # A copy, since setuptools writes beside what it builds.
    ignored = shutil.ignore_patterns(".*", "runs", "models", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored, symlinks=True)
    _run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", directory, source])
    (built,) = directory.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The `bin` directory of an environment that has the wheel, and what it depends on from here."""
    directory = tmp_path_factory.mktemp("installed") / "env"
    _run([sys.executable, "-m", "venv", "--without-pip", directory])
    python = directory / "bin" / "python"
    _run([sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel])
    # A path in a .pth file: its own .pth files, such as that of an editable install, are not read.
    (packages,) = (directory / "lib").glob("*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return directory / "bin"


def test_the_wheel_holds_configs_prompts_and_types(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {
        f"s2d_jax/shipped/configs/{path.relative_to(ROOT / 'configs')}"
        for path in (ROOT / "configs").rglob("*")
        if path.is_file()
    }
    assert len(shipped) >= 6
    assert shipped <= names
    assert {"s2d_jax/py.typed", "train/py.typed", "infer/py.typed"} <= names
    assert "s2d_jax/__init__.pyi" in names
    assert not any(name.startswith(("tests/", "docs/")) for name in names)


@pytest.mark.exhaustive(
    "half a minute of processes; what the wheel holds and each script calls is tested always"
)
def test_the_scripts_work_anywhere(installed, tmp_path):
    # Modules of the user's that have the names of ours.
    for name in ("train", "infer"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    models = save_tiny_models(tmp_path / "models")
    version = _run([installed / "s2d-generate", "--version"], cwd=tmp_path)
    assert f"s2d_jax {__version__}" in version
    assert "usage: s2d-train" in _run([installed / "s2d-train", "--help"], cwd=tmp_path)
    flags = (
        "--prompts",
        "configs/demo_prompts_eval.jsonl",
        "--max-new-tokens",
        2,
        "--out",
        "out.jsonl",
    )
    _run([installed / "s2d-generate", "--target", models.small, "--raw", *flags], cwd=tmp_path)
    asked = (ROOT / "configs" / "demo_prompts_eval.jsonl").read_text(encoding="utf-8")
    answered = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    assert len(answered.splitlines()) == len(asked.splitlines())


def test_every_script_has_its_command(installed):
    scripts = {path.name for path in installed.glob("s2d-*")}
    asked = {"train", "generate", "bench", "calibrate", "trim", "export", "plan"}
    assert {f"s2d-{name}" for name in asked} <= scripts
    check = (
        "import sys; from importlib.metadata import entry_points\n"
        "found = [e for e in entry_points(group='console_scripts') if e.name.startswith('s2d-')]\n"
        "for each in found: each.load()\n"
        "print(len(found), sys.modules['train'].__file__, sys.modules['s2d_jax'].__version__)"
    )
    count, train, version = _run([installed / "python", "-c", check], cwd=installed.parent).split()
    assert int(count) == len(scripts)
    assert Path(train).is_relative_to(installed.parent)
    assert version == __version__
