"""What a session needs to know before its first round."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from s2d_jax.config.sampling import SamplingParams
from s2d_jax.decode.loop import Decoder
from s2d_jax.draft.request import Request
from s2d_jax.generation.buckets import bucket, chunk_width
from s2d_jax.generation.placement import Placement
from s2d_jax.text.tokenizer import Tokenizer

UNLIMITED = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one call asks for, and how large its caches are made.

    Attributes:
        decoder: static.
        params: `{"target": ..., "draft": ...}`.
        request: per-row parameters, on the device.
        rows: the sampling parameters of each row.
        stop_ids: int32, token ids that end each row, as in the request, but on the host.
        exits: the draft's exits in use, for the statistics.
        prompts: token ids of each row.
        padding: rows behind them that the mesh needs and nobody reads: each has a prompt of one token, and ends with prefill.
        context: positions that the target can take.
        prefill_chunk: the most positions that one pass over a prompt computes.
        initial_room: new tokens that the caches have room for at first.
        placement: where the arrays of the call lie.
        tokenizer: the target's; None gives no text.
    """

    decoder: Decoder
    params: Any
    request: Request
    rows: list[SamplingParams]
    stop_ids: np.ndarray
    exits: tuple[int, ...]
    prompts: list[list[int]]
    padding: int
    context: int
    prefill_chunk: int
    initial_room: int
    placement: Placement
    tokenizer: Tokenizer | None

    @property
    def margin(self) -> int:
        """The decoder's margin, rounded up so that a width-matched reference has caches of the same capacity."""
        return -(-self.decoder.margin // 64) * 64

    @property
    def final_capacity(self) -> int:
        """The capacity that holds every row at its limit."""
        kept = [0] * len(self.prompts)
        return self._room_for(kept, self.width(kept), UNLIMITED)

    def width(self, kept: Sequence[int]) -> int:
        """Positions of one pass over the new part of the prompts; the caches hold the first `kept` tokens of each."""
        new = max(len(ids) - held for ids, held in zip(self.prompts, kept, strict=True))
        return chunk_width(new, self.prefill_chunk)

    def capacity(self, kept: Sequence[int], width: int) -> int:
        """Room for the whole last chunk of the prompts, and for the first new tokens."""
        return self._room_for(kept, width, self.initial_room)

    def _room_for(self, kept: Sequence[int], width: int, most_new: int) -> int:
        longest = max(len(ids) for ids in self.prompts)
        new = min(most_new, max(row.max_new_tokens for row in self.rows))
        if any(kept):  # the last chunk ends at most one width behind the prompt
            begin, reached = longest, longest + width
        else:  # at a multiple of the width, so all prompts of a bucket use the same programs
            begin = reached = -(-longest // width) * width
        return bucket(max(reached, min(begin + new, self.context)) + self.margin)

    def arrays(self, capacity: int) -> tuple[Any, Any]:
        """`tokens_BC` with the prompts on the left, and `length_B`, on the device."""
        padding = [1] * self.padding
        tokens = np.zeros((len(self.prompts) + len(padding), capacity), np.int32)
        for row, ids in enumerate(self.prompts):
            tokens[row, : len(ids)] = ids
        lengths = np.array([*map(len, self.prompts), *padding], np.int32)
        return self.placement.put((jnp.asarray(tokens), jnp.asarray(lengths)))
