"""Strings in, strings and stats out: `SpeculativeDecoder` pairs a target with a draft."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from s2d_jax.compilation import programs
from s2d_jax.config import DecodeConfig, SamplingParams, UserError, check_thresholds
from s2d_jax.decoder import Decoder, DecodeState, Target
from s2d_jax.draft_length import DraftingArrays
from s2d_jax.drafters import IndependentDrafter, NoDrafter, SortedDrafter
from s2d_jax.drafters.chain import ChainConfig
from s2d_jax.guard import allowance
from s2d_jax.model import Transformer
from s2d_jax.policy import load_policy
from s2d_jax.pretrained import Draft, Model
from s2d_jax.proposal import Drafter, Request, SamplingArrays
from s2d_jax.sharding import mesh_of, replicated
from s2d_jax.stats import GenerationStats, sum_stats
from s2d_jax.tokenizer import check_same_tokenizer

_SMALLEST_BUCKET = 32
_STOP_SLOTS = 8
# Positions that the draft takes in at once after plain rounds: passes this wide cost least per position (docs/experiments.md).
_RETURN_WIDTH = 32


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """What one call generated.

    Attributes:
        texts: new text per row, special tokens left out; empty strings without a tokenizer.
        token_ids: new tokens per row, the stop token included.
        stats: summed over the rows.
        row_stats: one per row.
    """

    texts: list[str]
    token_ids: list[list[int]]
    stats: GenerationStats
    row_stats: list[GenerationStats]


class SpeculativeDecoder:
    """Generates with a target, made faster by a draft, in batches, inside one compiled loop.

    Args:
        target: the model whose output is wanted.
        draft: a sorted draft, or any model of the same vocabulary; None decodes plainly on the same engine.
        config: exits, draft length and the like.

    Raises:
        UserError: for different tokenizers, exits that the draft does not have, or `policy="auto"` without a draft.
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
        self.exits, self.thresholds = _resolve_exits(draft, config)
        if draft is not None:
            _check_vocabularies(target, draft)
            _check_costs(self.exits, config)
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
            return self.config.draft_width + 1
        return self.config.verify_width or 1

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008
        *,
        time_phases: bool = False,
    ) -> GenerationResult:
        """Generates for all prompts in one batch.

        Args:
            prompts: texts, taken as they are (`target.tokenizer.render_chat` makes a chat prompt), or token ids.
            sampling: one for each prompt; or one for all, and then row i uses `seed + i`.
            time_phases: wait between prefill and decoding, to time them apart.

        Raises:
            UserError: for an empty prompt, or one that fills the target's context.
        """
        prompt_ids = [self._encode(prompt) for prompt in prompts]
        settled = self.settled(_hottest(self._per_row(sampling, len(prompt_ids))))
        if settled is not self:
            return settled.generate(prompt_ids, sampling, time_phases=time_phases)
        decoder, width, args = self.prepare(prompt_ids, sampling)
        (prefill, run), compile_seconds = programs(decoder, width, args)

        started = time.perf_counter()
        state = prefill(*args)
        if time_phases:
            jax.block_until_ready(state)
        prefilled = time.perf_counter()
        state = run(*args[:2], state)
        counters = decoder.drafter.stats(state.draft_state)
        fetched, counters = jax.device_get((_without_caches(state), counters))
        ended = time.perf_counter()

        seconds = {"compile": compile_seconds, "total": ended - started}
        if time_phases:
            seconds |= {"prefill": prefilled - started, "decode": ended - prefilled}
        return self._result(prompt_ids, fetched, counters, seconds)

    def _encode(self, prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.target.tokenizer is None:
                raise UserError(
                    f"prompt {prompt[:40]!r} is text, but {self.target.source} has no tokenizer; give token ids"
                )
            prompt = self.target.tokenizer.encode(prompt)
        ids, context = list(prompt), self.target.config.max_context
        if not ids:
            raise UserError("a prompt is empty; give at least one token")
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
        prompt_ids = [self._encode(prompt) for prompt in prompts]
        rows = self._per_row(sampling, len(prompt_ids))
        settled = self.settled(_hottest(rows))
        if settled is not self:
            return settled.prepare(prompt_ids, sampling)
        greedy = all(row.temperature == 0.0 for row in rows)
        decoder = self._decoder(greedy)
        lengths = np.array([len(ids) for ids in prompt_ids], np.int32)
        limits = np.minimum(
            lengths + [row.max_new_tokens for row in rows], self.target.config.max_context
        )
        width = bucket(int(lengths.max()))
        # The margin is rounded up so that a width-matched reference has caches of the same capacity.
        margin = -(-decoder.margin // 64) * 64
        capacity = bucket(max(width, int(limits.max())) + margin)
        tokens = np.zeros((len(prompt_ids), capacity), np.int32)
        for row, ids in enumerate(prompt_ids):
            tokens[row, : len(ids)] = ids
        request = Request(
            sampling=SamplingArrays.stack(rows),
            key_B=jax.vmap(jax.random.key)(jnp.asarray([row.seed for row in rows], jnp.uint32)),
            max_length_B=jnp.asarray(limits, jnp.int32),
            stop_ids_BN=jnp.asarray([self._stop_ids(row) for row in rows], jnp.int32),
            exit_threshold_E=jnp.asarray(self.thresholds, jnp.float32),
            drafting=self._drafting(rows, decoder.drafter.width),
        )
        arrays = self._place((request, jnp.asarray(tokens), jnp.asarray(lengths)))
        return decoder, width, (self._params, *arrays)

    def _stop_ids(self, row: SamplingParams) -> list[int]:
        own = set() if row.ignore_eos else set(self.target.config.eos_token_ids)
        ids = sorted(own | set(row.stop_token_ids))
        slots = -(-max(len(ids), 1) // _STOP_SLOTS) * _STOP_SLOTS
        return ids + [-1] * (slots - len(ids))

    def _decoder(self, greedy: bool) -> Decoder:
        speculates = self.draft is not None
        return Decoder(
            target=Target(_transformer(self.target), self.mesh),
            drafter=self._drafter(greedy),
            greedy=greedy,
            widths=self.config.verify_widths if speculates else (self.verify_width,),
        )

    def _drafting(self, rows: Sequence[SamplingParams], width: int) -> DraftingArrays:
        config = self.config if self.draft is not None else DecodeConfig()
        allowances = [allowance(row.max_new_tokens) if config.guard else np.inf for row in rows]
        return DraftingArrays.create(config, allowances, width, max(len(self.exits), 1))

    def _drafter(self, greedy: bool) -> Drafter:
        if self.draft is None:
            return NoDrafter(self.verify_width - 1)
        chain = ChainConfig(
            width=self.config.draft_width,
            vocab_size=self.target.config.vocab_size,
            greedy=greedy,
            sampled=self.config.draft_sampling == "sample",
            watched=self.config.draft_length_rule in ("confidence", "expected_gain"),
        )
        return_width = _RETURN_WIDTH if self.config.guard else 0
        model = _transformer(self.draft)
        if self.exits == (model.config.num_layers,):
            return IndependentDrafter(model, chain, return_width)
        return SortedDrafter(model, self.exits, chain, self.config.catch_up_width, return_width)

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

    def _result(self, prompt_ids, state: DecodeState, counters, seconds) -> GenerationResult:
        exits = self.exits
        passes = counters.get("segment_passes", ())
        draft_forwards = {exit: int(n) for exit, n in zip(exits, passes, strict=True)}
        row_stats, token_ids = [], []
        for row, ids in enumerate(prompt_ids):
            new_ids = state.tokens_BC[row, len(ids) : state.length_B[row]].tolist()
            token_ids.append(new_ids)
            exit_counts = counters["exit_counts"][row] if exits else ()
            row_stats.append(
                GenerationStats(
                    prompt_tokens=len(ids),
                    emitted_tokens=len(new_ids),
                    target_forwards=int(state.rounds_B[row]),
                    plain_rounds=int(state.guard.plain_rounds_B[row]) if exits else 0,
                    draft_forwards=draft_forwards,
                    drafted_tokens=int(state.drafted_BG[row].sum()),
                    accepted_tokens=int(state.accepted_BG[row].sum()),
                    drafted_per_depth=tuple(state.drafted_BG[row].tolist()),
                    accepted_per_depth=tuple(state.accepted_BG[row].tolist()),
                    exit_histogram={e: int(n) for e, n in zip(exits, exit_counts, strict=True)},
                    seconds=seconds,
                )
            )
        tokenizer = self.target.tokenizer
        texts = ["" if tokenizer is None else tokenizer.decode(ids) for ids in token_ids]
        return GenerationResult(texts, token_ids, sum_stats(row_stats), row_stats)


def bucket(length: int) -> int:
    """The smallest of 32, 48, 64, 96, 128, 192, ... that holds `length`: few shapes, so few compilations."""
    size = _SMALLEST_BUCKET
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


def _hottest(rows: Sequence[SamplingParams]) -> float:
    """The temperature that decides for a batch: it is greedy only if all rows are."""
    return max((row.temperature for row in rows), default=0.0)


def _transformer(model: Model) -> Transformer:
    return Transformer(model.config, dtype=jax.tree.leaves(model.params)[0].dtype)


def _without_caches(state: DecodeState) -> DecodeState:
    """Only what the host reads."""
    return state.replace(target_cache=None, draft_state=None)


def _resolve_exits(draft: Model | None, config: DecodeConfig):
    """The exits in use and their thresholds."""
    if draft is None:
        return (), ()
    if not isinstance(draft, Draft):
        own_exits, own_thresholds = (draft.config.num_layers,), (0.0,)
    else:
        own_exits = draft.draft_config.exit_layers
        own_thresholds = draft.draft_config.exit_thresholds
    exits = config.exits or own_exits
    missing = sorted(set(exits) - set(own_exits))
    if missing:
        raise UserError(f"exits={exits}: the draft has no exit at {missing}; it has {own_exits}")
    if config.exit_thresholds is not None:
        thresholds = config.exit_thresholds
        check_thresholds(exits, thresholds)
    else:
        thresholds = (*(own_thresholds[own_exits.index(e)] for e in exits[:-1]), 0.0)
    return exits, thresholds


def _check_costs(exits: tuple[int, ...], config: DecodeConfig) -> None:
    if config.costs is not None and len(config.costs.draft_step) != len(exits):
        raise UserError(
            f"costs.draft_step has {len(config.costs.draft_step)} values for {len(exits)} exits {exits}; give one per exit"
        )


def _check_vocabularies(target: Model, draft: Model) -> None:
    if target.tokenizer is not None and draft.tokenizer is not None:
        check_same_tokenizer(target.tokenizer, draft.tokenizer)
    elif target.config.vocab_size != draft.config.vocab_size:
        raise UserError(
            f"the draft's vocab_size={draft.config.vocab_size} differs from the target's {target.config.vocab_size} "
            "and there is no tokenizer to compare; use a draft of the target's vocabulary"
        )
