"""How every command begins and ends: it parses flags, names the devices in use, and reports a user's mistake on one line."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

from s2d_jax.cli.parsing import parse
from s2d_jax.cli.screen import screen
from s2d_jax.errors import UserError, visible
from s2d_jax.progress.activity import activity, show_lines_without_terminal

Args = TypeVar("Args")
# What is true after Ctrl-C of most commands.
NOTHING_LEFT = "nothing half-written was left"


def run_command_line(args_type: type[Args], run: Callable[[Args], None]) -> None:
    """Parses `sys.argv` into `args_type` and runs; after a user's mistake, prints one line and exits with status 2."""
    if status := status_of(lambda: run(parse(args_type))):
        sys.exit(status)


def status_of(work: Callable[[], object], interrupted: str = NOTHING_LEFT) -> int:
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
    return 2, f"error: {visible(' '.join(str(error).split()))}{remedy}"


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Wraps the imports of JAX and what uses it. They take a second or two, so flags are read before."""
    with activity("starting", key="starting", guess=2.0, quiet=0.0):
        yield
    import jax

    # Whatever the environment says: nothing here needs 64 bits.
    jax.config.update("jax_enable_x64", False)


@functools.cache
def say_devices() -> None:
    """Says once, on stderr, which devices JAX uses; and warns if it passes over an accelerator whose plugin is installed."""
    from s2d_jax.machine import device_notice  # imports JAX

    for line in device_notice():
        screen(stderr=True).print(line, soft_wrap=True)


@functools.cache
def say_once(line: str) -> None:
    """Says on stderr what a user should know about what was given; nothing if it was said before."""
    screen(stderr=True).print(f"note: {line}", soft_wrap=True)
