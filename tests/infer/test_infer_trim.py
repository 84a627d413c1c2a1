"""`python -m infer.trim`, and `--draft-vocabulary`, on tiny models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from infer_tiny import VOCAB, failing_run, run, save_tiny_models

from infer.bench import __main__ as bench
from infer.generate import __main__ as generate
from infer.trim import __main__ as trim
from infer.trim.choose import choose_tokens
from s2d_jax.text.tokenizer import Tokenizer
from s2d_jax.weights.load import load_draft, load_model
from s2d_jax.weights.vocabulary import read_vocabulary

SHORT = ("--max-new-tokens", 8)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def draft(models, tmp_path):
    return Path(shutil.copytree(models.draft, tmp_path / "draft"))


@pytest.fixture
def answers(tmp_path):
    rows = [
        {"prompt": "a", "response": "the quick brown\u2028fox"},
        {"prompt": "b", "responses": ["one two", "three four five"]},
        {"prompt": "c", "messages": [{"role": "assistant", "content": "user asks"}]},
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


TEXTS = ("the quick brown\u2028fox", "one two", "three four five", "user asks")


def test_the_list_is_kept_with_the_draft(draft, answers, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in draft.rglob("*") if path.is_file()}
    run(trim.main, monkeypatch, "--draft", draft, "--answers", answers, "--size", 40)
    after = {path: path.read_bytes() for path in draft.rglob("*") if path.is_file()}
    assert {p for p in after if after[p] != before.get(p)} == {draft / "sorted_draft.json"}
    assert before.keys() == after.keys()
    kept = json.loads(after[draft / "sorted_draft.json"])
    assert kept.keys() == json.loads(before[draft / "sorted_draft.json"]).keys()

    tokenizer, counts = Tokenizer.from_directory(draft), [0] * VOCAB
    for text in TEXTS:
        for i in tokenizer.encode(text):
            counts[i] += 1
    loaded = load_draft(draft)
    special = tokenizer.special_token_ids()
    assert len(special) == 3
    expected = choose_tokens(np.array(counts), np.zeros(VOCAB, int), special, 40)
    assert loaded.vocabulary.ids_U.tolist() == expected.tolist()
    provenance = loaded.vocabulary.provenance
    assert provenance["answers"] == [str(answers)]
    assert provenance["answer_tokens"] == sum(counts)
    assert provenance["held_out_coverage"][str(VOCAB)] == 1.0
    covered = list(provenance["held_out_coverage"].values())
    assert covered == sorted(covered)
    assert covered[0] < 1
    shown = capsys.readouterr().out
    assert "chosen" in shown
    assert "100.00%" in shown


def test_other_text_comes_after_the_answers(draft, answers, tmp_path, monkeypatch):
    text, listed = tmp_path / "more.txt", tmp_path / "v.json"
    text.write_text("assistant")
    flags = ("--draft", draft, "--answers", answers, "--text", text, "--out", listed)
    tokenizer = Tokenizer.from_directory(draft)
    answered = {i for written in TEXTS for i in tokenizer.encode(written)}
    more = set(tokenizer.encode("assistant")) - answered
    assert more
    size = 3 + len(answered) + len(more)
    run(trim.main, monkeypatch, *flags, "--size", size)
    vocabulary = read_vocabulary(listed)
    assert set(vocabulary.ids_U.tolist()) == {*tokenizer.special_token_ids(), *answered, *more}
    assert vocabulary.provenance["listed_from_text"] == len(more)
    assert vocabulary.provenance["text"] == [str(text)]


def test_calibrations_with_another_head_are_pointed_out(draft, answers, monkeypatch, capsys):
    path = draft / "sorted_draft.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "policies": [{"a": 1}]}))
    run(trim.main, monkeypatch, "--draft", draft, "--answers", answers, "--size", 40)
    assert "calibrate again" in capsys.readouterr().out
    assert json.loads(path.read_text())["policies"] == [{"a": 1}]


def test_answers_of_generate_make_a_list_for_any_draft(models, tmp_path, monkeypatch, capsys):
    """From the target's answers to a file, and with it through generate and bench, with a draft that is a plain model."""
    prompts = ("--prompt", "one two", "--prompt", "the fox", "--prompt", "three", "--batch-size", 1)
    answers, listed = tmp_path / "answers.jsonl", tmp_path / "lists" / "vocabulary.json"
    target = ("--target", models.large)
    run(generate.main, monkeypatch, *target, *prompts, *SHORT, "--out", answers)
    flags = ("--draft", models.small, "--answers", answers, "--size", 100, "--out", listed)
    run(trim.main, monkeypatch, *flags)
    assert read_vocabulary(listed).size == 100
    assert [path.name for path in listed.parent.iterdir()] == ["vocabulary.json"]

    found = []
    for vocabulary in (listed, "full"):
        out = tmp_path / "out.jsonl"
        drafting = ("--draft", models.small, "--draft-vocabulary", vocabulary)
        run(generate.main, monkeypatch, *target, *drafting, *prompts, *SHORT, "--out", out)
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        found.append([row["response"] for row in rows])
    assert found[0] == found[1]

    questions = tmp_path / "q.jsonl"
    questions.write_text(json.dumps({"prompt": "one two"}) + "\n")
    run(
        *(bench.main, monkeypatch, *target, "--independent-draft", models.small, "--draft"),
        *(models.draft, "--questions", questions, "--methods", "draft,s2d", *SHORT),
        *("--draft-vocabulary", listed, "--out", tmp_path / "bench"),
    )
    report = json.loads((tmp_path / "bench" / "report.json").read_text())
    assert report["settings"]["draft_vocabulary"] == str(listed)
    assert [row["identical_to_baseline"] for row in report["rows"]] == [True] * 3
    capsys.readouterr()


