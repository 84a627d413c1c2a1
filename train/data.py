"""From conversations to packed rows, and from (seed, step) to batches.

Tokenizing and packing happen once, before training; what a step sees is then a pure function of the seed and the step, so
the state of the data is one integer and does not depend on the number of hosts.
"""

from __future__ import annotations

import collections
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import jax
import numpy as np
from jax.sharding import NamedSharding

from s2d_jax.config import UserError
from s2d_jax.conversation_files import Message, read_conversations
from s2d_jax.tokenizer import Tokenizer
from train import tokenizing
from train.config import DataSection
from train.data_cache import (
    ROWS,
    DamagedRows,
    RowsCache,
    cache_directory,
    cache_key,
    read_rows,
    write_rows,
)
from train.data_report import DataReport, source_reports
from train.documents import training_turns
from train.step import Batch
from train.tokenizing import Documents, OnProgress, tokenize_all

# What the rows depend on, beside what the cache knows of itself.
_CODE = (__file__, tokenizing.__file__)


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the indices of the documents of each row, no row above `capacity`.

    A document goes to the fullest row that still holds it (Johnson et al. 1974).

    >>> pack([5, 3, 4, 2], 7)
    [[0, 3], [2, 1]]
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by free space
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        room = next((r for r in range(length, capacity + 1) if with_room[r]), None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, capacity
        else:
            row = with_room[room].pop()
        rows[row].append(index)
        with_room[room - length].append(row)
    return rows


def build_rows(
    config: DataSection,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    on_progress: OnProgress = lambda *_: None,
) -> tuple[datasets.Dataset, DataReport]:
    """The packed rows of all sources of `config`: from the cache, or read, tokenized, packed and kept there.

    Args:
        config: the sources and the length of rows.
        tokenizer: of the model.
        vocab_size: of the model.
        on_progress: told what is being done, how much of it is, and how much there is to do.

    Returns:
        A map-style dataset of rows of `max_length`: `tokens` (int32), `segment_ids` (int32; 0 is padding), `answer` (bool), and
        `source` (int32), the place in `config.paths` of the source that all of the row's documents come from.

    Raises:
        UserError: for an unreadable or corrupt source, one with nothing to train on, or for ids beyond `vocab_size`.
    """
    cache = RowsCache(cache_directory(config))
    key = cache_key(config, tokenizer, _CODE)
    found = cache.find(key)
    if found is None:
        rows, facts = _make_rows(config, tokenizer, on_progress)
        if cache_key(config, tokenizer, _CODE) != key:
            raise UserError(
                f"data.paths={config.paths}: a file changed while it was read; start again once it is whole"
            )
        try:
            cache.keep(key, rows, facts)
            told = f"kept for later runs in {cache.directory / key / ROWS}"
        except OSError as error:  # the run keeps its own copy, so it goes on
            told = f"not kept for later runs: {error.strerror} in {cache.directory}"
    else:
        (rows, facts), told = found, f"read from the cache, {cache.directory / key / ROWS}"
    if facts["highest_id"] >= vocab_size:
        raise UserError(
            f"the tokenizer wrote id {facts['highest_id']}, the model has {vocab_size}; give the model its own tokenizer"
        )
    sources = source_reports(config.paths, config.source_weights, facts["counts"])
    return rows, DataReport(sources, told, facts["refusal"])


def _make_rows(
    config: DataSection, tokenizer: Tokenizer, on_progress: OnProgress
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """Rows, and what is told of them: counts of each source, the highest id, and the first refusal of the template."""
    parts, counts, refusals, highest = [], [], [], 0
    for number, path in enumerate(config.paths):
        on_progress(f"reading {Path(path).name}", 0, 1)
        kept, left_out = _usable(read_conversations(path))
        if not kept:
            raise UserError(f"{path}: no conversation has a user turn and an answer; check it")
        documents = tokenize_all(
            kept,
            tokenizer,
            max_length=config.max_length,
            num_proc=config.num_proc,
            on_progress=on_progress,
        )
        refusals += documents.refused
        if len(documents.refused) == len(kept):
            raise UserError(f"{path}: no conversation is left; {documents.refused[0]}")
        trained = documents.trained
        if not trained.any():
            raise UserError(
                f"{path}: data.max_length={config.max_length} leaves no answer in any conversation; raise it"
            )
        highest = max(highest, int(documents.tokens.max()))
        columns = _fill_rows(documents, np.flatnonzero(trained), config.max_length)
        rows = len(columns["tokens"])
        parts.append({**columns, "source": np.full(rows, number, np.int32)})
        too_long = documents.whole_lengths > config.max_length
        counts.append(
            {
                **left_out,
                "refused_by_template": len(documents.refused),
                "documents": len(trained),
                "truncated": int((too_long & trained).sum()),
                "truncated_before_any_answer": int((~trained).sum()),
                "rows": rows,
                "tokens": int((columns["segment_ids"] > 0).sum()),
                "answer_tokens": int(columns["answer"].sum()),
            }
        )
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    facts = {"counts": counts, "highest_id": highest, "refusal": next(iter(refusals), "")}
    return datasets.Dataset.from_dict(joined), facts


def _usable(conversations: list[list[Message]]) -> tuple[list[list[Message]], dict[str, int]]:
    """The parts of conversations to train on, and counts of what was left out."""
    counts = collections.Counter({"conversations": len(conversations), "shortened": 0})
    kept = []
    for messages in conversations:
        turns, reason = training_turns(messages)
        if reason:
            counts[reason] += 1
            continue
        counts["shortened"] += len(turns) < len(messages)
        kept.append(turns)
    return kept, dict(counts)


def _fill_rows(documents: Documents, chosen: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """The columns `tokens`, `segment_ids` and `answer` of the packed rows of `chosen` documents, `[rows, length]` each."""
    packed = pack(documents.lengths[chosen].tolist(), length)
    columns = {
        "tokens": np.zeros((len(packed), length), np.int32),
        "segment_ids": np.zeros((len(packed), length), np.int32),
        "answer": np.zeros((len(packed), length), bool),
    }
    for row, members in enumerate(packed):
        start = 0
        for segment, index in enumerate(chosen[members], start=1):
            own = slice(documents.starts[index], documents.starts[index + 1])
            stop = start + own.stop - own.start
            columns["tokens"][row, start:stop] = documents.tokens[own]
            columns["answer"][row, start:stop] = documents.answer[own]
            columns["segment_ids"][row, start:stop] = segment
            start = stop
    return columns


def save_rows(rows: datasets.Dataset, directory: Path) -> None:
    """Keeps the rows of a run, so that a resumed run sees the same ones; the directory appears whole or not at all."""
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        write_rows(rows, partial)
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_rows(directory: Path) -> datasets.Dataset:
    """What `save_rows` kept, byte by byte.

    Raises:
        UserError: if it is missing or damaged.
    """
    remedy = "copy the rows of the cache entry that data.json names there, or start another run"
    try:
        return read_rows(directory)
    except FileNotFoundError:
        raise UserError(f"{directory} is missing; a resumed run needs its rows: {remedy}") from None
    except DamagedRows as error:
        raise UserError(
            f"{directory} is damaged ({error}); a resumed run needs its rows: {remedy}"
        ) from None


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
    """The rows of an epoch: those of a source of weight 2.25 twice each, and a quarter of them, drawn by `seed`, once more.

    Args:
        indices: rows to train on; those held out are drawn before, so that no copy of one is trained on.
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
    """The `batch_size` rows of a step: epochs are permutations by (seed, epoch), their incomplete last batch is left out."""
    steps_per_epoch = len(indices) // batch_size
    epoch, position = divmod(step, steps_per_epoch)
    order = np.random.default_rng((seed, 2, epoch)).permutation(len(indices))
    return indices[order[position * batch_size : (position + 1) * batch_size]]


def make_batch(rows: datasets.Dataset, indices: np.ndarray, sharding: NamedSharding) -> Batch:
    """The rows `indices` on the mesh; each process reads only the rows of its own devices.

    An index of -1 is a row that counts nothing (to fill up an evaluation's last batch).
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
