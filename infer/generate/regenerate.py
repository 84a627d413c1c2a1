"""Replaces the answers of conversations by the target's own, to train drafts: `python -m infer.generate --as-conversations`.

Each assistant turn is replaced by the target's own, and later turns see the new answers. Batches are planned from all prompts
of a turn, answered or not, and the journal holds whole batches. So a run that was killed and goes on computes exactly what an
uninterrupted run does.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from infer.generate.batching import Answer, PromptBatch, answer_batch, plan_batches
from infer.generate.journal import Journal
from infer.generate.talks import Talk, read_talks
from s2d_jax.cli.loading import keep_programs, load_drafting, load_target, tokenizer_of
from s2d_jax.cli.outputs import check_writable
from s2d_jax.cli.prompts import encode
from s2d_jax.cli.screen import PlainColumn, counting_bar, eta, screen
from s2d_jax.errors import UserError
from s2d_jax.files import write_text
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.text.conversations import content_hash
from s2d_jax.weights.model import Model
from s2d_jax.weights.prepare import format_kept

if TYPE_CHECKING:
    from infer.generate.args import Args

# Weights of at most this many values, such as norms, tell differently trained models apart.
_TELLTALE = 2**16


def regenerate(args: Args) -> None:
    """Answers all conversations of `args.prompts`; `args.out` appears whole at the end, until then its journal grows."""
    _check(args)
    assert args.prompts is not None
    assert args.out is not None
    keep_programs(args.loading.compile_cache)
    console, began = screen(), time.perf_counter()
    talks, left_out = read_talks(args.prompts)
    args.sampling.params()
    draft, config = load_drafting(args.draft, args.loading, args.drafting)
    target = load_target(args.target[0], args.loading, [draft])
    decoder = SpeculativeDecoder(target, draft, config)
    with Journal(journal_of(args.out), _settings(args, target, draft)) as journal:
        if args.out.exists():  # another process finished it while this one loaded
            raise UserError(f"{args.out} is there already; choose another --out, or remove it")
        kept = sum(len(batch["answers"]) for batch in journal.batches)
        if kept:
            console.print(f"resuming {journal.path}: {kept:,} answers are there", soft_wrap=True)
        try:
            _answer(args, decoder, talks, journal)
        except KeyboardInterrupt:
            screen(stderr=True).print(
                f"the answers so far are in {journal.path}; the same command goes on",
                soft_wrap=True,
            )
            raise
        rows = [_row(args, talk) for talk in talks if talk.answers]
        if not rows:
            raise UserError(f"{args.prompts}: no conversation could be answered ({talks[0].ended})")
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(args.out, "".join(lines))
        journal.remove()
    left_out.update(talk.ended for talk in talks if talk.ended)
    _show(console, args, talks, left_out, kept, time.perf_counter() - began)
    console.print(f"{len(rows):,} conversations written to {args.out}", soft_wrap=True)


def journal_of(out: Path) -> Path:
    """Where the answers are kept until all are done."""
    return out.with_name(f"{out.name}.journal")


def _check(args: Args) -> None:
    if len(args.target) != 1:
        raise UserError(
            f"--as-conversations has {len(args.target)} targets; give one --target, and run again for another"
        )
    if args.prompts is None or args.out is None:
        raise UserError("--as-conversations needs --prompts CONVERSATIONS and --out FILE.jsonl")
    refused = {
        "prompt": args.prompt,
        "stream": args.answering.stream,
        "raw": args.answering.raw,
        "profile": args.looking.profile,
        "explain": args.looking.explain,
    }
    for flag, value in refused.items():
        if value:
            raise UserError(f"--{flag} does not go with --as-conversations; leave it out")
    check_writable(args.out)
    if args.out.exists():
        raise UserError(f"{args.out} is there already; choose another --out, or remove it")


_REFUSED, _FULL = "refused by the chat template", "the target's context is full"


def _settings(args: Args, target: Model, draft: Model | None) -> dict[str, Any]:
    """Everything that decides an answer; also the batch size, since products of other shapes round differently."""
    assert args.prompts is not None
    return {
        "prompts": content_hash(args.prompts),
        "target": args.target[0],
        "target_weights": _weights_hash(target),
        "target_format": format_kept(target),
        "tokenizer": tokenizer_of(target).fingerprint(),
        "draft": args.draft,
        "draft_weights": None if draft is None else _weights_hash(draft),
        "draft_format": "f32" if draft is None else format_kept(draft),
        "draft_vocabulary": args.loading.draft_vocabulary,
        "batch_size": args.answering.batch_size,
        **dataclasses.asdict(args.sampling),
        **{f"drafting.{k}": v for k, v in dataclasses.asdict(args.drafting).items()},
    }


def _weights_hash(model: Model) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(model.params):
        if leaf.size <= _TELLTALE:
            digest.update(np.asarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()


def _answer(
    args: Args, decoder: SpeculativeDecoder, talks: Sequence[Talk], journal: Journal
) -> None:
    """Fills the answers of all talks: every first turn, then every second turn, and so on. The journal's answers come first."""
    known = iter(journal.batches)
    with counting_bar(PlainColumn("{task.fields[speed]}"), *eta()) as bar:
        task = bar.add_task("answering", total=sum(len(t.question.turns) for t in talks), speed="")
        bar.advance(task, sum(len(batch["answers"]) for batch in journal.batches))
        for turn in range(max(len(talk.question.turns) for talk in talks)):
            active, prompts = _prompts(decoder, talks)
            batches = plan_batches([len(prompt) for prompt in prompts], args.answering.batch_size)
            bar.update(task, total=sum(_turns_left(talk) + len(talk.answers) for talk in talks))
            for batch in batches:
                members = [active[i] for i in batch.indices]
                entry = next(known, None)
                if entry is None:
                    entry = _new_entry(args, decoder, talks, turn, members, batch, prompts)
                    journal.add(entry)
                    _advance(bar, task, entry["answers"])
                elif (entry.get("turn"), entry.get("talks")) != (turn, members):
                    raise UserError(
                        f"{journal.path} holds other batches than these conversations have; remove it to start again"
                    )
                for member, answer in zip(members, entry["answers"], strict=True):
                    talks[member].answers.append(answer)


