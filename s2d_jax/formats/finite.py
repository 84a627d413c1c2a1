"""Weights that are numbers: a tensor with NaN or infinity in it makes every output noise, and nothing else would say so."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from s2d_jax.errors import UserError, printable

# The bits of a float without its sign are a whole number that grows with its size; infinity and NaN are the largest.
_INFINITY = {
    np.dtype(np.float32): (np.uint32, 0x7F80_0000),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    jnp.dtype(jnp.bfloat16): (np.uint16, 0x7F80),
}
# Numbers that are looked at together: they stay in a core's cache, so that the memory is read only once.
_CHUNK = 2**16


def check_finite(name: str, array: np.ndarray, where: str | Path) -> None:
    """Makes sure that a tensor holds numbers only.

    Args:
        name: of the tensor.
        array: f32, f16 or bf16.
        where: its file, for messages.

    Raises:
        UserError: if there is a NaN or an infinity.
    """
    if count := count_not_finite(array):
        raise UserError(
            f"{printable(where)}: tensor {printable(name)} holds {count} values that are no finite numbers; fetch the file "
            "again, or take weights from before they went wrong"
        )


def count_not_finite(array: np.ndarray) -> int:
    """How many NaNs and infinities an f32, f16 or bf16 array holds."""
    bits, infinity = _INFINITY[array.dtype]
    flat = np.ascontiguousarray(array).reshape(-1)
    numbers = flat.view(bits)
    # Shifting the sign out is one operation for NumPy; the largest is another, and both use all lanes of the processor.
    chunks = (numbers[start : start + _CHUNK] for start in range(0, flat.size, _CHUNK))
    if all((chunk << 1).max() < infinity << 1 for chunk in chunks):
        return 0
    return int(np.count_nonzero(~np.isfinite(flat)))
