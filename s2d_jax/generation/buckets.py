"""Which sizes are compiled: only a few, so that few programs are compiled."""

from __future__ import annotations

_SMALLEST_BUCKET = 32


def bucket(length: int) -> int:
    """The smallest of 32, 48, 64, 96, 128, 192, ... that is at least `length`: few shapes, so few compilations."""
    size = _SMALLEST_BUCKET
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


def chunk_width(length: int, longest: int) -> int:
    """The width of the fewest equal chunks of at most `longest` that hold `length` tokens: a bucket, or `longest`."""
    count = -(-length // longest)
    return min(bucket(-(-length // count)), longest)
