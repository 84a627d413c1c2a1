"""Shows answers on the screen while they are generated."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from infer.generate.batching import Answer
from s2d_jax.cli.loading import tokenizer_of
from s2d_jax.cli.prompts import Question, encode
from s2d_jax.cli.screen import rule_above
from s2d_jax.cli.wrapping import WrappedText
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.generation.decoder import SpeculativeDecoder


def stream_answers(
    console: Console,
    decoder: SpeculativeDecoder,
    questions: Sequence[Question],
    sampling: Sequence[SamplingParams],
    *,
    raw: bool,
) -> list[list[Answer]]:
    """Answers one question after the other, printing text as it comes; later turns use the caches of earlier ones.

    Args:
        console: where text goes, as it is.
        decoder: the engine.
        questions: each with its turns.
        sampling: one for each question.
        raw: leave the chat template out.

    Returns:
        The answers to the turns of each question.

    Raises:
        UserError: for a first turn that cannot be answered, before any is.
    """
    tokenizer = tokenizer_of(decoder.target)
    for question in questions:
        decoder.encode(encode(tokenizer, question.messages([]), raw=raw), question.name)
    conversations = []
    for question, params in zip(questions, sampling, strict=True):
        conversation, answers = decoder.conversation(), []
        for turn in question.turns:
            if len(questions) > 1 or len(question.turns) > 1:
                console.print(rule_above(turn))
            messages = question.messages([answer.text for answer in answers])
            prompt = encode(tokenizer, messages, raw=raw)
            text = WrappedText(console)
            with conversation.stream([prompt], [params]) as stream:
                for delta in stream:
                    text.write(delta.text)
            text.end()
            result = stream.result
            answers.append(Answer(result.texts[0], tuple(result.token_ids[0]), result.stats))
        conversations.append(answers)
    return conversations
