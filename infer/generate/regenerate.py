"""Replaces the answers of conversations by the target's own, to train drafts: `python -m infer.generate --as-conversations`.

Each assistant turn is replaced by the target's own, and later turns see the new answers. Batches are planned from all prompts
of a turn, answered or not, and the journal holds whole batches. So a run that was killed and goes on computes exactly what an
uninterrupted run does.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from infer.generate.args import refuse_beside
from infer.generate.batching import Answer
from infer.generate.engine import Engine, Turn, answer_turn, open_journal
from infer.generate.journal import Journal, resuming
from infer.generate.journaled import engine_of
from infer.generate.talks import Talk, read_talks
from s2d_jax.cli.agreement import check_agreement, of_first_process
from s2d_jax.cli.outputs import check_writable
from s2d_jax.cli.prompts import encode
from s2d_jax.cli.screen import PlainColumn, counting_bar, eta, screen
from s2d_jax.errors import UserError
from s2d_jax.files import write_text
from s2d_jax.processes import is_main_process
from s2d_jax.text.conversations import content_hash

if TYPE_CHECKING:
    from infer.generate.args import Args


def regenerate(args: Args) -> None:
    """Answers all conversations of `args.prompts`; `args.out` appears whole at the end, until then its journal grows."""
    _check(args)
    assert args.prompts is not None
    assert args.out is not None
    console, began = screen(), time.perf_counter()
    talks, left_out = read_talks(args.prompts)
    args.sampling.params()
    settings = {"prompts": content_hash(args.prompts)}
    check_agreement(settings)  # before models are loaded together
    with engine_of(args) as engine, open_journal(args, engine, settings) as journal:
        _check_absent(args.out)  # another run may have finished it while this one loaded
        with resuming(journal):
            _answer(args, engine, talks, journal)
        rows = [_row(args, talk) for talk in talks if talk.answers]
        if not rows:
            raise UserError(f"{args.prompts}: no conversation could be answered ({talks[0].ended})")
        if is_main_process():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_text(args.out, "".join(lines))
        journal.remove()
    left_out.update(talk.ended for talk in talks if talk.ended)
    _show(console, args, talks, left_out, journal.kept_answers, time.perf_counter() - began)
    console.print(f"{len(rows):,} conversations written to {args.out}", soft_wrap=True)


def _check(args: Args) -> None:
    if len(args.target) != 1:
        raise UserError(
            f"--as-conversations has {len(args.target)} targets; give one --target, and run again for another"
        )
    if args.prompts is None or args.out is None:
        raise UserError("--as-conversations needs --prompts CONVERSATIONS and --out FILE.jsonl")
    refuse_beside(
        "--as-conversations",
        prompt=args.prompt,
        stream=args.answering.stream,
        raw=args.answering.raw,
        profile=args.looking.profile,
        explain=args.looking.explain,
    )
    if is_main_process():
        check_writable(args.out)
    _check_absent(args.out)


def _check_absent(out: Path) -> None:
    """Raises UserError in all processes if the first one sees the file."""
    if of_first_process(out.exists()):
        raise UserError(f"{out} is there already; choose another --out, or remove it")


_REFUSED, _FULL = "refused by the chat template", "the target's context is full"


def _answer(args: Args, engine: Engine, talks: Sequence[Talk], journal: Journal) -> None:
    """Fills the answers of all talks: every first turn, then every second turn, and so on. The journal's answers come first."""

    def told(answers: Sequence[Answer]) -> list[dict[str, Any]]:
        return [_told(answer, engine.config.eos_token_ids) for answer in answers]

    with counting_bar(PlainColumn("{task.fields[speed]}"), *eta()) as bar:
        task = bar.add_task("answering", total=sum(len(t.question.turns) for t in talks), speed="")
        bar.advance(task, journal.kept_answers)
        for turn in range(max(len(talk.question.turns) for talk in talks)):
            active, prompts = _prompts(engine, talks)
            bar.update(task, total=sum(_turns_left(talk) + len(talk.answers) for talk in talks))
            # Each turn of each talk has a seed of its own, whatever the batch.
            sampling = [args.sampling.params(turn * len(talks) + member) for member in active]
            answers = answer_turn(
                engine,
                journal,
                Turn(turn, active, prompts, sampling),
                args.answering.batch_size,
                told,
                lambda entry: _advance(bar, task, entry["answers"]),
            )
            for member in active:
                talks[member].answers.append(answers[member])


