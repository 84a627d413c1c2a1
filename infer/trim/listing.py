"""Makes the list of tokens that a draft's head is read over, from answers of its targets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from infer.trim.args import Args
from infer.trim.choose import FOLDS, choose_tokens, coverage
from s2d_jax.cli.outputs import check_writable
from s2d_jax.cli.screen import screen
from s2d_jax.cli.tables import print_table
from s2d_jax.errors import UserError, shown
from s2d_jax.files import expanded, json_rows, local_path, read_json, read_text, write_text
from s2d_jax.formats.hub import SORTED_DRAFT
from s2d_jax.text.messages import read_turn, text_of, turns_in
from s2d_jax.text.prompts import check_ids
from s2d_jax.text.tokenizer import Tokenizer
from s2d_jax.weights.load import read_description
from s2d_jax.weights.vocabulary import DraftVocabulary

_SMALLEST_SHOWN = 1000


@dataclasses.dataclass(frozen=True)
class Written:
    """One answer: the prompt that it answers, and its text."""

    prompt: str
    text: str


def trim(args: Args) -> None:
    """Makes the list, prints what lists of several sizes cover, and writes it whole or not at all.

    Raises:
        UserError: for a draft without a tokenizer, answers that hold nothing, or an impossible size.
    """
    _check_destination(args)
    answers = [answer for path in args.answers for answer in read_answers(path)]
    if not answers:
        raise UserError(
            "no answers were given; give --answers FILE.jsonl from infer.generate --out"
        )
    config, tokenizer = read_description(args.draft)
    if tokenizer is None:
        raise UserError(f"{args.draft} has no tokenizer; add its tokenizer.json to the directory")
    counts_FV = _count(answers, tokenizer, config.vocab_size)
    counts_V, text_counts_V = counts_FV.sum(axis=0), np.zeros(config.vocab_size, np.int64)
    for path in track(args.text, "counting text", console=screen(stderr=True), transient=True):
        text = read_text(local_path(path, "--text"), "give text files to --text")
        text_counts_V += _count_text(text, tokenizer, config.vocab_size)
    special = {*tokenizer.special_token_ids(), *config.eos_token_ids}
    keep = [i for i in sorted(special) if i < config.vocab_size]
    ids_U = choose_tokens(counts_V, text_counts_V, keep, args.size)
    sizes = _shown_sizes(args.size, len(keep), config.vocab_size)
    covered = coverage(counts_FV, text_counts_V, keep, sizes)
    provenance = {
        "answers": [str(path) for path in args.answers],
        "text": [str(path) for path in args.text],
        "answer_tokens": int(counts_V.sum()),
        "listed_from_answers": int((counts_V[ids_U] > 0).sum()),
        "listed_from_text": int(((counts_V == 0) & (text_counts_V > 0))[ids_U].sum()),
        "held_out_coverage": {str(size): round(share, 5) for size, share in covered.items()},
    }
    _show(args, covered, config.vocab_size, provenance)
    _write(args, DraftVocabulary.of_tokenizer(ids_U.tolist(), tokenizer, provenance))


def _check_destination(args: Args) -> None:
    kept = expanded(args.draft) / SORTED_DRAFT
    if args.out is None and not kept.is_file():
        raise UserError(
            f"{args.draft} holds no {SORTED_DRAFT} to keep the list in; "
            "give --out FILE.json, and that file to --draft-vocabulary"
        )
    if args.out is not None and (args.out.suffix != ".json" or args.out.name == SORTED_DRAFT):
        raise UserError(
            f"--out {args.out} is no file for a list; name it like vocabulary.json, or leave --out away to change the draft"
        )
    check_writable(
        kept if args.out is None else args.out, "--draft" if args.out is None else "--out"
    )


def read_answers(path: Path) -> Iterator[Written]:
    """The answers in the rows of `path`: every assistant message, else `responses`, else `response`.

    Raises:
        UserError: for a file that cannot be read or is empty, or a row without an answer.
    """
    remedy = "give a file that infer.generate --out wrote"
    empty = True
    for where, row in json_rows(local_path(path, "--answers"), remedy):
        empty, texts = False, _texts(row)
        if not texts or None in texts:
            raise UserError(
                f"{where}: {shown(row)} has no answer; expected an object with messages, responses or response"
            )
        prompt = _prompt(row) or where
        yield from (Written(prompt, text) for text in texts if text is not None)
    if empty:
        raise UserError(f"{path} holds no answers; {remedy}")


def _texts(row: Any) -> list[str | None]:
    """The answers of a row, with None for what is not text; none if it has no place for answers."""
    if (turns := turns_in(row)) is not None:
        return [text for role, text in map(read_turn, turns) if role == "assistant"]
    if not isinstance(row, dict):
        return []
    several = row.get("responses")
    return [text_of(a) for a in (several if isinstance(several, list) else [row.get("response")])]


def _prompt(row: Any) -> str:
    """What the answers of a row answer, so that answers to the same prompt are known; "" if the row does not say."""
    if isinstance(row, dict) and (prompt := text_of(row.get("prompt"))):
        return prompt
    asked = [text for role, text in map(read_turn, turns_in(row) or []) if role != "assistant"]
    return "\n".join(filter(None, asked))


def _count(answers: Sequence[Written], tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """int64 `[F, V]`: how often each token was written in each fold; all answers to a prompt are in one fold."""
    fold_of = {prompt: i for i, prompt in enumerate(dict.fromkeys(a.prompt for a in answers))}
    if len(fold_of) < 2:
        raise UserError(
            "the answers are all to one prompt; give more, so that some can be held out"
        )
    counts_FV = np.zeros((min(FOLDS, len(fold_of)), vocab_size), np.int64)
    progress = track(answers, "counting tokens", console=screen(stderr=True), transient=True)
    for answer in progress:
        fold = fold_of[answer.prompt] % len(counts_FV)
        counts_FV[fold] += _count_text(answer.text, tokenizer, vocab_size)
    if not counts_FV.any():
        raise UserError("the answers are all empty; give answers with text")
    return counts_FV


def _count_text(text: str, tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """int64 `[V]`: how often each token occurs. Raises UserError for a token that the model has no row for."""
    ids = tokenizer.encode(text)
    if ids:
        check_ids(ids, vocab_size, "the text to count", tokenizer)
    return np.bincount(ids, minlength=vocab_size)


def _shown_sizes(size: int, num_kept: int, vocab_size: int) -> list[int]:
    doubled = [_SMALLEST_SHOWN << i for i in range(vocab_size.bit_length())]
    possible = [shown for shown in doubled if num_kept < shown < vocab_size]
    return sorted({*possible, size, vocab_size})


def _show(args: Args, covered: dict[int, float], vocab_size: int, provenance) -> None:
    console = screen()
    headings = "tokens in the list", "of the head", "of held-out answers covered", ""
    rows = [
        (
            f"{size:,}",
            f"{size / vocab_size:.0%}",
            f"{share:.2%}",
            "chosen" if size == args.size else "",
        )
        for size, share in covered.items()
    ]
    print_table(console, f"lists for {args.draft}", headings, rows, texts=0)
    seen, more = provenance["listed_from_answers"], provenance["listed_from_text"]
    console.print(
        f"{provenance['answer_tokens']:,} answer tokens. Of the {args.size:,} listed tokens {seen:,} occur in them, "
        f"{more:,} only in the other text; the rest are special tokens and the lowest ids.",
        soft_wrap=not console.is_terminal,
    )


def _write(args: Args, vocabulary: DraftVocabulary) -> None:
    value, path = vocabulary.to_json(), args.out
    if path is None:
        path = expanded(args.draft) / SORTED_DRAFT
        value = {**read_json(path), "vocabulary_subset": value}
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    screen().print(f"written to {path}", soft_wrap=True)
    if value.get("policies"):
        screen().print(
            "The calibrations in it were measured with another head: calibrate again.",
            soft_wrap=True,
        )
