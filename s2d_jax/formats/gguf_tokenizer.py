"""The tokenizer that a GGUF file describes, built with `tokenizers`.

A GGUF file stores the vocabulary, the merges (or scores) and the *name* of the rule that splits text into words, which stands
in `gguf_words.py`.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from s2d_jax.errors import UserError, require, shown
from s2d_jax.fields import Fields
from s2d_jax.formats.eos_ids import merged_ids
from s2d_jax.formats.gguf import GGUFFile
from s2d_jax.formats.gguf_words import WORD_RULES

# Values of `tokenizer.ggml.token_type`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5

_SPACE = "▁"  # SentencePiece's visible space
_PREFIX = "tokenizer.ggml."


@dataclasses.dataclass(frozen=True)
class GGUFTokenizer:
    """What a GGUF file describes.

    Attributes:
        backend: the tokenizer.
        special_tokens: its special tokens under Hugging Face's names (`bos_token`, ...).
        stop_token_ids: ids that end an answer.
    """

    backend: Tokenizer
    special_tokens: dict[str, str]
    stop_token_ids: tuple[int, ...]


class _Vocabulary:
    """What a GGUF file says about its tokens, without the ids that only pad the embedding.

    Raises:
        UserError: for fields of another type, lists of another length, and a token with two ids.
    """

    def __init__(self, file: GGUFFile):
        self.path = file.path
        self._fields = Fields(file.metadata, file.path, "use a file with its tokenizer")
        # llama.cpp's name for a token without a text.
        self._tokens = [
            token or f"[EMPTY_{i}]"
            for i, token in enumerate(self._fields.texts(f"{_PREFIX}tokens"))
        ]
        types = self._fields.integers(f"{_PREFIX}token_type", default=None) or [NORMAL] * len(
            self._tokens
        )
        self.check_length("token_type", types)
        self.entries = [
            (i, token, kind)
            for i, (token, kind) in enumerate(zip(self._tokens, types, strict=True))
            if not (kind == UNUSED and re.fullmatch(r"\[PAD\d+\]", token))
        ]
        self.ids = {token: i for i, token, _ in self.entries}
        if len(self.ids) < len(self.entries):
            counted = collections.Counter(token for _, token, _ in self.entries)
            (token, count), *_ = counted.most_common(1)
            raise UserError(
                f"{self.path}: {_PREFIX}tokens lists {shown(token)} {count} times; a token has one id, so fetch the file again"
            )

    def check_length(self, key: str, values: tuple | list) -> None:
        """Raises UserError unless there is one value for each token."""
        require(
            len(values) == len(self._tokens),
            f"{self.path}: {_PREFIX}{key} has {len(values)} entries for {len(self._tokens)} tokens; fetch the file again",
        )

    def text(self, key: str) -> str:
        return self._fields.text(_PREFIX + key)

    def merges(self) -> list[tuple[str, str]]:
        """Pairs of tokens that merge, the first ones first."""
        # A token may begin with a space itself.
        cuts = ((merge, merge.find(" ", 1)) for merge in self._fields.texts(f"{_PREFIX}merges"))
        return [(merge[:cut], merge[cut + 1 :]) for merge, cut in cuts]

    def scores(self) -> list[float]:
        """One score for each token."""
        scores = self._fields.numbers(f"{_PREFIX}scores")
        self.check_length("scores", scores)
        return list(scores)

    def flag(self, key: str, default: bool) -> bool:
        return self._fields.flag(_PREFIX + key, default)

    def id(self, key: str) -> int | None:
        """The id under `key`, such as `eos_token_id`; None where there is none, or one that no token has."""
        index = self._fields.integer(_PREFIX + key, 0, default=None)
        return None if index is None or index >= len(self._tokens) else index

    def named(self, key: str) -> str | None:
        """The token whose id stands under `key`."""
        index = self.id(key)
        return None if index is None else self._tokens[index]


def _bpe(vocabulary: _Vocabulary, merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    try:
        return models.BPE(vocab=vocabulary.ids, merges=merges, **options)
    except Exception as error:  # tokenizers raises nothing more specific
        raise UserError(
            f"{vocabulary.path}: the tokenizer is damaged ({error}); fetch the file again"
        ) from error


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    pre = vocabulary.text("pre")
    if pre not in WORD_RULES:
        raise UserError(
            f"{vocabulary.path}: pre-tokenizer {shown(pre)} is not supported; use one of {', '.join(WORD_RULES)}"
        )
    rule = WORD_RULES[pre]
    tokenizer = Tokenizer(
        _bpe(vocabulary, vocabulary.merges(), ignore_merges=rule.takes_whole_words)
    )
    if rule.composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = rule.split()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    model = _bpe(
        vocabulary,
        merges_of_scores(vocabulary.entries, vocabulary.scores()),
        unk_token=vocabulary.named("unknown_token_id"),
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    visible_spaces = normalizers.Replace(" ", _SPACE)
    decode = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.flag("add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), visible_spaces])
        decode.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = visible_spaces
    tokenizer.decoder = decoders.Sequence(decode)
    return tokenizer


def merges_of_scores(
    entries: list[tuple[int, str, int]], scores: list[float]
) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE vocabulary, which stores a score per token instead.

    A pair may merge when its concatenation is a token; pairs of higher score go first.

    >>> merges_of_scores([(0, "a", 1), (1, "b", 1), (2, "ab", 1)], [0.0, 0.0, -1.0])
    [('a', 'b')]
    """
    score_of = {token: scores[i] for i, token, kind in entries if kind == NORMAL}
    merges = [
        (-score, -cut, token[:cut], token[cut:])
        for token, score in score_of.items()
        for cut in range(1, len(token))
        if token[:cut] in score_of and token[cut:] in score_of
    ]
    return [(left, right) for _, _, left, right in sorted(merges)]


