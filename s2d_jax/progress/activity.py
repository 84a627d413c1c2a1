"""Activities: `with activity("compiling the decoding loop", expected=9.0):` shows what goes on, if anybody can see it."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from typing import Literal

from s2d_jax.errors import UserError, visible
from s2d_jax.progress import durations
from s2d_jax.progress.displays import Lines, Notebook, Terminal, in_notebook, in_terminal
from s2d_jax.progress.state import Activity, Board, Display

Mode = Literal["auto", "lines", "off"]
MODE_VARIABLE = "S2D_PROGRESS"
_MODES = ("auto", "lines", "off")
# Shorter durations are mostly set-up, so they say nothing about longer ones.
_SHORTEST_REMEMBERED = 0.2


@dataclasses.dataclass
class _Chosen:
    mode: Mode = "auto"


_CHOSEN = _Chosen()
_LINES = Lines()
_beside_text: contextvars.ContextVar[bool] = contextvars.ContextVar("beside_text", default=False)
BOARD = Board()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=BOARD.reset)


def show_progress(mode: Mode = "auto") -> None:
    """Chooses how loading, compiling and prefill show what they do. The environment variable S2D_PROGRESS overrides it.

    Args:
        mode: "auto" shows a bar in a terminal (stderr) and in a notebook, and nothing elsewhere; "lines" writes plain lines to
            stderr, for logs; "off" shows nothing.

    Raises:
        UserError: for another mode.
    """
    _CHOSEN.mode = _checked(mode, "mode")


def show_lines_without_terminal() -> None:
    """Shows a bar in a terminal and lines in a log; a command calls this once, before it loads anything."""
    show_progress("auto" if in_terminal() else "lines")


def is_shown() -> bool:
    """Whether an activity would be shown, were it long enough."""
    return _display() is not None


@contextlib.contextmanager
def activity(
    text: str,
    *,
    total: float | None = None,
    unit: str = "",
    key: str = "",
    expected: float | None = None,
    guess: float | None = None,
    quiet: float = 0.3,
) -> Iterator[Activity]:
    """Shows what goes on inside the block, if it takes long enough.

    Args:
        text: what it is, such as "compiling the decoding loop". It may hold names that a user wrote.
        total: how much there is to do; the block calls `advance` of the yielded activity as it goes.
        unit: "B" shows bytes; otherwise amounts are not shown.
        key: its seconds (with a total: its amounts per second) are remembered and looked up under this key; "" for neither.
        expected: seconds that it should take; None takes what is remembered under `key`.
        guess: seconds to expect the first time, when nothing is remembered.
        quiet: seconds until it is shown in a terminal, if it is not known to take long.
    """
    mode, display = _mode(), _display()
    seconds = guess if display is None else _expected(expected, key, total)
    first_time = seconds is None and guess is not None
    told = Activity(
        text=visible(text),
        total=total,
        unit=unit,
        expected=guess if first_time else seconds,
        first_time=first_time,
        quiet=quiet,
        beside_text=_beside_text.get(),
        key=key,
        started=BOARD.clock(),
    )
    started = time.perf_counter()
    try:
        if display is not None:
            BOARD.begin(told, display)
        yield told
    finally:
        spent = time.perf_counter() - started
        if display is not None:
            BOARD.end(told)
    if told.key and mode != "off" and spent >= _SHORTEST_REMEMBERED:
        durations.remember(told.key, spent if total is None else total / spent)


@contextlib.contextmanager
def text_is_written() -> Iterator[None]:
    """Shows no bar in a terminal while text is written there: the bar would wipe the text's last line away."""
    token = _beside_text.set(True)
    try:
        yield
    finally:
        _beside_text.reset(token)


def _expected(given: float | None, key: str, total: float | None) -> float | None:
    if given is not None or not key:
        return given
    found = durations.known(key)
    return found if found is None or total is None else total / found


def _mode() -> Mode:
    from_environment = os.environ.get(MODE_VARIABLE)
    return _checked(from_environment, MODE_VARIABLE) if from_environment else _CHOSEN.mode


def _checked(mode: str, name: str) -> Mode:
    for known in _MODES:
        if mode == known:
            return known
    raise UserError(f"{name}={mode!r} is not a way to show progress; choose auto, lines or off")


def _display() -> Display | None:
    """Where activities are shown now."""
    mode = _mode()
    if mode == "off" or not is_first_process():
        return None
    if mode == "lines":
        return _LINES
    if in_notebook():
        return Notebook()
    return Terminal() if in_terminal() else None


def is_first_process() -> bool:
    """Whether this is the first of several processes, as far as is known without starting JAX's backend."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return True
    return jax.process_index() == 0
