"""Tokenizers in GGUF files: how each name splits words, and metadata of other types."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hard_texts import TEXTS
from hf_tiny import expect_user_error, tiny_gguf_vocabulary
from tokenizers import Regex, models, normalizers, pre_tokenizers

from s2d_jax.formats.gguf import GGUFFile
from s2d_jax.formats.gguf_tokenizer import tokenizer_from_gguf
from s2d_jax.formats.gguf_words import WORD_RULES


def described(metadata):
    """What a file with these `tokenizer.*` keys describes."""
    keys = {f"tokenizer.{key}": value for key, value in metadata.items() if value is not None}
    file = GGUFFile.__new__(GGUFFile)  # read from nowhere
    file.path, file.metadata = Path("m.gguf"), keys
    return tokenizer_from_gguf(file)


def words(text: str, pre: pre_tokenizers.PreTokenizer) -> list[str]:
    """The words of `text`, from the alphabet of bytes back to text where they are whole characters."""
    return [word for word, _ in pre.pre_tokenize_str(text)]


def split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Hugging Face's usual form: patterns one after another, then bytes."""
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(False, use_regex=False)])


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
SEQUENCE = pre_tokenizers.Sequence
# The pre-tokenizers in the models' own tokenizer.json.
KNOWN = {
    "gpt-2": BYTES,
    "olmo": BYTES,
    "starcoder": SEQUENCE([pre_tokenizers.Digits(True), BYTES]),
    "command-r": SEQUENCE([pre_tokenizers.Digits(True), BYTES]),
    "llama3": split(LLAMA3),
    "falcon3": split(LLAMA3),
    "dbrx": split(LLAMA3),
    "deepseek-r1-qwen": split(LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")),
    "tekken": split(TEKKEN),
    "gpt-4o": split(GPT4O),
    "llama4": split(GPT4O),
    "deepseek-coder": SEQUENCE(
        [
            pre_tokenizers.Split(Regex(r"[\r\n]"), "isolated"),
            pre_tokenizers.Split(Regex(r"\s?\p{L}+"), "isolated"),
            pre_tokenizers.Split(Regex(r"\s?\p{P}+"), "isolated"),
            pre_tokenizers.Split(Regex("[一-龥ࠀ-一가-퟿]+"), "isolated"),
            pre_tokenizers.Digits(True),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_words_are_those_of_the_models_own_files(name):
    ours = WORD_RULES[name].split()
    for text in (*TEXTS, "HTTPServer's DON'T a//\n\nb", "１２３ ½ ² x1234567"):
        assert words(text, ours) == words(text, KNOWN[name]), text


# What a rule does that others do not.
SPLITS = {
    "gpt-2": ("a  1234's\n\nb", ["a", "Ġ", "Ġ1234", "'s", "Ċ", "Ċ", "b"]),
    "smollm": ("ab 123", ["ab", "Ġ", "1", "2", "3"]),
    "llama-bpe": ("ab 12345 DON'T", ["ab", "Ġ", "123", "45", "ĠDON", "'T"]),
    "qwen2": ("ab 123!\n\nx", ["ab", "Ġ", "1", "2", "3", "!ĊĊ", "x"]),
    "tekken": ("HTTPServer don't", ["HTTPServer", "Ġdon", "'t"]),
    "gpt-4o": ("aBc don't 1234", ["a", "Bc", "Ġdon't", "Ġ", "123", "4"]),
    "deepseek-llm": ("ab cd, 123\n", ["ab", "Ġcd", ",", "Ġ", "123", "Ċ"]),
    "deepseek-coder": ("ab cd, 123\n", ["ab", "Ġcd", ",", "Ġ", "1", "2", "3", "Ċ"]),
    "deepseek-v3": ("ab 1234.x", ["ab", "Ġ", "123", "4", ".x"]),
    "seed-coder": ("ab 12;\n", ["ab", "Ġ", "1", "2", ";", "Ċ"]),
    "falcon": ("a1234 b=c", ["a", "123", "4", "Ġb", "=", "c"]),
    "default": ("a1234 b=c", ["a", "123", "4", "Ġb", "=", "c"]),
    "poro-chat": ("ab cd, e1", ["ab", "Ġcd", ",", "Ġe1"]),
    "viking": ("ab cd, e1", ["ab", "Ġcd", ",", "Ġe", "1"]),
}


@pytest.mark.parametrize("name", SPLITS)
def test_how_a_name_splits(name):
    text, expected = SPLITS[name]
    assert words(text, WORD_RULES[name].split()) == expected


@pytest.mark.parametrize("name", WORD_RULES)
def test_every_name_makes_a_tokenizer_that_loses_nothing(name):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    metadata = {
        "ggml.model": "gpt2",
        "ggml.pre": name,
        "ggml.tokens": [*alphabet, "ab", "zyx", "<s>"],
        "ggml.token_type": [1] * 258 + [3],
        "ggml.merges": ["a b"],
        "ggml.bos_token_id": 258,
    }
    backend, rule = described(metadata).backend, WORD_RULES[name]
    for text in TEXTS:
        expected = normalizers.NFC().normalize_str(text) if rule.composes else text
        assert backend.decode(
            backend.encode(text, add_special_tokens=False).ids
        ) == expected.replace("<s>", "")
    assert backend.encode("ab", add_special_tokens=False).ids == [256]
    assert (len(backend.encode("zyx", add_special_tokens=False).ids) == 1) == rule.takes_whole_words
    assert (backend.encode("ab").ids[0] == 258) == rule.adds_bos
    told = described(metadata | {"ggml.add_bos_token": not rule.adds_bos}).backend
    assert (told.encode("ab").ids[0] == 258) != rule.adds_bos


def test_names_that_mean_the_same_are_one_rule():
    for names in (
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2"),
        ("smollm", "starcoder", "refact", "command-r", "exaone"),
        ("deepseek-r1-qwen", "megrez", "stablelm2"),
        ("gpt-4o", "llama4"),
    ):
        assert len({id(WORD_RULES[name]) for name in names}) == 1


WRONG = {
    "ggml.model": (3, ["gpt2"], True, 1.5),
    "ggml.pre": (3, ["gpt-2"], True),
    "ggml.tokens": ("ab", 7, [1, 2], ["a", 3], 1.5),
    "ggml.token_type": ("ab", 3, ["a"], [1.5] * 64, [True] * 64),
    "ggml.merges": ("a b", 5, [1], [["a", "b"]], True),
    "ggml.bos_token_id": ("1", [1], -1, 1.5, True),
    "ggml.eos_token_id": ("1", [1], -1, 1.5, True),
    "ggml.eot_token_id": ("1", [1], -1, 1.5, True),
    "ggml.add_bos_token": (1, "yes", [True]),
    "ggml.add_eos_token": (1, "yes", [True]),
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, vs in WRONG.items() for v in vs])
def test_metadata_of_another_type_are_refused_in_a_line(key, value):
    with expect_user_error(rf"m\.gguf: tokenizer\.{key}=.* must be "):
        described(tiny_gguf_vocabulary() | {key: value})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"ggml.token_type": [1]}, "token_type has 1 entries for 64 tokens; fetch the file again"),
        ({"ggml.tokens": ["a", "b", "a"], "ggml.token_type": None}, "lists 'a' 2 times"),
        ({"ggml.merges": ["!"]}, r"the tokenizer is damaged \("),
        ({"ggml.merges": [""]}, r"the tokenizer is damaged \("),
        ({"ggml.pre": None}, "lacks tokenizer.ggml.pre"),
        ({"ggml.model": None}, "lacks tokenizer.ggml.model"),
        ({"ggml.pre": "x\n\x1b[2J"}, r"pre-tokenizer 'x\\n\\x1b\[2J' is not supported; use one of"),
        ({"ggml.pre": "kimi-k2"}, "pre-tokenizer 'kimi-k2' is not supported"),
        ({"ggml.model": "bert"}, "tokenizer 'bert' is not supported; use one of gpt2, llama"),
    ],
)
def test_metadata_that_do_not_fit_are_refused_in_a_line(changes, told):
    with expect_user_error(told):
        described(tiny_gguf_vocabulary() | changes)


