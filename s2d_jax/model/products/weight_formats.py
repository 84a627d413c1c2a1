"""How the numbers of a weight are kept: f32, bf16, or int8 with one scale for each output channel."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from s2d_jax.backends import forms_of
from s2d_jax.errors import UserError
from s2d_jax.sharding import mesh_in_use

WEIGHT_FORMATS = ("f32", "bf16", "int8")

_LARGEST = 127
# Where the largest element of a row is below this, the inverse of the row's scale overflows.
_NEGLIGIBLE = 2e-36
# Rows are quantised in pieces of about this many elements, so that no second f32 copy of a large tensor exists.
_PIECE = 1 << 22


class Int8Weight(flax.struct.PyTreeNode):
    """A matrix `values * scale`, quantised symmetrically with one scale for each output channel.

    Attributes:
        values: int8 `[O, I]`, from -127 to 127. The first leaf, so that its shape is the one that Flax checks.
        scale: f32 `[O]`.
    """

    values: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self):
        return self.values.dtype


# Outside of jit, a model may be given NumPy arrays.
Matrix = Float[Array | np.ndarray, "O I"]
Weight = Matrix | Int8Weight
Indices = Int[Array | np.ndarray, "*batch"]


def check_weight_format(weight_format: str) -> None:
    """Raises UserError unless `weight_format` is known."""
    if weight_format not in WEIGHT_FORMATS:
        raise UserError(
            f"weight format {weight_format!r} is unknown; use one of {', '.join(WEIGHT_FORMATS)}"
        )


def chosen_format(asked: str | None, stored: str, platform: str) -> str:
    """The weight format that a model is loaded in.

    Args:
        asked: what the user asked for, which always holds; None keeps a model as it is stored where the backend's products
            are as fast in that dtype (`Forms.keeps_dtype`), and else makes it f32.
        stored: "f32", or "bf16" for whatever takes fewer bits: bf16 itself; f16, whose range is too small for the activations
            of models that were trained in bf16; and the blocks of GGUF, which no backend multiplies as they are.
        platform: "cpu", "gpu", "tpu".

    Raises:
        UserError: for an unknown format.
    """
    if asked is not None:
        check_weight_format(asked)
        return asked
    return stored if forms_of(platform).keeps_dtype else "f32"


def compute_dtype(weight_format: str, platform: str) -> Any:
    """The dtype of activations, norms and biases beside weights of this format.

    It is that of the weights; beside int8 it is the backend's choice.
    """
    if weight_format == "int8":
        return forms_of(platform).beside_int8
    return jnp.float32 if weight_format == "f32" else jnp.bfloat16


def quantise(w_OI: Matrix | jax.ShapeDtypeStruct) -> Int8Weight:
    """The nearest int8 weight: `scale = max |row| * (1 / 127)`, `values = round(row * (1 / scale))`, halves to even.

    The error of an element is at most half its row's scale. A row of zeros (or of
    numbers below 2e-36, which become zeros) has scale 1.

    Args:
        w_OI: f32, f16 or bf16. A NumPy array is quantised on the host, piece by piece; a JAX array where it lies,
            and a `jax.ShapeDtypeStruct` gives structs. A sharding on a mesh is kept: the scale is split like the output axis.
    """
    if isinstance(w_OI, np.ndarray):
        return _quantise_on_host(w_OI)
    sharding = w_OI.sharding
    if not isinstance(sharding, jax.sharding.NamedSharding):
        of_values, of_scale = None, None
    else:
        of_values, of_scale = sharding, channel_sharding(sharding)
    if isinstance(w_OI, jax.ShapeDtypeStruct):
        values = jax.ShapeDtypeStruct(w_OI.shape, jnp.int8, sharding=of_values)
        return Int8Weight(
            values, jax.ShapeDtypeStruct(w_OI.shape[:1], jnp.float32, sharding=of_scale)
        )
    on_device = jax.jit(lambda w: _quantised(w.astype(jnp.float32), jnp))
    weight = on_device(w_OI)
    if of_values is None:
        return weight
    return jax.device_put(weight, Int8Weight(of_values, of_scale))


def channel_sharding(sharding: jax.sharding.NamedSharding) -> jax.sharding.NamedSharding:
    """The sharding of one number per output channel, beside a matrix that is split by `sharding`."""
    spec = jax.sharding.PartitionSpec(*sharding.spec[:1])
    return jax.sharding.NamedSharding(sharding.mesh, spec)


def _quantised(w_OI: Any, xp: Any) -> Int8Weight:
    largest_O = xp.max(xp.abs(w_OI), axis=1)
    # XLA turns a division by a constant into a product, NumPy does not: with products the host and the device agree.
    scale_O = xp.where(largest_O < _NEGLIGIBLE, xp.float32(1), largest_O * xp.float32(1 / _LARGEST))
    values = xp.round(w_OI * (xp.float32(1) / scale_O)[:, None])
    return Int8Weight(values.astype(xp.int8), scale_O)


def _quantise_on_host(w_OI: np.ndarray) -> Int8Weight:
    rows = max(1, _PIECE // max(w_OI.shape[1], 1))
    values = np.empty(w_OI.shape, np.int8)
    scale = np.empty(w_OI.shape[:1], np.float32)
    for start in range(0, w_OI.shape[0], rows):
        piece = slice(start, start + rows)
        quantised = _quantised(w_OI[piece].astype(np.float32), np)
        values[piece], scale[piece] = quantised.values, quantised.scale
    return Int8Weight(values, scale)


def dequantise(weight: Int8Weight) -> Matrix:
    """f32: `values * scale`."""
    return weight.values.astype(jnp.float32) * weight.scale[:, None]


def take_rows(weight: Weight, rows: Indices) -> Float[Array, "*batch I"] | Int8Weight:
    """Some output channels of a weight, in its own format. Indices beyond the end read the last one.

    Args:
        weight: array or `Int8Weight`.
        rows: int32.
    """
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0, mode="clip"), weight)


def embed(weight: Weight, tokens: Indices) -> Float[Array, "*batch I"]:
    """Rows of an embedding table as vectors: f32 from an int8 table, else the table's dtype."""
    quantised = isinstance(weight, Int8Weight)
    if not quantised and (tokens.size > 1 or mesh_in_use() is None):
        return jnp.take(weight, tokens, axis=0, mode="clip")
    # To look up a single row is to take a slice, for which XLA copies the whole table: to every GPU if its rows are split, and
    # into another layout on a TPU if it is int8. For two rows it does not.
    flat = tokens.reshape(-1)
    rows = take_rows(weight, jnp.tile(flat, 2) if flat.size == 1 else flat)
    vectors = jnp.asarray(dequantise(rows) if isinstance(rows, Int8Weight) else rows)
    return vectors[: flat.size].reshape(*tokens.shape, -1)


def weight_bytes(params: Any) -> int:
    """Bytes of all parameters, scales included."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
