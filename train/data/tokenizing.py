"""Turns all conversations of a source into token sequences, in one process or several."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from s2d_jax.errors import UserError
from s2d_jax.text.messages import Message
from s2d_jax.text.tokenizer import Tokenizer
from train.data.documents import documents_of

# Called with what is being done, how much is done, and how much there is to do.
OnProgress = Callable[[str, int, int], None]

_CHUNK = 100


@dataclasses.dataclass(frozen=True)
class Documents:
    """Token sequences, one after another in two arrays.

    Attributes:
        tokens: int32, the tokens of all documents, each cut at the length of a row.
        answer: bool, the same shape: which tokens the assistant writes.
        starts: int64, where each document begins, and finally where the last one ends.
        whole_lengths: int64, tokens of each document before the cut.
        refused: what the template said of each conversation that it refused.
    """

    tokens: np.ndarray
    answer: np.ndarray
    starts: np.ndarray
    whole_lengths: np.ndarray
    refused: tuple[str, ...]

    @property
    def lengths(self) -> np.ndarray:
        """int64, tokens of each document after the cut."""
        return np.diff(self.starts)

    @property
    def trained(self) -> np.ndarray:
        """bool, which documents hold an answer, or the beginning of one."""
        return np.diff(np.concatenate([[0], np.cumsum(self.answer)])[self.starts]) > 0


def tokenize_all(
    conversations: Sequence[list[Message]],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    num_proc: int,
    on_progress: OnProgress,
) -> Documents:
    """The documents of `conversations`, in their order, cut at `max_length`."""
    parts = []
    for part in _chunks_done(conversations, tokenizer, max_length, num_proc):
        parts.append(part)
        done = min(_CHUNK * len(parts), len(conversations))
        on_progress("tokenizing", done, len(conversations))
    lengths = np.concatenate([np.diff(part.starts) for part in parts])
    return Documents(
        tokens=np.concatenate([part.tokens for part in parts]),
        answer=np.concatenate([part.answer for part in parts]),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        whole_lengths=np.concatenate([part.whole_lengths for part in parts]),
        refused=tuple(reason for part in parts for reason in part.refused),
    )


def _chunks_done(
    conversations: Sequence[list[Message]], tokenizer: Tokenizer, max_length: int, num_proc: int
) -> Iterator[Documents]:
    chunks = (conversations[i : i + _CHUNK] for i in range(0, len(conversations), _CHUNK))
    if num_proc == 1:
        yield from (_chunk(chunk, tokenizer, max_length) for chunk in chunks)
        return
    # Not forked: JAX runs threads by now, and a fork would copy their locks.
    context = multiprocessing.get_context("spawn")
    start = (_start_worker, (tokenizer, max_length))
    with concurrent.futures.ProcessPoolExecutor(num_proc, context, *start) as pool:
        yield from pool.map(_worker_chunk, chunks)


_worker: tuple[Tokenizer, int] | None = None


def _start_worker(tokenizer: Tokenizer, max_length: int) -> None:
    global _worker
    _worker = (tokenizer, max_length)


def _worker_chunk(conversations: Sequence[list[Message]]) -> Documents:
    assert _worker is not None, "_start_worker runs first"
    return _chunk(conversations, *_worker)


def _chunk(
    conversations: Sequence[list[Message]], tokenizer: Tokenizer, max_length: int
) -> Documents:
    found, refused = [], []
    for messages in conversations:
        try:
            found += documents_of(messages, tokenizer)
        except UserError as error:
            refused.append(str(error))
    ids = [document[0][:max_length] for document in found]
    answers = [document[1][:max_length] for document in found]
    flat = itertools.chain.from_iterable
    return Documents(
        tokens=np.fromiter(flat(ids), np.int32),
        answer=np.fromiter(flat(answers), bool),
        starts=np.cumsum([0, *map(len, ids)], dtype=np.int64),
        whole_lengths=np.array([len(document[0]) for document in found], np.int64),
        refused=tuple(refused),
    )
