"""Prompts in, answers out: on the screen, or as JSONL."""

from __future__ import annotations

import json
import time
from pathlib import Path

from rich.console import Console

from infer.generate.args import Args
from infer.generate.batching import Answer, answer_all
from infer.generate.explain import drafting_trees, explain
from infer.generate.journaled import answered, check_flags, is_journaled, settings_of
from infer.generate.regenerate import regenerate
from infer.generate.streaming import stream_answers
from s2d_jax.cli.agreement import check_agreement
from s2d_jax.cli.loading import (
    keep_programs,
    load_drafting,
    load_target,
    meshes_of_flags,
    tokenizer_of,
)
from s2d_jax.cli.options import require_targets
from s2d_jax.cli.outputs import check_directory, check_writable
from s2d_jax.cli.profiling import write_profile
from s2d_jax.cli.prompts import Question, encode, read_questions
from s2d_jax.cli.screen import PlainColumn, counting_bar, eta, rule_above, screen
from s2d_jax.cli.short_text import shares, short_name
from s2d_jax.cli.tables import print_table
from s2d_jax.cli.wrapping import WrappedText
from s2d_jax.errors import UserError
from s2d_jax.files import whole_characters, write_text
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.generation.stats import GenerationStats, sum_stats
from s2d_jax.processes import is_main_process
from s2d_jax.weights.model import Model


def generate(args: Args) -> None:
    """Answers all prompts with each target; writes `args.out` whole or not at all."""
    require_targets(args.target)
    if args.answering.as_conversations:
        regenerate(args)
        return
    check_flags(args)
    if is_main_process():
        _check_outputs(args)
    keep_programs(args.loading.compile_cache)
    questions, console = _questions(args), screen()
    args.sampling.params()
    if is_journaled(args):
        _generate_journaled(args, console, questions)
        return
    check_agreement(settings_of(args, questions))
    meshes = meshes_of_flags(args.mesh)
    draft, config = load_drafting(args.draft, args.loading, args.drafting, meshes.draft)
    rows = []
    for path in args.target:
        raw = args.answering.raw
        target = load_target(path, args.loading, [draft], raw=raw, mesh=meshes.target)
        decoder = SpeculativeDecoder(target, draft, config)
        if args.looking.explain:  # reports what cannot be shown before anything is answered
            drafting_trees(decoder, args.sampling.temperature)
        start = time.perf_counter()
        if args.answering.stream:
            params = [args.sampling.params(i) for i in range(len(questions))]
            conversations = stream_answers(
                console, decoder, questions, params, raw=args.answering.raw
            )
        else:
            conversations = _converse(args, decoder, target, questions)
        seconds = time.perf_counter() - start
        rows += [
            _row(args, path, question, answers, target.config.eos_token_ids)
            for question, answers in zip(questions, conversations, strict=True)
        ]
        if args.out is None and not args.answering.stream:
            _show_answers(console, questions, conversations)
        flat = [answer.stats for answers in conversations for answer in answers]
        _show_stats(console, path, sum_stats(flat), seconds)
        prompt = encode(tokenizer_of(target), questions[0].messages([]), raw=args.answering.raw)
        if args.looking.explain:
            directory = args.looking.explain_out / short_name(path)
            explain(
                console, decoder, prompt, args.sampling.params(), args.looking.explain, directory
            )
        if args.looking.profile is not None:
            directory = args.looking.profile / short_name(path)
            write_profile(directory, decoder, prompt, args.sampling.params())
            console.print(f"trace written to {directory}", soft_wrap=True)
    if args.out is not None:
        _write(args.out, rows, console)


def _generate_journaled(args: Args, console: Console, questions: list[Question]) -> None:
    assert args.out is not None
    start, (path,) = time.perf_counter(), args.target
    with answered(args, questions) as (conversations, stop_ids):
        rows = [
            _row(args, path, question, answers, stop_ids)
            for question, answers in zip(questions, conversations, strict=True)
        ]
        flat = [answer.stats for answers in conversations for answer in answers]
        _show_stats(console, path, sum_stats(flat), time.perf_counter() - start)
        _write(args.out, rows, console)


def _write(out: Path, rows: list[dict], console: Console) -> None:
    if is_main_process():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(out, "".join(lines))
    console.print(f"{len(rows)} answers written to {out}", soft_wrap=True)


def _check_outputs(args: Args) -> None:
    if args.out is not None:
        check_writable(args.out)
    if args.looking.explain:
        check_directory(args.looking.explain_out, "--explain-out")
    if args.looking.profile is not None:
        check_directory(args.looking.profile, "--profile")


