"""`python -m infer.generate --as-conversations` on tiny models: the target's own answers, also of runs that were killed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import datasets
import jax
import pytest
from hf_tiny import expect_user_error
from infer_tiny import failing_run, run, save_tiny_models

from infer.generate import __main__ as generate
from infer.generate.engine import weights_hash
from infer.generate.journal import Journal, journal_of
from infer.generate.talks import read_talks
from s2d_jax.cli.options import SamplingOptions
from s2d_jax.cli.prompts import Question
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.text.conversations import read_conversations
from s2d_jax.weights.load import load_model
from train.config.sections import DataSection
from train.data.rows import build_rows

SHORT = ("--max-new-tokens", 6)
SYSTEM = {"role": "system", "content": "be brief"}


def turn(role, text):
    return {"role": role, "content": text}


CONVERSATIONS = [
    {"messages": [turn("user", "one two"), turn("assistant", "old"), turn("user", "three"), turn("assistant", "old")]},
    {"messages": [SYSTEM, turn("user", "the quick brown fox"), turn("assistant", "old")], "id": "fox"},
    {"conversations": [{"from": "gpt", "value": "hi"}, {"from": "human", "value": "seven"}, {"from": "gpt", "value": "old"}]},
    {"messages": [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d"), turn("user", "e")]},
    {"messages": [turn("user", "x"), turn("user", "y")]},
    {"prompt": "user asks"},
    {"turns": ["five", "six"]},
]  # fmt: skip
ANSWERED = 6  # of them; the two questions in a row are left out


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in CONVERSATIONS))
    return path


def again(monkeypatch, models, source, out, *flags, target=None):
    arguments = ("--as-conversations", "--target", target or models.small, "--prompts", source)
    run(generate.main, monkeypatch, *arguments, "--out", out, "--batch-size", 2, *SHORT, *flags)


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def killed(monkeypatch, batches, *arguments):
    """`again`, in a process that dies when this many batches are on the disk."""
    add, seen = Journal.add, []

    def limited(self, batch):
        add(self, batch)
        seen.append(batch)
        if len(seen) == batches:
            raise SystemExit(137)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", limited)
        with pytest.raises(SystemExit):
            again(patch, *arguments)


def test_every_answer_is_the_targets_own_and_later_turns_see_it(
    models, source, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "new.jsonl"
    again(monkeypatch, models, source, out)
    target = load_model(models.small)
    decoder = SpeculativeDecoder(target)
    rows = rows_of(out)
    assert len(rows) == ANSWERED
    for row in rows:
        for i, message in enumerate(row["messages"]):
            if message["role"] != "assistant":
                continue
            ids = target.tokenizer.encode_chat(row["messages"][:i])
            result = decoder.generate([ids], SamplingParams(max_new_tokens=6))
            assert message["content"] == result.texts[0]
            number = sum(m["role"] == "assistant" for m in row["messages"][:i])
            assert row["new_tokens"][number] == len(result.token_ids[0])
            ended = result.token_ids[0][-1] in target.config.eos_token_ids
            assert row["finished"][number] == ended
    said = [[m["content"] for m in row["messages"] if m["role"] != "assistant"] for row in rows]
    assert said == [
        *(["one two", "three"], ["be brief", "the quick brown fox"], ["seven"]),
        *(["a", "c", "e"], ["user asks"], ["five", "six"]),
    ]
    assert rows[1]["question_id"] == "fox"
    shown = capsys.readouterr().out
    assert "left out or ended early: roles do not alternate" in shown
    assert all(len(line) <= 100 for line in shown.splitlines() if "│" in line)
    assert not journal_of(out).exists()


def test_the_rows_are_ready_for_training(models, source, tmp_path, monkeypatch):
    out = tmp_path / "new.jsonl"
    again(monkeypatch, models, source, out)
    cut = sum(not ended for row in rows_of(out) for ended in row["finished"])
    read = read_conversations(out)
    assert len(read) == ANSWERED
    assert sum("unfinished" in message for messages in read for message in messages) == cut > 0
    config = DataSection(paths=(str(out),), max_length=128)
    _, report = build_rows(config, load_model(models.small).tokenizer, vocab_size=300)
    assert report.total["documents"] == ANSWERED
    assert report.total["answer_tokens"] > 0


SAMPLED = ("--temperature", 0.9, "--seed", 5)


@pytest.mark.parametrize(
    ("batches", "flags"),
    [(1, ()), (4, ()), (4, (*SAMPLED, "--draft", "{draft}"))],
    ids=["one batch", "in the second turn", "sampled with a draft"],
)
def test_a_killed_run_goes_on_and_gives_what_an_uninterrupted_one_gives(
    models, source, tmp_path, monkeypatch, capsys, flags, batches
):
    flags = [str(flag).format(**vars(models)) for flag in flags]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "new.jsonl"
    again(monkeypatch, models, source, whole, *flags)
    killed(monkeypatch, batches, models, source, out, *flags)
    journal = journal_of(out)
    assert not out.exists()
    assert len(journal.read_text().splitlines()) == 1 + batches
    with journal.open("a") as file:
        file.write('{"turn": 0, "talks": [')  # half a line
    capsys.readouterr()
    again(monkeypatch, models, source, out, *flags)
    assert f"resuming {journal}" in capsys.readouterr().out
    assert out.read_bytes() == whole.read_bytes()
    assert not journal.exists()
    drafted = [row["stats"]["drafted_tokens"] for row in rows_of(out)]
    assert all(drafted) if "--draft" in flags else not any(drafted)


def test_samples_do_not_depend_on_the_batch_and_every_turn_has_a_seed_of_its_own(
    models, source, tmp_path, monkeypatch
):
    seeds, params = [], SamplingOptions.params

    def recorded(self, index=0):
        seeds.append(index)
        return params(self, index)

    monkeypatch.setattr(SamplingOptions, "params", recorded)
    texts = []
    for size in (2, 6):
        out = tmp_path / f"{size}.jsonl"
        drafted = (*SAMPLED, "--draft", models.draft)
        again(monkeypatch, models, source, out, *drafted, "--batch-size", size)
        texts.append([row["messages"] for row in rows_of(out)])
        assert len(set(seeds)) == len(seeds) - 1 == 10  # the first checks the flags
        seeds.clear()
    assert texts[0] == texts[1]


def test_other_settings_are_refused(models, source, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new.jsonl"
    killed(monkeypatch, 1, models, source, out)
    before = journal_of(out).read_bytes()
    start = ("--as-conversations", "--prompts", source, "--out", out, *SHORT)
    for flags, message in (
        (("--target", models.small, "--batch-size", 3), "was begun with batch_size=2, not 3; go"),
        (("--target", models.large, "--batch-size", 2), "was begun with target="),
        (("--target", models.small, "--batch-size", 2, "--seed", 1), "with seed=0, not 1; go on"),
        (("--target", models.small, "--batch-size", 2, "--draft", models.draft), "draft=null"),
    ):
        assert message in failing_run(generate.main, monkeypatch, capsys, *start, *flags)
    with source.open("a") as file:
        file.write(json.dumps({"prompt": "more"}) + "\n")
    flags = ("--target", models.small, "--batch-size", 2)
    error = failing_run(generate.main, monkeypatch, capsys, *start, *flags)
    assert "was begun with prompts=" in error
    assert journal_of(out).read_bytes() == before


def test_a_target_that_was_trained_on_under_the_same_name_is_another(models):
    model, other = load_model(models.small), load_model(models.small)
    assert weights_hash(model) == weights_hash(other)
    moved = jax.tree.map(lambda x: x * 1.001 if x.ndim == 1 else x, other.params)
    other = dataclasses.replace(other, params=moved)
    assert weights_hash(model) != weights_hash(other)


def test_conversations_that_fill_the_context_end_early(models, tmp_path, monkeypatch, capsys):
    long = {"messages": [turn("user", "one"), turn("assistant", "old"), turn("user", "ten " * 200)]}
    source = tmp_path / "long.jsonl"
    rows = [long, {"prompt": "two " * 200}, {"prompt": "three"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "new.jsonl"
    again(monkeypatch, models, source, out)
    answered = rows_of(out)
    assert [len(row["messages"]) for row in answered] == [2, 2]
    assert [row["prompt"] for row in answered] == ["one", "three"]
    shown = capsys.readouterr().out
    assert "left out or ended early: the target's context is full" in shown


def test_whatever_training_reads_is_read(tmp_path):
    rows = [{"messages": [turn("user", "a"), turn("assistant", "b")]}] * 2
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    talks, left_out = read_talks(tmp_path / "saved")
    assert [talk.question for talk in talks] == [Question(i, "", ("a",)) for i in (1, 2)]
    assert not left_out
    (tmp_path / "lines.txt").write_text("one\ntwo\n")
    talks, _ = read_talks(tmp_path / "lines.txt")
    assert [talk.question.turns for talk in talks] == [("one",), ("two",)]
    for text, message in (
        ('{"text": 1}', r"user's turn \(.*line 1: is an object of \['text'\]; expected prompt"),
        (
            '{"messages": [{"role": "user"}]}',
            r"user's turn \(.*line 1: turn 1 needs a role and text",
        ),
        ('{"messages": []}', "holds no conversation with a user's turn"),
        ("{", "not valid JSON"),
    ):
        (tmp_path / "bad.jsonl").write_text(text)
        with expect_user_error(message):
            read_talks(tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--as-conversations needs --prompts CONVERSATIONS and --out"),
        (("--prompts", "{source}"), "--as-conversations needs --prompts CONVERSATIONS and --out"),
        (("--prompts", "{source}", "--out", "{out}", "--raw"), "--raw does not go with"),
        (("--prompts", "{source}", "--out", "{out}", "--stream"), "--stream does not go with"),
        (("--prompts", "{source}", "--out", "{out}", "--prompt", "x"), "--prompt does not go"),
        (("--prompts", "{source}", "--out", "{source}"), "is there already; choose another --out"),
        (
            ("--prompts", "nowhere", "--out", "{out}"),
            "nowhere does not exist; give a conversation file",
        ),
        (("--prompts", "{source}", "--out", "{out}", "--exits", "1"), "need a draft"),
        (("--prompts", "{source}", "--out", "{out}", "--target", "b"), "has 2 targets; give one"),
    ],
)
def test_mistakes_get_one_line(models, source, tmp_path, monkeypatch, capsys, flags, message):
    out = tmp_path / "new.jsonl"
    filled = [flag.format(source=source, out=out) for flag in flags]
    start = ("--as-conversations", "--target", models.small)
    assert message in failing_run(generate.main, monkeypatch, capsys, *start, *filled)
    assert sorted(tmp_path.iterdir()) == [source]


def test_rows_that_hold_no_talk_are_left_out_by_reason(tmp_path):
    tool = [turn("user", "a"), turn("tool", "b")]
    rows = [{"text": 1}, {"messages": tool}, {"messages": [turn("user", None)]}, {"prompt": "c"}]
    rows += [{"prompt": "d", "completion": "e"}, {"conversation": [turn("Human", "f")], "id": [1]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    talks, left_out = read_talks(tmp_path / "rows.jsonl")
    assert [(t.question.question_id, t.question.turns) for t in talks] == [
        (4, ("c",)),
        (5, ("d",)),
        ("[1]", ("f",)),
    ]
    assert left_out == {
        "no prompt or conversation in the row": 1,
        "roles other than user, assistant and system": 1,
        "a turn is not text": 1,
    }


def test_a_journal_keeps_names_with_bytes_that_are_no_text(tmp_path):
    settings = {"target": "models/\udcff", "stop": ["\ud800"]}
    for expected in ([], [{"text": "a\u2028b\x85"}]):
        with Journal(tmp_path / "a.journal", settings) as journal:
            assert journal.batches == expected
            journal.add({"text": "a\u2028b\x85"})
    with expect_user_error(r'was begun with target=.*, not "x.u001b"'):
        Journal(tmp_path / "a.journal", {**settings, "target": "x\x1b"})


def test_a_journal_is_for_one_process_and_tells_where_it_is_damaged(tmp_path):
    path = tmp_path / "a.journal"
    with Journal(path, {"seed": 0}) as journal:
        journal.add({"n": 1})
        with expect_user_error("another process writes .*a.journal; wait for it, or choose"):
            Journal(path, {"seed": 0})
    with Journal(path, {"seed": 0}) as journal:
        assert journal.batches == [{"n": 1}]
        journal.add({"n": 2})
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:4], lines[2], ""]))
    with expect_user_error("a.journal: line 2 is damaged; remove it and all behind it"):
        Journal(path, {"seed": 0})
    path.write_text(lines[0][:5])  # killed while it was begun
    with Journal(path, {"seed": 1}) as journal:
        assert journal.batches == []
    assert json.loads(path.read_text()) == {"seed": 1}


@pytest.mark.exhaustive(
    "tests of `killed` die in both turns, and another test kills one of two processes"
)
@pytest.mark.parametrize(
    "moments",
    [
        (2,),
        pytest.param((2, 5), marks=pytest.mark.exhaustive("tests of `killed` die in both turns")),
    ],
)
def test_kill_9_at_any_moment(models, source, tmp_path, monkeypatch, moments):
    """Lines of the journal at which the process dies; tests of `killed` above choose other moments."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "new.jsonl"
    again(monkeypatch, models, source, whole)
    command = [
        sys.executable,
        "-m",
        "infer.generate",
        "--as-conversations",
        "--target",
        models.small,
    ]
    command += ["--prompts", str(source), "--out", str(out), "--batch-size", "2", *map(str, SHORT)]
    journal = journal_of(out)
    for lines in moments:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (
            journal.exists() and len(journal.read_bytes().split(b"\n")) > lines
        ):
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert journal.exists()
    again(monkeypatch, models, source, out)
    assert [row["messages"] for row in rows_of(out)] == [row["messages"] for row in rows_of(whole)]
