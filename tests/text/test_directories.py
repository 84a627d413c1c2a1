"""Tokenizers of Hugging Face directories: tokenizer.json as it stands, whatever class is named, and no code that lies there."""

from __future__ import annotations

import io
import json
import os
import sys

import pytest
import tokenizers
from hard_texts import TEXTS
from hf_tiny import expect_user_error
from tiny import tiny_model, tiny_tokenizer
from tokenizers import normalizers, pre_tokenizers

from s2d_jax.text.tokenizer import Tokenizer
from s2d_jax.weights.export import save_model
from s2d_jax.weights.load import load_model

DIGITS = pre_tokenizers.Digits(individual_digits=True)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
PIPELINES = {
    "digits": (None, [DIGITS, pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "own regex": (None, [pre_tokenizers.Split(tokenizers.Regex(r"\s|\w{1,2}"), "isolated"), BYTES]),
    "normalised": (normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]), [BYTES]),
}
CLASSES = ("GPT2Tokenizer", "Qwen2TokenizerFast", "LlamaTokenizerFast", "NoSuchTokenizer", None)


def pipeline(name: str) -> tokenizers.Tokenizer:
    """A byte-level tokenizer whose words are split in one of these ways."""
    texts = (*TEXTS, "\n\n\n  \n", "      ", "123 1234 12345")
    backend = tiny_tokenizer(500, texts=texts)._fast.backend_tokenizer
    normalizer, splits = PIPELINES[name]
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    return backend


def write(directory, backend=None, **config):
    """A directory with tokenizer.json and tokenizer_config.json."""
    directory.mkdir(exist_ok=True)
    backend = pipeline("digits") if backend is None else backend
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("named", CLASSES)
@pytest.mark.parametrize("name", PIPELINES)
def test_tokenizer_json_counts_and_not_the_class(tmp_path, name, named):
    backend = pipeline(name)
    write(tmp_path, backend, tokenizer_class=named, eos_token="<|im_end|>")
    ours = Tokenizer.from_directory(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == backend.encode(text, add_special_tokens=False).ids, text
    assert ours.stop_token_ids == (2, 0)
    assert ours.rebuilt_as == named


def test_what_save_writes_was_never_rebuilt(tmp_path):
    tiny_tokenizer().save(tmp_path)
    assert Tokenizer.from_directory(tmp_path).rebuilt_as is None


@pytest.mark.parametrize(
    ("named", "bos", "eos"),
    [
        ("GPT2Tokenizer", "<|endoftext|>", "<|endoftext|>"),
        ("Qwen2TokenizerFast", None, "<|endoftext|>"),
        ("PreTrainedTokenizerFast", None, None),
        ("LlamaTokenizerFast", None, None),  # its <s> and </s> are no tokens here
    ],
)
def test_a_class_gives_the_special_tokens_that_no_file_names(tmp_path, named, bos, eos):
    fast = Tokenizer.from_directory(write(tmp_path, tokenizer_class=named))._fast
    assert (fast.bos_token, fast.eos_token) == (bos, eos)
    write(tmp_path, tokenizer_class=named, eos_token="<|im_end|>", bos_token=None)
    fast = Tokenizer.from_directory(tmp_path)._fast
    assert (fast.bos_token, fast.eos_token) == (None, "<|im_end|>")


def test_special_and_added_tokens_come_from_every_file(tmp_path):
    size = pipeline("digits").get_vocab_size()
    token = {"content": "<|im_end|>", "lstrip": False, "normalized": False, "special": True}
    write(tmp_path, eos_token=token, additional_special_tokens=["<|im_start|>", "<|more|>"])
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|im_start|>"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": size + 1, "<x>": size}))
    tokenizer = Tokenizer.from_directory(tmp_path)
    fast = tokenizer._fast
    assert (fast.bos_token, fast.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.encode("<x><tool><|more|>") == [size, size + 1, size + 2]
    assert tokenizer.decode([size, size + 2]) == "<x>", "<x> is no special token"
    listed = {str(size): {"content": "<y>", "special": False}}
    write(tmp_path, added_tokens_decoder=listed, bos_token="<|im_end|>")
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer._fast.bos_token == "<|im_end|>", "special_tokens_map.json is the older file"
    assert tokenizer.encode("<y>") == [size]
    write(tmp_path, added_tokens_decoder={str(size + 7): {"content": "<y>"}})
    with expect_user_error(rf"token '<y>' has id {size + 7} beside tokenizer.json, .* {size};"):
        Tokenizer.from_directory(tmp_path)


def test_texts_are_never_cut_or_filled_up(tmp_path):
    backend = pipeline("digits")
    expected = backend.encode("a b c d").ids
    backend.enable_truncation(2)
    backend.enable_padding(length=64)
    assert Tokenizer.from_directory(write(tmp_path, backend)).encode("a b c d") == expected


WRONG = {
    "eos_token": (7, ["</s>"], {"text": "</s>"}, {"content": None}, True),
    "tokenizer_class": (3, ["GPT2Tokenizer"], {}),
    "chat_template": (1.5, True, 0, [{"name": "default"}], ["a"], [{"name": 1, "template": ""}]),
    "added_tokens_decoder": ([], "x", {"one": "<x>"}, {"-1": "<x>"}, {"1": 3}, {"1": None}),
    "additional_special_tokens": ("<x>", 3, [1], [None]),
    "clean_up_tokenization_spaces": ("no", 2),
    "model_max_length": ("2048", [1]),
    "padding_side": ("above", 0),
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, vs in WRONG.items() for v in vs])
def test_a_field_of_another_type_is_refused_in_a_line(tmp_path, field, value):
    write(tmp_path, **{field: value})
    with expect_user_error("tokenizer_config.json"):
        Tokenizer.from_directory(tmp_path)
    write(tmp_path, **{field: None})
    assert Tokenizer.from_directory(tmp_path).encode("a")


