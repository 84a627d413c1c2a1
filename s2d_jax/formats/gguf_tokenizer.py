"""The tokenizer that a GGUF file describes, built with `tokenizers`.

A GGUF file stores the vocabulary, the merges (or scores) and the *name* of the rule that splits text into words; the rules
themselves are copied here from the models' own `tokenizer.json`.
"""

from __future__ import annotations

import re
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from s2d_jax.errors import UserError
from s2d_jax.formats.gguf import GGUFFile

# Values of `tokenizer.ggml.token_type`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5

_SPACE = "▁"  # SentencePiece's visible space
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2_words() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm_words() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_words()])


# `tokenizer.ggml.pre` -> how text is split into words before merging.
_WORD_SPLITS = {
    "gpt-2": _gpt2_words,
    "smollm": _smollm_words,
    "qwen2": lambda: _split_by(rf"{_WORDS}|\p{{N}}|{_OTHERS}"),
    "llama-bpe": lambda: _split_by(rf"{_WORDS}|\p{{N}}{{1,3}}|{_OTHERS}"),
}


class _Vocabulary:
    """What a GGUF file says about its tokens, without the ids that only pad the embedding."""

    def __init__(self, file: GGUFFile):
        self.path, self._metadata = file.path, file.metadata
        tokens = self.require("tokens")
        types = self.get("token_type") or [NORMAL] * len(tokens)
        self.entries = [
            (i, token, kind)
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if not (kind == UNUSED and re.fullmatch(r"\[PAD\d+\]", token))
        ]
        self.ids = {token: i for i, token, _ in self.entries}
        self._tokens = tokens

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    def require(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise UserError(
                f"{self.path} lacks tokenizer.ggml.{key}; use a file with its tokenizer"
            )
        return value

    def named(self, key: str) -> str | None:
        """The token whose id stands under `key`, such as `eos_token_id`."""
        index = self.get(key)
        return None if index is None or index >= len(self._tokens) else self._tokens[index]


def _bpe(vocabulary: _Vocabulary, merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    try:
        return models.BPE(vocab=vocabulary.ids, merges=merges, **options)
    except Exception as error:  # tokenizers raises nothing more specific
        raise UserError(
            f"{vocabulary.path}: the tokenizer is damaged ({error}); fetch the file again"
        ) from error


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    pre = vocabulary.require("pre")
    if pre not in _WORD_SPLITS:
        raise UserError(
            f"{vocabulary.path}: pre-tokenizer {pre!r} is not supported; use one of {', '.join(_WORD_SPLITS)}"
        )
    merges = [
        (left, right) for left, _, right in (m.partition(" ") for m in vocabulary.require("merges"))
    ]
    # Llama-3 keeps a word whole if it is a token, even where no merges lead to it.
    tokenizer = Tokenizer(_bpe(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _WORD_SPLITS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    model = _bpe(
        vocabulary,
        merges_of_scores(vocabulary.entries, vocabulary.require("scores")),
        unk_token=vocabulary.named("unknown_token_id"),
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    visible_spaces = normalizers.Replace(" ", _SPACE)
    decode = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.get("add_space_prefix", True):
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
        if token is not None and vocabulary.get(flag, default):
            template.insert(0 if place == 0 else len(template), token)
            used.append((token, vocabulary.ids[token]))
    if used:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=list(dict(used).items())
        )


def tokenizer_from_gguf(file: GGUFFile) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer, and its special tokens under Hugging Face's names (`bos_token`, ...).

    Raises:
        UserError: for a kind of tokenizer other than byte-level BPE ("gpt2") and SentencePiece BPE ("llama"), an unknown
            pre-tokenizer, or missing metadata.
    """
    vocabulary = _Vocabulary(file)
    kind = vocabulary.require("model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise UserError(
            f"{file.path}: tokenizer {kind!r} is not supported; use one of {', '.join(builders)}"
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
    default_bos = kind == "llama" or vocabulary.get("pre") == "llama-bpe"
    _add_post_processor(tokenizer, vocabulary, default_bos)
    names = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    named = {name: vocabulary.named(key) for name, key in names.items()}
    return tokenizer, {name: token for name, token in named.items() if token is not None}
