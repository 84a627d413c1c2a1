"""Packed rows are made once: what the key depends on, and what damage, other processes and full disks do to the cache."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import time

import datasets
import numpy as np
import pytest
from disk import file_size_limit
from hf_tiny import expect_user_error
from tiny import tiny_tokenizer

from train.config.sections import DataSection
from train.data import rows as rows_module
from train.data.cache import RowsCache, cache_directory, cache_key
from train.data.rows import build_rows, load_rows, save_rows

VOCAB = 300


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(VOCAB)


@pytest.fixture
def config(tmp_path):
    words = ("one", "two", "three", "four", "five", "six")
    turns = lambda a, b: [{"role": "user", "content": a}, {"role": "assistant", "content": b}]  # noqa: E731
    lines = (json.dumps({"messages": turns(a, b)}) + "\n" for a in words for b in words)
    (tmp_path / "chat.jsonl").write_text("".join(lines))
    return DataSection(
        paths=(str(tmp_path / "chat.jsonl"),), cache_dir=str(tmp_path / "cache"), max_length=64
    )


def build(config, tokenizer):
    return build_rows(config, tokenizer, vocab_size=VOCAB)


def entries(config):
    directory = cache_directory(config)
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def assert_same(first, second):
    for name in ("tokens", "segment_ids", "answer", "source"):
        np.testing.assert_array_equal(first[name][:], second[name][:])


def test_a_second_run_reads_what_the_first_one_made(config, tokenizer, monkeypatch):
    rows, report = build(config, tokenizer)
    assert "kept for later runs in" in report.cache
    monkeypatch.setattr(rows_module, "_make_rows", None)  # would fail if it were called
    again, told = build(config, tokenizer)
    assert_same(rows, again)
    assert told.sources == report.sources
    assert "read from the cache" in told.cache
    assert told.cache in str(told)


def test_the_key_depends_on_contents_tokenizer_template_and_length_only(
    config, tokenizer, tmp_path
):

    def key(config=config, tokenizer=tokenizer):
        return cache_key(config, tokenizer)

    change = lambda **fields: dataclasses.replace(config, **fields)  # noqa: E731
    other_name = shutil.copy(config.paths[0], tmp_path / "copy.jsonl")
    same = (key(), key(change(paths=(str(other_name),))), key(change(weights=(2.0,))))
    same += (key(change(held_out_fraction=0.5, num_proc=2)), key(tokenizer=tiny_tokenizer(VOCAB)))
    assert len(set(same)) == 1
    templated = tiny_tokenizer(VOCAB)
    templated.chat_template += " "
    different = [
        key(change(max_length=65)),
        key(change(paths=config.paths * 2)),
        key(tokenizer=templated),
        key(tokenizer=tiny_tokenizer(VOCAB, texts=("other words",) * 3)),
    ]
    with open(config.paths[0], "a") as file:
        file.write("\n")
    different.append(key())
    assert len({*different, same[0]}) == 6


def test_rows_are_those_that_the_key_stands_for(config, tokenizer, tmp_path):
    """Whoever changes which rows are made sees this fail: add a word to `train.data.cache._HOW_ROWS_ARE_MADE`."""
    roles = ("system", "user", "assistant", "user", "assistant")
    talks = [
        [{"role": role, "content": f"{role} {number} " * size} for role in roles]
        for number, size in enumerate((1, 3, 9, 27))
    ]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    rows, _ = build(dataclasses.replace(config, paths=(*config.paths, str(path))), tokenizer)
    digest = hashlib.sha256()
    for name in ("tokens", "segment_ids", "answer", "source"):
        digest.update(np.asarray(rows[name][:]).astype(np.int32).tobytes())
    assert digest.hexdigest()[:16] == "81438f0c568ff232"


@pytest.mark.parametrize(
    "damage", ["truncated", "zeroed", "no entry.json", "no hashes.json", "half entry.json"]
)
def test_a_damaged_entry_is_made_again(config, tokenizer, damage):
    rows, _ = build(config, tokenizer)
    entry = cache_directory(config) / entries(config)[0]
    file = next((entry / "rows").glob("*.arrow"))
    whole = file.read_bytes()
    file.chmod(0o644)
    if damage == "truncated":
        file.write_bytes(whole[:100])
    elif damage == "zeroed":  # what a crash of the machine can leave
        file.write_bytes(bytes(len(whole)))
    elif damage == "no entry.json":
        (entry / "entry.json").unlink()
    elif damage == "no hashes.json":
        (entry / "rows" / "hashes.json").unlink()
    else:
        (entry / "entry.json").write_text((entry / "entry.json").read_text()[:40])
    again, report = build(config, tokenizer)
    assert "kept for later runs" in report.cache
    assert_same(rows, again)
    assert "read from the cache" in build(config, tokenizer)[1].cache


def test_leftovers_of_killed_processes_are_no_entries_and_go_after_a_day(config, tokenizer):
    directory = cache_directory(config)
    for name, age in ((".partial-old", 2 * 24 * 3600), (".partial-new", 60)):
        (directory / name / "rows").mkdir(parents=True)
        os.utime(directory / name, times=(time.time() - age,) * 2)
    build(config, tokenizer)
    assert ".partial-old" not in entries(config)
    assert ".partial-new" in entries(config)
    assert len(entries(config)) == 2


def test_an_entry_that_another_process_made_meanwhile_is_kept(config, tokenizer):
    rows, _ = build(config, tokenizer)
    (key,) = entries(config)
    cache = RowsCache(cache_directory(config))
    cache.keep(key, rows.select([0]), {})
    assert entries(config) == [key]
    assert_same(cache.find(key)[0], rows)


def _build_elsewhere(config):
    datasets.disable_progress_bars()
    rows, report = build(config, tiny_tokenizer(VOCAB))
    return np.asarray(rows["tokens"][:]).tolist(), report.cache


@pytest.mark.exhaustive("half a minute of starting processes")
def test_processes_at_once(config, tokenizer):
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        found = list(pool.map(_build_elsewhere, [config] * 4))
    assert all(tokens == found[0][0] for tokens, _ in found)
    assert len(entries(config)) == 1
    assert "read from the cache" in build(config, tokenizer)[1].cache


def test_a_full_disk_costs_the_cache_only(config, tokenizer):
    with file_size_limit(200):
        rows, report = build(config, tokenizer)
    assert "not kept for later runs: File too large" in report.cache
    assert entries(config) == []
    again, _ = build(config, tokenizer)
    assert_same(rows, again)


def test_a_source_that_grows_while_it_is_read_is_not_trusted(config, tokenizer, monkeypatch):
    made = rows_module._make_rows

    def and_grows(*arguments):
        found = made(*arguments)
        with open(config.paths[0], "a") as file:
            file.write("\n")
        return found

    monkeypatch.setattr(rows_module, "_make_rows", and_grows)
    with expect_user_error("a file changed while it was read; start again once it is whole"):
        build(config, tokenizer)
    assert entries(config) == []


def test_where_the_cache_is(config, monkeypatch, tmp_path):
    assert cache_directory(config) == tmp_path / "cache"
    default = dataclasses.replace(config, cache_dir=None)
    monkeypatch.setenv("S2D_DATA_CACHE", str(tmp_path / "own"))
    assert cache_directory(default) == tmp_path / "own"
    monkeypatch.delenv("S2D_DATA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory(default) == tmp_path / "xdg" / "s2d-jax" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_directory(default) == tmp_path / "home" / ".cache" / "s2d-jax" / "data"


@pytest.mark.parametrize("damage", ["truncated", "one bit"])
def test_damaged_rows_of_a_run_are_named_and_the_cache_repairs_them(
    config, tokenizer, tmp_path, damage
):
    rows, report = build(config, tokenizer)
    save_rows(rows, tmp_path / "rows")
    file = next((tmp_path / "rows").glob("*.arrow"))
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 1
    file.write_bytes(whole if damage == "one bit" else whole[:100])
    with expect_user_error(
        "rows is damaged .*.arrow is not what was saved.; a resumed run needs its rows: copy the rows of"
    ):
        load_rows(tmp_path / "rows")
    shutil.rmtree(tmp_path / "rows")
    shutil.copytree(report.cache.removeprefix("kept for later runs in "), tmp_path / "rows")
    assert_same(load_rows(tmp_path / "rows"), rows)
