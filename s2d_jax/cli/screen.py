"""Progress bars and the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.rule import Rule
from rich.text import Text

from s2d_jax.errors import visible
from s2d_jax.progress.activity import BOARD, is_first_process, is_shown
from s2d_jax.progress.displays import due_now, table_of

_SECONDS_BETWEEN_LINES = 10.0
_WIDEST = 100


class PlainConsole(Console):
    """A console that takes text as it is: square brackets and `:names:` mean nothing, and control characters show as escapes.

    This holds for lines, titles, cells of tables and labels of trees alike, since rich makes all of them from texts in one
    place. Styles are given to `rich.text.Text`.
    """

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)


class PlainColumn(TextColumn):
    """A column of a progress bar that takes text as `PlainConsole` does; `{task.description}` may hold anything."""

    def __init__(self, text_format: str, **options: Any):
        super().__init__(text_format, markup=False, **options)

    def render(self, task: Task) -> Text:
        text = visible(self.text_format.format(task=task))
        return Text(text, style=self.style, justify=self.justify)


def screen(*, stderr: bool = False) -> PlainConsole:
    """A console of at most 100 columns, and of exactly 100 where there is no terminal. Only the first process shows things."""
    width = width_of(PlainConsole(stderr=stderr))
    return PlainConsole(stderr=stderr, width=width, quiet=not is_first_process())


def width_of(console: Console) -> int:
    """The columns that what is printed may take: those of a terminal, at most 100, and exactly 100 where there is none."""
    return min(_WIDEST, console.width) if console.is_terminal else _WIDEST


def rule_above(text: str) -> Rule:
    """A line with the beginning of a user's turn, to stand above its answer."""
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    while cell_len(first) > _WIDEST - 10:
        first = first[:-1]
    return Rule(first, align="left", style="dim")


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
            self.console.print(f"{description}{of}", soft_wrap=True)
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
        self.console.print(line, soft_wrap=True)


def counting_bar(*shown: ProgressColumn) -> Progress:
    """A progress bar on stderr that counts, with further columns behind it."""
    return CountingBar(
        PlainColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *shown,
        console=screen(stderr=True),
        speed_estimate_period=600.0,  # seconds; one answer of a large model takes minutes
    )


def eta() -> tuple[PlainColumn, TimeRemainingColumn]:
    """Columns of a `counting_bar` that show the time left."""
    return PlainColumn("ETA"), TimeRemainingColumn()
