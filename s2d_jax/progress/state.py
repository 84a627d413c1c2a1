"""The activities that go on now, and the thread that keeps their display up to date."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

_SECONDS_BETWEEN_TICKS = 0.1
# An activity that should take this many seconds is shown at once; one known to take less than a second, only after a second.
LONG = 2.0
_BRIEF = 1.0


@dataclasses.dataclass(eq=False)
class Activity:
    """Something that takes a while; `activity` explains the other fields.

    Attributes:
        first_time: nothing is known of its duration on this machine, `expected` is a guess.
        beside_text: text is being written to the screen meanwhile.
        started: when it began, by the clock of the board.
        done: how much of `total` is done.
    """

    text: str
    total: float | None = None
    unit: str = ""
    expected: float | None = None
    first_time: bool = False
    quiet: float = 0.3
    beside_text: bool = False
    key: str = ""
    started: float = 0.0
    done: float = 0.0

    def advance(self, amount: float = 1.0) -> None:
        """Adds `amount` to what is done."""
        self.done += amount

    @property
    def long(self) -> bool:
        """Whether it is expected to take long."""
        return self.expected is not None and self.expected >= LONG

    def visible_after(self) -> float:
        """Seconds until a terminal or a notebook shows it; quick ones do not flicker."""
        if self.long:
            return 0.0
        brief = self.expected is not None and self.expected < _BRIEF
        return max(self.quiet, _BRIEF) if brief else self.quiet

    def share(self, now: float) -> float | None:
        """The share that is done, from 0 to 1; None if it is not known."""
        if self.total and self.done:
            return min(1.0, self.done / self.total)
        elapsed = now - self.started
        if self.expected is not None and elapsed <= self.expected:
            return elapsed / self.expected
        return None

    def left(self, now: float) -> float | None:
        """Seconds until it ends: from what is done, once enough is done; else from what is expected."""
        elapsed, share = now - self.started, self.share(now)
        if self.total and self.done and share and elapsed >= 1.0:
            return elapsed * (1 - share) / share
        if self.expected is not None and elapsed <= self.expected:
            return self.expected - elapsed
        return None

    def announced(self) -> str:
        """What it is and how long it will take: `compiling the decoding loop, about 9 s`."""
        if self.expected is None or self.expected < 1:
            return self.text
        about = f"about {in_words(self.expected)}"
        return (
            f"{self.text} (first time; usually {about})"
            if self.first_time
            else f"{self.text}, {about}"
        )

    def status(self, now: float) -> str:
        """How far it is: `4 s, about 5 s left`."""
        words = [in_words(now - self.started)]
        if self.unit == "B" and self.total and self.done:
            words.insert(0, _bytes_of(self.done, self.total))
        if (left := self.left(now)) is not None:
            words.append(f"about {in_words(max(left, 1))} left")
            if self.first_time and not self.done:
                words[-1] = f"first time, usually about {in_words(self.expected or 0)}"
        elif self.expected is not None and self.expected >= 1:
            words.append(f"usually {in_words(self.expected)}")
        return ", ".join(words)


def in_words(seconds: float) -> str:
    """`9 s`, `3 min`."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _bytes_of(done: float, total: float) -> str:
    unit, size = ("GB", 1e9) if total >= 1e9 else ("MB", 1e6)
    digits = 1 if size == 1e9 else 0
    return f"{done / size:.{digits}f} of {total / size:.{digits}f} {unit}"


class Display(Protocol):
    """Where activities are shown.

    Attributes:
        moves: whether it overwrites the last lines of a screen, so that there can be only one.
    """

    moves: bool

    def tick(self, going: Sequence[Activity], now: float) -> None:
        """Shows the activities that are due."""
        ...

    def close(self) -> None:
        """Removes what is shown."""
        ...


def _harmless() -> contextlib.AbstractContextManager[None]:
    """Ignores errors of the display: the terminal may be gone, or may not know a character."""
    return contextlib.suppress(OSError, ValueError)


class Board:
    """The activities that go on, one display for all of them, and a thread as long as there are any.

    Args:
        clock: seconds, as `time.monotonic`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.reset()

    def reset(self) -> None:
        """Forgets everything; a forked process must call it, because it does not have the thread."""
        self._lock = threading.RLock()
        self._going: list[Activity] = []
        self._display: Display | None = None
        self._host: object | None = None
        self._stop = threading.Event()
        self._ticker: threading.Thread | None = None

    def going_for(self, host: object) -> list[Activity]:
        """The activities that `host` must show."""
        display = self._display
        return list(self._going) if host is self._host and display and display.moves else []

    def begin(self, activity: Activity, display: Display) -> None:
        """Shows an activity: on the display of those that already go on, else on `display`."""
        with self._lock:
            self._going.append(activity)
            if self._display is None:
                self._display, self._stop = display, threading.Event()
                self._ticker = threading.Thread(
                    target=self._keep_moving, args=(self._stop,), name="s2d progress", daemon=True
                )
                self._ticker.start()
            self.tick()

    def end(self, activity: Activity) -> None:
        """Stops showing an activity; after the last one, display and thread end."""
        with self._lock:
            if activity in self._going:
                self._going.remove(activity)
            if self._going:
                self.tick()
                return
            ticker, self._ticker = self._ticker, None
            self._stop.set()
            self._close()
            self._display = None
        if ticker is not None:
            ticker.join()

    def tick(self) -> None:
        """Brings the display up to date, unless a host shows the activities itself (`give_way`)."""
        with self._lock:
            if self._display is None or (self._host is not None and self._display.moves):
                return
            with _harmless():
                self._display.tick(self._going, self.clock())

    def give_way(self, host: object) -> None:
        """From now on `host`, another display on the same screen, shows `going` itself."""
        with self._lock:
            self._host = host
            if self._display is not None and self._display.moves:
                self._close()

    def come_back(self, host: object) -> None:
        """The end of `give_way`."""
        with self._lock:
            if self._host is host:
                self._host = None

    def _close(self) -> None:
        if self._display is not None:
            with _harmless():
                self._display.close()

    def _keep_moving(self, stop: threading.Event) -> None:
        while not stop.wait(_SECONDS_BETWEEN_TICKS):
            with self._lock:
                if not stop.is_set():
                    self.tick()
