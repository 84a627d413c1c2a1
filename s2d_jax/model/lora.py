"""Low-rank adapters on the trunk (Hu et al. 2021): beside a kernel `[O, I]` lie `lora_a` `[R, I]` and `lora_b` `[O, R]`, and
the layer computes with `kernel + lora_b @ lora_a`. The scale is 1, which PEFT writes as `lora_alpha = r`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key

from s2d_jax.errors import UserError
from s2d_jax.formats.names import FINAL_NORM, PROJECTIONS, WeightName, get_weight
from s2d_jax.model.params import Params
from s2d_jax.model.products.weight_formats import Int8Weight

FACTORS = ("lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which kernels of every layer have low-rank adapters.

    Attributes:
        rank: R, the rank of every adapter.
        targets: names of projections.

    Raises:
        UserError: for a rank below 1, or no, repeated or unknown targets.
    """

    rank: int
    targets: tuple[str, ...] = tuple(PROJECTIONS)

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"LoRA rank={self.rank} must be at least 1; for example 16")
        targets = self.targets
        if not targets or len(set(targets)) < len(targets) or not set(targets) <= set(PROJECTIONS):
            raise UserError(
                f"LoRA targets={targets} must be some of {', '.join(PROJECTIONS)}, each once"
            )


def _modules(tree: Params) -> Iterator[tuple[WeightName, dict[str, Any]]]:
    """The dict that holds each projection's kernel, with the kernel's name."""
    for i in range(sum(name.startswith("layers_") for name in tree)):
        for projection in PROJECTIONS.values():
            name = projection.at_layer(i)
            yield name, get_weight(tree, dataclasses.replace(name, ours=name.ours[:-1]))


def _copied(tree: Any) -> Any:
    """New dicts around the same leaves."""
    return {key: _copied(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def _with_factors(tree: Params, lora: LoraConfig, factors_of: Callable) -> Params:
    added = _copied(tree)
    for name, module in _modules(added):
        if name.ours[-2] in lora.targets:
            module |= dict(zip(FACTORS, factors_of(module["kernel"]), strict=True))
    return added


def with_lora(tree: Params, lora: LoraConfig | None) -> Params:
    """`abstract_params` or `logical_axes` of a model, with the shapes or axes of its adapters; None adds none."""
    if lora is None:
        return tree

    def factors_of(kernel: Any) -> tuple[Any, Any]:
        if isinstance(kernel, tuple):
            return ("rank", kernel[1]), (kernel[0], "rank")
        out_dim, in_dim = kernel.shape
        new = lambda *shape: jax.ShapeDtypeStruct(shape, kernel.dtype)  # noqa: E731
        return new(lora.rank, in_dim), new(out_dim, lora.rank)

    return _with_factors(tree, lora, factors_of)


def init_lora(params: Params, lora: LoraConfig, key: Key[Array, ""]) -> Params:
    """`params` with adapters that change nothing yet: `lora_a` uniform within 1 / sqrt(I), `lora_b` zero.

    Source: PEFT's `LoraLayer.reset_lora_parameters`, Kaiming's uniform with a = sqrt(5).

    Args:
        params: arrays; the adapters get the dtype of the norms, and are split as their kernels are.
        lora: which kernels, and the rank.
        key: for the random numbers.
    """
    dtype = get_weight(params, FINAL_NORM).dtype
    keys = iter(jax.random.split(key, len(params) * len(PROJECTIONS)))

    def factors_of(kernel_OI: Any) -> tuple[jax.Array, jax.Array]:
        (out_dim, in_dim), own_key = kernel_OI.shape, next(keys)
        bound = 1 / math.sqrt(in_dim)
        a_RI = jax.random.uniform(own_key, (lora.rank, in_dim), jnp.float32, -bound, bound)
        return placed_beside(kernel_OI, a_RI.astype(dtype), jnp.zeros((out_dim, lora.rank), dtype))

    return _with_factors(params, lora, factors_of)


def placed_beside(
    kernel_OI: Any, a_RI: Float[Array, "R I"], b_OR: Float[Array, "O R"]
) -> tuple[Float[Array, "R I"], Float[Array, "O R"]]:
    """The factors on the kernel's mesh: each shares one axis with the kernel, and is split along it like the kernel."""
    values = kernel_OI.values if isinstance(kernel_OI, Int8Weight) else kernel_OI
    sharding = getattr(values, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return jnp.asarray(a_RI), jnp.asarray(b_OR)
    of_out, of_in = (*sharding.spec, None, None)[:2]
    specs = PartitionSpec(None, of_in), PartitionSpec(of_out, None)
    return jax.device_put((a_RI, b_OR), tuple(NamedSharding(sharding.mesh, s) for s in specs))


def add_factors(params: Params, factors: dict[tuple[str, ...], tuple[Any, Any]]) -> Params:
    """`params` with `factors`, given by the path of their kernel, beside the kernels and in the dtype of the norms."""
    added, dtype = _copied(params), get_weight(params, FINAL_NORM).dtype
    for name, module in _modules(added):
        if name.ours in factors:
            a_RI, b_OR = (jnp.asarray(factor, dtype) for factor in factors[name.ours])
            module |= dict(zip(FACTORS, placed_beside(module["kernel"], a_RI, b_OR), strict=True))
    return added


def lora_of(params: Params) -> LoraConfig | None:
    """The adapters that `params` hold; None without any."""
    found = [(name.ours[-2], module["lora_a"]) for name, module in _adapted(params)]
    if not found:
        return None
    present = {target for target, _ in found}
    return LoraConfig(found[0][1].shape[0], tuple(t for t in PROJECTIONS if t in present))


def _adapted(params: Params) -> Iterator[tuple[WeightName, dict[str, Any]]]:
    return ((name, module) for name, module in _modules(params) if "lora_a" in module)


def factors_in(params: Params) -> dict[tuple[str, ...], tuple[Any, Any]]:
    """The adapters that `params` hold: path of the kernel -> `(lora_a, lora_b)`."""
    return {name.ours: (m["lora_a"], m["lora_b"]) for name, m in _adapted(params)}


def merge_lora(params: Params) -> Params:
    """`params` with every adapter folded into its kernel: `kernel + lora_b @ lora_a`, computed in f32.

    All other leaves are shared.

    Raises:
        UserError: for int8 kernels, which would lose the adapters to rounding.
    """
    merged = _copied(params)
    for name, module in _adapted(merged):
        a_RI, b_OR = (module.pop(factor) for factor in FACTORS)
        if isinstance(module["kernel"], Int8Weight):
            path = ".".join(name.ours)
            raise UserError(f"LoRA cannot be folded into {path}, which is int8; fold it in before")
        if not isinstance(module["kernel"], jax.ShapeDtypeStruct):
            module["kernel"] = merged_kernel(module["kernel"], a_RI, b_OR)
    return merged


@jax.jit
def merged_kernel(
    kernel_OI: Float[Array, "O I"], a_RI: Float[Array, "R I"], b_OR: Float[Array, "O R"]
) -> Float[Array, "O I"]:
    """`kernel + b @ a` in the dtype of the kernel, computed in f32."""
    a_RI, b_OR = a_RI.astype(jnp.float32), b_OR.astype(jnp.float32)
    change_OI = jnp.matmul(b_OR, a_RI, precision=jax.lax.Precision.HIGHEST)
    return (kernel_OI.astype(jnp.float32) + change_OI).astype(kernel_OI.dtype)
