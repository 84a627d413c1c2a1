"""Runs independent jobs side by side: XLA compiles a program on one core."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterable
from typing import TypeVar

from s2d_jax.machine import usable_cores

Result = TypeVar("Result")


def in_parallel(
    jobs: Iterable[Callable[[], Result]],
    on_done: Callable[[], None],
    *,
    at_once: int | None = None,
) -> list[Result]:
    """The results in the order in which jobs end.

    Args:
        jobs: independent of each other.
        on_done: called after each.
        at_once: how many run at a time; None is as many as there are cores.
    """
    results = []
    with concurrent.futures.ThreadPoolExecutor(at_once or usable_cores()) as pool:
        for done in concurrent.futures.as_completed([pool.submit(job) for job in jobs]):
            results.append(done.result())
            on_done()
    return results
