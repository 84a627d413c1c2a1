"""Turns of a conversation: the caches of earlier turns serve the later ones."""

from __future__ import annotations

from collections.abc import Iterator

from s2d_jax.config.sampling import Sampling
from s2d_jax.errors import UserError, shown
from s2d_jax.generation.planner import Planner
from s2d_jax.generation.result import GenerationResult
from s2d_jax.generation.session import Session
from s2d_jax.generation.stream import Delta, Stream
from s2d_jax.text.messages import Message
from s2d_jax.text.prompts import Prompts
from s2d_jax.weights.describe import short_source


class Conversation:
    """Generations on the same caches, of target and draft; `SpeculativeDecoder.conversation()` makes one.

    `generate` and `stream` take whole prompts, as those of `SpeculativeDecoder` do. Of each row they compute only the tokens
    after the longest prefix that the caches hold. `ask` and `ask_stream` keep the messages of one conversation.

    Args:
        planner: plans calls for the target and the draft.

    Attributes:
        messages: the questions and answers of `ask` and `ask_stream` so far. Put a system message here first if you want one.
    """

    def __init__(self, planner: Planner):
        self._planner, self._session = planner, Session()
        self.messages: list[Message] = []

    def __repr__(self) -> str:
        last = shown(self.messages[-1]["content"], 60) if self.messages else "none yet"
        source = short_source(self._planner.target.source)
        return f"Conversation: with {source}\n    {len(self.messages)} messages, the last: {last}"

    def generate(
        self,
        prompts: Prompts,
        sampling: Sampling = None,
    ) -> GenerationResult:
        """As `SpeculativeDecoder.generate`; if the number of prompts differs from the last call's, the caches start empty."""
        plan = self._planner.plan(prompts, sampling)
        return Stream(self._session, plan, keep=True).finish()

    def stream(
        self,
        prompts: Prompts,
        sampling: Sampling = None,
        *,
        rounds_per_look: int = 8,
    ) -> Stream:
        """As `SpeculativeDecoder.stream`. What a closed stream has computed is kept for the next call."""
        plan = self._planner.plan(prompts, sampling)
        return Stream(self._session, plan, rounds_per_look=rounds_per_look, keep=True)

    def ask(
        self,
        text: str,
        sampling: Sampling = None,
    ) -> GenerationResult:
        """Adds a user's message, answers it through the chat template, and adds the answer.

        Raises:
            UserError: if the target has no tokenizer, or the conversation fills its context.
        """
        result = self.generate(self._with(text), sampling)
        self._add(text, result)
        return result

    def ask_stream(
        self,
        text: str,
        sampling: Sampling = None,
        *,
        rounds_per_look: int = 8,
    ) -> Iterator[Delta]:
        """As `ask`, but yields `Delta`s as they come; question and answer are added at the end, even if closed early."""
        prompt = self._with(text)
        with self.stream(prompt, sampling, rounds_per_look=rounds_per_look) as stream:
            try:
                yield from stream
            finally:
                if stream.started:
                    self._add(text, stream.result)

    def _with(self, text: str) -> list[Message]:
        if self._planner.target.tokenizer is None:
            raise UserError(f"{text[:40]!r} is text, but the target has no tokenizer; use generate")
        return [*self.messages, {"role": "user", "content": text}]

    def _add(self, text: str, result: GenerationResult) -> None:
        answer = {"role": "assistant", "content": result.texts[0]}
        self.messages += [{"role": "user", "content": text}, answer]
