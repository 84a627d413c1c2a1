"""The head of a GGUF file: its metadata, and where its tensors lie.

It is parsed here because the `gguf` package's own reader takes ten seconds for a vocabulary of 150,000 strings, and maps a
truncated file without complaint. Every count is held against the bytes that are left before anything is built from it.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from s2d_jax.errors import UserError, printable
from s2d_jax.fields import Fields
from s2d_jax.files import check_no_lfs_pointer, regular_file

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT, _MOST_ALIGNMENT = 32, 2**20
# GGML's tensors have at most four dimensions; arrays of arrays are allowed, but no known key is one.
_MOST_DIMS, _MOST_DEPTH = 4, 8

# GGUF value types of fixed size: id -> struct format.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
# The bytes that an entry takes at least: a string its length, an array its type and length.
_SHORTEST = {_STRING: 8, _ARRAY: 12}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in its file. `shape` is in NumPy's order: rows first."""

    shape: tuple[int, ...]
    ggml_type: int
    offset: int
    num_bytes: int


class _Cursor:
    """Reads one value after another; raises struct.error for what cannot be in a file of this size."""

    def __init__(self, buffer: mmap.mmap):
        self.buffer, self.position = buffer, len(MAGIC)

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self.buffer, self.position)
        self.position += struct.calcsize(f"<{form}")
        return values

    def check_room(self, count: int, size: int, what: str) -> None:
        if count * size > len(self.buffer) - self.position:
            raise struct.error(f"{count} {what} beyond the end of the file")

    def string(self) -> str:
        (length,) = self.take("Q")
        self.check_room(length, 1, "bytes of a string")
        start, self.position = self.position, self.position + length
        return self.buffer[start : self.position].decode("utf-8", errors="replace")

    def value(self, value_type: int, depth: int = 0) -> Any:
        if value_type in _SCALARS:
            return self.take(_SCALARS[value_type])[0]
        if value_type == _STRING:
            return self.string()
        if value_type != _ARRAY:
            raise struct.error(f"unknown value type {value_type}")
        if depth == _MOST_DEPTH:
            raise struct.error(f"arrays nested more than {_MOST_DEPTH} deep")
        item_type, count = self.take("IQ")
        if form := _SCALARS.get(item_type):
            self.check_room(count, struct.calcsize(f"<{form}"), "numbers")
            return list(self.take(f"{count}{form}"))
        self.check_room(count, _SHORTEST.get(item_type, 1), "entries of an array")
        return [self.value(item_type, depth + 1) for _ in range(count)]

    def dims(self) -> tuple[int, ...]:
        (count,) = self.take("I")
        if count > _MOST_DIMS:
            raise struct.error(f"a tensor of {count} dimensions")
        # GGUF lists the fastest-moving dimension first.
        return tuple(reversed(self.take(f"{count}Q")))


class GGUFPart:
    """One GGUF file, mapped into memory: a whole model, or a part of one.

    Args:
        path: the file.
        block_sizes: GGML's type -> (elements of a block, its bytes).

    Attributes:
        metadata: keys as in the file (`llama.block_count`) -> int, float, bool, str or list of them.
        tensors: name -> TensorInfo.
        buffer: the bytes of the file.

    Raises:
        UserError: when the file is no GGUF file, is truncated or damaged.
    """

    def __init__(self, path: Path, block_sizes: Mapping[int, tuple[int, int]]):
        self.path = regular_file(path, "give a Hugging Face directory, a hub id or a .gguf file")
        check_no_lfs_pointer(path)
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise UserError(f"{path} is not a GGUF file: it does not start with 'GGUF'")
            self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self.metadata, entries, end = self._read()
        except struct.error as error:
            raise self.damaged(f"its header is incomplete ({error})") from None
        alignment = Fields(self.metadata, path, "fetch it again").integer(
            "general.alignment", 1, _MOST_ALIGNMENT, _DEFAULT_ALIGNMENT
        )
        data_start = -(-end // alignment) * alignment
        self.tensors = {
            name: self._located(name, *entry, data_start, block_sizes)
            for name, entry in entries.items()
        }

    def damaged(self, what: str) -> UserError:
        """The error for a file whose content cannot be."""
        size = len(self.buffer)
        return UserError(
            f"{self.path} is truncated or damaged at {size} bytes: {what}; fetch it again"
        )

    def _read(self) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, int]], int]:
        """Metadata, (shape, type, offset) of each tensor by name, and where the head ends."""
        head = _Cursor(self.buffer)
        version, num_tensors, num_values = head.take("IQQ")
        if version not in VERSIONS:
            raise UserError(
                f"{self.path} is GGUF version {version}; versions 2 and 3 (little-endian) can be read"
            )
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = head.string()
            metadata[key] = head.value(*head.take("I"))
        entries = {}
        for _ in range(num_tensors):
            name = head.string()
            if name in entries:
                raise struct.error(f"two tensors {printable(name)}")
            entries[name] = (head.dims(), *head.take("IQ"))
        return metadata, entries, head.position

    def _located(
        self,
        name: str,
        shape: tuple[int, ...],
        ggml_type: int,
        offset: int,
        data_start: int,
        block_sizes: Mapping[int, tuple[int, int]],
    ) -> TensorInfo:
        what = f"tensor {printable(name)}"
        if ggml_type not in block_sizes:
            raise UserError(
                f"{self.path}: {what} has unknown type {ggml_type}; update the gguf package"
            )
        block_elements, block_bytes = block_sizes[ggml_type]
        if (shape or (1,))[-1] % block_elements:
            raise self.damaged(f"{what} has rows of {shape[-1]}, no multiple of {block_elements}")
        num_bytes = math.prod(shape) // block_elements * block_bytes
        start = data_start + offset
        if start + num_bytes > len(self.buffer):
            raise self.damaged(f"{what} ends beyond the end of the file")
        return TensorInfo(shape, ggml_type, start, num_bytes)
