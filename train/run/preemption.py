"""SIGTERM: a run saves at a step that all its processes agree on, and ends with a status of its own."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

# EX_TEMPFAIL of sysexits.h, "try again later": everything is saved. A shell reports 143 of a process that SIGTERM killed before
# it could save, so a launcher can tell the two apart.
PREEMPTED_STATUS = 75


class Preempted(Exception):
    """The run was told to end, and is saved."""

    def __init__(self, step: int):
        super().__init__(f"SIGTERM: saved at step {step}")
        self.step = step


class Preemption:
    """Whether to save and end, asked once after every step.

    A single process takes notice of SIGTERM by itself. Several leave that to JAX's coordination service, which also hears of a
    TPU's maintenance: a signal to any of them makes all stop at the same step, the next that none has begun.
    """

    def __init__(self):
        self._noticed = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM no longer kills this process, it is remembered."""
        if jax.process_count() > 1:
            yield
            return
        before = signal.signal(signal.SIGTERM, self._notice)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def reached(self, step: int) -> bool:
        """Whether all processes save and end after this step."""
        return self._noticed or multihost_utils.reached_preemption_sync_point(step)

    def _notice(self, *_: object) -> None:
        self._noticed = True
