"""How one request is sampled."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

from s2d_jax.config.plain import plain_fields
from s2d_jax.errors import UserError as UserError
from s2d_jax.errors import require, shown


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. `temperature=0` is greedy.

    Filters act in this order, as in Hugging Face generation: temperature, top-k, top-p, min-p. Numbers and sequences may be
    NumPy's; they are kept as Python's.

    Attributes:
        temperature: >= 0; 0 takes the argmax.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set whose probability reaches it; 1 keeps all.
        min_p: drop tokens below `min_p` times the largest probability; 0 keeps all.
        max_new_tokens: at most this many tokens are emitted.
        seed: the request's own random seed.
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
        require(0 <= self.seed < 2**31, f"seed={self.seed} must be in [0, 2**31)")


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
        return [dataclasses.replace(sampling, seed=sampling.seed + i) for i in range(count)]
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
