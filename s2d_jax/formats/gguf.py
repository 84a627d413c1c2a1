"""Reading GGUF files: metadata, and tensors dequantised one at a time.

The header is parsed here because the `gguf` package's own reader takes ten seconds for a vocabulary of 150,000 strings, and
maps a truncated file without complaint; its block formats (`gguf.quants`) are used as they are.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from s2d_jax.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

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


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in the file. `shape` is in NumPy's order: rows first."""

    shape: tuple[int, ...]
    ggml_type: int
    offset: int
    num_bytes: int


class _Header:
    """A cursor over the head of a GGUF file."""

    def __init__(self, buffer: mmap.mmap):
        self.buffer, self.position = buffer, len(MAGIC)

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self.buffer, self.position)
        self.position += struct.calcsize(f"<{form}")
        return values

    def string(self) -> str:
        (length,) = self.take("Q")
        start, self.position = self.position, self.position + length
        if self.position > len(self.buffer):
            raise struct.error("string beyond the end of the file")
        return self.buffer[start : self.position].decode("utf-8", errors="replace")

    def value(self, value_type: int) -> Any:
        if value_type in _SCALARS:
            return self.take(_SCALARS[value_type])[0]
        if value_type == _STRING:
            return self.string()
        if value_type != _ARRAY:
            raise struct.error(f"unknown value type {value_type}")
        item_type, count = self.take("IQ")
        if item_type in _SCALARS:
            return list(self.take(f"{count}{_SCALARS[item_type]}"))
        return [self.value(item_type) for _ in range(count)]


def _gguf_package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            "reading a GGUF file needs the gguf package; pip install 's2d-jax[gguf]'"
        ) from error
    return gguf


class GGUFFile:
    """A GGUF file, mapped into memory.

    Attributes:
        metadata: keys as in the file (`llama.block_count`) -> int, float, bool, str or list of them.
        tensors: name -> TensorInfo.

    Raises:
        UserError: when the file is no GGUF file, is truncated, or needs a package that is not installed.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._gguf = _gguf_package()
        with open(self.path, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise UserError(f"{self.path} is not a GGUF file: it does not start with 'GGUF'")
            self._buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self.metadata, self.tensors = self._read_header()
        except struct.error as error:
            raise self._truncated("its header is incomplete") from error
        for name, info in self.tensors.items():
            if info.offset + info.num_bytes > len(self._buffer):
                raise self._truncated(f"tensor {name} ends beyond the end of the file")

    def _truncated(self, what: str) -> UserError:
        size = len(self._buffer)
        return UserError(
            f"{self.path} is truncated or damaged at {size} bytes: {what}; fetch it again"
        )

    def _read_header(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        head = _Header(self._buffer)
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
            (num_dims,) = head.take("I")
            dims = head.take(f"{num_dims}Q")
            # GGUF lists the fastest-moving dimension first.
            entries[name] = (tuple(reversed(dims)), *head.take("IQ"))
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        data_start = -(-head.position // alignment) * alignment
        tensors = {
            name: TensorInfo(shape, kind, data_start + offset, self._num_bytes(name, shape, kind))
            for name, (shape, kind, offset) in entries.items()
        }
        return metadata, tensors

    def _num_bytes(self, name: str, shape: tuple[int, ...], ggml_type: int) -> int:
        sizes = {kind.value: size for kind, size in self._gguf.GGML_QUANT_SIZES.items()}
        if ggml_type not in sizes:
            raise UserError(
                f"{self.path}: tensor {name} has unknown type {ggml_type}; update the gguf package"
            )
        block_elements, block_bytes = sizes[ggml_type]
        return math.prod(shape) // block_elements * block_bytes

    def tensor(self, name: str) -> np.ndarray:
        """f32, dequantised, in NumPy's order of dimensions.

        Raises:
            UserError: for a type that the gguf package does not dequantise.
        """
        info = self.tensors[name]
        kind = self._gguf.GGMLQuantizationType(info.ggml_type)
        raw = np.frombuffer(self._buffer, np.uint8, info.num_bytes, info.offset)
        try:
            values = self._gguf.dequantize(raw.reshape(*info.shape[:-1], -1), kind)
        except NotImplementedError as error:
            raise UserError(
                f"{self.path}: tensor {name} has type {kind.name}, which cannot be dequantised; use another quantisation"
            ) from error
        # An unquantised tensor is a view of the file; JAX on CPU might keep that view.
        return np.require(values, np.float32, ["W"]).reshape(info.shape)