def _questions(args: Args) -> list[Question]:
    texts = map(whole_characters, args.prompt)  # a shell passes bytes that are no UTF-8
    given = [Question(i, "", (text,)) for i, text in enumerate(texts, start=1)]
    if args.prompts is not None:
        given += read_questions(args.prompts)
    if not given:
        raise UserError("nothing to answer; give --prompt TEXT or --prompts FILE.jsonl")
    return given


def _converse(
    args: Args, decoder: SpeculativeDecoder, target: Model, questions: list[Question]
) -> list[list[Answer]]:
    """All answers of each question: every first turn, then every second turn, and so on."""
    conversations: list[list[Answer]] = [[] for _ in questions]
    tokenizer = tokenizer_of(target)
    with counting_bar(PlainColumn("{task.fields[speed]}"), *eta()) as progress:
        task = progress.add_task("answering", total=sum(len(q.turns) for q in questions), speed="")
        tokens, seconds = 0, 0.0

        def on_batch(count, stats):
            nonlocal tokens, seconds
            tokens += stats.emitted_tokens
            seconds += stats.seconds["total"]  # without compilation
            progress.update(task, advance=count, speed=f"{tokens / seconds:.0f} tok/s")

        for turn in range(max(len(question.turns) for question in questions)):
            active = [i for i, question in enumerate(questions) if turn < len(question.turns)]
            prompts = []
            for i in active:
                messages = questions[i].messages([answer.text for answer in conversations[i]])
                prompt = encode(tokenizer, messages, raw=args.answering.raw)
                prompts.append(decoder.encode(prompt, questions[i].name))
            sampling = [args.sampling.params(i) for i in active]
            answers = answer_all(decoder, prompts, sampling, args.answering.batch_size, on_batch)
            for i, answer in zip(active, answers, strict=True):
                conversations[i].append(answer)
    return conversations


def _row(
    args: Args, target: str, question: Question, answers: list[Answer], stop_ids: tuple[int, ...]
) -> dict:
    texts, stats = [answer.text for answer in answers], sum_stats([a.stats for a in answers])
    row = {
        "question_id": question.question_id,
        "category": question.category,
        "target": target,
        "draft": args.draft,
        "prompt": question.turns[0],
        "response": texts[0],
        "messages": question.messages(texts),
        "new_tokens": [len(answer.token_ids) for answer in answers],
        # Without it, an answer cut by max-new-tokens would teach a draft to stop there.
        "finished": [not set(stop_ids).isdisjoint(answer.token_ids[-1:]) for answer in answers],
        "stats": {
            "mean_acceptance_length": round(stats.mean_acceptance_length, 4),
            "target_forwards": stats.target_forwards,
            "plain_rounds": stats.plain_rounds,
            "drafted_tokens": stats.drafted_tokens,
            "accepted_tokens": stats.accepted_tokens,
            "draft_length_histogram": stats.draft_length_histogram,
            "exit_histogram": stats.exit_histogram,
            "draft_steps": stats.draft_steps,
        },
    }
    if len(texts) > 1:
        row["responses"] = texts
    return row


def _show_answers(
    console: Console, questions: list[Question], conversations: list[list[Answer]]
) -> None:
    for question, answers in zip(questions, conversations, strict=True):
        for turn, answer in zip(question.turns, answers, strict=True):
            if len(questions) > 1 or len(question.turns) > 1:
                console.print(rule_above(turn))
            text = WrappedText(console)
            text.write(answer.text)
            text.end()


def _show_stats(console: Console, target: str, stats: GenerationStats, seconds: float) -> None:
    row = {
        "new tokens": f"{stats.emitted_tokens:,}",
        "seconds": f"{seconds:.1f}",
        # On a cluster, calls ran beside each other, some of them perhaps for an earlier process.
        "compiling": f"{stats.seconds['compile']:.1f}" if stats.seconds else "-",
        "tokens/s": f"{stats.tokens_per_second:.1f}" if stats.seconds else "-",
        "target passes": f"{stats.target_forwards:,}",
        "MAT": f"{stats.mean_acceptance_length:.2f}",
        "accepted": f"{stats.draft_acceptance_rate:.0%}" if stats.drafted_tokens else "-",
        "by exit": shares(stats.exit_histogram),
    }
    print_table(console, f"target {target}", list(row), [list(row.values())], texts=0)
