"""How long things took on this machine: hints that are kept between processes, in one small file.

Only the time left that is shown depends on them. So a file that is damaged, or that cannot be written, is no error.
"""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path

from s2d_jax.files import expanded, write_text

CACHE_VARIABLE = "S2D_CACHE_DIR"
# Each entry is a key of about 40 characters and a number, so the file stays below 20 kB.
MOST_REMEMBERED = 300


def durations_file() -> Path:
    """`durations.json` in $S2D_CACHE_DIR, else in s2d-jax of the user's cache directory."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return expanded(chosen) / "durations.json"
    cache = expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return cache / "s2d-jax" / "durations.json"


def known(key: str) -> float | None:
    """What is remembered under a key: seconds, or amounts per second."""
    return _read().get(key)


def known_per_part(prefix: str) -> float | None:
    """Seconds per part, the median over the keys `prefix/PARTS/NAME`, which are of one kind."""
    found = []
    for key, seconds in _read().items():
        parts, *rest = key.removeprefix(f"{prefix}/").split("/")
        if key.startswith(f"{prefix}/") and len(rest) == 1 and parts.isdigit() and int(parts):
            found.append(seconds / int(parts))
    return statistics.median(found) if found else None


def remember(key: str, value: float) -> None:
    """Keeps the mean of `value` and what was known before; the oldest keys are dropped."""
    values = _read()
    before = values.pop(key, value)
    values[key] = float(f"{(before + value) / 2:.4g}")
    newest = dict(list(values.items())[-MOST_REMEMBERED:])
    try:
        write_text(durations_file(), json.dumps(newest, indent=0) + "\n")
    except OSError:
        return


def _read() -> dict[str, float]:
    """Positive numbers by key, the newest last."""
    try:
        values = json.loads(durations_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(values, dict):
        return {}
    numbers = {key: value for key, value in values.items() if type(value) in (int, float)}
    return {key: value for key, value in numbers.items() if 0 < value < float("inf")}
