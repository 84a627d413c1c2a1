"""Texts and JSON from files: what is read, and the one line for what is not."""

import gzip
import json
import os

import pytest

import s2d_jax.files
from s2d_jax.errors import UserError
from s2d_jax.files import (
    check_no_lfs_pointer,
    parse_json,
    read_json,
    read_text,
    regular_file,
)


@pytest.mark.parametrize(
    "data",
    [b"a\xc3\xa9\r\nb", b"\xef\xbb\xbfa\xc3\xa9\r\nb", gzip.compress(b"a\xc3\xa9\r\nb", mtime=0)],
)
def test_utf_8_is_read_plain_marked_or_packed(tmp_path, data):
    (tmp_path / "f").write_bytes(data)
    assert read_text(tmp_path / "f") == "aé\r\nb"


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("a".encode("utf-16"), "UTF-16; convert it: iconv"),
        (b"a\nb\xff", "line 2: not UTF-8 at byte 3"),
        (gzip.compress(b"a" * 1000, mtime=0)[:-20], "damaged gzip"),
        (b"\x1f\x8bnonsense", "damaged gzip"),
    ],
)
def test_other_texts_are_refused_in_a_line(tmp_path, data, told):
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(UserError, match=told) as refused:
        read_text(tmp_path / "f")
    assert "\n" not in str(refused.value)


def test_gzip_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(s2d_jax.files, "_MOST_UNPACKED", 1000)
    (tmp_path / "f").write_bytes(gzip.compress(b"a" * 1001, mtime=0))
    with pytest.raises(UserError, match="unpacks to more than"):
        read_text(tmp_path / "f")


def test_only_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert regular_file(tmp_path / "link", "give one") == tmp_path / "link"
    for name, told in (
        ("fifo", "a device or a pipe"),
        (".", "a directory"),
        ("absent", "does not exist"),
        ("file/x", "does not exist"),
        ("a\0b", "cannot be read"),
    ):
        with pytest.raises(UserError, match=told) as refused:
            read_text(tmp_path / name)
        assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "thousands of digits"),
    ],
)
def test_json_that_cannot_be_used_is_one_line(tmp_path, text, told):
    with pytest.raises(UserError, match=f"^here is .*{told}.*; mend it$") as refused:
        parse_json(text, "here", "mend it")
    assert "\n" not in str(refused.value)


def test_half_a_surrogate_pair_becomes_a_replacement_character():
    text = r'{"a\ud800": ["\udc00", "\ud83d\ude00", 1]}'
    assert parse_json(text, "here") == {"a\ufffd": ["\ufffd", "\N{GRINNING FACE}", 1]}
    json.dumps(parse_json(text, "here"), ensure_ascii=False).encode()


def test_an_object_is_expected(tmp_path):
    (tmp_path / "f").write_text("[1]")
    with pytest.raises(UserError, match="holds a JSON list, an object is expected"):
        read_json(tmp_path / "f")


def test_git_lfs_pointers_are_named_with_the_command_that_fetches(tmp_path):
    pointer, other = tmp_path / "tokenizer.json", tmp_path / "other.json"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    other.write_text("{}")
    for read in (check_no_lfs_pointer, read_text, read_json):
        with pytest.raises(UserError, match=r"is a git-lfs pointer, .*: git lfs pull") as refused:
            read(pointer)
        assert str(refused.value).isprintable()
        read(other)
    check_no_lfs_pointer(tmp_path / "absent")