def _turns_left(talk: Talk) -> int:
    return len(talk.question.turns) - len(talk.answers) if talk.waits else 0


def _prompts(engine: Engine, talks: Sequence[Talk]) -> tuple[list[int], list[list[int]]]:
    """Which talks wait for an answer, and their prompts; talks that cannot go on are ended."""
    active, prompts = [], []
    for number, talk in enumerate(talks):
        if not talk.waits:
            continue
        try:
            prompt = encode(engine.tokenizer, talk.messages(), raw=False)
        except UserError:
            talk.ended = _REFUSED
            continue
        if len(prompt) >= engine.config.max_context:
            talk.ended = _FULL
            continue
        active.append(number)
        prompts.append(prompt)
    return active, prompts


def _told(answer: Answer, stop_ids: Sequence[int]) -> dict[str, Any]:
    return {
        "text": answer.text,
        "new_tokens": len(answer.token_ids),
        "finished": not set(stop_ids).isdisjoint(answer.token_ids[-1:]),
        "target_forwards": answer.stats.target_forwards,
        "decoded_tokens": answer.stats.emitted_tokens + answer.stats.overshoot_tokens - 1,
        "drafted_tokens": answer.stats.drafted_tokens,
        "accepted_tokens": answer.stats.accepted_tokens,
    }


def _advance(bar: Progress, task: TaskID, answers: Sequence[dict[str, Any]]) -> None:
    row = next(row for row in bar.tasks if row.id == task)
    tokens = row.fields.get("tokens", 0) + sum(answer["new_tokens"] for answer in answers)
    speed = f"{tokens / max(row.elapsed or 0.0, 1e-9):.0f} tok/s"
    bar.update(task, advance=len(answers), tokens=tokens, speed=speed)


def _row(args: Args, talk: Talk) -> dict[str, Any]:
    answered = dataclasses.replace(talk.question, turns=talk.question.turns[: len(talk.answers)])
    forwards = sum(answer["target_forwards"] for answer in talk.answers)
    return {
        "question_id": answered.question_id,
        "category": answered.category,
        "target": args.target[0],
        "draft": args.draft,
        "prompt": answered.turns[0],
        "messages": answered.messages([answer["text"] for answer in talk.answers]),
        "new_tokens": [answer["new_tokens"] for answer in talk.answers],
        # Without it, an answer cut by max-new-tokens would teach a draft to stop there.
        "finished": [answer["finished"] for answer in talk.answers],
        "stats": {
            "mean_acceptance_length": round(_total([talk], "decoded_tokens") / max(forwards, 1), 4),
            "target_forwards": forwards,
            "drafted_tokens": _total([talk], "drafted_tokens"),
            "accepted_tokens": _total([talk], "accepted_tokens"),
        },
    }


def _total(talks: Sequence[Talk], name: str) -> int:
    return sum(answer[name] for talk in talks for answer in talk.answers)


def _show(
    console: Console,
    args: Args,
    talks: Sequence[Talk],
    left_out: collections.Counter[str],
    kept: int,
    seconds: float,
) -> None:
    answers = sum(len(talk.answers) for talk in talks)
    console.print(f"target {args.target[0]}", soft_wrap=True)
    table = Table(show_header=False)
    table.add_column("what")
    table.add_column("number", justify="right")
    rows = {
        "conversations": f"{sum(bool(talk.answers) for talk in talks):,}",
        "answers": f"{answers:,}",
        "of those, kept from earlier runs": f"{kept:,}",
        "finished by themselves": f"{_total(talks, 'finished') / max(answers, 1):.1%}",
        "new tokens": f"{_total(talks, 'new_tokens'):,}",
        "MAT": f"{_total(talks, 'decoded_tokens') / max(_total(talks, 'target_forwards'), 1):.2f}",
        **{f"left out or ended early: {why}": f"{n:,}" for why, n in sorted(left_out.items())},
        "seconds, loading included": f"{seconds:,.1f}",
    }
    for row in rows.items():
        table.add_row(*row)
    console.print(table)
