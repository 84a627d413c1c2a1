"""Rows over the data axis of a mesh: each group of devices decodes its own rows, and waits for no other group.

Inside of a group the program is that of one device, or of one tensor axis. So a round sends nothing over the data axis, and a
group whose rows are done is done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from s2d_jax.draft.request import Request

ROWS, WHOLE = PartitionSpec("data"), PartitionSpec()


def groups_of(mesh: Mesh | None) -> int:
    """How many groups a batch is split into; 1 without a mesh."""
    return 1 if mesh is None else mesh.shape["data"]


def specs_of(value: Any) -> Any:
    """How an argument of a program is split: parameters (dicts) not, a `Request` by its arrays' names, the rest by rows."""
    if isinstance(value, Request):
        # A name ends in the letters of the array's axes, and B is the axis of rows.
        return jax.tree_util.tree_map_with_path(
            lambda path, _: ROWS if path[-1].name.rpartition("_")[2].startswith("B") else WHOLE,
            value,
        )
    return WHOLE if isinstance(value, dict) else ROWS


def over_groups(function: Callable, mesh: Mesh | None, inputs: tuple) -> Callable:
    """`function`, run by each group on its own rows; itself where there is only one group.

    Args:
        function: takes `inputs`, returns arrays whose first axis is that of rows. Others come back one group after the other.
        mesh: where the inputs lie.
        inputs: as `specs_of` reads them.
    """
    if mesh is None or groups_of(mesh) == 1:
        return function
    # A kernel is refused beside axes that the compiler splits, also where they have one device.
    alone = all(size == 1 for axis, size in mesh.shape.items() if axis != "data")
    return jax.shard_map(
        function,
        mesh=mesh,
        axis_names=set(mesh.axis_names) if alone else {"data"},
        in_specs=tuple(map(specs_of, inputs)),
        out_specs=ROWS,
        check_vma=False,  # the carry of a loop starts with constants, which vary over no axis
    )
