"""Rows in their order, and batches of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import datasets
import jax
import numpy as np
from jax.sharding import NamedSharding

from s2d_jax.errors import UserError
from train.data.batch import Batch


def split_rows(num_rows: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row indices to train on and to hold out (at least one if `fraction` is above 0), drawn by `seed`.

    Raises:
        UserError: if no row is left to train on.
    """
    held_out = int(np.ceil(num_rows * fraction))
    if held_out >= num_rows:
        raise UserError(
            f"{num_rows} rows leave none to train on with data.held_out_fraction={fraction}; "
            "add data, or lower data.max_length or the fraction"
        )
    order = np.random.default_rng((seed, 1)).permutation(num_rows)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def weighted_rows(
    indices: np.ndarray, sources: np.ndarray, weights: Sequence[float], seed: int
) -> np.ndarray:
    """The rows of an epoch: of a source of weight 2.25 each row twice, and a quarter of the rows, drawn by `seed`, once more.

    Args:
        indices: rows to train on. Held-out rows are removed before, so that no copy of one is trained on.
        sources: the source of every row, also of those that are not in `indices`.
        weights: one per source.
        seed: draws the share.

    Returns:
        int64, ascending, with repetitions; at least one row of each source that has any.
    """
    epoch = []
    for source, weight in enumerate(weights):
        own = indices[sources[indices] == source]
        whole, share = divmod(weight, 1.0)
        extra = round(share * len(own))
        if whole == 0 and len(own):
            extra = max(extra, 1)
        order = np.random.default_rng((seed, 3, source)).permutation(len(own))
        epoch += [own] * int(whole) + [own[order[:extra]]]
    return np.sort(np.concatenate(epoch))


def rows_of_step(step: int, indices: np.ndarray, batch_size: int, seed: int) -> np.ndarray:
    """The `batch_size` rows of a step: epochs are permutations by (seed, epoch), without their incomplete last batch."""
    steps_per_epoch = len(indices) // batch_size
    epoch, position = divmod(step, steps_per_epoch)
    order = np.random.default_rng((seed, 2, epoch)).permutation(len(indices))
    return indices[order[position * batch_size : (position + 1) * batch_size]]


def make_batch(rows: datasets.Dataset, indices: np.ndarray, sharding: NamedSharding) -> Batch:
    """The rows `indices` on the mesh; each process reads only the rows of its own devices.

    An index of -1 is a row of weight 0, which fills up an evaluation's last batch.
    """
    length = len(rows[0]["tokens"])
    cache: dict[bytes, dict[str, np.ndarray]] = {}

    def field(name: str, dtype) -> jax.Array:
        def read(slices):
            chosen = indices[slices[0]]
            if chosen.tobytes() not in cache:
                cache[chosen.tobytes()] = _arrays(rows, chosen)
            return cache[chosen.tobytes()][name].astype(dtype)

        return jax.make_array_from_callback((len(indices), length), sharding, read)

    return Batch(
        tokens_BT=field("tokens", np.int32),
        targets_BT=field("targets", np.int32),
        weights_BT=field("weights", np.float32),
        positions_BT=field("positions", np.int32),
        segment_ids_BT=field("segment_ids", np.int32),
    )


def _arrays(rows: datasets.Dataset, indices: np.ndarray) -> dict[str, np.ndarray]:
    """What `Batch` holds, `[B, T]` each."""
    read = rows.with_format("numpy")[np.maximum(indices, 0)]
    tokens, segments, answer = read["tokens"], read["segment_ids"], read["answer"]
    ahead = lambda x: np.pad(x[:, 1:], ((0, 0), (0, 1)))  # noqa: E731
    same_document = (segments > 0) & (segments == ahead(segments))
    places = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    begins = np.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return {
        "tokens": tokens,
        "targets": ahead(tokens),
        "weights": ahead(answer) & same_document & (indices >= 0)[:, None],
        "positions": places - np.maximum.accumulate(np.where(begins, places, 0), axis=1),
        "segment_ids": segments,
    }


def batches_of(
    indices: np.ndarray, size: int, make: Callable[[np.ndarray], Batch]
) -> Iterator[tuple[np.ndarray, Batch]]:
    """The rows `indices` in batches of `size`, the last filled up with rows of weight 0.

    Yields:
        For each row of the batch its place among `indices` (-1 if it only fills up the batch), and the batch.
    """
    for start in range(0, len(indices), size):
        chosen = indices[start : start + size]
        fill = (0, size - len(chosen))
        places = np.pad(np.arange(start, start + len(chosen)), fill, constant_values=-1)
        yield places, make(np.pad(chosen, fill, constant_values=-1))
