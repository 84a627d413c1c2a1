"""What answers batches: a decoder in this process, or decoders elsewhere (`ray_batches.py`); and turns through a journal."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from infer.generate.batching import Answer, Job, PromptBatch, plan_batches
from infer.generate.journal import Journal, journal_of
from s2d_jax.cli.agreement import check_agreement, of_first_process
from s2d_jax.cli.loading import (
    keep_programs,
    load_drafting,
    load_target,
    meshes_of_flags,
    tokenizer_of,
)
from s2d_jax.config.model import ModelConfig
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.processes import is_main_process
from s2d_jax.sharding import fetch_whole
from s2d_jax.text.tokenizer import Tokenizer
from s2d_jax.weights.model import Model
from s2d_jax.weights.prepare import format_kept

if TYPE_CHECKING:
    from infer.generate.args import Args

# Settings of a journal that only those know who have loaded the weights.
MODEL_SETTINGS = ("target_weights", "target_format", "draft_weights", "draft_format")
# Weights of at most this many values, such as norms, tell differently trained models apart.
_TELLTALE = 2**16


@dataclasses.dataclass(frozen=True)
class Answered:
    """A batch with its answers.

    Attributes:
        number: of the batch, as its job has it.
        answers: one for each of its prompts.
        models: the `MODEL_SETTINGS` of the models that answered.
    """

    number: int
    answers: list[Answer]
    models: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Engine:
    """What answers batches.

    Attributes:
        config: the target's shape.
        tokenizer: the target's.
        models: the `MODEL_SETTINGS`; None if they come with the first answer.
        answer: answers jobs, in any order.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    models: dict[str, Any] | None
    answer: Callable[[Sequence[Job]], Generator[Answered, None, None]]


@contextlib.contextmanager
def engine_here(args: Args) -> Iterator[Engine]:
    """A decoder in this process. Raises UserError as `load_decoder`."""
    decoder, models = load_decoder(args)

    def answer(jobs: Sequence[Job]) -> Generator[Answered, None, None]:
        for job in jobs:
            yield Answered(job.number, job.answers(decoder), models)

    target = decoder.target
    yield Engine(target.config, tokenizer_of(target), models, answer)


def load_decoder(args: Args) -> tuple[SpeculativeDecoder, dict[str, Any]]:
    """The decoder of `--target` (the first) and `--draft`, and the `MODEL_SETTINGS` of both.

    Raises:
        UserError: for models that cannot be read, or do not fit each other or the flags.
    """
    keep_programs(args.loading.compile_cache)
    meshes = meshes_of_flags(args.mesh)
    draft, config = load_drafting(args.draft, args.loading, args.drafting, meshes.draft)
    raw = args.answering.raw
    target = load_target(args.target[0], args.loading, [draft], raw=raw, mesh=meshes.target)
    models = {
        "target_weights": weights_hash(target),
        "target_format": format_kept(target),
        "draft_weights": None if draft is None else weights_hash(draft),
        "draft_format": "f32" if draft is None else format_kept(draft),
    }
    return SpeculativeDecoder(target, draft, config), models


def weights_hash(model: Model) -> str:
    """Tells differently trained models apart by their small weights."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(model.params):
        if leaf.size <= _TELLTALE:
            digest.update(np.asarray(fetch_whole(leaf)).tobytes())
    return digest.hexdigest()


def decoding_settings(args: Args, engine: Engine) -> dict[str, Any]:
    """What decides an answer beside the prompts; also the batch size, since products of other shapes round differently."""
    return {
        "target": args.target[0],
        "tokenizer": engine.tokenizer.fingerprint(),
        "draft": args.draft,
        "draft_vocabulary": args.loading.draft_vocabulary,
        "batch_size": args.answering.batch_size,
        **dataclasses.asdict(args.sampling),
        **{f"drafting.{k}": v for k, v in dataclasses.asdict(args.drafting).items()},
        # A tensor axis adds up products in another order; earlier versions knew no mesh.
        **({"mesh.tensor": args.mesh.tensor} if (args.mesh.tensor or 1) > 1 else {}),
        **({"mesh.draft": args.mesh.draft} if args.mesh.draft != "whole" else {}),
        **(engine.models or {}),
    }


def open_journal(args: Args, engine: Engine, settings: dict[str, Any]) -> Journal:
    """The journal beside `--out`, which the first of several processes writes, and all know.

    Raises:
        UserError: if it was begun with other settings than these and `decoding_settings`, or a process has others.
    """
    assert args.out is not None
    later = MODEL_SETTINGS if engine.models is None else ()
    settings = {**settings, **decoding_settings(args, engine)}
    check_agreement(settings)
    journal = Journal(journal_of(args.out), settings, later, writes=is_main_process())
    journal.batches = of_first_process(journal.batches)
    return journal


@dataclasses.dataclass(frozen=True)
class Turn:
    """What is asked in one turn.

    Attributes:
        number: 0 for first turns.
        talks: the numbers of the talks that wait for an answer.
        prompts: token ids, one list for each of them.
        sampling: one for each of them.
    """

    number: int
    talks: list[int]
    prompts: list[list[int]]
    sampling: list[SamplingParams]

    def job(self, number: int, batch: PromptBatch) -> Job:
        prompts = tuple(self.prompts[i] for i in batch.indices)
        return Job(number, prompts, tuple(self.sampling[i] for i in batch.indices), batch.padding)


def answer_turn(
    engine: Engine,
    journal: Journal,
    turn: Turn,
    batch_size: int,
    told: Callable[[list[Answer]], list[dict[str, Any]]],
    on_entry: Callable[[dict[str, Any]], None],
) -> dict[int, dict[str, Any]]:
    """What the journal holds of each talk's answer; what is missing is answered, and written as it comes.

    Args:
        engine: what answers.
        journal: of earlier processes and of this one.
        turn: what is asked. Batches are planned from all of it, answered or not, so that each holds the same prompts always.
        batch_size: prompts per batch.
        told: what the journal keeps of the answers of a batch.
        on_entry: called with each new entry, once it is on the disk.

    Raises:
        UserError: if the journal holds other batches, or was begun with other models.
    """
    batches = plan_batches([len(prompt) for prompt in turn.prompts], batch_size)
    talks = [[turn.talks[i] for i in batch.indices] for batch in batches]
    entries = journal.kept(turn.number, talks)
    jobs = [turn.job(n, batch) for n, batch in enumerate(batches) if n not in entries]
    with contextlib.closing(engine.answer(jobs)) as answered:
        for done in answered:
            if done.number in entries:  # answered twice: once by a worker that was thought dead
                continue
            journal.settle(done.models)
            entry = {"turn": turn.number, "talks": talks[done.number]}
            entry["answers"] = told(done.answers)
            journal.add(entry)
            entries[done.number] = entry
            on_entry(entry)
    answers = {}
    for entry in entries.values():
        answers |= zip(entry["talks"], entry["answers"], strict=True)
    return answers
