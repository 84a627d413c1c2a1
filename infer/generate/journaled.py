"""Answers of prompts that are kept in a journal beside `--out` as they come: for runs on many machines, which are long."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from infer.generate.args import refuse_beside
from infer.generate.batching import Answer
from infer.generate.engine import Engine, Turn, answer_turn, engine_here, open_journal
from infer.generate.journal import Journal, resuming
from infer.generate.ray_batches import ray_engine
from s2d_jax.cli.agreement import check_agreement, several_processes
from s2d_jax.cli.prompts import Question, encode
from s2d_jax.cli.screen import PlainColumn, counting_bar, eta
from s2d_jax.errors import UserError
from s2d_jax.generation.planner import check_prompt
from s2d_jax.generation.stats import GenerationStats

if TYPE_CHECKING:
    from infer.generate.args import Args


def check_flags(args: Args) -> None:
    """Raises UserError for flags that do not go with `--ray`, or with several processes."""
    looks = {"profile": args.looking.profile, "explain": args.looking.explain}
    if args.cluster.ray is None:
        if several_processes():
            refuse_beside("several processes", **looks)
        return
    if len(args.target) != 1:
        raise UserError(
            f"--ray has {len(args.target)} targets; give one --target, and run again for another"
        )
    if args.out is None:
        raise UserError("--ray keeps its answers in a file; give --out FILE.jsonl")
    refuse_beside("--ray", stream=args.answering.stream, **looks)


def is_journaled(args: Args) -> bool:
    """Whether answers are kept as they come: those of a cluster, and those of several processes for a file of one target."""
    if args.cluster.ray is not None:
        return True
    alone = args.out is None or len(args.target) > 1 or args.answering.stream
    return several_processes() and not alone


def engine_of(args: Args) -> contextlib.AbstractContextManager[Engine]:
    """The decoders of `--ray`, or the one of this process."""
    return engine_here(args) if args.cluster.ray is None else ray_engine(args)


def settings_of(args: Args, questions: Sequence[Question]) -> dict[str, Any]:
    """What is asked, as JSON values, without what decides how it is answered."""
    asked = json.dumps([dataclasses.asdict(question) for question in questions])
    prompts = hashlib.sha256(asked.encode()).hexdigest()
    return {"prompts": prompts, "raw": args.answering.raw}


@contextlib.contextmanager
def answered(
    args: Args, questions: Sequence[Question]
) -> Iterator[tuple[list[list[Answer]], tuple[int, ...]]]:
    """The answers to the turns of each question, and the target's stop tokens; the journal goes when the block ends well.

    Batches and seeds are those of a run in one process. Stats have no `seconds` and `draft_forwards`, which are of calls.

    Raises:
        UserError: as the engine, for a prompt that cannot be answered, and as `Journal`.
    """
    settings = settings_of(args, questions)
    check_agreement(settings)  # before models are loaded together
    with engine_of(args) as engine, open_journal(args, engine, settings) as journal:
        with resuming(journal):
            conversations = _converse(args, engine, questions, journal)
        yield conversations, engine.config.eos_token_ids
        journal.remove()


def _converse(
    args: Args, engine: Engine, questions: Sequence[Question], journal: Journal
) -> list[list[Answer]]:
    """All answers of each question: every first turn, then every second turn, and so on."""
    conversations: list[list[Answer]] = [[] for _ in questions]
    with counting_bar(PlainColumn("{task.fields[speed]}"), *eta()) as bar:
        task = bar.add_task("answering", total=sum(len(q.turns) for q in questions), speed="")
        bar.advance(task, journal.kept_answers)
        for turn in range(max(len(question.turns) for question in questions)):
            active = [i for i, question in enumerate(questions) if turn < len(question.turns)]
            prompts = [_encoded(args, engine, questions[i], conversations[i]) for i in active]
            sampling = [args.sampling.params(i) for i in active]
            answers = answer_turn(
                engine,
                journal,
                Turn(turn, active, prompts, sampling),
                args.answering.batch_size,
                lambda answers: [_written(answer) for answer in answers],
                lambda entry: bar.advance(task, len(entry["answers"])),
            )
            for i in active:
                conversations[i].append(_read(answers[i]))
    return conversations


def _encoded(
    args: Args, engine: Engine, question: Question, answers: Sequence[Answer]
) -> list[int]:
    """The token ids of a question's next turn."""
    messages = question.messages([answer.text for answer in answers])
    ids = encode(engine.tokenizer, messages, raw=args.answering.raw)
    check_prompt(ids, engine.config, question.name, engine.tokenizer)
    return ids


def _written(answer: Answer) -> dict[str, Any]:
    """An answer as the journal keeps it."""
    stats = dataclasses.asdict(answer.stats)
    kept = {name: value for name, value in stats.items() if name not in _OF_CALLS}
    return {"text": answer.text, "token_ids": answer.token_ids, "stats": kept}


def _read(kept: dict[str, Any]) -> Answer:
    stats = {name: _plain_again(value) for name, value in kept["stats"].items()}
    of_calls: dict[str, Any] = {name: {} for name in _OF_CALLS}
    return Answer(kept["text"], tuple(kept["token_ids"]), GenerationStats(**stats, **of_calls))


def _plain_again(value: Any) -> Any:
    """A count, tuple of counts, or counts by number, from JSON."""
    if isinstance(value, dict):
        return {int(key): count for key, count in value.items()}
    return tuple(value) if isinstance(value, list) else value


_OF_CALLS = ("draft_forwards", "seconds")
