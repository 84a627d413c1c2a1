"""Walks over the positions that count, in chunks."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from train.objective.labels import Labels


class _Walk(flax.struct.PyTreeNode):
    """The counted positions of each row, moved to its front and cut into chunks.

    Positions move within their row only, so a batch that is split over devices stays split.

    Attributes:
        order_BC: int32, the positions in this order, counted ones first; C is a whole number of chunks.
        place_BT: int32, the inverse of `order_BC`.
        count_B: int32, how many positions count.
        chunks: int32 scalar, chunks until every row is done.
        size: W, positions per chunk.
    """

    order_BC: jax.Array
    place_BT: jax.Array
    count_B: jax.Array
    chunks: jax.Array
    size: int = flax.struct.field(pytree_node=False)

    @classmethod
    def over(cls, weights_BT: jax.Array, chunk: int) -> _Walk:
        T = weights_BT.shape[1]
        size = min(chunk, T)
        order_BT = jnp.argsort(weights_BT == 0, axis=1, stable=True).astype(jnp.int32)
        place_BT = jnp.argsort(order_BT, axis=1).astype(jnp.int32)
        count_B = jnp.sum((weights_BT != 0).astype(jnp.int32), axis=1)
        order_BC = jnp.pad(order_BT, ((0, 0), (0, -T % size)))
        return cls(order_BC, place_BT, count_B, -(-jnp.max(count_B) // size), size)

    @property
    def padded_length(self) -> int:
        """C."""
        return self.order_BC.shape[1]

    def _positions(self, i) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(self.order_BC, i * self.size, self.size, axis=1)

    def _gather(self, i, x_BT: jax.Array) -> jax.Array:
        positions_BW = self._positions(i)
        index = positions_BW.reshape(*positions_BW.shape, *(1,) * (x_BT.ndim - 2))
        return jnp.take_along_axis(x_BT, index, axis=1, mode="clip")

    def take(self, i, hiddens: tuple[jax.Array, ...]) -> jax.Array:
        """Chunk `i` of the states, `[E, B, W, D]`."""
        return jnp.stack([self._gather(i, h) for h in hiddens])

    def labels(self, i, labels: Labels) -> Labels:
        """Chunk `i` of the labels; positions that do not count have weight 0."""
        piece = jax.tree.map(lambda x: self._gather(i, x), labels)
        at_W = i * self.size + jnp.arange(self.size, dtype=jnp.int32)
        counted_BW = at_W[None, :] < self.count_B[:, None]
        return piece.replace(weights_BT=jnp.where(counted_BW, piece.weights_BT, 0.0))

    def empty(self, hiddens: tuple[jax.Array, ...]) -> jax.Array:
        """Zeros `[E, B, C, D]`, for `put` to write into."""
        B, _, D = hiddens[0].shape
        return jnp.zeros((len(hiddens), B, self.padded_length, D), hiddens[0].dtype)

    def put(self, i, all_EBC: jax.Array, chunk_EBW: jax.Array) -> jax.Array:
        """Writes chunk `i`."""
        return jax.lax.dynamic_update_slice_in_dim(all_EBC, chunk_EBW, i * self.size, axis=2)

    def put_back(self, all_EBC: jax.Array, num_exits: int) -> tuple[jax.Array, ...]:
        """What `put` wrote, with every position back in place: one `[B, T, ...]` per exit; 0 at positions that do not count."""
        place = self.place_BT.reshape(*self.place_BT.shape, *(1,) * (all_EBC.ndim - 3))
        counts = place < self.count_B.reshape(-1, *(1,) * (place.ndim - 1))
        moved = [
            jnp.take_along_axis(all_EBC[e], place, axis=1, mode="clip") for e in range(num_exits)
        ]
        return tuple(jnp.where(counts, x, jnp.zeros_like(x)) for x in moved)
