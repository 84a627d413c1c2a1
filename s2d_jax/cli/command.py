"""How every command begins and ends: it parses flags, names the devices in use, and reports a user's mistake on one line."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from s2d_jax.cli.parsing import parse
from s2d_jax.cli.screen import screen
from s2d_jax.errors import UserError
from s2d_jax.progress.activity import activity, show_lines_without_terminal

Args = TypeVar("Args")


def run_command_line(args_type: type[Args], run: Callable[[Args], None]) -> None:
    """Parses `sys.argv` into `args_type` and runs; after a user's mistake, prints one line and exits with status 2."""
    if status := status_of(lambda: run(parse(args_type))):
        sys.exit(status)


def status_of(
    work: Callable[[], object], interrupted: str = "nothing half-written was left"
) -> int:
    """Does the work of a command; returns its exit status. A user's mistake is one line on stderr."""
    show_lines_without_terminal()
    try:
        work()
    except (UserError, OSError, KeyboardInterrupt) as error:
        status, message = told(error, interrupted)
        print(message, file=sys.stderr)
        return status
    return 0


def told(error: BaseException, interrupted: str) -> tuple[int, str]:
    """The exit status and the line for a `UserError`, an `OSError` or a `KeyboardInterrupt`.

    Args:
        error: what ended the command.
        interrupted: what the line says after Ctrl-C.
    """
    if isinstance(error, KeyboardInterrupt):
        return 130, f"interrupted; {interrupted}"
    remedy = "; check the path, its permissions and the disk" if isinstance(error, OSError) else ""
    return 2, f"error: {' '.join(str(error).split())}{remedy}"


def check_writable(path: Path) -> None:
    """Raises UserError if no file can be written at `path`, so that it is known before hours of work."""
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir():
        raise UserError(f"{path} cannot be written: {existing} is a file; choose another --out")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{path} cannot be written: no permission in {existing}")
    if path.is_dir():
        raise UserError(f"{path} is a directory; give the name of a file")


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Wraps the imports of JAX and what uses it. They take a second or two, so flags are read before."""
    with activity("starting", key="starting", guess=2.0, quiet=0.0):
        yield


def say_notices(lines: Iterable[str]) -> None:
    """Says on stderr what the library noticed about a model, such as a choice among its files."""
    for line in lines:
        screen(stderr=True).print(f"note: {line}", markup=False, soft_wrap=True)


@functools.cache
def say_devices() -> None:
    """Says once, on stderr, which devices JAX uses; and warns if it passes over an accelerator whose plugin is installed."""
    from s2d_jax.machine import device_notice  # imports JAX

    for line in device_notice():
        screen(stderr=True).print(line, markup=False, soft_wrap=True)