def _add_post_processor(tokenizer: Tokenizer, vocabulary: _Vocabulary, default_bos: bool) -> None:
    """Puts BOS before and EOS after a text encoded with `add_special_tokens=True`, where the model wants it."""
    template, used = ["$A"], []
    for flag, key, default, place in (
        ("add_bos_token", "bos_token_id", default_bos, 0),
        ("add_eos_token", "eos_token_id", False, 1),
    ):
        token = vocabulary.named(key)
        if vocabulary.flag(flag, default) and token is not None:
            template.insert(0 if place == 0 else len(template), token)
            used.append((token, vocabulary.ids[token]))
    if used:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=list(dict(used).items())
        )


def tokenizer_from_gguf(file: GGUFFile) -> GGUFTokenizer:
    """The tokenizer, its special tokens, and the ids that end an answer.

    Raises:
        UserError: for a kind of tokenizer other than byte-level BPE ("gpt2") and SentencePiece BPE ("llama"), an unknown
            pre-tokenizer, or metadata that are missing or of another type.
    """
    vocabulary = _Vocabulary(file)
    kind = vocabulary.text("model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise UserError(
            f"{file.path}: tokenizer {shown(kind)} is not supported; use one of {', '.join(builders)}"
        )
    tokenizer = builders[kind](vocabulary)
    # Control tokens are cut out of the text whole and left out of decoded text; user-defined ones are cut out only.
    tokenizer.add_special_tokens(
        [
            AddedToken(t, normalized=False)
            for _, t, k in vocabulary.entries
            if k in (UNKNOWN, CONTROL)
        ]
    )
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False) for _, t, k in vocabulary.entries if k == USER_DEFINED]
    )
    default_bos = kind == "llama" or WORD_RULES[vocabulary.text("pre")].adds_bos
    _add_post_processor(tokenizer, vocabulary, default_bos)
    names = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    named = {name: vocabulary.named(key) for name, key in names.items()}
    return GGUFTokenizer(
        tokenizer,
        {name: token for name, token in named.items() if token is not None},
        merged_ids(vocabulary.id("eos_token_id"), vocabulary.id("eot_token_id")),
    )
