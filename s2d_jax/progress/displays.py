"""Where activities are shown: in a terminal, in a notebook, as lines of a log.

rich is imported only when there is something to show in a terminal.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from s2d_jax.progress.state import LONG, Activity

SECONDS_BETWEEN_LINES = 10.0
_WIDEST = 100
_BAR_WIDTH = 20


def in_terminal() -> bool:
    """Whether stderr is a terminal whose lines can be overwritten."""
    stderr = sys.stderr
    dumb = os.environ.get("TERM", "") in ("dumb", "unknown")
    return stderr is not None and stderr.isatty() and not dumb


def in_notebook() -> bool:
    """Whether this is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return type(shell).__name__ == "ZMQInteractiveShell"


class Lines:
    """Plain lines: one when something long begins, then one every ten seconds.

    Args:
        write: takes a line; None writes to stderr.
    """

    moves = False

    def __init__(self, write: Callable[[str], None] | None = None):
        self._write = write or _to_stderr
        self._said: dict[str, float] = {}  # when each text was said last

    def tick(self, going: Sequence[Activity], now: float) -> None:
        for activity in going:
            elapsed, said = now - activity.started, self._said.get(activity.text)
            if not activity.long and elapsed < LONG:
                continue
            # A repeated activity, such as reading the prompts of each batch, is not reported every time.
            if said is not None and now - said < SECONDS_BETWEEN_LINES:
                continue
            again = said is not None and said >= activity.started
            line = f"{activity.text}: {activity.status(now)}" if again else activity.announced()
            self._said[activity.text] = now
            self._write(line)

    def close(self) -> None:
        recent = list(self._said.items())[-50:]
        self._said = dict(recent)


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


class Terminal:
    """A bar for each activity, below what the terminal shows, gone at the end.

    Args:
        console: rich's; None makes one for stderr.
    """

    moves = True

    def __init__(self, console: Any = None):
        self._console, self._live = console, None

    def tick(self, going: Sequence[Activity], now: float) -> None:
        # A bar that is drawn while text is written would wipe the text's last line away.
        due = due_now([each for each in going if not each.beside_text], now)
        if not due:
            self.close()
            return
        if self._live is None:
            self._live = self._new_live()
            self._live.start()
        self._live.update(table_of(due, now), refresh=True)

    def close(self) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def _new_live(self) -> Any:
        from rich.console import Console
        from rich.live import Live

        if self._console is None:
            console = Console(stderr=True, force_jupyter=False)
            self._console = Console(
                stderr=True, force_jupyter=False, width=min(_WIDEST, console.width)
            )
        # stdout and stderr are not redirected: another thread is using them.
        return Live(
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )


def due_now(going: Sequence[Activity], now: float) -> list[Activity]:
    """The activities that a terminal or a notebook shows now."""
    return [each for each in going if now - each.started >= each.visible_after()]


def table_of(going: Sequence[Activity], now: float) -> Any:
    """Text, bar and time of each activity, for rich."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    statuses = [activity.status(now) for activity in going]
    table = Table.grid(padding=(0, 1))
    table.add_column()  # in a narrow terminal the text is cut: rich narrows columns whose text may wrap
    table.add_column(width=_BAR_WIDTH, no_wrap=True)
    table.add_column(no_wrap=True)
    for activity, status in zip(going, statuses, strict=True):
        share = activity.share(now)
        bar = ProgressBar(
            total=1.0,
            completed=share or 0.0,
            width=_BAR_WIDTH,
            pulse=share is None,
            animation_time=now,
        )
        text = Text(activity.text, no_wrap=True, overflow="ellipsis")
        table.add_row(text, bar, Text(status))
    return table


class Notebook:
    """A line for each activity below the cell, empty at the end. It needs no widgets."""

    moves = False

    def __init__(self):
        self._handle: Any = None
        self._shown = ""

    def tick(self, going: Sequence[Activity], now: float) -> None:
        lines = [f"{each.text}: {each.status(now)}" for each in due_now(going, now)]
        self._show("\n".join(lines))

    def close(self) -> None:
        self._show("")

    def _show(self, text: str) -> None:
        if text == self._shown:
            return
        self._shown, shown = text, {"text/plain": text}
        if self._handle is None:
            from IPython.display import display  # pyright: ignore[reportMissingImports]

            self._handle = display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)
