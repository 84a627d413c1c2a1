"""Progress bars and the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from s2d_jax.progress.activity import BOARD, is_shown
from s2d_jax.progress.displays import due_now, table_of

_SECONDS_BETWEEN_LINES = 10.0


def screen(*, stderr: bool = False) -> Console:
    """A console of at most 100 columns, and of exactly 100 where there is no terminal."""
    console = Console(stderr=stderr, highlight=False)
    width = min(100, console.width) if console.is_terminal else 100
    return Console(stderr=stderr, highlight=False, width=width)


class SharedProgress(Progress):
    """Bars with the library's activities below them, since only one live display fits on a screen."""

    _ends = False

    def start(self) -> None:
        if self.console.is_terminal:
            BOARD.give_way(self)
        super().start()

    def stop(self) -> None:
        self._ends = True
        super().stop()
        BOARD.come_back(self)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        now = BOARD.clock()
        if not self._ends and (due := due_now(BOARD.going_for(self), now)):
            yield table_of(due, now)


class CountingBar(SharedProgress):
    """A progress bar on stderr; without a terminal, a line now and then."""

    _last_line = 0.0

    def add_task(self, description: str, *args: Any, **fields: Any) -> TaskID:
        task_id = super().add_task(description, *args, **fields)
        # Where activities are shown as lines, this is one line; it may take long until the next.
        if not self.console.is_terminal and is_shown():
            total = self.tasks[-1].total
            of = "" if total is None else f" 0 of {total:.0f}"
            self.console.print(f"{description}{of}", markup=False, soft_wrap=True)
        return task_id

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
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *shown,
        console=screen(stderr=True),
        speed_estimate_period=600.0,  # seconds; one answer of a large model takes minutes
    )


def eta() -> tuple[TextColumn, TimeRemainingColumn]:
    """Columns of a `counting_bar` that show the time left."""
    return TextColumn("ETA"), TimeRemainingColumn()