def _turns_left(talk: Talk) -> int:
    return len(talk.question.turns) - len(talk.answers) if talk.waits else 0


def _prompts(
    decoder: SpeculativeDecoder, talks: Sequence[Talk]
) -> tuple[list[int], list[list[int]]]:
    """Which talks wait for an answer, and their prompts; talks that cannot go on are ended."""
    tokenizer, context = tokenizer_of(decoder.target), decoder.target.config.max_context
    active, prompts = [], []
    for number, talk in enumerate(talks):
        if not talk.waits:
            continue
        try:
            prompt = encode(tokenizer, talk.messages(), raw=False)
        except UserError:
            talk.ended = _REFUSED
            continue
        if len(prompt) >= context:
            talk.ended = _FULL
            continue
        active.append(number)
        prompts.append(prompt)
    return active, prompts


def _new_entry(
    args: Args,
    decoder: SpeculativeDecoder,
    talks: Sequence[Talk],
    turn: int,
    members: list[int],
    batch: PromptBatch,
    prompts: Sequence[list[int]],
) -> dict[str, Any]:
    """The journal's entry of a batch, with the target's answers."""
    # Each turn of each talk has a seed of its own, whatever the batch.
    sampling = [args.sampling.params(turn * len(talks) + member) for member in members]
    rows = [prompts[i] for i in batch.indices]
    answers = answer_batch(decoder, rows, sampling, batch.padding)
    stop_ids = decoder.target.config.eos_token_ids
    return {"turn": turn, "talks": members, "answers": [_told(a, stop_ids) for a in answers]}


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
