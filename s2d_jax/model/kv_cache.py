"""Key/value caches with one length per row: append, advance, rewind; and reading or writing a window of each row.

Positions at or beyond a row's length hold garbage that the next append overwrites, so rewinding is clipping a length. Entries
move only when the accepted path of a tree is put together.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from s2d_jax.backends import forms
from s2d_jax.model.conditional import run_if
from s2d_jax.sharding import kept_split


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of some consecutive layers.

    Attributes:
        keys: one `[B, K, C, H]` array per layer (rotary positions already applied).
        values: one `[B, K, C, H]` array per layer.
        length_B: int32 `[B]`, how many positions of each row are valid.
        states: named states `[B, C, D]` at these positions, for drafters that ask for them (`Drafter.target_states`).
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length_B: jax.Array
    states: dict[str, jax.Array] = flax.struct.field(default_factory=dict)

    @classmethod
    def create(
        cls,
        num_layers: int,
        batch: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        dtype: Any,
        mesh: Mesh | None = None,
    ) -> KVCache:
        """An empty cache; with a `mesh`, K/V heads are split over its tensor axis."""

        def zeros():
            array = jnp.zeros((batch, num_kv_heads, capacity, head_dim), dtype)
            return kept_split(array, mesh, PartitionSpec(None, "tensor"))

        return cls(
            keys=tuple(zeros() for _ in range(num_layers)),
            values=tuple(zeros() for _ in range(num_layers)),
            length_B=jnp.zeros(batch, jnp.int32),
        )

    @property
    def capacity(self) -> int:
        """C, positions of each row that there is room for."""
        return self.keys[0].shape[2]

    def layers(self, start: int, stop: int) -> KVCache:
        """The part of layers [start, stop), counted from this cache's first layer."""
        return KVCache(self.keys[start:stop], self.values[start:stop], self.length_B)

    def write_states(self, states: dict[str, Float[Array, "B T D"]]) -> KVCache:
        """Writes states behind the valid positions."""
        old = tuple(self.states[name] for name in states)
        written = write_caches(old, tuple(states.values()), self.length_B, axis=1)
        return self.replace(states=dict(zip(states, written, strict=True)))

    def rewind(self, length_B: Int[Array, "B"]) -> KVCache:
        """Clips every row to at most `length_B`."""
        return self.replace(length_B=jnp.minimum(self.length_B, length_B))

    def advance_to(self, length_B: Int[Array, "B"]) -> KVCache:
        """Declares the positions below `length_B` valid; the caller has written them."""
        return self.replace(length_B=length_B)

    def keep_path(
        self, start_B: Int[Array, "B"], index_BY: Int[Array, "B Y"], width: int
    ) -> KVCache:
        """Moves the entries at `start + index` to `start`, `start + 1`, ...; see `keep_path`. The length stays."""
        keys, values = (
            tuple(keep_path(x, start_B, index_BY, width, axis=2) for x in arrays)
            for arrays in (self.keys, self.values)
        )
        states = {
            name: keep_path(x, start_B, index_BY, width, axis=1) for name, x in self.states.items()
        }
        return self.replace(keys=keys, values=values, states=states)

    def grow(self, capacity: int) -> KVCache:
        """The same cache with room for `capacity` positions."""
        keys, values = (
            tuple(grow_axis(x, capacity, axis=2) for x in arrays)
            for arrays in (self.keys, self.values)
        )
        states = {name: grow_axis(x, capacity, axis=1) for name, x in self.states.items()}
        return self.replace(keys=keys, values=values, states=states)


