"""Strings in, strings and stats out: `SpeculativeDecoder` pairs a target with a draft."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.config.tree import TreeShape
from s2d_jax.decode.loop import Decoder
from s2d_jax.decode.target import Target
from s2d_jax.draft.chain import ChainConfig
from s2d_jax.draft.drafter import Drafter
from s2d_jax.draft.guard import allowance
from s2d_jax.draft.independent import IndependentDrafter
from s2d_jax.draft.length import DraftingArrays
from s2d_jax.draft.none import NoDrafter
from s2d_jax.draft.request import Request
from s2d_jax.draft.segments import Segments
from s2d_jax.draft.sorted import SortedDrafter
from s2d_jax.errors import UserError
from s2d_jax.generation.checks import check_pair, resolve_exits, vocabulary_of
from s2d_jax.generation.conversation import Conversation
from s2d_jax.generation.plan import UNLIMITED, Plan
from s2d_jax.generation.policy import load_policy
from s2d_jax.generation.session import Session
from s2d_jax.generation.stream import GenerationResult, Stream, Timing, growing_rounds
from s2d_jax.model.transformer import Transformer
from s2d_jax.sampling import SamplingArrays
from s2d_jax.sharding import mesh_of, replicated
from s2d_jax.tree.drafter import TreeDrafter
from s2d_jax.tree.growth import Growth
from s2d_jax.tree.loop import TreeDecoder
from s2d_jax.weights.model import Draft, Model

_STOP_SLOTS = 8
# Positions that the draft takes in at once after plain rounds: passes this wide cost least per position (docs/experiments.md).
_RETURN_WIDTH = 32


class SpeculativeDecoder:
    """Generates with a target, made faster by a draft, in batches, inside one compiled loop.

    Args:
        target: the model whose output is wanted.
        draft: a sorted draft, or any model of the same vocabulary; None decodes plainly on the same engine.
        config: exits, draft length and the like.

    Raises:
        UserError: for different tokenizers, exits that the draft does not have, a tree of more children than the draft has
            tokens, or `policy="auto"` without a draft.
    """

    def __init__(
        self,
        target: Model,
        draft: Model | None = None,
        config: DecodeConfig = DecodeConfig(),  # noqa: B008 (frozen)
    ):
        self.target, self.config, self.draft = target, config, draft
        self._settled: dict[float, SpeculativeDecoder] = {}
        if config.policy == "auto" and draft is None:
            raise UserError("policy='auto' chooses how to use a draft; give one, or leave it out")
        self.mesh = mesh_of(target.params)
        self.exits, self.thresholds = resolve_exits(draft, config)
        if draft is not None:
            check_pair(target, draft, self.exits, config)
        self._params = {
            "target": target.params,
            "draft": {} if draft is None else self._place(draft.params),
        }

    def settled(self, temperature: float) -> SpeculativeDecoder:
        """The decoder that really runs at a temperature: this one, or with `policy="auto"` the one that calibration chose.

        Raises:
            UserError: if nothing was calibrated for it.
        """
        if self.config.policy is None:
            return self
        if temperature not in self._settled:
            draft, file = self.draft, self.config.policy_file
            config = load_policy(self.target, draft, temperature, file).config
            chosen = (None, DecodeConfig()) if config is None else (draft, config)
            self._settled[temperature] = SpeculativeDecoder(self.target, *chosen)
        return self._settled[temperature]

    @property
    def verify_width(self) -> int:
        """Positions that one target pass computes at most; give it to the `DecodeConfig` of a width-matched reference."""
        if self.config.policy == "auto":
            return self.settled(0.0).verify_width
        if self.draft is not None:
            return self.config.full_width
        return self.config.verify_width or 1

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008
        *,
        time_phases: bool = False,
        time_rounds: bool = False,
    ) -> GenerationResult:
        """Generates for all prompts in one batch.

        Args:
            prompts: texts, taken as they are; conversations (lists of messages with role and content), which go through the
                chat template; or token ids.
            sampling: one for each prompt; or one for all, and then row i uses `seed + i`.
            time_phases: wait between prefill and decoding, to time them apart.
            time_rounds: time drafting, verification and the rest apart, by running them as programs of their own that are
                waited for one by one. The phases add up to the total of this call, which is longer than with one loop on the
                device.

        Raises:
            UserError: for no prompts, an empty prompt, one that fills the target's context, ids outside the vocabulary, or stop
                strings without a tokenizer.
        """
        timing = Timing(prefill=time_phases, rounds=time_rounds)
        return self._stream(Session(), prompts, sampling, timing=timing).result

    def stream(
        self,
        prompts,
        sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008
        *,
        rounds_per_look: int = 8,
    ) -> Stream:
        """Generates as `generate` does, the same tokens, and gives them out as they come.

        Args:
            prompts, sampling: as for `generate`.
            rounds_per_look: the device runs so many rounds, at first fewer, before the host looks at what is new.

        Returns:
            An iterator over `Delta`s; its `result` is what `generate` returns. Closing it stops decoding and frees the caches.
        """
        return self._stream(Session(), prompts, sampling, rounds_per_look=rounds_per_look)

    def conversation(self) -> Conversation:
        """Generations whose caches serve each other: of a prompt, only what is new is computed."""
        return Conversation(self._stream, self.target.tokenizer)

    def warmup(
        self,
        buckets: Sequence[int] = (64,),
        batch_sizes: Sequence[int] = (1,),
        sampling: SamplingParams = SamplingParams(),  # noqa: B008 (frozen)
    ) -> float:
        """Compiles ahead what `generate` and `stream` will need, and runs it for one round.

        Args:
            buckets: prompt lengths; programs serve all lengths of the same bucket (32, 48, 64, 96, 128, 192, ...).
            batch_sizes: prompts per call.
            sampling: `max_new_tokens` and whether the temperature is 0 decide what is compiled; the rest may change later.

        Returns:
            Wall seconds spent. With a persistent compilation cache (`use_compile_cache`) a later process spends few.
        """
        started = time.perf_counter()
        for batch in batch_sizes:
            for length in buckets:
                prompts = [[0] * min(length, self.target.config.max_context - 1)] * batch
                with self.stream(prompts, dataclasses.replace(sampling, stop=())) as stream:
                    for _ in itertools.islice(stream, batch + 1):
                        pass
        return time.perf_counter() - started

    def _stream(
        self,
        session: Session,
        prompts,
        sampling,
        *,
        rounds_per_look: int | None = None,
        timing: Timing = Timing(),  # noqa: B008 (frozen)
        keep: bool = False,
    ) -> Stream:
        """A generation on `session`; the host looks at the end only unless `rounds_per_look` is given."""
        if rounds_per_look is not None and rounds_per_look < 1:
            raise UserError(f"rounds_per_look={rounds_per_look} must be at least 1")
        rounds = None if rounds_per_look is None else growing_rounds(rounds_per_look)
        plan = self._plan(prompts, sampling)
        return Stream(
            *(session, plan, self.target.tokenizer),
            rounds=rounds,
            timing=timing,
            keep=keep,
        )

    def encode(self, prompt) -> list[int]:
        """The token ids of a prompt that can be answered; UserError as in `generate`."""
        is_chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], dict)
        if isinstance(prompt, str) or is_chat:
            tokenizer = self.target.tokenizer
            if tokenizer is None:
                raise UserError(
                    f"prompt {str(prompt)[:40]!r} is text, but {self.target.source} has no tokenizer; give token ids"
                )
            prompt = tokenizer.encode_chat(prompt) if is_chat else tokenizer.encode(prompt)
        ids, context = list(prompt), self.target.config.max_context
        if not ids:
            raise UserError("a prompt is empty; give at least one token")
        vocab_size = self.target.config.vocab_size
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            outside = next(token for token in ids if not 0 <= token < vocab_size)
            raise UserError(
                f"a prompt has token id {outside}; the target's ids are 0 to {vocab_size - 1}"
            )
        if len(ids) >= context:
            raise UserError(
                f"a prompt has {len(ids)} tokens, the target's context is {context}; shorten the prompt"
            )
        return ids

    @staticmethod
    def _per_row(sampling, count: int) -> list[SamplingParams]:
        if isinstance(sampling, SamplingParams):
            return [dataclasses.replace(sampling, seed=sampling.seed + i) for i in range(count)]
        if len(sampling) != count:
            raise UserError(
                f"{len(sampling)} sampling parameters for {count} prompts; give one each, or one for all"
            )
        return list(sampling)

    def prepare(self, prompts, sampling) -> tuple[Decoder, int, tuple]:
        """What `generate` would run: static decoder, prompt width, and `(params, request, tokens_BC, length_B)`."""
        plan = self._plan(prompts, sampling)
        kept = [0] * len(plan.prompts)
        width = plan.width(kept)
        arrays = plan.arrays(plan.capacity(kept, width))
        return plan.decoder, width, (plan.params, plan.request, *arrays)

    def _plan(self, prompts, sampling) -> Plan:
        if not len(prompts):
            raise UserError("there are no prompts; give at least one")
        prompt_ids = [self.encode(prompt) for prompt in prompts]
        rows = self._per_row(sampling, len(prompt_ids))
        settled = self.settled(_hottest(rows))
        if settled is not self:
            return settled._plan(prompt_ids, rows)
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
        decoder = self._decoder(all(row.temperature == 0.0 for row in rows))
        request = Request(
            sampling=SamplingArrays.stack(rows),
            key_B=jax.vmap(jax.random.key)(jnp.asarray([row.seed for row in rows], jnp.uint32)),
            max_length_B=jnp.asarray(limits, jnp.int32),
            stop_ids_BN=jnp.asarray(self._stop_ids(rows)),
            exit_threshold_E=jnp.asarray(self.thresholds, jnp.float32),
            max_rounds=jnp.asarray(UNLIMITED, jnp.int32),
            vocabulary_K=None if listed is None else jnp.asarray(listed.ids_K),
            drafting=self._drafting(rows, decoder.drafter.width),
        )
        return Plan(
            decoder=decoder,
            params=self._params,
            request=self._place(request),
            rows=rows,
            exits=self.exits,
            prompts=prompt_ids,
            context=context,
            prefill_chunk=self.config.prefill_chunk,
            initial_room=self.config.initial_room,
            place=self._place,
        )

    def _stop_ids(self, rows: Sequence[SamplingParams]) -> np.ndarray:
        """int32 `[B, N]`: N is a multiple of 8, so that few programs serve any number of stop tokens."""
        own = self.target.config.eos_token_ids
        ids = [sorted({*(() if row.ignore_eos else own), *row.stop_token_ids}) for row in rows]
        slots = -(-max(1, *map(len, ids)) // _STOP_SLOTS) * _STOP_SLOTS
        return np.array([row + [-1] * (slots - len(row)) for row in ids], np.int32)

    def _decoder(self, greedy: bool) -> Decoder:
        target = Target(self.target.transformer, self.mesh)
        if self.draft is None:
            return Decoder(target, NoDrafter(self.verify_width - 1), greedy, (self.verify_width,))
        widths = self.config.verify_widths
        if self.config.tree is None:
            return Decoder(target, self._chain_drafter(greedy), greedy, widths)
        drafter = self._tree_drafter(greedy, self.config.tree)
        nodes = drafter.growth.nodes
        narrow = (width for width in widths if width < nodes)
        return TreeDecoder(target, drafter, greedy, (*narrow, nodes))

    def _drafting(self, rows: Sequence[SamplingParams], width: int) -> DraftingArrays:
        config = self.config if self.draft is not None else DecodeConfig()
        allowances = [
            allowance(row.max_new_tokens, config) if config.guard else np.inf for row in rows
        ]
        return DraftingArrays.create(config, allowances, width, max(len(self.exits), 1))

    @property
    def _drafting_model(self) -> Transformer:
        """The draft, read through its trimmed head if it has one."""
        draft = self.draft
        assert draft is not None
        return draft.drafting_transformer if isinstance(draft, Draft) else draft.transformer

    @property
    def _return_width(self) -> int:
        return _RETURN_WIDTH if self.config.guard else 0

    def _chain_drafter(self, greedy: bool) -> Drafter:
        chain = ChainConfig(
            width=self.config.draft_width,
            vocab_size=self.target.config.vocab_size,
            greedy=greedy,
            sampled=self.config.draft_sampling == "sample",
            watched=self.config.costs is not None
            or self.config.draft_length_rule in ("confidence", "expected_gain"),
        )
        model, returning = self._drafting_model, self._return_width
        if self.exits == (model.config.num_layers,):
            return IndependentDrafter(model, chain, returning)
        segments = Segments(model, self.exits, self.target.config.vocab_size)
        return SortedDrafter(segments, chain, self.config.catch_up_width, returning)

    def _tree_drafter(self, greedy: bool, shape: TreeShape) -> TreeDrafter:
        growth = Growth(shape, sampled=self.config.draft_sampling == "sample" and not greedy)
        segments = Segments(
            model=self._drafting_model,
            exit_layers=self.exits,
            vocab_size=self.target.config.vocab_size,
            together=shape.leaving == "level",
        )
        return TreeDrafter(segments, growth, self.config.catch_up_width, self._return_width)

    def _place(self, tree):
        """Replicates over the target's mesh. Next to an abstract target (ahead-of-time compilation) all stays abstract."""
        if self.mesh is None:
            return tree
        everywhere = replicated(self.mesh)
        if isinstance(jax.tree.leaves(self.target.params)[0], jax.ShapeDtypeStruct):
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree
            )
        return jax.device_put(tree, everywhere)


def _hottest(rows: Sequence[SamplingParams]) -> float:
    """The temperature that decides for a batch: it is greedy only if all rows are."""
    return max((row.temperature for row in rows), default=0.0)