def test_full_ignores_the_drafts_own_list(draft, answers, monkeypatch):
    run(trim.main, monkeypatch, "--draft", draft, "--answers", answers, "--size", 40)
    from s2d_jax.cli.loading import load_listed_draft

    assert load_listed_draft(str(draft), None, "f32").vocabulary.size == 40
    assert load_listed_draft(str(draft), "full", "f32").vocabulary is None
    assert load_listed_draft(None, None, "f32") is None


def test_gguf_and_directories_are_described_without_their_weights(models, tmp_path):
    from s2d_jax.weights.load import read_description

    model = load_model(models.large)
    bare = Path(shutil.copytree(models.large, tmp_path / "bare"))
    (bare / "model.safetensors").unlink()
    config, tokenizer = read_description(bare)
    assert config.vocab_size == model.config.vocab_size
    assert tokenizer.vocabulary() == model.tokenizer.vocabulary()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--draft", "{draft}"), "no answers were given; give --answers"),
        (("--draft", "{draft}", "--answers", "none.jsonl"), "none.jsonl does not exist"),
        (("--draft", "missing", "--answers", "{answers}", "--out", "v.json"), "missing does not"),
        (("--draft", "{small}", "--answers", "{answers}"), "holds no sorted_draft.json to keep"),
        (("--draft", "{draft}", "--answers", "{answers}"), "size 32000 exceeds the vocabulary of"),
        (("--draft", "{draft}", "--answers", "{answers}", "--size", 3), "3 special tokens"),
        (("--draft", "{draft}", "--answers", "{empty}"), "holds no answers"),
        (("--draft", "{draft}", "--answers", "{blank}"), "the answers are all empty"),
        (("--draft", "{draft}", "--answers", "{one}"), "the answers are all to one prompt"),
        (
            ("--draft", "{draft}", "--answers", "{prompts}"),
            "line 1: {'prompt': 'a'} has no answer; expected",
        ),
        (("--draft", "{draft}", "--answers", "{junk}"), "junk.jsonl is not valid JSON"),
        (
            ("--draft", "{draft}", "--answers", "{answers}", "--text", "none.txt"),
            "none.txt does not exist",
        ),
        (
            ("--draft", "{draft}", "--answers", "{answers}", "--text", "{binary}"),
            "is UTF-16; convert it",
        ),
        (("--draft", "{draft}", "--answers", "{answers}", "--out", "dir"), "--out dir is no file"),
    ],
)
def test_mistakes_get_one_line(
    models, draft, answers, tmp_path, monkeypatch, capsys, flags, message
):
    contents = {
        "empty": "",
        "blank": '{"prompt": "a", "response": ""}\n{"prompt": "b", "response": ""}\n',
        "one": '{"prompt": "a", "response": "x"}\n',
        "prompts": '{"prompt": "a"}\n',
        "junk": "[1, 2\n",
    }
    names = {"draft": draft, "small": models.small, "answers": answers}
    for name, text in contents.items():
        names[name] = tmp_path / f"{name}.jsonl"
        names[name].write_text(text)
    names["binary"] = tmp_path / "binary"
    names["binary"].write_bytes(b"\xff\xfe\x00\xd8")
    before = (draft / "sorted_draft.json").read_bytes()
    filled = [str(flag).format(**names) for flag in flags]
    assert message in failing_run(trim.main, monkeypatch, capsys, *filled)
    assert (draft / "sorted_draft.json").read_bytes() == before
    assert not [path.name for path in draft.iterdir() if "partial" in path.name]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"size": 2, "ids": "0,300"}, f"lists id 300, the draft has {VOCAB} tokens"),
        ({"size": 3, "ids": "5,5,6"}, "lists id 5 after 5; list every id once"),
        ({"size": 1, "ids": ""}, "must look like 0-99"),
        ({"size": 0, "ids": ""}, "size=0 must be a whole number from 1"),
        (None, "does not exist; give a file that python -m infer.trim"),
    ],
)
def test_bad_lists_get_one_line(models, tmp_path, monkeypatch, capsys, content, message):
    path = tmp_path / "v.json"
    if content is not None:
        path.write_text(json.dumps(content))
    flags = ("--target", models.large, "--draft", models.draft, "--prompt", "x")
    found = failing_run(generate.main, monkeypatch, capsys, *flags, "--draft-vocabulary", path)
    assert message in found


def test_a_list_without_a_draft_gets_one_line(models, tmp_path, monkeypatch, capsys):
    flags = ("--target", models.large, "--draft-vocabulary", "v.json")
    message = failing_run(generate.main, monkeypatch, capsys, *flags, "--prompt", "x")
    assert "--draft-vocabulary needs a draft" in message
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"prompt": "one two"}\n')
    message = failing_run(bench.main, monkeypatch, capsys, *flags, "--questions", questions)
    assert "--draft-vocabulary needs a draft" in message
