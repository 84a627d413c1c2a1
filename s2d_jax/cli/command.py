"""What the command lines of `infer` share: parsing, one-line errors, the screen and its progress bars."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import tyro

from s2d_jax.cli.screen import screen
from s2d_jax.errors import UserError
from s2d_jax.machine import device_notice

Args = TypeVar("Args")


def run_command_line(args_type: type[Args], run: Callable[[Args], None]) -> None:
    """Parses `sys.argv` into `args_type` and runs; a user's mistake exits 2 with one line."""
    try:
        run(_parse(args_type))
    except UserError as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(f"{error}; check the path, its permissions and the disk", 2)
    except KeyboardInterrupt:
        _fail("interrupted; nothing half-written was left", 130)


def _parse(args_type: type[Args]) -> Args:
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            config = (tyro.conf.FlagCreatePairsOff,)
            return tyro.cli(args_type, prog=_program(), config=config)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(f"{_unboxed(message.getvalue())}; --help lists the flags") from None


def _program() -> str | None:
    """What the user typed, where it was `python -m MODULE`; tyro would show the path of the file."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else None


def _unboxed(box: str) -> str:
    """The first paragraph inside the box that tyro draws around a mistake."""
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()[1:]]
    paragraph = "\n".join(lines).split("─" * 10)[0]
    return " ".join(paragraph.split())


def _fail(message: str, status: int) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def check_writable(path: Path) -> None:
    """Raises UserError if no file could be written at `path`: better before hours of work than after them."""
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir():
        raise UserError(f"{path} cannot be written: {existing} is a file; choose another --out")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{path} cannot be written: no permission in {existing}")
    if path.is_dir():
        raise UserError(f"{path} is a directory; give the name of a file")


@functools.cache
def say_devices() -> None:
    """Says once, on stderr, which devices JAX uses; and warns if it passes over an accelerator whose plugin is installed."""
    for line in device_notice():
        screen(stderr=True).print(line, markup=False, soft_wrap=True)
