"""Meshes and shardings: one table maps the logical axes of parameters, optimizer state and batches to mesh axes."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from s2d_jax.config.mesh import MESH_AXES as MESH_AXES
from s2d_jax.config.mesh import MeshConfig as MeshConfig
from s2d_jax.config.model import ModelConfig
from s2d_jax.errors import UserError, shown

MeshAxes = str | tuple[str, ...] | None

# Tensor parallelism splits what a block computes independently (heads, hidden units, vocabulary); FSDP splits the other axis.
RULES: dict[str, MeshAxes] = {
    "batch": ("data", "fsdp"),
    "length": None,
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffw": "tensor",
    "embed": "fsdp",
    "norm": None,
    "rank": None,
}


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """A mesh with axes `data`, `fsdp`, `tensor` over the first devices.

    Where the devices lie in several slices, neighbours along `fsdp` and `tensor` are in one slice, and the slices are the
    outer part of the `data` axis.

    Raises:
        UserError: if there are fewer devices than the mesh asks for, if the mesh would leave a process out, or if the data
            axis does not divide over the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    count = config.data * config.fsdp * config.tensor
    shape = dict(zip(MESH_AXES, config.shape, strict=True))
    if count > len(devices):
        raise UserError(
            f"mesh {shape} needs {count} devices, {len(devices)} are present; make an axis smaller"
        )
    if count < len(devices) and len(_groups(devices, "process_index")) > 1:
        raise UserError(
            f"mesh {shape} takes {count} of {len(devices)} devices, which belong to several processes; "
            "make it take all, so that every process has a part"
        )
    devices = devices[:count]
    # Explicit axes (the default of jax.make_mesh) are refused by Linen under tensor parallelism.
    auto = (AxisType.Auto,) * len(MESH_AXES)
    slices = config.slices or len(_groups(devices, "slice_index"))
    if slices == 1:
        return jax.make_mesh(config.shape, MESH_AXES, axis_types=auto, devices=devices)
    return Mesh(_hybrid(config, slices, devices), MESH_AXES, axis_types=auto)


def check_mesh(mesh: Any) -> None:
    """Raises UserError unless `mesh` is None, or a mesh with the axes that `make_mesh` gives it."""
    if mesh is None:
        return
    if not isinstance(mesh, Mesh):
        kind = type(mesh).__name__
        raise UserError(
            f"mesh={shown(mesh)} ({kind}) is no mesh; give make_mesh(MeshConfig(tensor=2)), or None"
        )
    if missing := [axis for axis in MESH_AXES if axis not in mesh.axis_names]:
        raise UserError(
            f"the mesh has the axes {', '.join(map(str, mesh.axis_names))}, without {missing[0]}; make it with make_mesh"
        )


def _groups(devices: list, attribute: str) -> set:
    return {getattr(device, attribute, 0) for device in devices}


def _hybrid(config: MeshConfig, slices: int, devices: list) -> np.ndarray:
    """Devices in the mesh's shape; where the platform has no slices, each process counts as one."""
    config.check_slices(slices)
    by_process = len(_groups(devices, "slice_index")) == 1
    groups = len(_groups(devices, "process_index" if by_process else "slice_index"))
    if groups != slices:
        kind = "processes" if by_process else "slices"
        raise UserError(
            f"mesh.slices={slices}, but the devices lie in {groups} {kind}; set it to {groups}, or to 1"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (config.data // slices, config.fsdp, config.tensor),
        (slices, 1, 1),
        devices,
        process_is_granule=by_process,
    )


def partition_spec(axes: tuple[str, ...], rules: dict[str, MeshAxes] = RULES) -> PartitionSpec:
    """The mesh axes of an array with these logical axes; inside of a `jax.shard_map`, only those that it has not split.

    Raises:
        ValueError: for a logical axis without a rule.
    """
    for axis in axes:
        if axis not in rules:
            raise ValueError(f"no rule for axis {axis!r}; have {sorted(rules)}")
    split = jax.sharding.get_abstract_mesh().manual_axes

    def left(names: MeshAxes) -> MeshAxes:
        if isinstance(names, str):
            return None if names in split else names
        return None if names is None else tuple(name for name in names if name not in split)

    return PartitionSpec(*(left(rules[axis]) for axis in axes))


def params_sharding(config: ModelConfig, logical_axes: Any, mesh: Mesh) -> Any:
    """The tree of `NamedSharding` for the parameters of `config`.

    Args:
        config: the model's shape, to check that every split axis divides evenly.
        logical_axes: `s2d_jax.model.params.logical_axes(config)`.
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


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays `[batch, length]`: rows over `data` and `fsdp`."""
    return NamedSharding(mesh, partition_spec(("batch", "length")))


def axes_that_split_rows() -> tuple[str, ...]:
    """The axes of the mesh of `jax.set_mesh` that split a batch over several devices; none without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return () if mesh.empty else tuple(x for x in RULES["batch"] or () if mesh.shape[x] > 1)


def over_rows(x: jax.Array) -> jax.Array:
    """Keeps activations `[B, ...]` split over rows where a mesh is set with `jax.set_mesh`; elsewhere nothing happens, and
    nothing inside of a `jax.shard_map`, where rows are split already.

    Without this, XLA splits activations like the parameters that they are multiplied with. With `fsdp`, every device would
    then compute all rows with a part of the weights, attention included.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(("batch",)))


