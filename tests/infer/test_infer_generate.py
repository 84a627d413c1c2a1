"""`python -m infer.generate` on tiny models."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
from infer_tiny import failing_run, run, save_tiny_models

from infer.generate import __main__ as generate
from infer.generate import answering
from infer.generate.args import Args
from infer.generate.batching import Answer
from s2d_jax.cli.prompts import Question
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.errors import UserError
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.generation.stats import GenerationStats
from s2d_jax.text.conversations import read_conversations
from s2d_jax.weights.load import load_model

PROMPTS = ("the", "one two", "user asks")
SHORT = ("--max-new-tokens", 8)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_tiny_models(tmp_path_factory.mktemp("models"))


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompts_file(tmp_path, *rows):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answers_in_batches_are_those_of_single_prompts(models, tmp_path, monkeypatch):
    path, out = prompts_file(tmp_path, *({"prompt": p} for p in PROMPTS)), tmp_path / "out.jsonl"
    flags = ("--prompts", path, "--out", out, "--batch-size", 2, *SHORT)
    run(generate.main, monkeypatch, "--target", models.large, "--draft", models.draft, *flags)
    target = load_model(models.large)
    decoder = SpeculativeDecoder(target)
    for row, prompt in zip(rows_of(out), PROMPTS, strict=True):
        messages = [{"role": "user", "content": prompt}]
        ids = target.tokenizer.encode_chat(messages)
        expected = decoder.generate([ids], SamplingParams(max_new_tokens=8))
        assert row["prompt"] == prompt
        assert row["response"] == expected.texts[0]
        assert row["messages"] == [*messages, {"role": "assistant", "content": row["response"]}]
        assert row["new_tokens"] == [len(expected.token_ids[0])]
        assert row["finished"] == [expected.token_ids[0][-1] in target.config.eos_token_ids]
        assert row["stats"]["mean_acceptance_length"] >= 1


def test_two_targets_share_one_draft_and_both_are_shown(models, monkeypatch, capsys):
    targets = ("--target", models.small, "--target", models.large)
    flags = ("--draft", models.draft, "--exits", "1,2", "--exit-thresholds", ".2,0", *SHORT)
    run(generate.main, monkeypatch, *targets, *flags, "--prompt", "one", "--prompt", "two")
    shown = capsys.readouterr().out
    assert shown.count("MAT") == 2
    assert "small" in shown
    assert "large" in shown
    assert all(len(line) <= 100 for line in shown.splitlines() if "┃" in line)


def test_later_turns_contain_the_models_own_answer(models, tmp_path, monkeypatch):
    path = prompts_file(tmp_path, {"turns": ["one two", "three four"]}, {"prompt": "fox"})
    out = tmp_path / "out.jsonl"
    flags = ("--prompts", path, "--out", out, *SHORT)
    run(generate.main, monkeypatch, "--target", models.large, *flags)
    two, one = rows_of(out)
    assert [m["role"] for m in two["messages"]] == ["user", "assistant", "user", "assistant"]
    assert two["messages"][1]["content"] == two["responses"][0] == two["response"]
    assert len(two["new_tokens"]) == 2
    assert len(one["new_tokens"]) == 1
    target = load_model(models.large)
    ids = target.tokenizer.encode_chat(two["messages"][:3])
    expected = SpeculativeDecoder(target).generate([ids], SamplingParams(max_new_tokens=8))
    assert two["responses"][1] == expected.texts[0]


def test_rows_tell_which_answers_were_cut_off(tmp_path):
    args = Args(target=("t",), prompt=("p",))
    question = Question(1, "", ("a", "b", "c"))
    ids = {"ended": (5, 7), "cut": (5, 6), "ended at once": (7,)}
    stats = GenerationStats(1, 1, 1, 0, {}, 0, 0, (), (), {}, {}, {"compile": 0.0, "total": 1.0})
    answers = [Answer(text, tokens, stats) for text, tokens in ids.items()]
    row = answering._row(args, "t", question, answers, (7, 9))
    assert row["finished"] == [True, False, True]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    marked = [m["content"] for m in read_conversations(path)[0] if m.get("unfinished")]
    assert marked == ["cut"]


def test_raw_prompts_are_continued_without_a_template(models, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    flags = ("--prompt", PROMPTS[0], "--raw", "--out", out, *SHORT)
    run(generate.main, monkeypatch, "--target", models.large, *flags)
    target = load_model(models.large)
    expected = SpeculativeDecoder(target).generate([PROMPTS[0]], SamplingParams(max_new_tokens=8))
    assert rows_of(out)[0]["response"] == expected.texts[0]


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_prompts_in_brackets_empty_ones_and_undecodable_bytes_are_answered(
    models, tmp_path, monkeypatch, capsys, stream
):
    prompts = (
        "--prompt",
        "[/INST] hi",
        "--prompt",
        "",
        "--prompt",
        "a\udcff",
        "--target",
        models.small,
    )
    out = tmp_path / "[/out].jsonl"
    run(generate.main, monkeypatch, *prompts, stream, "--batch-size", 1, "--max-new-tokens", 4)
    shown = capsys.readouterr().out
    assert "[/INST] hi ─" in shown
    assert "a\ufffd ─" in shown
    run(
        generate.main,
        monkeypatch,
        *prompts,
        stream,
        *("--batch-size", 1, "--max-new-tokens", 4, "--out", out),
    )
    assert f"3 answers written to {out}" in capsys.readouterr().out
    assert [row["prompt"] for row in rows_of(out)] == ["[/INST] hi", "", "a\ufffd"]


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_a_prompt_without_a_token_is_named(models, tmp_path, monkeypatch, capsys, stream):
    """Without the chat template an empty text gives no token."""
    flags = ("--target", models.small, "--raw", stream)
    given = ("--prompt", "b", "--prompt", "")
    told = failing_run(generate.main, monkeypatch, capsys, *flags, *given)
    assert told == "error: prompt 2 is empty: it gives no token; give at least one"
    path = prompts_file(tmp_path, {"prompt": "b"}, {"prompt": "", "id": "x\n1"})
    told = failing_run(generate.main, monkeypatch, capsys, *flags, "--prompts", path)
    assert told == r"error: prompt x\n1 is empty: it gives no token; give at least one"
    with pytest.raises(UserError, match="prompt 1 of 2 is empty: it gives no token"):
        SpeculativeDecoder(load_model(models.small)).generate(["", "b"])
    with pytest.raises(UserError, match="prompt 2 of 2 is empty: it gives no token"):
        load_model(models.small).score(["b", ""])


@pytest.mark.exhaustive("test_regenerate.py has the same, over several turns")
def test_samples_do_not_depend_on_the_batch_size(models, tmp_path, monkeypatch):
    path = prompts_file(tmp_path, *({"prompt": p} for p in PROMPTS))
    answers = []
    for size in (1, 2):
        out = tmp_path / f"{size}.jsonl"
        flags = ("--prompts", path, "--out", out, "--batch-size", size, *SHORT)
        sampling = ("--temperature", 0.9, "--top-p", 0.95, "--seed", 7)
        drafting = ("--draft", models.draft, "--draft-sampling", "argmax")
        run(generate.main, monkeypatch, "--target", models.large, *flags, *sampling, *drafting)
        answers.append([row["response"] for row in rows_of(out)])
    assert answers[0] == answers[1]
    assert len(set(answers[0])) == len(PROMPTS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "no --target was given"),
        (("--target", "{small}"), "nothing to answer; give --prompt"),
        (("--target", "missing", "--prompt", "x"), "missing does not exist"),
        (("--target", "{small}", "--prompts", "missing.jsonl"), "missing.jsonl does not exist"),
        (("--target", "{small}", "--prompt", "x", "--exits", "1"), "need a draft"),
        (("--target", "{small}", "--prompt", "x", "--temperature", "-1"), "temperature=-1.0"),
        (("--target", "{small}", "--prompt", "x", "--batch-size", "0"), "batch-size 0"),
        (("--target", "{small}", "--prompt", "x", "--exits", "one"), "is not a list of numbers"),
        (("--target", "{small}", "--prompt", "x", "--colour", "red"), "--colour"),
        (("--target", "{small}", "--prompt", "x", "--top-k", "many"), "many"),
        (
            ("--target", "{small}", "--prompt", "x", "--draft", "{draft}", "--exits", "1,4"),
            "the draft has no exit at [4]",
        ),
        (("--target", "{small}", "--prompt", "x", "--draft", "{stranger}"), "different tokenizers"),
        (("--target", "{small}", "--prompt", "one " * 200), "the target's context is 256"),
    ],
)
def test_mistakes_get_one_line(models, monkeypatch, capsys, flags, message):
    filled = [flag.format(**vars(models)) for flag in flags]
    assert message in failing_run(generate.main, monkeypatch, capsys, *filled)


def test_a_full_disk_leaves_the_old_answers_and_nothing_half_written(
    models, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out.jsonl"
    out.write_text("old\n")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    flags = ("--target", models.large, "--prompt", "one", "--out", out, *SHORT)
    assert "No space left on device" in failing_run(generate.main, monkeypatch, capsys, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    assert out.read_text() == "old\n"


def test_as_a_process_a_mistake_is_one_line_and_status_2():
    command = [sys.executable, "-m", "infer.generate", "--target", "missing", "--prompt", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: missing does not exist")
    assert len(done.stderr.splitlines()) == 1
