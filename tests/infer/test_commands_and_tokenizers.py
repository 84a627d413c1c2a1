"""Commands with tokenizers and chat templates: they refuse alike, say things once, and go on with nothing of other ids."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hf_tiny import expect_user_error
from infer_tiny import VOCAB, failing_run, run, save_tiny_models
from run_tiny import launch, write_source
from tiny import tiny_config, tiny_params, tiny_tokenizer
from tokenizers import normalizers

from infer.bench import __main__ as bench
from infer.calibrate import __main__ as calibrate
from infer.generate import __main__ as generate
from infer.generate.journal import Journal
from infer.trim import __main__ as trim
from s2d_jax.cli import command
from s2d_jax.cli.loading import load_listed_draft, load_target
from s2d_jax.cli.options import LoadingOptions
from s2d_jax.sharding import make_mesh
from s2d_jax.text.tokenizer import Tokenizer
from s2d_jax.weights.export import save_model
from s2d_jax.weights.load import load_draft
from s2d_jax.weights.vocabulary import DraftVocabulary
from train.config.files import load_config
from train.data.rows import build_rows, check_rows
from train.run.initial_draft import load_start
from train.run.setup import _check_tokenizer
from train.run.teachers import load_teacher

NAMED = [
    {"name": "default", "template": "{{ messages[0]['content'] }}"},
    {"name": "loud", "template": "{{ messages[0]['content'] }}!"},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(autouse=True)
def nothing_said_yet():
    command.say_once.cache_clear()


def changed(directory, to: Path, change=lambda backend: None, **config) -> str:
    """A copy of a model whose tokenizer.json and tokenizer_config.json were changed."""
    copy = Path(shutil.copytree(directory, to))
    backend = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    change(backend)
    backend.save(str(copy / "tokenizer.json"))
    file = copy / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return str(copy)


def lower(backend):
    backend.normalizer = normalizers.Lowercase()


def commands(tmp_path, target, draft):
    """Command lines of every command that reads prompts."""
    prompts, talks = tmp_path / "prompts.jsonl", tmp_path / "talks.jsonl"
    prompts.write_text('{"prompt": "the"}\n')
    talks.write_text('{"prompt": "the"}\n')
    pair = ("--target", target, "--draft", draft)
    return {
        "generate": (generate.main, *pair, "--prompt", "the"),
        "conversations": (
            *(generate.main, *pair, "--as-conversations"),
            *("--prompts", talks, "--out", tmp_path / "out.jsonl"),
        ),
        "bench": (bench.main, *pair, "--questions", prompts, "--out", tmp_path / "bench"),
        "calibrate": (calibrate.main, *pair, "--questions", prompts, "--out", tmp_path / "p.json"),
    }


COMMANDS = ("generate", "conversations", "bench", "calibrate")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_draft_of_another_pipeline_is_refused(models, tmp_path, monkeypatch, capsys, name):
    """As one that was trained on the ids of a tokenizer that was rebuilt from its class."""
    target = changed(models.small, tmp_path / "lower", lower, tokenizer_class="GPT2Tokenizer")
    main, *words = commands(tmp_path, target, models.draft)[name]
    error = failing_run(main, monkeypatch, capsys, *words)
    assert "different tokenizers: '" in error
    assert "train such a draft again" in error
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_chat_template_is_chosen_alike(models, tmp_path, monkeypatch, capsys, name):
    target = changed(models.small, tmp_path / "named", chat_template=NAMED)
    main, *words = commands(tmp_path, target, models.draft)[name]
    error = failing_run(main, monkeypatch, capsys, *words, "--chat-template", "none")
    assert "'none' is neither a file nor one of the names known here" in error
    assert "default, loud, vicuna" in error
    if name != "conversations":
        flags = ("--raw", "--chat-template", "loud")
        error = failing_run(main, monkeypatch, capsys, *words, *flags)
        assert "--raw leaves the chat template out, and --chat-template chooses one" in error
    messages = [{"role": "user", "content": "the"}]
    for chosen, text in ((None, "the"), ("loud", "the!")):
        tokenizer = load_target(target, LoadingOptions(chat_template=chosen)).tokenizer
        assert tokenizer is not None
        assert tokenizer.render_chat(messages) == text


def test_a_missing_template_is_said_once(models, tmp_path, capsys):
    bare = changed(models.small, tmp_path / "bare", chat_template=None)
    for _ in range(2):
        load_target(bare, LoadingOptions())
    said = capsys.readouterr()
    assert said.err.count("note: the model has no chat template") == 1
    assert said.out == ""
    command.say_once.cache_clear()
    load_target(bare, LoadingOptions(), raw=True)
    load_target(bare, LoadingOptions(chat_template="vicuna"))
    load_target(models.small, LoadingOptions())
    assert "note:" not in capsys.readouterr().err


def test_a_list_of_other_rules_is_refused_and_an_older_one_is_told(models, tmp_path, capsys):
    draft = changed(models.draft, tmp_path / "draft", tokenizer_class="GPT2Tokenizer")
    tokenizer = load_draft(draft).tokenizer
    assert tokenizer is not None
    listed = DraftVocabulary.of_tokenizer(range(40), tokenizer, {})
    kept = tmp_path / "list.json"
    kept.write_text(json.dumps(listed.to_json()))
    assert load_listed_draft(draft, str(kept), "f32").vocabulary.size == 40
    other = changed(models.draft, tmp_path / "other", lower)
    with expect_user_error("counted with a tokenizer that splits texts otherwise"):
        load_listed_draft(other, str(kept), "f32")
    assert "note:" not in capsys.readouterr().err
    old = listed.to_json()
    del old["behaviour_sha256"]
    kept.write_text(json.dumps(old))
    for _ in range(2):
        assert load_listed_draft(draft, str(kept), "f32").vocabulary.size == 40
    said = capsys.readouterr().err
    assert said.count("note: the draft vocabulary of 40 tokens was made by an earlier version") == 1
    assert "GPT2Tokenizer" in said
    load_listed_draft(models.draft, str(kept), "f32")  # was read as it stands by all versions
    assert "note:" not in capsys.readouterr().err


def test_trim_names_a_token_without_an_embedding(models, tmp_path, monkeypatch, capsys):
    draft = changed(models.draft, tmp_path / "draft", lambda b: b.add_special_tokens(["<pad>"]))
    answers, text = tmp_path / "answers.jsonl", tmp_path / "text.txt"
    rows = [{"prompt": p, "response": r} for p, r in (("a", "the dog"), ("b", "one<pad>"))]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--draft", draft, "--answers", answers, "--size", 40)
    told = f"has token id {VOCAB} ('<pad>'); the model's ids are 0 to {VOCAB - 1}"
    assert told in failing_run(trim.main, monkeypatch, capsys, *words)
    answers.write_text(answers.read_text().replace("<pad>", ""))
    text.write_text("<pad>")
    assert told in failing_run(trim.main, monkeypatch, capsys, *words, "--text", text)
    run(trim.main, monkeypatch, *words)


def test_a_journal_of_another_tokenizer_is_named(tmp_path):
    file = tmp_path / "answers.jsonl.journal"
    with Journal(file, {"seed": 0, "tokenizer": "a"}):
        pass
    before = file.read_bytes()
    with expect_user_error("journal was begun with another tokenizer or chat template .*class"):
        Journal(file, {"seed": 0, "tokenizer": "b"})
    assert file.read_bytes() == before
    with Journal(file, {"seed": 0, "tokenizer": "a"}) as again:
        assert again.batches == []


def test_the_fingerprint_changes_with_the_pipeline(models, tmp_path):
    own = Tokenizer.from_directory(models.small).fingerprint()
    assert Tokenizer.from_directory(changed(models.small, tmp_path / "same")).fingerprint() == own
    other = changed(models.small, tmp_path / "lower", lower)
    assert Tokenizer.from_directory(other).fingerprint() != own


def test_training_chooses_a_template(source, tmp_path, capsys):
    config = load_config(source / "run.yaml")
    messages = [{"role": "user", "content": "x"}]
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[0]['content'] }}?")
    section = dataclasses.replace(config.data, chat_template=str(template))
    chosen = load_start(dataclasses.replace(config, data=section), make_mesh(config.mesh))
    assert chosen.tokenizer.render_chat(messages) == "x?"
    assert chosen.notices == ()
    assert launch(source, tmp_path / "run", "--data.chat-template", "none") == 2
    assert "'none' is neither a file nor one of" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_training_says_that_a_template_is_missing(source, tmp_path):
    config = load_config(source / "run.yaml")
    bare = changed(source / "model", tmp_path / "bare", chat_template=None)
    section = dataclasses.replace(config.model, path=bare)
    start = load_start(dataclasses.replace(config, model=section), make_mesh(config.mesh))
    (line,) = start.notices
    assert "no chat template" in line


def test_rows_with_tokens_beyond_an_embedding(source, tmp_path):
    """Of the draft that is trained, and of a teacher whose vocabulary ends before the draft's padding."""
    config = load_config(source / "run.yaml")
    chat = tmp_path / "chat.jsonl"
    talk = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two<pad>"}]
    chat.write_text(json.dumps({"messages": talk}) + "\n")
    section = dataclasses.replace(config.data, paths=(str(chat),), cache_dir=str(tmp_path / "c"))
    config = dataclasses.replace(config, data=section)
    padded = tiny_tokenizer(VOCAB)
    padded._fast.add_tokens(["<pad>"], special_tokens=True)
    told = f"id {VOCAB} .'<pad>'. in the rows, {{}} has {VOCAB} tokens, so no embedding for it"
    with expect_user_error(told.format("the model")):
        build_rows(section, padded, vocab_size=VOCAB)
    rows, _ = build_rows(section, padded, vocab_size=VOCAB + 1)
    check_rows(rows, VOCAB + 1, padded, "it")
    with expect_user_error(told.format("it")):
        check_rows(rows, VOCAB, padded, "it")
    teacher = tiny_config(VOCAB, 1)
    save_model(tmp_path / "teacher", teacher, tiny_params(teacher), tiny_tokenizer(VOCAB))
    path = str(tmp_path / "teacher")
    with expect_user_error(told.format(path)):
        load_teacher(path, config, padded, make_mesh(config.mesh), rows)


def test_a_run_of_other_ids_is_not_resumed(source, tmp_path):
    """Its tokenizer was written by a version that read the model's by its class."""
    config = load_config(source / "run.yaml")
    wrong = Tokenizer.from_directory(changed(source / "model", tmp_path / "run", lower))
    with expect_user_error("the rows of .* were made with another tokenizer than .* start another"):
        _check_tokenizer(config, tmp_path / "run", wrong)
    _check_tokenizer(config, tmp_path / "run", Tokenizer.from_directory(source / "model"))
    gone = dataclasses.replace(config.model, path=str(tmp_path / "gone"))
    _check_tokenizer(dataclasses.replace(config, model=gone), tmp_path / "run", wrong)
