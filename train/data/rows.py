"""From conversations to packed rows, and from (seed, step) to batches.

Tokenizing and packing happen once, before training. Then the rows of a step are a pure function of the seed and the step, so
the state of the data is one integer, whatever the number of hosts.
"""

from __future__ import annotations

import collections
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from s2d_jax.errors import UserError, shown
from s2d_jax.progress.activity import activity
from s2d_jax.text.conversations import read_conversations
from s2d_jax.text.messages import Message
from s2d_jax.text.tokenizer import Tokenizer
from train.config.sections import DataSection
from train.data.cache import (
    ROWS,
    DamagedRows,
    RowsCache,
    cache_directory,
    cache_key,
    read_dataset,
    write_dataset,
)
from train.data.documents import training_turns
from train.data.packing import _fill_rows
from train.data.report import DataReport, source_reports
from train.data.tokenizing import OnProgress, tokenize_all


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
        tokenizer: the model's.
        vocab_size: the model's.
        on_progress: called with what is being done, how much is done, and how much there is to do.

    Returns:
        A map-style dataset of rows of `max_length`: `tokens` (int32), `segment_ids` (int32; 0 is padding), `answer` (bool), and
        `source` (int32), index in `config.paths` of the one source that the row's documents come from.

    Raises:
        UserError: for an unreadable or corrupt source, one with nothing to train on, or for ids beyond `vocab_size`.
    """
    cache = RowsCache(cache_directory(config))
    key = cache_key(config, tokenizer)
    found = cache.find(key)
    if found is None:
        rows, facts = _make_rows(config, tokenizer, on_progress)
        if cache_key(config, tokenizer) != key:
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
    _check_highest(facts["highest_id"], vocab_size, tokenizer, "the model")
    sources = source_reports(config.paths, config.source_weights, facts["counts"])
    return rows, DataReport(sources, told, facts["refusal"])


def check_rows(rows: datasets.Dataset, vocab_size: int, tokenizer: Tokenizer, what: str) -> None:
    """Refuses rows with tokens that a model has no embedding for, which would silently be read as its last one.

    Args:
        rows: as `build_rows` gives them.
        vocab_size: rows of the model's embedding.
        tokenizer: that the rows were made with.
        what: the model; messages name it.

    Raises:
        UserError: naming the highest such token.
    """
    chunks = rows.data.column("tokens").chunks
    _check_highest(
        max(int(chunk.flatten().to_numpy().max()) for chunk in chunks), vocab_size, tokenizer, what
    )


def _check_highest(highest: int, vocab_size: int, tokenizer: Tokenizer, what: str) -> None:
    if highest >= vocab_size:
        raise UserError(
            f"the tokenizer wrote id {highest} ({shown(tokenizer.token(highest))}) in the rows, {what} has "
            f"{vocab_size} tokens, so no embedding for it; give the model its own tokenizer, or take the token out of the "
            "conversations or the chat template"
        )


def _make_rows(
    config: DataSection, tokenizer: Tokenizer, on_progress: OnProgress
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """Rows and facts about them: counts of each source, the highest id, and the template's first refusal."""
    parts, counts, refusals, highest = [], [], [], 0
    for number, path in enumerate(config.paths):
        on_progress(f"reading {Path(path).name}", 0, 1)
        with activity(f"reading {Path(path).name}"):
            unusable: collections.Counter[str] = collections.Counter()
            kept, left_out = _usable(read_conversations(path, unusable), unusable)
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


def _usable(
    conversations: list[list[Message]], unusable: collections.Counter[str]
) -> tuple[list[list[Message]], dict[str, int]]:
    """The parts of conversations to train on, and counts of what was left out; `unusable` counts the rows without any."""
    read = len(conversations) + unusable.total()
    counts = collections.Counter({"conversations": read, "shortened": 0, **unusable})
    kept = []
    for messages in conversations:
        turns, reason = training_turns(messages)
        if reason:
            counts[reason] += 1
            continue
        counts["shortened"] += len(turns) < len(messages)
        kept.append(turns)
    return kept, dict(counts)


def save_rows(rows: datasets.Dataset, directory: Path) -> None:
    """Keeps the rows of a run, so that a resumed run sees the same ones; the directory appears whole or not at all."""
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        write_dataset(rows, partial)
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
        return read_dataset(directory)
    except FileNotFoundError:
        raise UserError(f"{directory} is missing; a resumed run needs its rows: {remedy}") from None
    except DamagedRows as error:
        raise UserError(
            f"{directory} is damaged ({error}); a resumed run needs its rows: {remedy}"
        ) from None
