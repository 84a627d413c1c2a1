"""What a run shows while it trains: a progress bar or, without a terminal, a line now and then."""

from __future__ import annotations

import time
from typing import Any

from rich.progress import BarColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from s2d_jax.cli.screen import PlainColumn, PlainConsole, SharedProgress, width_of
from train.run.metrics import losses

_SECONDS_BETWEEN_LINES = 10.0
_TIME_WIDTH = len("0:00:00")


class ProgressReport:
    """A bar with ETA, tokens per second and the loss of each exit; plain lines where there is no terminal.

    Use as a context manager.
    """

    def __init__(self, console: PlainConsole | None = None):
        self._console = console or PlainConsole()
        self._bar: SharedProgress | None = None
        self._last_line = 0.0

    def __enter__(self) -> ProgressReport:
        if self._console.is_terminal:
            self._bar = SharedProgress(
                PlainColumn("{task.description}"),
                BarColumn(bar_width=8),
                PlainColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(table_column=Column(min_width=_TIME_WIDTH)),
                TimeRemainingColumn(
                    elapsed_when_finished=True, table_column=Column(min_width=_TIME_WIDTH)
                ),
                PlainColumn("{task.fields[numbers]}", table_column=Column(overflow="fold")),
                console=self._console,
                speed_estimate_period=600.0,  # seconds; lines may come minutes apart
            )
            self._task = self._bar.add_task("training", total=1.0, numbers="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def width(self) -> int:
        """The columns that a table may take."""
        return width_of(self._console)

    def say(self, text: str) -> None:
        """Prints one line, which stays."""
        # A terminal would cut words at its edge; tables, and lines of a log, stay as they are.
        as_it_is = not self._console.is_terminal or "\n" in text
        self._console.print(text, soft_wrap=as_it_is)

    def working(self, what: str, done: int, total: int) -> None:
        """Shows how far some work before training is; ends at `done == total`."""
        if self._bar is not None:
            old = [task.id for task in self._bar.tasks if task.id != self._task]
            if not old:
                old = [self._bar.add_task(what, numbers="")]
            self._bar.update(old[0], description=what, completed=done, total=total)
            if done == total:
                self._bar.remove_task(old[0])
            return
        now = time.perf_counter()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.say(what if total == 1 else f"{what}: {done:,} of {total:,}")

    def update(self, share: float, row: dict[str, Any]) -> None:
        """Shows a line of metrics; `share` of the run is over."""
        numbers = f"step {row['step']}  {row['tokens_per_second']:,.0f} tok/s  {losses(row)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=share, numbers=numbers)
            return
        now = time.perf_counter()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES or share >= 1:
            self._last_line = now
            left = row["elapsed_seconds"] * (1 - share) / share
            self.say(f"{share:4.0%}  {numbers}  {left:,.0f} s left")
