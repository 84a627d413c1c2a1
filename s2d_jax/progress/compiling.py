"""How long compiling takes: as long as the same program took before; else an estimate from the number of its arrays."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import jax

from s2d_jax.backends import platform_of
from s2d_jax.progress import durations
from s2d_jax.progress.activity import activity, is_shown

_HIT = "/jax/compilation_cache/cache_hits"
# Seconds per input array, where nothing was compiled on this machine yet; measured on two cores of an AMD EPYC (2026).
# A layer has nine weights, and its part of the caches.
_GUESSED_PER_ARRAY = {
    "prefill": 0.010,
    "run": 0.015,
    "extend": 0.010,
    "grow": 0.001,
    "propose": 0.010,
    "verify": 0.010,
    "accept": 0.001,
    "train": 0.050,
    "evaluate": 0.020,
}


@contextlib.contextmanager
def compiling(kind: str, text: str, inputs: Any) -> Iterator[None]:
    """Shows that a program is compiled inside the block, and remembers how long it took.

    Args:
        kind: what the program does; programs of one kind take seconds in proportion to their arrays.
        text: what is shown.
        inputs: the program's arguments.
    """
    leaves = jax.tree.leaves(inputs)
    prefix = f"compile/{platform_of(None)}/{kind}"
    described = " ".join(f"{leaf.dtype}{leaf.shape}" for leaf in leaves)
    key = f"{prefix}/{len(leaves)}/{hashlib.sha256(described.encode()).hexdigest()[:8]}"
    seconds = None
    if is_shown():
        seconds = _expected(key, prefix, len(leaves))
    guess = len(leaves) * _GUESSED_PER_ARRAY[kind]
    with _cache_hits() as hits, activity(text, key=key, expected=seconds, guess=guess) as told:
        yield
        if hits:  # it was loaded, not compiled; the next time will be as quick
            told.key = f"{key}/kept"


def _expected(key: str, prefix: str, parts: int) -> float | None:
    keeps_programs = getattr(jax.config, "jax_compilation_cache_dir", None)
    if keeps_programs and (kept := durations.known(f"{key}/kept")):
        return kept
    if (same := durations.known(key)) is not None:
        return same
    per_part = durations.known_per_part(prefix)
    return None if per_part is None else per_part * parts


@contextlib.contextmanager
def _cache_hits() -> Iterator[list[str]]:
    """Yields a list that gets an entry for each program found in JAX's persistent cache inside the block."""
    found: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == _HIT:
            found.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_listener(listen)
