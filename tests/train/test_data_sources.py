"""Sources of conversations: what each kind reads as, how damage is told, weights, and the report of what was left out."""

from __future__ import annotations

import dataclasses
import json

import datasets
import numpy as np
import pytest
from hf_tiny import expect_user_error
from tiny import tiny_draft, tiny_tokenizer

from s2d_jax.text.conversations import content_hash, read_conversations, read_rows
from s2d_jax.weights.export import export_draft
from train.config.sections import DataSection
from train.data.batches import split_rows, weighted_rows
from train.data.rows import build_rows
from train.main import main

VOCAB = 300
MESSAGES = [
    {"role": "user", "content": "one two"},
    {"role": "assistant", "content": "three four"},
]
ROWS = [{"messages": MESSAGES, "finished": [True]}, {"messages": MESSAGES * 2, "finished": [False]}]
READ = [
    MESSAGES,
    [*MESSAGES, MESSAGES[0], {**MESSAGES[1], "unfinished": "yes"}],
]


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(VOCAB)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    return path


def test_saved_datasets_parquet_and_arrow_read_as_json_does(saved, tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(str(tmp_path / "rows.json"))  # told apart by content
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(
        str(tmp_path / "dict")
    )
    (tmp_path / "rows.txt").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    arrow = next(saved.glob("*.arrow"))
    for path in (saved, "rows.json", "dict", "rows.txt", arrow):
        assert read_conversations(tmp_path / path) == READ, path
    assert read_conversations(tmp_path / "dict" / "test") == READ[:1]


def test_sharegpt_columns_of_either_layout_and_rows_without_flags(tmp_path):
    turns = [{"from": "human", "value": "one two"}, {"from": "gpt", "value": "three four"}]
    columns = {"from": ["human", "gpt"], "value": ["one two", "three four"]}
    for name, value in (("list", turns), ("columns", columns)):
        table = datasets.Dataset.from_list([{"conversations": value, "finished": None, "id": "x"}])
        table.save_to_disk(str(tmp_path / name))
        assert read_conversations(tmp_path / name) == [MESSAGES]


def test_prompts_are_rows_too(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n\n{"turns": ["b", "c"]}\n')
    rows = list(read_rows(tmp_path / "prompts.jsonl"))
    assert [row for _, row in rows] == [{"prompt": "a"}, {"turns": ["b", "c"]}]
    assert rows[1][0].endswith("prompts.jsonl: line 3")


def test_damage_is_told_with_the_file_and_the_row(saved, tmp_path):
    datasets.Dataset.from_list([{"text": "a", "id": 1}]).save_to_disk(str(tmp_path / "other"))
    message = r"other: row 1: expected a list .*; it is an object of \['text', 'id'\]"
    with expect_user_error(message):
        read_conversations(tmp_path / "other")
    bad = [*ROWS, {"messages": [{"role": "tool", "content": "x"}], "finished": [True]}]
    datasets.Dataset.from_list(bad).save_to_disk(str(tmp_path / "role"))
    with expect_user_error("role: row 3: turn 1 has the role 'tool'; use one of user"):
        read_conversations(tmp_path / "role")
    with expect_user_error(
        "is a directory without a saved dataset or parquet files; give what save_to_disk wrote"
    ):
        read_conversations(tmp_path)
    table = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "dict"))
    with expect_user_error("dict: has the splits test and no train; give one as .*dict/SPLIT"):
        read_conversations(tmp_path / "dict")
    arrow = next(saved.glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:700])
    with expect_user_error("saved: not readable as a dataset .*; write or fetch it again"):
        read_conversations(saved)
    table.to_parquet(str(tmp_path / "rows.parquet"))
    whole = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "rows.parquet").write_bytes(whole[: len(whole) // 2])
    with expect_user_error("rows.parquet: not readable as a dataset .*; write or fetch it again"):
        read_conversations(tmp_path / "rows.parquet")
    (saved / "state.json").write_text("{")
    with expect_user_error("saved: not readable as a dataset"):
        read_conversations(saved)


def test_hashes_follow_contents_not_names(saved, tmp_path):
    moved = saved.rename(tmp_path / "moved")
    before = content_hash(moved)
    (moved / "cache-1234.arrow").touch()  # what `map` leaves
    assert content_hash(moved) == before
    (moved / "more.arrow").touch()
    assert content_hash(moved) != before
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_text("x")
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b") != before
    with expect_user_error("nowhere does not exist"):
        content_hash(tmp_path / "nowhere")


def write_source(path, count, *, words):
    rows = [
        {"messages": [{"role": "user", "content": words}, {"role": "assistant", "content": f"{words} {i}"}]}
        for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_hold_documents_of_one_source(tokenizer, tmp_path):
    paths = tuple(write_source(tmp_path / w, 7, words=w) for w in ("one", "two"))
    rows, report = build_rows(DataSection(paths=paths, max_length=64), tokenizer, vocab_size=VOCAB)
    for row in rows:
        text = tokenizer.decode(row["tokens"])
        assert ("one" in text, "two" in text) == (row["source"] == 0, row["source"] == 1)
    assert [source.rows for source in report.sources] == [
        sum(row["source"] == i for row in rows) for i in range(2)
    ]
    assert report.total["conversations"] == 14


def test_several_processes_tokenize_as_one_does(tokenizer, tmp_path):
    """Spawned, as threads of JAX run already."""
    path = write_source(tmp_path / "chat", 250, words="one two")
    found, told = [], []
    for num_proc in (1, 2):
        config = DataSection(
            paths=(path,), num_proc=num_proc, max_length=64, cache_dir=str(tmp_path / str(num_proc))
        )
        rows, _ = build_rows(
            config, tokenizer, vocab_size=VOCAB, on_progress=lambda *now: told.append(now)
        )
        found.append(rows[:])
    assert found[0] == found[1]
    steps = [("reading chat", 0, 1), *(("tokenizing", n, 250) for n in (100, 200, 250))]
    assert told == steps * 2


def test_weights_say_how_often_rows_are_seen():
    sources = np.array([0] * 40 + [1] * 20 + [2] * 8)
    training, held_out = split_rows(68, 0.1, seed=3)
    epoch = weighted_rows(training, sources, (1.0, 2.25, 0.5), seed=3)
    times = np.bincount(epoch, minlength=68)
    own = [training[sources[training] == i] for i in range(3)]
    assert set(times[own[0]]) == {1}
    assert set(times[own[1]]) == {2, 3}
    assert (times[own[1]] == 3).sum() == round(0.25 * len(own[1]))
    assert sorted(set(times[own[2]])) == [0, 1]
    assert times[own[2]].sum() == round(0.5 * len(own[2]))
    assert not times[held_out].any()
    again = weighted_rows(training, sources, (1.0, 2.25, 0.5), seed=3)
    np.testing.assert_array_equal(epoch, again)
    other = weighted_rows(training, sources, (1.0, 2.25, 0.5), seed=4)
    assert list(other) != list(epoch)
    np.testing.assert_array_equal(weighted_rows(training, sources, (1.0,) * 3, seed=3), training)
    # A small source of a small weight is still seen.
    assert weighted_rows(np.array([60]), sources, (1.0, 1.0, 0.1), seed=0).tolist() == [60]


def test_what_was_left_out_is_counted_for_each_source_and_reason(tokenizer, tmp_path):
    user, answer = MESSAGES
    long = {"role": "assistant", "content": "ten " * 200}
    first = [
        *([user, answer], [answer, user, answer], [user, answer, {**user, "content": " "}, answer]),
        *([user], [user, user, answer], [{**user, "content": ""}, answer], [user, long]),
        *([{**user, "content": "ten " * 200}, answer],),
    ]
    for name, conversations in (("first", first), ("second", [[user, answer]] * 2)):
        lines = (json.dumps({"messages": messages}) + "\n" for messages in conversations)
        (tmp_path / name).write_text("".join(lines))
    paths = (str(tmp_path / "first"), str(tmp_path / "second"))
    config = DataSection(paths=paths, weights=(1.0, 2.5), max_length=128)
    _, report = build_rows(config, tokenizer, vocab_size=VOCAB)
    counts = report.sources[0].counts()
    assert {name: n for name, n in counts.items() if n and "token" not in name} == {
        "conversations": 8,
        "no_answer": 1,
        "roles_do_not_alternate": 1,
        "empty_turn": 1,
        "shortened": 2,
        "documents": 5,
        "truncated": 1,
        "truncated_before_any_answer": 1,
        "rows": 2,
    }
    assert report.sources[1].documents == 2
    assert report.total["documents"] == 7
    shown = str(report)
    assert all(len(line) <= 100 for line in shown.splitlines()[:-1])
    for words in (
        *("left out: no answer", "left out: roles do not alternate", "(weight 2.5)"),
        *("left out: truncated before any answer", "left out: the first turn or answer is empty"),
    ):
        assert words in shown
    assert "refused by the chat template" not in shown  # only what happened
    assert json.loads(json.dumps(report.to_json()))["sources"][1]["weight"] == 2.5


def test_rows_of_other_forms_are_left_out_and_counted(tokenizer, tmp_path):
    user, answer = MESSAGES
    rows = [
        *({"messages": MESSAGES}, {"conversations": json.dumps(MESSAGES)}, {"text": "a"}, None),
        *({"messages": [user, answer, {"role": "tool", "content": "5"}, answer]},),
        *({"messages": [user, {"role": "assistant", "content": None, "tool_calls": []}]},),
        {"messages": MESSAGES, "finished": 1.5},
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataSection(paths=(str(tmp_path / "chat.jsonl"),), max_length=64)
    _, report = build_rows(config, tokenizer, vocab_size=VOCAB)
    counts = report.sources[0].counts()
    names = ("no_conversation", "other_roles", "not_text", "unclear_finished", "documents")
    assert counts["conversations"] == 7
    assert [counts[name] for name in names] == [2, 1, 1, 1, 2]
    assert "left out: a turn is not text" in str(report)


def test_conversations_that_the_template_refuses_are_left_out_and_told(tmp_path):
    tokenizer = tiny_tokenizer(VOCAB)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
        + tokenizer.chat_template
    )
    system = {"role": "system", "content": "be brief"}
    lines = [json.dumps({"messages": m}) + "\n" for m in (MESSAGES, [system, *MESSAGES])]
    (tmp_path / "some").write_text("".join(lines))
    config = DataSection(paths=(str(tmp_path / "some"),), max_length=64)
    _, report = build_rows(config, tokenizer, vocab_size=VOCAB)
    assert (report.sources[0].refused_by_template, report.sources[0].documents) == (1, 1)
    assert "no system messages" in str(report)
    (tmp_path / "all").write_text(lines[1])
    config = DataSection(paths=(str(tmp_path / "all"),), max_length=64)
    with expect_user_error("all: no conversation is left; the chat template refuses .*no system"):
        build_rows(config, tokenizer, vocab_size=VOCAB)


def test_a_source_with_nothing_to_train_on_is_named(tokenizer, tmp_path):
    good, bad = write_source(tmp_path / "good", 2, words="one"), tmp_path / "bad"
    bad.write_text(json.dumps({"messages": MESSAGES[:1]}))
    config = DataSection(paths=(good, str(bad)), max_length=64)
    with expect_user_error("bad: no conversation has a user turn and an answer; check it"):
        build_rows(config, tokenizer, vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1.0,), r"data.weights=\(1.0,\) has 1 values for 2 paths; give one per path"),
        ((1.0, 0.0), "must be above 0; leave out the path of a source that is not wanted"),
        ((1.0, float("nan")), r"data.weights=\(1.0, nan\) must be finite numbers"),
    ],
)
def test_bad_weights_are_refused(weights, message):
    with expect_user_error(message):
        DataSection(paths=("a", "b"), weights=weights)


def test_a_corrupt_row_stops_a_run_in_one_line_and_leaves_nothing(tokenizer, tmp_path, capsys):
    model = dataclasses.replace(tiny_draft(VOCAB, (1, 2)), tokenizer=tokenizer)
    export_draft(model, tmp_path / "model", {})
    chat = write_source(tmp_path / "chat.jsonl", 40, words="one")
    with open(chat, "a") as file:
        file.write('{"messages": [{"role": "user", "con')
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {tmp_path}/model, compute_dtype: float32}}\n"
        f"data: {{paths: [{chat}], max_length: 64}}\ndraft: {{exit_layers: [1, 2]}}\n"
    )
    run_dir = tmp_path / "run"
    assert main(["--config", str(tmp_path / "run.yaml"), "--train.run-dir", str(run_dir)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {chat}: line 41 is not valid JSON (Unterminated string")
    assert line.endswith("repair or remove it")
    assert not run_dir.exists()