@pytest.mark.parametrize("scores", ["x", 3, [1.0], ["a"] * 3, [float("nan")] * 3, [None] * 3])
def test_scores_of_another_type_or_length(scores):
    metadata = {"ggml.model": "llama", "ggml.tokens": ["a", "b", "ab"], "ggml.scores": scores}
    with expect_user_error(r"m\.gguf: tokenizer\.ggml\.scores"):
        described(metadata)
    assert described(metadata | {"ggml.scores": [0.0, 0.0, -1.0]}).backend.get_vocab_size() == 3


def test_special_ids_that_no_token_has_are_left_out():
    found = described(tiny_gguf_vocabulary() | {"ggml.eos_token_id": 64, "ggml.eot_token_id": 63})
    assert found.stop_token_ids == (63,)
    assert found.special_tokens == {"bos_token": "<|im_start|>"}


def test_tokens_without_a_text_get_a_name():
    tokens = ["a", "", "b", ""]
    backend = described(
        {"ggml.model": "gpt2", "ggml.pre": "gpt-2", "ggml.tokens": tokens, "ggml.merges": []}
    ).backend
    assert [backend.id_to_token(i) for i in range(4)] == ["a", "[EMPTY_1]", "b", "[EMPTY_3]"]


def test_a_merge_may_begin_with_a_space():
    metadata = {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.tokens": ["a", "Ġ", "Ġa", " ", " a"],
        "ggml.merges": ["Ġ a", "  a"],
    }
    model = described(metadata).backend.model
    assert isinstance(model, models.BPE)
    assert tokenizers.Tokenizer(model).encode(" a").tokens == [" a"]
