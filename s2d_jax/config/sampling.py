"""How one request is sampled."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from s2d_jax.config.plain import plain_fields
from s2d_jax.errors import UserError as UserError
from s2d_jax.errors import require, shown

LEAST_TEMPERATURE = float(np.finfo(np.float32).tiny)
"""What is below (1.2e-38) is greedy: devices take such numbers for 0."""
LARGEST_ID = 2**31 - 1
NUM_SEEDS = 2**64


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. `temperature=0` is greedy.

    Filters act in this order, as in Hugging Face generation: temperature, top-k, top-p, min-p. Numbers and sequences may be
    NumPy's; they are kept as Python's.

    Attributes:
        temperature: >= 0; 0 takes the argmax, and so does what is below `LEAST_TEMPERATURE`, which becomes 0.
        top_k: keep the k most probable tokens; 0, and more than there are, keeps all.
        top_p: keep the smallest set whose probability reaches it; 1 keeps all.
        min_p: drop tokens below `min_p` times the largest probability; 0 keeps all.
        max_new_tokens: at most this many tokens are emitted; never more than the target's context holds.
        seed: the request's own random seed, 0 to 2**64 - 1.
        stop_token_ids: further ids that end the request, beside the model's own; one, or a sequence.
        ignore_eos: go on after the model's own end-of-sequence tokens (for measurements).
        stop: strings that end the request; one, or a sequence. The text ends before the first of them; the token ids
            end with the one that completes it.

    Raises:
        UserError: for values of a wrong type or outside their range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 128
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        plain_fields(self)
        require(
            all(self.stop), f"stop={self.stop} must be texts that are not empty, such as '\\n\\n'"
        )
        require(
            self.temperature >= 0, f"temperature={self.temperature} must be 0 or more; 0 is greedy"
        )
        require(self.top_k >= 0, f"top_k={self.top_k} must be 0 (off) or more")
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must be in (0, 1]; 1 is off")
        require(0 <= self.min_p < 1, f"min_p={self.min_p} must be in [0, 1); 0 is off")
        require(
            self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens} must be at least 1"
        )
        require(
            0 <= self.seed < NUM_SEEDS,
            f"seed={shown(self.seed)} must be 0 or more, of at most 64 bits",
        )
        outside = [i for i in self.stop_token_ids if not 0 <= i <= LARGEST_ID]
        require(
            not outside,
            f"stop_token_ids: {shown((*outside, 0)[0])} is no token id; ids are 0 to {LARGEST_ID}",
        )
        if self.temperature < LEAST_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)

    def of_row(self, number: int) -> SamplingParams:
        """The parameters of row `number`, from 0, where one is given for all: its seed is `seed + number`, in 64 bits."""
        return dataclasses.replace(self, seed=(self.seed + number) % NUM_SEEDS)


Sampling: TypeAlias = SamplingParams | Sequence[SamplingParams] | None
"""One for all rows, one for each, or None: greedy."""


def one_for_each(sampling: Sampling, count: int) -> list[SamplingParams]:
    """The parameters of `count` rows; one for all gives row i `seed + i`.

    Raises:
        UserError: for anything that is no `Sampling`, or a wrong number of them.
    """
    if sampling is None:
        sampling = SamplingParams()
    if isinstance(sampling, SamplingParams):
        return [sampling.of_row(i) for i in range(count)]
    wrong = [sampling]
    if isinstance(sampling, Sequence) and not isinstance(sampling, str | bytes):
        wrong = [row for row in sampling if not isinstance(row, SamplingParams)]
    if wrong:
        raise UserError(f"sampling={shown(wrong[0])} is no SamplingParams; {_remedy(wrong[0])}")
    if len(sampling) != count:
        raise UserError(
            f"{len(sampling)} sampling parameters for {count} prompts; give one each, or one for all"
        )
    return list(sampling)


def _remedy(value: Any) -> str:
    """What to write instead of `value`."""
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    given = "temperature=0.7, max_new_tokens=128"
    if isinstance(value, dict) and value and value.keys() <= fields:
        given = ", ".join(f"{name}={setting!r}" for name, setting in value.items())
    elif isinstance(value, int | float) and not isinstance(value, bool):
        given = f"temperature={value}"
    return f"write SamplingParams({given})"