def grow_axis(array: Shaped[Array, "..."], size: int, *, axis: int) -> Shaped[Array, "..."]:
    """`array` padded with zeros at the end of `axis` to `size` entries."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, widths)


def write_caches(
    buffers: tuple[jax.Array, ...],
    windows: tuple[jax.Array, ...],
    start_B: Int[Array, "B"],
    *,
    axis: int,
) -> tuple[jax.Array, ...]:
    """`write_window` for arrays that are large and read right after: the form keeps them in place (`s2d_jax.backends`)."""

    def write(buffers):
        return tuple(
            write_window(buffer, window, start_B, axis=axis)
            for buffer, window in zip(buffers, windows, strict=True)
        )

    if len(start_B) > 1 or forms().one_row_write == "plain":
        return write(buffers)
    # XLA does not look through a loop, and cannot know that this one always makes its only trip.
    return run_if(start_B[0] >= 0, write, buffers)


def write_window(
    buffer: Shaped[Array, "B *rest"],
    window: Shaped[Array, "B ..."],
    start_B: Int[Array, "B"],
    *,
    axis: int,
) -> Shaped[Array, "B *rest"]:
    """Writes `window` into each row of `buffer` from `start_B` on, along `axis` (counted with the batch axis)."""
    window, rows = window.astype(buffer.dtype), buffer.shape[0]
    if rows == 1:
        written = jax.lax.dynamic_update_slice_in_dim(buffer, window, start_B[0], axis)
        return _laid_out(written)
    if rows > forms().unrolled_rows:

        def write_row(row, values, start):
            return jax.lax.dynamic_update_slice_in_dim(row, values, start, axis - 1)

        return _laid_out(jax.vmap(write_row)(buffer, window, start_B))
    for row in range(rows):
        starts = _starts(buffer, row, start_B, axis)
        buffer = jax.lax.dynamic_update_slice(buffer, window[row : row + 1], starts)
    return _laid_out(buffer)


def read_window(
    buffer: Shaped[Array, "B *rest"], start_B: Int[Array, "B"], width: int, *, axis: int = 1
) -> Shaped[Array, "B ..."]:
    """The `width` entries of each row of `buffer` from `start_B` on, along `axis` (counted with the batch axis)."""
    if _read_by_rows(buffer):
        # Without the barrier, the TPU compiler gathers a cache that is split over devices before it slices it.
        buffer = jax.lax.optimization_barrier(buffer)
        sizes = list(buffer.shape)
        sizes[0], sizes[axis] = 1, width
        rows = [
            jax.lax.dynamic_slice(buffer, _starts(buffer, row, start_B, axis), sizes)
            for row in range(buffer.shape[0])
        ]
        return _laid_out(jnp.concatenate(rows))

    def read(row, start):
        return jax.lax.dynamic_slice_in_dim(row, start, width, axis - 1)

    return jax.vmap(read)(buffer, start_B)


def _read_by_rows(buffer: jax.Array) -> bool:
    """Whether windows are read row by row, not gathered. More rows than are written so would only take long to compile."""
    chosen = forms()
    return chosen.cache_layout == "row_major" and buffer.shape[0] <= chosen.unrolled_rows


def _starts(buffer: jax.Array, row: int, start_B: jax.Array, axis: int) -> list[jax.Array]:
    """Where the window of a row begins."""
    starts = [jnp.int32(0)] * buffer.ndim
    starts[0], starts[axis] = jnp.int32(row), start_B[row]
    return starts


def _laid_out(array: jax.Array) -> jax.Array:
    """The same array, in the order in memory that the form says."""
    if forms().cache_layout == "chosen":
        return array
    # Constrained with an axis of one entry, an array is gathered where it is split over devices.
    if array.shape[0] == 1:
        return with_layout_constraint(array[0], Layout(tuple(range(array.ndim - 1))))[None]
    return with_layout_constraint(array, Layout(tuple(range(array.ndim))))


def keep_path(
    buffer: Shaped[Array, "B *rest"],
    start_B: Int[Array, "B"],
    index_BY: Int[Array, "B Y"],
    width: int,
    *,
    axis: int,
) -> Shaped[Array, "B *rest"]:
    """Copies the entries `start + index[y]` of each row of `buffer` to `start + y`, along `axis`, in place.

    Args:
        buffer: of any shape after the batch axis.
        start_B: int32.
        index_BY: int32, at least 0 and less than `width`.
        width: `start + width` is at most the capacity.
        axis: counted with the batch axis.
    """
    shape = [1] * buffer.ndim
    shape[0], shape[axis] = index_BY.shape
    if _read_by_rows(buffer):
        among = read_window(buffer, start_B, width, axis=axis)
    else:
        among, index_BY = buffer, start_B[:, None] + index_BY
    kept = _laid_out(jnp.take_along_axis(among, index_BY.reshape(shape), axis=axis))
    # Read completely before anything is written: merged, the two would need a copy of the buffer.
    (written,) = write_caches((buffer,), (jax.lax.optimization_barrier(kept),), start_B, axis=axis)
    return written
