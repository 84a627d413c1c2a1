"""What the command lines of `infer` share: parsing, one-line errors, the screen and its progress bars."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from s2d_jax.config import UserError
from s2d_jax.machine import device_notice

Args = TypeVar("Args")
_SECONDS_BETWEEN_LINES = 10.0


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


def screen(*, stderr: bool = False) -> Console:
    """A console of at most 100 columns, and of exactly 100 where there is no terminal."""
    console = Console(stderr=stderr, highlight=False)
    width = min(100, console.width) if console.is_terminal else 100
    return Console(stderr=stderr, highlight=False, width=width)


class CountingBar(Progress):
    """A progress bar on stderr; where that is no terminal, a line now and then."""

    _last_line = 0.0

    def update(self, task_id: TaskID, **fields: Any) -> None:
        super().update(task_id, **fields)
        now = time.perf_counter()
        if self.console.is_terminal or now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        task = next(task for task in self.tasks if task.id == task_id)
        left = "" if task.time_remaining is None else f", about {task.time_remaining:,.0f} s left"
        line = f"{task.description} {task.completed:.0f} of {task.total:.0f}{left}"
        self.console.print(line, markup=False, soft_wrap=True)


def counting_bar(*shown: ProgressColumn) -> Progress:
    """A progress bar on stderr that counts, with further columns behind it."""
    return CountingBar(
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *shown),
        console=screen(stderr=True),
        speed_estimate_period=600.0,  # seconds; one answer of a large model takes minutes
    )


def eta() -> tuple[TextColumn, TimeRemainingColumn]:
    """Columns of a `counting_bar` that show the time left."""
    return TextColumn("ETA"), TimeRemainingColumn()
