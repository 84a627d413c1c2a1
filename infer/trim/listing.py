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
from s2d_jax.cli.screen import screen
from s2d_jax.cli.tables import print_table
from s2d_jax.errors import UserError
from s2d_jax.files import read_json, write_text
from s2d_jax.formats.hub import SORTED_DRAFT
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
        text_counts_V += _count_text(_read_text(path), tokenizer, config.vocab_size)
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
    if args.out is None and not (Path(args.draft).expanduser() / SORTED_DRAFT).is_file():
        raise UserError(
            f"{args.draft} holds no {SORTED_DRAFT} to keep the list in; "
            "give --out FILE.json, and that file to --draft-vocabulary"
        )
    if args.out is not None and (args.out.suffix != ".json" or args.out.name == SORTED_DRAFT):
        raise UserError(
            f"--out {args.out} is no file for a list; name it like vocabulary.json, or leave --out away to change the draft"
        )


def read_answers(path: Path) -> Iterator[Written]:
    """The answers in the rows of `path`: every assistant message, else `responses`, else `response`.

    Raises:
        UserError: for a missing or empty file, or a row without an answer.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a file that infer.generate --out wrote")
    # Not splitlines: an answer may hold other characters that end a line.
    lines = path.read_text(encoding="utf-8").split("\n")
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError(f"{path} holds no answers; give a file that infer.generate --out wrote")
    for number, line in numbered:
        try:
            row = json.loads(line)
            texts = _texts(row)
        except (ValueError, TypeError, KeyError, AttributeError):
            row, texts = {}, []
        if (
            not isinstance(texts, list)
            or not texts
            or not all(isinstance(text, str) for text in texts)
        ):
            raise UserError(
                f"{path}, line {number}: no answer; expected an object with messages, responses or response"
            )
        prompt = str(row.get("prompt") or row.get("messages") or f"{path}:{number}")
        yield from (Written(prompt, text) for text in texts)


def _texts(row: dict[str, Any]) -> list[str]:
    if "messages" in row:
        return [m["content"] for m in row["messages"] if m["role"] == "assistant"]
    return row["responses"] if "responses" in row else [row["response"]]


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
        check_ids(ids, vocab_size, tokenizer, what="the text to count")
    return np.bincount(ids, minlength=vocab_size)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; give text files to --text") from None


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
        path = Path(args.draft).expanduser() / SORTED_DRAFT
        value = {**read_json(path), "vocabulary_subset": value}
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    screen().print(f"written to {path}", soft_wrap=True)
    if value.get("policies"):
        screen().print(
            "The calibrations in it were measured with another head: calibrate again.",
            soft_wrap=True,
        )
