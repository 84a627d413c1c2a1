"""Many prompts through a decoder in batches of similar length."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from s2d_jax.config.sampling import SamplingParams
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.generation.stats import GenerationStats, sum_stats


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came back for one prompt."""

    text: str
    token_ids: tuple[int, ...]
    stats: GenerationStats


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompt numbers that go together; `padding` rows repeat the first prompt for one token."""

    indices: tuple[int, ...]
    padding: int


@dataclasses.dataclass(frozen=True)
class Job:
    """A batch as a decoder takes it, wherever that decoder is.

    Attributes:
        number: which of the batches that were planned together it is.
        prompts: token ids of its prompts.
        sampling: one for each prompt.
        padding: rows that repeat the first prompt for one token.
    """

    number: int
    prompts: tuple[list[int], ...]
    sampling: tuple[SamplingParams, ...]
    padding: int

    def answers(self, decoder: SpeculativeDecoder) -> list[Answer]:
        return answer_batch(decoder, self.prompts, self.sampling, self.padding)


def plan_batches(lengths: Sequence[int], batch_size: int) -> list[PromptBatch]:
    """Sorts prompts by length and cuts them into batches of one size, so that one program serves all."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    groups = [tuple(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
    full = batch_size if len(groups) > 1 else len(order)
    return [PromptBatch(group, full - len(group)) for group in groups]


def answer_all(
    decoder: SpeculativeDecoder,
    prompts: Sequence[list[int]],
    sampling: Sequence[SamplingParams],
    batch_size: int,
    on_batch: Callable[[int, GenerationStats], None],
) -> list[Answer]:
    """Answers every prompt, in the order given.

    Args:
        decoder: the engine.
        prompts: token ids, as `decoder.encode` gives them.
        sampling: one per prompt.
        batch_size: rows per call.
        on_batch: called after each batch with the number of its prompts and its stats.
    """
    answers: dict[int, Answer] = {}
    for batch in plan_batches([len(prompt) for prompt in prompts], batch_size):
        rows = [prompts[i] for i in batch.indices]
        found = answer_batch(decoder, rows, [sampling[i] for i in batch.indices], batch.padding)
        answers |= zip(batch.indices, found, strict=True)
        on_batch(len(batch.indices), sum_stats([answer.stats for answer in found]))
    return [answers[i] for i in range(len(prompts))]


def answer_batch(
    decoder: SpeculativeDecoder,
    prompts: Sequence[list[int]],
    sampling: Sequence[SamplingParams],
    padding: int,
) -> list[Answer]:
    """Answers prompts in one call, with `padding` rows that repeat the first prompt for one token."""
    rows = [*prompts, *[prompts[0]] * padding]
    short = dataclasses.replace(sampling[0], max_new_tokens=1)
    result = decoder.generate(rows, [*sampling, *[short] * padding])
    return [
        Answer(result.texts[row], tuple(result.token_ids[row]), result.row_stats[row])
        for row in range(len(prompts))
    ]
