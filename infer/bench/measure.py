"""Runs every method on every prompt, in alternation, and records each run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from infer.bench.methods import Method
from s2d_jax.calibration.timing import rotated, warm_run
from s2d_jax.cli.loading import tokenizer_of
from s2d_jax.cli.options import SamplingOptions
from s2d_jax.cli.prompts import Question, encode
from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.decode.timed_rounds import ROUND_PHASES
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.generation.stats import GenerationStats, sum_stats
from s2d_jax.weights.model import Model


@dataclasses.dataclass(frozen=True)
class Sample:
    """One method's answers to all turns of one question.

    Attributes:
        method: its name.
        question_id, category: the question's.
        stats: summed over the turns.
        answers: text per turn.
        compile_seconds: seconds of compiling programs that this run was the first to need; not in `stats`.
        identical: whether all tokens equal the width-matched greedy reference's; None if not asked.
        turns_left_out: later turns that no longer fit into the target's context.
    """

    method: str
    question_id: int | str
    category: str
    stats: GenerationStats
    answers: tuple[str, ...]
    compile_seconds: float
    identical: bool | None
    turns_left_out: int = 0

    @property
    def tokens_per_second(self) -> float:
        """New tokens over wall seconds, prefill included, compilation not."""
        return self.stats.emitted_tokens / self.stats.seconds["total"]

    @property
    def decode_tokens_per_second(self) -> float:
        """The same after prefill, whose token is left out as well."""
        return (self.stats.emitted_tokens - self.stats.rows) / self.stats.seconds["decode"]


class Reference:
    """Greedy tokens of plain decoding whose target pass is as wide as the checked method's.

    Products of another width differ in their last bits, which can change the argmax at near ties.
    """

    def __init__(self, target: Model):
        self._target = target
        self._decoders: dict[int, SpeculativeDecoder] = {}
        self._known: dict[tuple, list[int]] = {}

    def tokens(self, width: int, prompt: list[int], sampling: SamplingParams) -> list[int]:
        """The reference's new tokens after `prompt` with target passes of `width` positions."""
        key = (width, tuple(prompt), sampling)
        if key not in self._known:
            if width not in self._decoders:
                config = DecodeConfig(verify_width=width)
                self._decoders[width] = SpeculativeDecoder(self._target, None, config)
            result = self._decoders[width].generate([prompt], [sampling])
            self._known[key] = result.token_ids[0]
        return self._known[key]


def measure(
    target: Model,
    methods: Sequence[Method],
    questions: Sequence[Question],
    sampling: SamplingOptions,
    *,
    repeats: int,
    raw: bool,
    check_identity: bool,
    on_sample: Callable[[Sample], None],
) -> list[Sample]:
    """Answers each question with each method before the next question.

    The order of the methods rotates, so that none always follows another.

    Args:
        target: the model that all methods decode with.
        methods: what is compared.
        questions: prompts; later turns follow the method's own answer.
        sampling: question number i uses seed + i, in every method.
        repeats: runs of each method on each question.
        raw: leave the chat template out.
        check_identity: compare with the width-matched reference; only meaningful when greedy.
        on_sample: called after each run.

    Raises:
        UserError: for a first turn that is too long, before anything is measured.
    """
    for question in questions:
        prompt = encode(tokenizer_of(target), question.messages([]), raw=raw)
        methods[0].decoder.encode(prompt, question.name)
    reference = Reference(target) if check_identity else None
    samples = []
    for number, question in enumerate(questions):
        for repeat in range(repeats):
            for method in rotated(methods, number + repeat):
                params = sampling.params(number)
                sample = _answer(target, method, question, params, raw, reference)
                samples.append(sample)
                on_sample(sample)
    return samples


def _answer(
    target: Model,
    method: Method,
    question: Question,
    params: SamplingParams,
    raw: bool,
    reference: Reference | None,
) -> Sample:
    answers: list[str] = []
    stats, compile_seconds, identical = [], 0.0, True
    for _ in question.turns:
        prompt = encode(tokenizer_of(target), question.messages(answers), raw=raw)
        if answers and len(prompt) >= target.config.max_context:
            break
        result, spent = warm_run(method.decoder, prompt, params)
        compile_seconds += spent
        answers.append(result.texts[0])
        stats.append(result.stats)
        if reference is not None:
            expected = reference.tokens(method.decoder.verify_width, prompt, params)
            identical = identical and expected == result.token_ids[0]
    return Sample(
        method=method.name,
        question_id=question.question_id,
        category=question.category,
        stats=sum_stats(stats),
        answers=tuple(answers),
        compile_seconds=compile_seconds,
        identical=None if reference is None else identical,
        turns_left_out=len(question.turns) - len(answers),
    )


def round_shares(
    target: Model,
    method: Method,
    questions: Sequence[Question],
    sampling: SamplingOptions,
    *,
    raw: bool,
) -> dict[str, float]:
    """Shares of a round's time that drafting, verification and the rest take, over first turns."""
    seconds = dict.fromkeys(ROUND_PHASES, 0.0)
    for number, question in enumerate(questions):
        prompt = encode(tokenizer_of(target), question.messages([]), raw=raw)
        request = [prompt], [sampling.params(number)]
        method.decoder.generate(*request, time_rounds=True)  # the first run is the warm-up
        spent = method.decoder.generate(*request, time_rounds=True).stats.seconds
        seconds = {phase: total + spent.get(phase, 0.0) for phase, total in seconds.items()}
    whole = sum(seconds.values())
    return {phase: total / whole for phase, total in seconds.items()} if whole else {}
