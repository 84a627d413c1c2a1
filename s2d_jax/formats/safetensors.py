"""Tensors in safetensors files: read by name, and written without torch."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from s2d_jax.errors import UserError, printable
from s2d_jax.files import check_no_lfs_pointer, regular_file
from s2d_jax.formats.finite import check_finite
from s2d_jax.progress.activity import activity

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class SafetensorsFiles:
    """The tensors of one or several safetensors files; `num_bytes` is their size.

    Raises:
        UserError: for a truncated file, a dtype other than F32, F16 and BF16, or a tensor that stands in two files.
    """

    def __init__(self, paths: Sequence[Path]):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._handles: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        self.num_bytes = 0
        for path in paths:
            check_no_lfs_pointer(regular_file(path, "fetch the complete model"))
            try:
                # NumPy knows bfloat16 here because jax registers ml_dtypes on import.
                handle = safetensors.safe_open(path, framework="np")
            except (safetensors.SafetensorError, OSError) as error:
                raise UserError(
                    f"{path} is truncated or damaged ({printable(error)[:160]}); fetch it again"
                ) from error
            self.num_bytes += path.stat().st_size
            for name in handle.keys():  # noqa: SIM118 - not a dict
                tensor = handle.get_slice(name)
                if tensor.get_dtype() not in _DTYPES.values():
                    raise UserError(
                        f"{path}: tensor {printable(name)} has dtype {tensor.get_dtype()}; only F32, F16 and BF16 weights "
                        "can be read"
                    )
                if name in self.shapes:
                    raise UserError(
                        f"tensor {printable(name)} stands in {self._paths[name]} and in {path}; fetch the complete model again"
                    )
                self.shapes[name] = tuple(tensor.get_shape())
                self._handles[name], self._paths[name] = handle, path

    def is_f32(self, name: str) -> bool:
        """Whether the tensor is stored as F32."""
        return self._handles[name].get_slice(name).get_dtype() == _DTYPES["float32"]

    def read(self, name: str) -> np.ndarray:
        """One tensor, as it is stored.

        Raises:
            UserError: if it holds NaN or infinity.
        """
        array = self._handles[name].get_tensor(name)
        check_finite(name, array, self._paths[name])
        return array


def save_safetensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Writes arrays in safetensors format, one after another, and waits until they are on the disk.

    Args:
        tensors: name -> f32, f16 or bf16 array; each is copied to the host only while it is written.

    Raises:
        UserError: for another dtype.

    Source: https://github.com/huggingface/safetensors#format
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, array in tensors.items():
        dtype = jnp.dtype(array.dtype).name
        if dtype not in _DTYPES:
            raise UserError(f"{name} has dtype {dtype}; export parameters in f32, f16 or bf16")
        end = start + array.size * array.dtype.itemsize
        header[name] = {
            "dtype": _DTYPES[dtype],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
        start = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    text = f"writing {path.parent.name}/{path.name}"
    with activity(text, total=start, unit="B", key="save") as told, open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for array in tensors.values():
            host = np.ascontiguousarray(np.asarray(array))
            file.write(host.reshape(-1).view(np.uint8).data)
            told.advance(host.nbytes)
        file.flush()
        os.fsync(file.fileno())
