"""Documents packed into rows of one length."""

from __future__ import annotations

import numpy as np

from train.data.tokenizing import Documents


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the indices of the documents of each row, no row above `capacity`.

    A document goes to the fullest row that still holds it (Johnson et al. 1974).

    >>> pack([5, 3, 4, 2], 7)
    [[0, 3], [2, 1]]
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by free space
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        room = next((r for r in range(length, capacity + 1) if with_room[r]), None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, capacity
        else:
            row = with_room[room].pop()
        rows[row].append(index)
        with_room[room - length].append(row)
    return rows


def _fill_rows(documents: Documents, chosen: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """The columns `tokens`, `segment_ids` and `answer` of the packed rows of `chosen` documents, `[rows, length]` each."""
    packed = pack(documents.lengths[chosen].tolist(), length)
    columns = {
        "tokens": np.zeros((len(packed), length), np.int32),
        "segment_ids": np.zeros((len(packed), length), np.int32),
        "answer": np.zeros((len(packed), length), bool),
    }
    for row, members in enumerate(packed):
        start = 0
        for segment, index in enumerate(chosen[members], start=1):
            own = slice(documents.starts[index], documents.starts[index + 1])
            stop = start + own.stop - own.start
            columns["tokens"][row, start:stop] = documents.tokens[own]
            columns["answer"][row, start:stop] = documents.answer[own]
            columns["segment_ids"][row, start:stop] = segment
            start = stop
    return columns
