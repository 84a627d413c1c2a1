"""From conversations to packed rows, and from (seed, step) to batches.

Tokenizing and packing happen once, before training; what a step sees is then a pure function of the seed and the step, so
the state of the data is one integer and does not depend on the number of hosts.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import jax
import numpy as np
from jax.sharding import NamedSharding

from s2d_jax.config import UserError
from s2d_jax.tokenizer import Tokenizer
from train.config import DataSection
from train.conversations import Message, read_conversations, well_formed
from train.step import Batch


@dataclasses.dataclass(frozen=True)
class DataReport:
    """What became of the conversations.

    Attributes:
        conversations: read from the files.
        skipped: without an answer, or whose turns do not alternate.
        truncated: longer than a row, cut at its length.
        dropped: truncated so early that no answer was left.
        rows: packed rows.
        tokens: in them, padding apart.
        counted_tokens: of those, assistant tokens that enter the loss.
    """

    conversations: int
    skipped: int
    truncated: int
    dropped: int
    rows: int
    tokens: int
    counted_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.conversations} conversations ({self.skipped} skipped, {self.truncated} truncated, "
            f"{self.dropped} dropped) -> {self.rows} rows, {self.tokens} tokens, "
            f"{self.counted_tokens} of them answers"
        )


def tokenize(messages: list[Message], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Token ids of a well-formed conversation, and which of them the assistant writes.

    An answer begins where the prompt with its generation prefix ends, as in decoding, and ends with its end-of-turn token;
    without one in the template, where the template's text of that answer ends. An answer that was cut off ends with its
    content: that the turn is over then, no model said.

    Raises:
        UserError: if the template writes a conversation in another way once it goes on.
    """
    cut_off = [bool(message.get("unfinished")) for message in messages]
    messages = [{key: message[key] for key in ("role", "content")} for message in messages]
    ids = tokenizer.encode_chat(messages, add_generation_prompt=False)
    text = tokenizer.render_chat(messages, add_generation_prompt=False)
    mask = [False] * len(ids)
    stops = set(tokenizer.stop_token_ids)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i in answers:
        if not text.startswith(tokenizer.render_chat(messages[:i], add_generation_prompt=True)):
            raise UserError(
                "the tokenizer's chat template rewrites earlier turns as a conversation grows, so answers cannot be told "
                "apart; use a template that only appends"
            )
    starts = [
        _shared_length(ids, tokenizer.encode_chat(messages[:i], add_generation_prompt=True))
        for i in answers
    ]
    for i, start, limit in zip(answers, starts, [*starts[1:], len(ids)], strict=True):
        if cut_off[i]:
            end = max(start, _content_end(messages[: i + 1], ids, tokenizer))
            mask[start:end] = [True] * (end - start)
            continue
        end = next((j + 1 for j in range(start, limit) if ids[j] in stops), None)
        if end is None:
            whole = tokenizer.encode_chat(messages[: i + 1], add_generation_prompt=False)
            end = _shared_length(ids, whole)
        mask[start:end] = [True] * (end - start)
    return ids, mask


def _content_end(messages: list[Message], ids: list[int], tokenizer: Tokenizer) -> int:
    """How many leading tokens of `ids` end no later than the content of the last message; 0 if a template changes it."""
    prompt = tokenizer.render_chat(messages[:-1], add_generation_prompt=True)
    text, content = (
        tokenizer.render_chat(messages, add_generation_prompt=False),
        messages[-1]["content"].strip(),  # many templates strip it
    )
    begin = text.find(content, len(prompt))
    return 0 if begin < 0 else _shared_length(ids, tokenizer.encode(text[: begin + len(content)]))


def _shared_length(first: list[int], second: list[int]) -> int:
    """How many leading ids are equal."""
    for n, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return n
    return min(len(first), len(second))


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
    config: DataSection, tokenizer: Tokenizer, *, vocab_size: int
) -> tuple[datasets.Dataset, DataReport]:
    """Reads, tokenizes and packs all files of `config`.

    Returns:
        A map-style dataset of rows of `max_length`: `tokens` (int32), `segment_ids` (int32; 0 is padding) and `answer` (bool).

    Raises:
        UserError: for an unreadable or corrupt file, when nothing is left to train on, or for ids beyond `vocab_size`.
    """
    read = [row for path in config.paths for row in read_conversations(path)]
    conversations = [kept for row in read if (kept := well_formed(row)) is not None]
    if not conversations:
        raise UserError(f"data.paths={config.paths}: no conversation has a user turn and an answer")

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        ids, answer = tokenize(row["messages"], tokenizer)
        return {
            "tokens": ids[: config.max_length],
            "answer": answer[: config.max_length],
            "length": len(ids),
        }

    documents = datasets.Dataset.from_dict({"messages": conversations}).map(
        encode,
        remove_columns=["messages"],
        num_proc=config.num_proc if config.num_proc > 1 else None,
        desc="tokenizing",
    )
    truncated = sum(length > config.max_length for length in documents["length"])
    kept = documents.filter(lambda row: any(row["answer"]))
    if len(kept) == 0:
        raise UserError(
            f"data.max_length={config.max_length} leaves no answer in any conversation; raise it"
        )
    highest = max(max(row["tokens"]) for row in kept)
    if highest >= vocab_size:
        raise UserError(
            f"the tokenizer wrote id {highest}, the model has {vocab_size}; give the model its own tokenizer"
        )
    rows, counted, tokens = _fill_rows(kept, config.max_length)
    report = DataReport(
        conversations=len(read),
        skipped=len(read) - len(conversations),
        truncated=truncated,
        dropped=len(documents) - len(kept),
        rows=len(rows),
        tokens=tokens,
        counted_tokens=counted,
    )
    return rows, report


def _fill_rows(documents: datasets.Dataset, length: int) -> tuple[datasets.Dataset, int, int]:
    """Packed rows, the number of answer tokens and of all tokens in them."""
    packed = pack([min(n, length) for n in documents["length"]], length)
    documents = documents.with_format("numpy")
    columns = {
        "tokens": np.zeros((len(packed), length), np.int32),
        "segment_ids": np.zeros((len(packed), length), np.int32),
        "answer": np.zeros((len(packed), length), bool),
    }
    for row, members in enumerate(packed):
        start = 0
        for segment, index in enumerate(members, start=1):
            document = documents[index]
            stop = start + len(document["tokens"])
            columns["tokens"][row, start:stop] = document["tokens"]
            columns["answer"][row, start:stop] = document["answer"]
            columns["segment_ids"][row, start:stop] = segment
            start = stop
    counted, real = int(columns["answer"].sum()), int((columns["segment_ids"] > 0).sum())
    return datasets.Dataset.from_dict(dict(columns)), counted, real


def save_rows(rows: datasets.Dataset, directory: Path) -> None:
    """Keeps the rows of a run, so that a resumed run sees the same ones; the directory appears whole or not at all."""
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        rows.save_to_disk(str(partial))
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_rows(directory: Path) -> datasets.Dataset:
    """What `save_rows` kept."""
    try:
        return datasets.load_from_disk(str(directory))
    except FileNotFoundError:
        raise UserError(
            f"{directory} is missing; a resumed run needs its rows, so start another run"
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
