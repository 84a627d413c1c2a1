"""Meshes and shardings: one table maps the logical axes of parameters to mesh axes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from s2d_jax.config import ModelConfig, UserError

MESH_AXES = ("data", "fsdp", "tensor")

# Tensor parallelism splits what a block computes independently (heads, hidden units, vocabulary); FSDP the other axis.
RULES: dict[str, str | None] = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffw": "tensor",
    "embed": "fsdp",
    "norm": None,
    "rank": None,
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each mesh axis has; their product is the number of devices used."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        for axis in MESH_AXES:
            size = getattr(self, axis)
            if size < 1:
                raise UserError(f"mesh.{axis}={size} must be at least 1")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Devices along (data, fsdp, tensor)."""
        return (self.data, self.fsdp, self.tensor)


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """A mesh with axes `data`, `fsdp`, `tensor` over the first devices.

    Raises:
        UserError: if there are fewer devices than the mesh asks for.
    """
    devices = jax.devices() if devices is None else list(devices)
    count = config.data * config.fsdp * config.tensor
    if count > len(devices):
        raise UserError(
            f"mesh {dict(zip(MESH_AXES, config.shape, strict=True))} needs {count} devices, {len(devices)} are present; "
            "make an axis smaller"
        )
    # Explicit axes (the default of jax.make_mesh) are refused by Linen under tensor parallelism.
    auto = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(config.shape, MESH_AXES, axis_types=auto, devices=devices[:count])


def partition_spec(axes: tuple[str, ...], rules: dict[str, str | None] = RULES) -> PartitionSpec:
    """The mesh axes of a parameter with these logical axes.

    Raises:
        ValueError: for a logical axis without a rule.
    """
    for axis in axes:
        if axis not in rules:
            raise ValueError(f"no rule for axis {axis!r}; have {sorted(rules)}")
    return PartitionSpec(*(rules[axis] for axis in axes))


def params_sharding(config: ModelConfig, logical_axes: Any, mesh: Mesh) -> Any:
    """The tree of `NamedSharding` for the parameters of `config`.

    Args:
        config: the model's shape, to check that every split axis divides evenly.
        logical_axes: `s2d_jax.model.logical_axes(config)`.
        mesh: from `make_mesh`.

    Raises:
        UserError: if heads, hidden units, vocabulary or embedding do not divide by the mesh.
    """
    sizes = {
        "vocab_size": (config.vocab_size, "tensor"),
        "num_heads": (config.num_heads, "tensor"),
        "num_kv_heads": (config.num_kv_heads, "tensor"),
        "ffw_dim": (config.ffw_dim, "tensor"),
        "embed_dim": (config.embed_dim, "fsdp"),
    }
    for name, (size, axis) in sizes.items():
        if size % mesh.shape[axis]:
            raise UserError(
                f"{name}={size} does not divide by mesh axis {axis}={mesh.shape[axis]}; choose a divisor of it"
            )
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(
        lambda axes: NamedSharding(mesh, partition_spec(axes)), logical_axes, is_leaf=is_axes
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device of the mesh holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def mesh_of(params: Any) -> Mesh | None:
    """The mesh that `params` were placed on, or None for a single device."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) else None
