"""Runs independent jobs side by side: XLA compiles a program on one core."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterable
from typing import TypeVar

from s2d_jax.machine import usable_cores

Result = TypeVar("Result")


def in_parallel(jobs: Iterable[Callable[[], Result]], on_done: Callable[[], None]) -> list[Result]:
    """The results in the order in which jobs end; as many run at a time as there are cores. Calls `on_done` after each."""
    results = []
    with concurrent.futures.ThreadPoolExecutor(usable_cores()) as pool:
        for done in concurrent.futures.as_completed([pool.submit(job) for job in jobs]):
            results.append(done.result())
            on_done()
    return results
