"""Numbers as short text."""

from __future__ import annotations

from pathlib import Path


def shares(histogram: dict[int, int]) -> str:
    """`{6: 80, 12: 20}` as "6: 80%  12: 20%"; "-" when it is empty. No-break spaces keep each share in one piece."""
    total = sum(histogram.values())
    if total == 0:
        return "-"
    return "  ".join(
        f"{key}:\N{NO-BREAK SPACE}{count / total:.0%}" for key, count in sorted(histogram.items())
    )


def rates(values: tuple[float, ...] | list[float]) -> str:
    """Acceptance per depth as ".81 .64 .5"; "-" when it is empty."""
    return " ".join(f"{value:.2f}".removeprefix("0") for value in values) or "-"


def short_name(target: str) -> str:
    """The last part of a path, for column heads and directories."""
    return Path(target).name.removesuffix(".gguf")
