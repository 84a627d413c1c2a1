"""From prompts and sampling parameters to what the compiled programs are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import jax.numpy as jnp
import numpy as np

from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.model import ModelConfig
from s2d_jax.config.sampling import Sampling, SamplingParams, one_for_each
from s2d_jax.decode.loop import Decoder
from s2d_jax.draft.guard import allowance
from s2d_jax.draft.length import DraftingArrays
from s2d_jax.draft.request import Request
from s2d_jax.errors import UserError
from s2d_jax.generation.build import build_decoder
from s2d_jax.generation.checks import check_pair, resolve_exits, vocabulary_of
from s2d_jax.generation.placement import Placement
from s2d_jax.generation.plan import UNLIMITED, Plan
from s2d_jax.generation.policy import load_policy
from s2d_jax.generation.room import check_room, check_width
from s2d_jax.sampling import SamplingArrays, keys_of
from s2d_jax.text.messages import Message
from s2d_jax.text.prompts import (
    OnePrompt,
    Prompt,
    Prompts,
    check_ids,
    is_ids,
    names_of_prompts,
    split_prompts,
)
from s2d_jax.text.tokenizer import Tokenizer
from s2d_jax.weights.model import Model

_STOP_SLOTS = 8
# A prompt of one token, and the token that prefill emits.
_PADDING_LENGTH = 2


class Planner:
    """Plans the calls of one target with one draft.

    Args:
        target, draft, config: as for `SpeculativeDecoder`; raises the same.

    Attributes:
        exits: layers of the draft at which tokens may leave; () without a draft.
        thresholds: the thresholds of these exits.
        placement: where the arrays of a call lie.
    """

    def __init__(self, target: Model, draft: Model | None, config: DecodeConfig):
        if config.policy == "auto" and draft is None:
            raise UserError("policy='auto' chooses how to use a draft; give one, or leave it out")
        self.target, self.draft, self.config = target, draft, config
        self.placement = Placement.beside(target.device_params)
        check_width(target, draft, config)
        self.exits, self.thresholds = resolve_exits(draft, config)
        if draft is not None:
            check_pair(target, draft, self.exits, config)
        self._settled: dict[float, Planner] = {}
        self._params = {
            "target": target.device_params,
            "draft": {} if draft is None else self.placement.put_draft(draft.device_params),
        }

    def settled(self, temperature: float) -> Planner:
        """The planner for this temperature: this one, or with `policy="auto"` the one that calibration chose.

        Raises:
            UserError: if nothing was calibrated for it.
        """
        if self.config.policy is None:
            return self
        if temperature not in self._settled:
            draft, file = self.draft, self.config.policy_file
            assert draft is not None  # a policy needs a draft
            config = load_policy(self.target, draft, temperature, file).config
            chosen = (None, DecodeConfig()) if config is None else (draft, config)
            self._settled[temperature] = Planner(self.target, *chosen)
        return self._settled[temperature]

    @property
    def verify_width(self) -> int:
        """The most positions that one target pass computes; give it to the `DecodeConfig` of a width-matched reference."""
        if self.config.policy == "auto":
            return self.settled(0.0).verify_width
        if self.draft is not None:
            return self.config.full_width
        return self.config.verify_width or 1

    def encode(self, prompt: Prompt, name: str = "the prompt") -> list[int]:
        """The token ids of one prompt that can be answered; UserError, about `name`, as in `SpeculativeDecoder.generate`."""
        # No ids are one prompt here, and an empty one.
        found = split_prompts([prompt] if isinstance(prompt, list) and not prompt else prompt)
        if len(found) > 1:
            raise UserError(f"{len(found)} prompts to encode; give one at a time")
        return self._ids(found[0], name)

    def _ids(self, prompt: OnePrompt, name: str) -> list[int]:
        """The prompt's token ids; messages about it begin with `name`."""
        ids = self._encoded(prompt)
        check_prompt(ids, self.target.config, name, self.target.tokenizer)
        return ids

    def _encoded(self, prompt: OnePrompt) -> list[int]:
        if is_ids(prompt):
            return prompt
        tokenizer = self.target.tokenizer
        if tokenizer is None:
            raise UserError(
                f"prompt {str(prompt)[:40]!r} is text, but {self.target.source} has no tokenizer; give token ids"
            )
        if isinstance(prompt, str):
            return tokenizer.encode_text(prompt)
        return tokenizer.encode_chat(cast("list[Message]", prompt))

    def plan(self, prompts: Prompts, sampling: Sampling) -> Plan:
        """What a call for these prompts asks for; UserError as in `SpeculativeDecoder.generate`."""
        found = split_prompts(prompts)
        names = names_of_prompts(len(found))
        prompt_ids = [self._ids(*each) for each in zip(found, names, strict=True)]
        rows = one_for_each(sampling, len(prompt_ids))
        settled = self.settled(_hottest(rows))
        if settled is not self:
            return settled.plan(prompt_ids, rows)
        if self.target.tokenizer is None and any(row.stop for row in rows):
            raise UserError(
                f"stop strings are texts, but {self.target.source} has no tokenizer; use stop_token_ids"
            )
        context = self.target.config.max_context
        listed = vocabulary_of(self.draft)
        limits = [
            min(len(ids) + row.max_new_tokens, context)
            for ids, row in zip(prompt_ids, rows, strict=True)
        ]
        # Rows that are done with prefill fill the batch up to what the mesh takes.
        padding = self.placement.padding(len(rows))
        limits += [_PADDING_LENGTH] * padding
        padded = [*rows, *rows[:1] * padding]
        stop_ids = self._stop_ids(padded)
        decoder = self.decoder(greedy=all(row.temperature == 0.0 for row in rows))
        request = Request(
            sampling=SamplingArrays.stack(padded),
            key_B=keys_of([row.seed for row in padded]),
            max_length_B=jnp.asarray(limits, jnp.int32),
            stop_ids_BZ=jnp.asarray(stop_ids),
            exit_threshold_E=jnp.asarray(self.thresholds, jnp.float32),
            max_rounds=jnp.asarray(UNLIMITED, jnp.int32),
            vocabulary_U=None if listed is None else jnp.asarray(listed.ids_U),
            drafting=self._drafting(padded, decoder.drafter.width),
        )
        plan = Plan(
            decoder=decoder,
            params=self._params,
            request=self.placement.put(request),
            rows=rows,
            stop_ids=stop_ids,
            exits=self.exits,
            prompts=prompt_ids,
            padding=padding,
            context=context,
            prefill_chunk=self.config.prefill_chunk,
            initial_room=self.config.initial_room,
            placement=self.placement,
            tokenizer=self.target.tokenizer,
        )
        check_room(plan, self.target, self.draft, self.config)
        return plan

    def decoder(self, *, greedy: bool) -> Decoder:
        """The static decoder; `greedy`: every row has temperature 0."""
        pair, mesh = (self.target, self.draft, self.exits), self.placement.mesh
        return build_decoder(*pair, self.config, greedy=greedy, mesh=mesh)

    def _stop_ids(self, rows: Sequence[SamplingParams]) -> np.ndarray:
        """int32 `[B, Z]`: Z is a multiple of 8, so that few programs serve any number of stop tokens."""
        own = self.target.config.eos_token_ids
        ids = [sorted({*(() if row.ignore_eos else own), *row.stop_token_ids}) for row in rows]
        slots = -(-max(1, *map(len, ids)) // _STOP_SLOTS) * _STOP_SLOTS
        return np.array([row + [-1] * (slots - len(row)) for row in ids], np.int32)

    def _drafting(self, rows: Sequence[SamplingParams], width: int) -> DraftingArrays:
        config = self.config if self.draft is not None else DecodeConfig()
        allowances = [
            allowance(row.max_new_tokens, config) if config.guard else np.inf for row in rows
        ]
        return DraftingArrays.create(config, allowances, width, max(len(self.exits), 1))


def _hottest(rows: Sequence[SamplingParams]) -> float:
    """The highest temperature of a batch, which decides for it: a batch is greedy only if all rows are."""
    return max((row.temperature for row in rows), default=0.0)


def check_prompt(
    ids: list[int], config: ModelConfig, name: str, tokenizer: Tokenizer | None
) -> None:
    """Raises UserError, which begins with `name`, for token ids that a target of this shape cannot answer."""
    check_ids(ids, config.vocab_size, name, tokenizer)
    if len(ids) >= config.max_context:
        raise UserError(
            f"{name} has {len(ids)} tokens, the target's context is {config.max_context}; shorten the prompt"
        )
