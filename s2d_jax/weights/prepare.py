"""How weights are laid out for decoding: the one place that decides it, used while loading and on loaded models."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from s2d_jax.backends import platform_of
from s2d_jax.model.lora import merge_lora
from s2d_jax.model.products.linear import format_of
from s2d_jax.model.products.weight_formats import (
    Int8Weight,
    channel_sharding,
    check_weight_format,
    compute_dtype,
    dequantise,
    quantise,
)
from s2d_jax.sharding import mesh_of, put_whole
from s2d_jax.weights.model import Model

ModelT = TypeVar("ModelT", bound=Model)


def prepare_for_decode(model: ModelT, weight_format: str) -> ModelT:
    """The model with its matrices in `weight_format`, for decoding. Low-rank factors are folded into their kernels first.

    Matrices, embedding tables included, are converted one after another; a tied table stays one table. Norms and biases get the
    compute dtype (`s2d_jax.model.products.weight_formats.compute_dtype`). What is already in the format is shared, not copied.

    Args:
        model: a `Model` or `Draft`; its parameters may be `jax.ShapeDtypeStruct`s, for compiling ahead of time.
        weight_format: "f32", "bf16" or "int8".

    Raises:
        UserError: for an unknown format.
    """
    check_weight_format(weight_format)
    params = merge_lora(model.params)
    dtype = compute_dtype(weight_format, platform_of(mesh_of(params)))
    is_weight = lambda x: isinstance(x, Int8Weight)  # noqa: E731
    prepared = jax.tree.map(
        lambda leaf: _converted(leaf, weight_format, dtype), params, is_leaf=is_weight
    )
    return dataclasses.replace(model, params=prepared)


def format_kept(model: Model) -> str:
    """The weight format that a model's matrices are in."""
    return format_of(model.params["embed"]["embedding"])


def load_weight(
    array: np.ndarray, weight_format: str, dtype: Any, sharding: jax.sharding.Sharding | None
) -> Any:
    """One tensor as it came from a file, converted on the host and then placed: only the final size reaches the device.

    Args:
        array: f32, f16 or bf16; matrices are converted to the format, anything else to `dtype`.
        weight_format: "f32", "bf16" or "int8".
        dtype: the compute dtype.
        sharding: how the tensor lies on a mesh; None puts it on the default device.
    """
    weight = _converted(array, weight_format, dtype)
    if not isinstance(weight, Int8Weight):
        return put_whole(weight, sharding)
    of_scale = sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        of_scale = channel_sharding(sharding)
    return Int8Weight(put_whole(weight.values, sharding), put_whole(weight.scale, of_scale))


def _converted(weight: Any, weight_format: str, dtype: Any) -> Any:
    if len(weight.shape) < 2:
        return _cast(weight, dtype)
    if weight_format == "int8":
        return weight if isinstance(weight, Int8Weight) else quantise(weight)
    if isinstance(weight, Int8Weight):
        weight = dequantise(weight)
    return _cast(weight, {"f32": jnp.float32, "bf16": jnp.bfloat16}[weight_format])


def _cast(array: Any, dtype: Any) -> Any:
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, dtype, sharding=array.sharding)
    return array if array.dtype == dtype else array.astype(dtype)
