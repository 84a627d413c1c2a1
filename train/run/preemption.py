"""SIGTERM: a run saves at a step that all its processes agree on, and ends with a status of its own."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

# EX_TEMPFAIL of sysexits.h, "try again later": everything is saved. A shell reports 143 for a process that SIGTERM killed
# before it could save, so a launcher can tell the two cases apart.
PREEMPTED_STATUS = 75


class Preempted(Exception):
    """The run was told to end, and is saved."""

    def __init__(self, step: int):
        super().__init__(f"SIGTERM: saved at step {step}")
        self.step = step


class Preemption:
    """Decides whether to save and end; it is asked once after every step.

    A single process handles SIGTERM itself. Several processes leave it to JAX's coordination service, which is also told of a
    TPU's maintenance: a signal to any of them makes all stop at the same step, the next that no process has begun.
    """

    def __init__(self):
        self._noticed = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside the block, SIGTERM does not kill this process but is remembered."""
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
