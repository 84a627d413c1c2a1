"""Outputs are tried before work begins, and nothing is left of the trial."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from s2d_jax.cli.options import read_paths
from s2d_jax.cli.outputs import check_cache_variable, check_directory, check_writable
from s2d_jax.errors import UserError
from s2d_jax.files import expanded, local_path, write_text


def refused(check, path, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        check(Path(path), *arguments)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_places_that_can_be_written_are_left_as_they_were(tmp_path):
    (tmp_path / "old").write_text("kept")
    for path in ("new", "old", "a/b/c/new", "link"):
        if path == "link":
            (tmp_path / "link").symlink_to(tmp_path / "old")
        assert check_writable(tmp_path / path) == tmp_path / path
        before = sorted(tmp_path.rglob("*"))
    check_directory(tmp_path)
    check_directory(tmp_path / "a" / "b")
    assert sorted(tmp_path.rglob("*")) == before == [tmp_path / "link", tmp_path / "old"]
    assert (tmp_path / "old").read_text() == "kept"


def test_a_file_that_another_process_is_writing_stays(tmp_path):
    (tmp_path / ".partial-out").write_text("half")
    check_writable(tmp_path / "out")
    assert (tmp_path / ".partial-out").read_text() == "half"


def test_places_that_cannot_be_written_are_told_in_a_line(tmp_path):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "fifo")
    for check in (check_writable, check_directory):
        assert "--out" in refused(check, tmp_path / "file" / "x")
        assert "is a file" in refused(check, tmp_path / "file" / "x" / "y")
        assert "File name too long" in refused(check, tmp_path / ("n" * 300))
        assert "has a NUL in it" in refused(check, "a\0b")
        assert "cannot be written" in refused(check, "/proc/nothing/x")
    assert "is a directory" in refused(check_writable, tmp_path)
    assert "is a device or a pipe" in refused(check_writable, tmp_path / "fifo")
    assert "is a device or a pipe" in refused(check_writable, "/dev/full")
    assert "is a file" in refused(check_directory, tmp_path / "file")
    assert refused(check_directory, tmp_path / "file", "--profile").startswith("--profile ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "file"]


@pytest.mark.parametrize("place", ["gs://bucket/run", "s3://bucket", "hdfs://host:1/x", "gs:/b/c"])
def test_places_elsewhere_are_refused_as_texts_and_as_paths(place):
    for given in (place, Path(place)):
        with pytest.raises(UserError, match=r"--run .* is not on this machine, and only local"):
            local_path(given, "--run")
    assert "is not on this machine" in refused(check_writable, place)
    assert "is not on this machine" in refused(check_directory, place)


def test_homes_are_expanded_and_strangers_are_left(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("~/x") == Path("/home/me/x")
    assert expanded("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    assert expanded("a/~") == Path("a/~")
    assert expanded("~a\0b") == Path("~a\0b")


def test_the_cache_variable_is_judged(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("S2D_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"\$S2D_CACHE_DIR .*file is a file; give a directory"):
        check_cache_variable()
    monkeypatch.setenv("S2D_CACHE_DIR", str(tmp_path / "new"))
    check_cache_variable()
    assert not (tmp_path / "new").exists()


def test_a_name_with_bytes_that_are_no_text_can_be_written_about(tmp_path):
    write_text(tmp_path / "a", "models/\udcff")
    assert (tmp_path / "a").read_text() == "models/\ufffd"


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"\xff\xfe[", "UTF-16"),
        (b"[[0], [\xff]]", "line 1: not UTF-8"),
        (b"[[0], [", "is not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": 1}', "is not a list of paths"),
        (b"[[0], [null]]", "has the rank None"),
    ],
)
def test_a_file_of_paths_is_told_in_a_line(tmp_path, data, told):
    (tmp_path / "paths.json").write_bytes(data)
    assert told in refused(lambda path: read_paths(str(path)), tmp_path / "paths.json")
