"""GGUF files byte by byte: whatever a field may hold, also what no writer would write."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

U8, U32, F32, BOOL, STRING, ARRAY, U64, F64 = 0, 4, 6, 7, 8, 9, 10, 12


def string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def value(content: Any) -> bytes:
    """A value with its type before it: the type that the value has in Python, or the bytes as they are."""
    if isinstance(content, bytes):
        return content
    if isinstance(content, bool):
        return struct.pack("<I?", BOOL, content)
    if isinstance(content, int):
        kind, form = (U64, "Q") if content >= 0 else (11, "q")
        return struct.pack(f"<I{form}", kind, content)
    if isinstance(content, float):
        return struct.pack("<Id", F64, content)
    if isinstance(content, str):
        return struct.pack("<I", STRING) + string(content)
    return struct.pack("<I", ARRAY) + array(content)


def array(content: Sequence[Any]) -> bytes:
    """An array of what its first entry is; the others must be of the same type."""
    entries = [value(entry) for entry in content]
    kind = struct.unpack("<I", entries[0][:4])[0] if entries else U8
    return struct.pack("<IQ", kind, len(entries)) + b"".join(entry[4:] for entry in entries)


def tensor(name: str, dims: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    """`dims` as in the file: the fastest-moving first."""
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return string(name) + sizes + struct.pack("<IQ", kind, offset)


def gguf_file(
    metadata: Mapping[str, Any],
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A file of version 3; `counts` are the numbers of tensors and of values that it claims to have."""
    num_tensors, num_values = counts or (len(tensors), len(metadata))
    head = b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_values)
    head += b"".join(string(key) + value(content) for key, content in metadata.items())
    head += b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data
