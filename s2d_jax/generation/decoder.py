"""Strings in, strings and stats out: `SpeculativeDecoder` pairs a target with a draft."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.sampling import Sampling, SamplingParams, one_for_each
from s2d_jax.decode.loop import Decoder
from s2d_jax.generation.checks import opened
from s2d_jax.generation.conversation import Conversation
from s2d_jax.generation.planner import Planner
from s2d_jax.generation.result import GenerationResult
from s2d_jax.generation.session import Session
from s2d_jax.generation.stream import Stream, Timing
from s2d_jax.text.prompts import Prompt, Prompts
from s2d_jax.weights.describe import short_source
from s2d_jax.weights.load import load_draft, load_model
from s2d_jax.weights.model import Model


class SpeculativeDecoder:
    """Generates with a target, made faster by a draft, in batches, inside one compiled loop.

    Args:
        target: the model whose output is wanted; a path or hub id is loaded with `load_model`.
        draft: a sorted draft, or any model of the same vocabulary; a path or hub id is loaded with `load_draft`. None decodes
            plainly on the same engine.
        config: exits, draft length and the like.

    Raises:
        UserError: for different tokenizers, exits that the draft does not have, a tree whose nodes have more children
            than the draft has tokens, `policy="auto"` without a draft, or a value that is no model; and as `load_model` and
            `load_draft`.
    """

    def __init__(
        self,
        target: Model | str | Path,
        draft: Model | str | Path | None = None,
        config: DecodeConfig = DecodeConfig(),  # noqa: B008 (frozen)
    ):
        self.target = opened("target", target, load_model)
        self.draft = None if draft is None else opened("draft", draft, load_draft)
        self.config = config
        self._planner = Planner(self.target, self.draft, config)
        self.exits, self.thresholds = self._planner.exits, self._planner.thresholds
        self.mesh = self._planner.placement.mesh
        self._settled: dict[float, SpeculativeDecoder] = {}

    def __repr__(self) -> str:
        pair = [short_source(self.target.source)]
        pair += [short_source(self.draft.source)] if self.draft is not None else ["no draft"]
        return f"SpeculativeDecoder: target {pair[0]}, draft {pair[1]}\n    {self._way}"

    @property
    def _way(self) -> str:
        """How it decodes, in a few words."""
        config = self.config
        if self.draft is None:
            return f"plain decoding, {self.verify_width} positions in a target pass"
        if config.policy == "auto":
            return "as calibration chose (policy='auto')"
        drafted = f"{config.draft_width} tokens"
        if config.tree is not None:
            drafted = f"trees of {config.tree.nodes} nodes, {config.tree.depth} deep"
        guard = ", guarded" if config.guard else ""
        return f"exits {', '.join(map(str, self.exits))}, up to {drafted} a round{guard}"

    def settled(self, temperature: float) -> SpeculativeDecoder:
        """The decoder that runs at this temperature: this one, or with `policy="auto"` the one that calibration chose.

        Raises:
            UserError: if nothing was calibrated for it.
        """
        planner = self._planner.settled(temperature)
        if planner is self._planner:
            return self
        if temperature not in self._settled:
            chosen = planner.target, planner.draft, planner.config
            self._settled[temperature] = SpeculativeDecoder(*chosen)
        return self._settled[temperature]

    @property
    def verify_width(self) -> int:
        """The most positions that one target pass computes; give it to the `DecodeConfig` of a width-matched reference."""
        return self._planner.verify_width

    def generate(
        self,
        prompts: Prompts,
        sampling: Sampling = None,
        *,
        time_phases: bool = False,
        time_rounds: bool = False,
    ) -> GenerationResult:
        """Generates for all prompts in one batch.

        Args:
            prompts: one prompt, or a sequence of them. A prompt is a text, which gets a BOS where the tokenizer puts one before
                texts and the text does not begin with it; a conversation (a list of messages with role and content), which goes
                through the chat template; or token ids (a list, or a 1-D array), taken as they are. A 2-D array of integers has
                a prompt in each row.
            sampling: one for each prompt; or one for all, and then row i uses `seed + i`. None is greedy.
            time_phases: wait between prefill and decoding, to time them apart.
            time_rounds: time drafting, verification and the rest apart, by running each as its own program and waiting for it.
                The phases add up to the total of this call, which is longer than with one loop on the device.

        Raises:
            UserError: for no prompts, a value that is no prompt, an empty prompt, one that fills the target's context, ids
                outside the vocabulary, stop strings without a tokenizer, or a value that is no `SamplingParams`.
        """
        timing = Timing(prefill=time_phases, rounds=time_rounds)
        return Stream(Session(), self._planner.plan(prompts, sampling), timing=timing).finish()

    def stream(
        self,
        prompts: Prompts,
        sampling: Sampling = None,
        *,
        rounds_per_look: int = 8,
    ) -> Stream:
        """Generates the same tokens as `generate`, and gives them out as they come.

        Args:
            prompts, sampling: as for `generate`.
            rounds_per_look: how many rounds the device runs, at first fewer, before the host looks at what is new.

        Returns:
            An iterator over `Delta`s. At its end `result` is what `generate` returns; `finish()` runs to the end at once.
            Closing it stops decoding and frees the caches.
        """
        plan = self._planner.plan(prompts, sampling)
        return Stream(Session(), plan, rounds_per_look=rounds_per_look)

    def conversation(self) -> Conversation:
        """Generations on the same caches: only the new part of each prompt is computed."""
        return Conversation(self._planner)

    def warmup(
        self,
        buckets: Sequence[int] = (64,),
        batch_sizes: Sequence[int] = (1,),
        sampling: SamplingParams | None = None,
    ) -> float:
        """Compiles what `generate` and `stream` will need, and runs it for one round.

        Args:
            buckets: prompt lengths; programs serve all lengths of the same bucket (32, 48, 64, 96, 128, 192, ...).
            batch_sizes: prompts per call.
            sampling: what is compiled depends on `max_new_tokens` and on whether the temperature is 0; the rest may change
                later. None is greedy.

        Returns:
            Wall seconds spent. With a persistent compilation cache (`use_compile_cache`) a later process spends few.
        """
        started = time.perf_counter()
        (row,) = one_for_each(sampling, 1)
        for batch in batch_sizes:
            for length in buckets:
                prompts = [[0] * min(length, self.target.config.max_context - 1)] * batch
                with self.stream(prompts, dataclasses.replace(row, stop=())) as stream:
                    for _ in itertools.islice(stream, batch + 1):
                        pass
        return time.perf_counter() - started

    def encode(self, prompt: Prompt, name: str = "the prompt") -> list[int]:
        """The token ids of one prompt that can be answered; UserError as in `generate`, with `name` for the prompt."""
        return self._planner.encode(prompt, name)

    def prepare(self, prompts: Prompts, sampling: Sampling = None) -> tuple[Decoder, int, tuple]:
        """What `generate` would run: static decoder, prompt width, and `(params, request, tokens_BC, length_B)`."""
        plan = self._planner.plan(prompts, sampling)
        kept = [0] * len(plan.prompts)
        width = plan.width(kept)
        arrays = plan.arrays(plan.capacity(kept, width))
        return plan.decoder, width, (plan.params, plan.request, *arrays)