def unreadable(file, kind):
    deep = "[" * 100_000 + "]" * 100_000
    texts = {
        "empty": b"",
        "cut off": b'{"version": "1.0", "mod',
        "deep": deep.encode(),
        "no UTF-8": b'{"a": "\xff"}',
        "UTF-16": '{"a": 1}'.encode("utf-16"),
        "a list": b"[]",
        "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    }
    file.unlink(missing_ok=True)
    if kind == "a FIFO":
        os.mkfifo(file)
    elif kind == "a directory":
        file.mkdir()
    else:
        file.write_bytes(texts[kind])


KINDS = (
    "empty",
    "cut off",
    "deep",
    "no UTF-8",
    "UTF-16",
    "a list",
    "a pointer",
    "a FIFO",
    "a directory",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("added_tokens.json", "generation_config.json", "chat_template.jinja"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_in_a_line(tmp_path, name, kind):
    write(tmp_path)
    if name == "chat_template.jinja" and kind in ("empty", "cut off", "deep", "a list"):
        return  # these are templates
    unreadable(tmp_path / name, kind)
    with expect_user_error(name):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("kind", ["cut off", "deep", "no UTF-8", "a pointer", "a FIFO"])
@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.model"])
def test_files_that_only_a_class_reads_are_read_before(tmp_path, name, kind):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (tmp_path / "vocab.json").write_text('{"a": 0, "<|endoftext|>": 1}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    if name == "merges.txt" and kind in ("cut off", "deep"):
        return  # texts
    unreadable(tmp_path / name, kind)
    with expect_user_error(name):
        Tokenizer.from_directory(tmp_path)


def test_without_tokenizer_json_the_class_decides(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.encode("abb<|endoftext|>") == [2, 1, 3]
    assert tokenizer.stop_token_ids == (3,)
    assert tokenizer.templates == {}


@pytest.mark.parametrize("answer", ["y\n", "yes\n", ""])
@pytest.mark.parametrize("with_json", [True, False])
def test_python_code_of_a_directory_is_never_run(tmp_path, monkeypatch, capsys, with_json, answer):
    """`answer` waits on stdin, where transformers asks whether to run the code."""
    left = tmp_path / "left behind"
    directory = write(
        tmp_path / "m", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]}, tokenizer_class="Own"
    )
    config = {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Config", "AutoTokenizer": "own.Own"},
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "own.py").write_text(
        f"open({str(left)!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast as Own\n"
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer * 10))
    if with_json:
        assert Tokenizer.from_directory(directory).encode("a")
    else:
        (directory / "tokenizer.json").rename(directory / "vocab.json")
        with expect_user_error(
            "Python code of its own, which is never run; add its tokenizer.json"
        ):
            Tokenizer.from_directory(directory)
    assert not left.exists()
    assert capsys.readouterr().out == ""


def test_an_exported_model_names_no_code(tmp_path):
    write(tmp_path / "m", auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own")
    Tokenizer.from_directory(tmp_path / "m").save(tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved/tokenizer_config.json").read_text())


def test_a_model_is_loaded_with_its_own_tokenizer_json(tmp_path):
    model = tiny_model(500, 1)
    save_model(tmp_path / "m", model.config, model.params, None)
    backend = pipeline("digits")
    write(tmp_path / "m", backend, tokenizer_class="GPT2Tokenizer")
    tokenizer = load_model(tmp_path / "m").tokenizer
    assert tokenizer is not None
    text = "12345\n\n\n   x  1"
    assert tokenizer.encode(text) == backend.encode(text).ids
