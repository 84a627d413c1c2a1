"""Walks over the positions that count, in chunks."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from train.objective.labels import Labels


class _Walk(flax.struct.PyTreeNode):
    """The counted positions of each row, brought to its front and cut into chunks.

    Rows stay where they are: positions move within a row, so a batch that is split over devices stays so.

    Attributes:
        order_BS: int32, position of the s-th in this order; the counted ones first, S whole chunks.
        place_BT: int32, the inverse.
        count_B: int32, how many count.
        chunks: int32 scalar, chunks until all rows are through.
        size: C, positions per chunk.
    """

    order_BS: jax.Array
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
        order_BS = jnp.pad(order_BT, ((0, 0), (0, -T % size)))
        return cls(order_BS, place_BT, count_B, -(-jnp.max(count_B) // size), size)

    @property
    def padded_length(self) -> int:
        """S."""
        return self.order_BS.shape[1]

    def _positions(self, i) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(self.order_BS, i * self.size, self.size, axis=1)

    def _gather(self, i, x_BT: jax.Array) -> jax.Array:
        positions_BC = self._positions(i)
        index = positions_BC.reshape(*positions_BC.shape, *(1,) * (x_BT.ndim - 2))
        return jnp.take_along_axis(x_BT, index, axis=1, mode="clip")

    def take(self, i, hiddens: tuple[jax.Array, ...]) -> jax.Array:
        """Chunk `i` of the states, `[E, B, C, D]`."""
        return jnp.stack([self._gather(i, h) for h in hiddens])

    def labels(self, i, labels: Labels) -> Labels:
        """Chunk `i` of the labels; positions that do not count have weight 0."""
        piece = jax.tree.map(lambda x: self._gather(i, x), labels)
        at_C = i * self.size + jnp.arange(self.size, dtype=jnp.int32)
        counted_BC = at_C[None, :] < self.count_B[:, None]
        return piece.replace(weights_BT=jnp.where(counted_BC, piece.weights_BT, 0.0))

    def empty(self, hiddens: tuple[jax.Array, ...]) -> jax.Array:
        """Zeros `[E, B, S, D]` for what `put` writes."""
        B, _, D = hiddens[0].shape
        return jnp.zeros((len(hiddens), B, self.padded_length, D), hiddens[0].dtype)

    def put(self, i, all_EBS: jax.Array, chunk_EBC: jax.Array) -> jax.Array:
        """Writes chunk `i`."""
        return jax.lax.dynamic_update_slice_in_dim(all_EBS, chunk_EBC, i * self.size, axis=2)

    def put_back(self, all_EBS: jax.Array, num_exits: int) -> tuple[jax.Array, ...]:
        """What `put` wrote, every position where it was: one `[B, T, ...]` per exit; 0 where nothing counts."""
        place = self.place_BT.reshape(*self.place_BT.shape, *(1,) * (all_EBS.ndim - 3))
        counts = place < self.count_B.reshape(-1, *(1,) * (place.ndim - 1))
        moved = [
            jnp.take_along_axis(all_EBS[e], place, axis=1, mode="clip") for e in range(num_exits)
        ]
        return tuple(jnp.where(counts, x, jnp.zeros_like(x)) for x in moved)