def looked_up_over_rows(h_BTD: jax.Array) -> jax.Array:
    """`over_rows` for states that were just looked up in a table whose features are split over `fsdp`.

    XLA leaves such states split over features. It cannot go from there to rows over `data` and `fsdp` in one move and would
    first copy all of them to every device, also for the gradient. In two moves, features go to rows within `fsdp` only.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return h_BTD
    features = PartitionSpec("data", None, RULES["embed"])
    return over_rows(jax.lax.with_sharding_constraint(h_BTD, features))


_split_over: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def split_over(mesh: Mesh | None) -> Iterator[None]:
    """Says to `mesh_in_use` which mesh the inputs of the program lie on that is traced in the block.

    It stands inside of the function that is traced, like `backends.compiling_for`. Activations are not constrained by it.
    """
    token = _split_over.set(mesh)
    try:
        yield
    finally:
        _split_over.reset(token)


def mesh_in_use() -> Mesh | AbstractMesh | None:
    """The mesh of `split_over` or of `jax.set_mesh`; None where neither was given, or where nothing is left to split.

    Inside of a `jax.shard_map` it is the mesh there, whose `manual_axes` are split already.
    """
    here = jax.sharding.get_abstract_mesh()
    mesh = here if here.manual_axes else _split_over.get() or here
    return None if mesh.empty or math.prod(free_axes(mesh).values()) == 1 else mesh


def free_axes(mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """The axes of a mesh that no `jax.shard_map` around the caller has split, with their sizes."""
    split = set(mesh.manual_axes)
    return {name: size for name, size in mesh.shape.items() if name not in split}


def kept_split(x: jax.Array, mesh: Mesh | AbstractMesh | None, spec: PartitionSpec) -> jax.Array:
    """`x`, split over the tensor axis of `mesh` as `spec` says; itself inside of a `jax.shard_map` over all axes."""
    if mesh is None:
        return x
    here = jax.sharding.get_abstract_mesh()
    if here.manual_axes:
        if not free_axes(here):
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(here, spec))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def gathered_last(x: jax.Array, mesh: Mesh | AbstractMesh | None) -> jax.Array:
    """`x` with its last axis whole on every device of the tensor axis of `mesh`, and its other axes as they are."""
    anyhow = PartitionSpec.UNCONSTRAINED
    return kept_split(x, mesh, PartitionSpec(*(anyhow,) * (x.ndim - 1), None))


def optimizer_sharding(optimizer: Any, abstract_state: Any, params: Any, mesh: Mesh) -> Any:
    """Shardings of an optax state: arrays that belong to a parameter are split like it, counters are on every device.

    Args:
        optimizer: the `optax.GradientTransformation` whose state it is.
        abstract_state: shapes of the state.
        params: the tree of the parameters' shardings.
        mesh: from `make_mesh`.

    Raises:
        ValueError: for an array that belongs to no parameter: no rule says how to split it.
    """

    def of_another(leaf: Any) -> NamedSharding:
        if leaf.ndim:
            raise ValueError(
                f"no rule for optimizer state of shape {leaf.shape}, which belongs to no parameter"
            )
        return replicated(mesh)

    return optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        abstract_state,
        params,
        transform_non_params=of_another,
    )


def put_whole(array: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Places an array, NumPy's or JAX's, that every process holds whole; each takes its own part only.

    `jax.device_put` would first send the whole array between the processes, to check that they agree.
    """
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if isinstance(array, jax.Array) and array.sharding == sharding:
        return array
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):  # NumPy has no keys
        words = put_whole(jax.random.key_data(array), sharding)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(array))
    on_host = np.asarray(array)
    return jax.make_array_from_callback(on_host.shape, sharding, lambda index: on_host[index])


def fetch_whole(tree: Any) -> Any:
    """The arrays of `tree` as NumPy arrays, whole in every process, whichever of them hold their parts."""
    if all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return jax.tree.map(np.asarray, multihost_utils.process_allgather(tree, tiled=True))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device of the mesh holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def is_split(params: Any) -> bool:
    """Whether the devices that hold `params` hold different parts of them, of some array at least."""
    return not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))


def mesh_of(params: Any) -> Mesh | None:
    """The mesh that `params` were placed on, or None for a single device."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None
