"""Reading GGUF files, whole or in parts: metadata, and tensors dequantised one at a time.

The block formats of the `gguf` package (`gguf.quants`) are used as they are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from s2d_jax.errors import UserError, first_of
from s2d_jax.fields import Fields
from s2d_jax.formats.gguf_header import GGUFPart, TensorInfo

# The name that llama.cpp's gguf-split gives to part 1 of 2; https://github.com/ggml-org/llama.cpp/tree/master/tools/gguf-split
_PART_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_MOST_PARTS = 99_999
_FETCH_ALL = "fetch all parts of the model into one directory"


def _gguf_package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            "reading a GGUF file needs the gguf package; pip install 's2d-jax[gguf]'"
        ) from error
    return gguf


class GGUFFile:
    """A GGUF file, or all parts of one, mapped into memory.

    Args:
        path: the file; any part (`NAME-00002-of-00003.gguf`) stands for all, which lie beside it.

    Attributes:
        path: as given.
        metadata: keys as in the (first) file (`llama.block_count`) -> int, float, bool, str or list of them.
        tensors: name -> TensorInfo, those of all parts.
        num_bytes: the size of all parts.

    Raises:
        UserError: when the file is no GGUF file, is truncated, lacks parts, or needs a package that is not installed.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._gguf = _gguf_package()
        self._block_sizes = {kind.value: size for kind, size in self._gguf.GGML_QUANT_SIZES.items()}
        given = GGUFPart(self.path, self._block_sizes)
        split = Fields(given.metadata, given.path, _FETCH_ALL)
        count = split.integer("split.count", 0, _MOST_PARTS, 0)
        parts = [given] if count <= 1 else self._all_parts(given, count)
        self.metadata = parts[0].metadata
        self.tensors: dict[str, TensorInfo] = {}
        self._part_of: dict[str, GGUFPart] = {}
        for part in parts:
            for name, info in part.tensors.items():
                if name in self.tensors:
                    raise UserError(
                        f"tensor {name} stands in {self._part_of[name].path} and in {part.path}; {_FETCH_ALL}"
                    )
                self.tensors[name], self._part_of[name] = info, part
        self.num_bytes = sum(len(part.buffer) for part in parts)
        if count > 1:
            self._check_complete()

    def _all_parts(self, given: GGUFPart, count: int) -> list[GGUFPart]:
        """All `count` parts in their order; the first holds the metadata of the model."""
        named = _PART_NAME.fullmatch(self.path.name)
        if named is None or int(named["count"]) != count:
            raise UserError(
                f"{self.path} is one of {count} parts, but its name does not say which; name the parts as they were: "
                f"NAME-00001-of-{count:05}.gguf, ..."
            )
        paths = [
            self.path.with_name(f"{named['stem']}-{number:05}-of-{count:05}.gguf")
            for number in range(1, count + 1)
        ]
        if absent := [path.name for path in paths if not path.exists()]:
            raise UserError(
                f"{self.path} is one of {count} parts, and {self.path.parent} lacks {first_of(absent)}; {_FETCH_ALL}"
            )
        parts = []
        for number, path in enumerate(paths):
            part = given if path == self.path else GGUFPart(path, self._block_sizes)
            own = part.metadata.get("split.no"), part.metadata.get("split.count")
            if own != (number, count):
                raise UserError(
                    f"{path} says that it is part split.no={own[0]!r} of split.count={own[1]!r}, its name says {number} of "
                    f"{count} (counted from 0); {_FETCH_ALL} again"
                )
            parts.append(part)
        return parts

    def _check_complete(self) -> None:
        """Raises UserError if the parts do not hold as many tensors as the first says."""
        fields = Fields(self.metadata, self.path, _FETCH_ALL)
        expected = fields.integer("split.tensors.count", 0, default=len(self.tensors))
        if expected != len(self.tensors):
            raise UserError(
                f"the parts of {self.path} hold {len(self.tensors)} tensors, split.tensors.count={expected} is expected; "
                f"{_FETCH_ALL} again"
            )

    def is_f32(self, name: str) -> bool:
        """Whether the tensor is stored as f32, neither in 16 bits nor in blocks."""
        return self.tensors[name].ggml_type == self._gguf.GGMLQuantizationType.F32.value

    def tensor(self, name: str) -> np.ndarray:
        """f32, dequantised, in NumPy's order of dimensions.

        Raises:
            UserError: for a type that the gguf package does not dequantise.
        """
        info, part = self.tensors[name], self._part_of[name]
        kind = self._gguf.GGMLQuantizationType(info.ggml_type)
        raw = np.frombuffer(part.buffer, np.uint8, info.num_bytes, info.offset)
        try:
            values = self._gguf.dequantize(raw.reshape(*info.shape[:-1], -1), kind)
        except NotImplementedError as error:
            raise UserError(
                f"{part.path}: tensor {name} has type {kind.name}, which cannot be dequantised; use another quantisation"
            ) from error
        # An unquantised tensor is a view of the file; JAX on CPU might keep that view.
        return np.require(values, np.float32, ["W"]).reshape(info.shape)
