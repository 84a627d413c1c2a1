"""Exported drafts in Hugging Face torch: logits at every exit, assisted generation, the way back, and failures."""

from __future__ import annotations

import dataclasses
import errno
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from disk import tokenizer_refused
from exported import MAX_ABS, VOCABULARY, exit_logits, files_in, hf_load, make_draft
from hf_tiny import expect_user_error, hf_logits, hf_model, random_tokens, write_gguf
from tiny import tiny_config, tiny_params

from s2d_jax.config.draft import DraftConfig
from s2d_jax.formats.safetensors import save_safetensors
from s2d_jax.model.select_layers import truncated
from s2d_jax.weights import export
from s2d_jax.weights.export import exit_directory, export_draft
from s2d_jax.weights.load import load_draft, load_model
from s2d_jax.weights.model import Draft

# One case of each family, head and RoPE; test_pretrained has more.
NAMES = ["llama tied", "llama wide heads", "llama3 short scaling", "qwen2", "qwen2 tied"]


SHAPES = [pytest.mark.exhaustive("test_load.py compares such shapes with torch")]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=SHAPES * name.startswith(("llama wide", "llama3 short")))
        for name in NAMES
    ],
)
def test_every_exit_equals_torch(name, tmp_path):
    draft, out = make_draft(name), tmp_path / "out"
    export_draft(draft, out, {"run": "test"})
    tokens_BT = random_tokens(VOCABULARY)
    directories = {1: out / "exit_01", 2: out / "exit_02", 4: out}
    ours = exit_logits(draft, (1, 2, 4), tokens_BT)
    for depth, directory in directories.items():
        theirs = hf_logits(hf_load(directory), tokens_BT)
        assert np.abs(theirs).max() > 0.5
        assert np.abs(ours[depth] - theirs).max() <= MAX_ABS
    shortened = transformers.AutoModelForCausalLM.from_pretrained(
        out, num_hidden_layers=2, trust_remote_code=False
    ).eval()
    assert np.abs(hf_logits(shortened, tokens_BT) - ours[2]).max() <= MAX_ABS


def test_layout(tmp_path):
    export_draft(make_draft(), tmp_path / "out", {"run": "test", "step": 7})
    model_files = {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    expected = model_files | {"sorted_draft.json"}
    expected |= {f"{d}/{file}" for d in ("exit_01", "exit_02") for file in model_files}
    assert files_in(tmp_path / "out") == expected
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert json.loads((tmp_path / "out" / "sorted_draft.json").read_text()) == {
        "format": 1,
        "exit_layers": [1, 2, 4],
        "exit_thresholds": [0.6, 0.5, 0.0],
        "exit_parts": None,
        "vocabulary_subset": None,
        "base": None,
        "provenance": {"run": "test", "step": 7},
    }
    assert exit_directory(6) == "exit_06"


def test_exits_shallower_than_the_draft(tmp_path):
    """A whole model may be exported with its last exit below its depth."""
    draft = dataclasses.replace(make_draft(), draft_config=DraftConfig((1, 3)))
    export_draft(draft, tmp_path / "out", {})
    assert sorted(p.name for p in (tmp_path / "out").glob("exit_*")) == ["exit_01", "exit_03"]
    assert load_draft(tmp_path / "out").draft_config == draft.draft_config


other_names = pytest.mark.exhaustive("names are those of f32, whose every case is there")


@pytest.mark.parametrize(
    ("name", "weight_format", "dtype"),
    [
        *((name, "f32", jnp.float32) for name in NAMES),
        *((name, "bf16", jnp.bfloat16) for name in ("llama tied", "qwen2")),
        *(
            pytest.param(name, "bf16", jnp.bfloat16, marks=other_names)
            for name in sorted(set(NAMES) - {"llama tied", "qwen2"})
        ),
    ],
)
def test_round_trip_is_bit_identical(name, weight_format, dtype, tmp_path):
    draft = make_draft(name, dtype)
    export_draft(draft, tmp_path / "out", {})
    loaded = load_draft(tmp_path / "out", weight_format=weight_format)
    assert loaded.config == draft.config
    assert loaded.draft_config == draft.draft_config
    assert loaded.tokenizer.vocabulary() == draft.tokenizer.vocabulary()
    assert loaded.tokenizer.chat_template == draft.tokenizer.chat_template
    jax.tree.map(np.testing.assert_array_equal, loaded.params, draft.params)

    shallow = load_draft(tmp_path / "out" / "exit_02", weight_format=weight_format)
    config, params = truncated(draft.config, draft.params, 2)
    assert shallow.config == config
    assert shallow.draft_config == DraftConfig((2,))
    jax.tree.map(np.testing.assert_array_equal, shallow.params, params)


def test_torch_sees_the_dtype_of_the_parameters(tmp_path):
    export_draft(make_draft(dtype=jnp.bfloat16), tmp_path / "out", {})
    assert hf_load(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            "llama tied", marks=pytest.mark.exhaustive("logits of every kind are those of torch")
        ),
        "qwen2",
    ],
)
def test_each_directory_assists_huggingface_generation(name, tmp_path):
    draft, out = make_draft(name), tmp_path / "out"
    export_draft(draft, out, {})
    target = hf_model(dataclasses.replace(tiny_config(num_layers=2), vocab_size=VOCABULARY), seed=3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    prompt = tokenizer("the quick brown", return_tensors="pt")
    limits = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    plain = target.generate(**prompt, **limits)
    for directory in (out, out / "exit_01", out / "exit_02"):
        assistant = hf_load(directory)
        generation = assistant.generation_config
        assert generation.num_assistant_tokens == 5
        assert generation.num_assistant_tokens_schedule == "heuristic"
        assisted = target.generate(**prompt, **limits, assistant_model=assistant)
        assert torch.equal(assisted, plain)
        assert assistant.generate(**prompt, **limits).shape[1] > prompt.input_ids.shape[1]


def test_a_target_with_a_padded_vocabulary_takes_both_tokenizers(tmp_path):
    """transformers takes unequal sizes for other tokenizers, so it wants to have both."""
    draft, out = make_draft("llama tied"), tmp_path / "out"
    export_draft(draft, out, {})
    target = hf_model(tiny_config(VOCABULARY + 16, num_layers=2), seed=3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    prompt = tokenizer("the quick brown", return_tensors="pt")
    limits = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    limits["suppress_tokens"] = list(
        range(VOCABULARY, VOCABULARY + 16)
    )  # a trained model never writes padding
    assistant = hf_load(out / "exit_01")
    with pytest.raises(ValueError, match="assistant_tokenizer"):
        target.generate(**prompt, **limits, assistant_model=assistant)
    both = {"tokenizer": tokenizer, "assistant_tokenizer": tokenizer}
    assisted = target.generate(**prompt, **limits, assistant_model=assistant, **both)
    assert torch.equal(assisted, target.generate(**prompt, **limits))


def test_stop_tokens_are_exported(tmp_path):
    draft = make_draft()
    export_draft(draft, tmp_path / "out", {})
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == list(draft.tokenizer.stop_token_ids)
    assert generation.bos_token_id == 0


def test_without_a_tokenizer(tmp_path):
    draft = dataclasses.replace(make_draft(), tokenizer=None)
    export_draft(draft, tmp_path / "out", {})
    assert load_draft(tmp_path / "out").tokenizer is None
    assert load_model(tmp_path / "out").config == draft.config


def test_replaces_an_earlier_export_only(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    export_draft(make_draft(), out, {"run": 1})
    draft = dataclasses.replace(make_draft(), draft_config=DraftConfig((2, 4)))
    export_draft(draft, out, {"run": 2})
    assert not (out / "exit_01").exists()
    assert json.loads((out / "sorted_draft.json").read_text())["provenance"] == {"run": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").touch()
    with expect_user_error("other is not empty and is no earlier export; give a new directory"):
        export_draft(draft, other, {})
    assert files_in(other) == {"precious.txt"}
    with expect_user_error("precious.txt is a file; give a new directory"):
        export_draft(draft, other / "precious.txt", {})


def test_exits_deeper_than_the_draft(tmp_path):
    draft = dataclasses.replace(make_draft(), draft_config=DraftConfig((2, 6)))
    with expect_user_error(r"exit_layers=\(2, 6\) exceeds num_layers=4"):
        export_draft(draft, tmp_path / "out", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("earlier", [False, True])
def test_full_disk_leaves_nothing(earlier, tmp_path, monkeypatch):
    out = tmp_path / "out"
    if earlier:
        export_draft(make_draft(), out, {"run": 1})
    before = files_in(tmp_path)
    save = export.save_safetensors

    def fill_the_disk(path, tensors):
        save(path, tensors)
        if path.parent.name == "exit_02":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "save_safetensors", fill_the_disk)
    with expect_user_error("out was not written: the disk is full; nothing was left behind"):
        export_draft(make_draft(), out, {"run": 2})
    assert files_in(tmp_path) == before
    if earlier:
        assert json.loads((out / "sorted_draft.json").read_text())["provenance"] == {"run": 1}


def test_a_tokenizer_that_the_disk_refuses_leaves_nothing(tmp_path, monkeypatch):
    """The Rust tokenizer raises no OSError."""
    message = "out was not written: .*File too large.*; nothing was left behind"
    with tokenizer_refused(monkeypatch), expect_user_error(message):
        export_draft(make_draft(), tmp_path / "out", {})
    assert list(tmp_path.iterdir()) == []

    def full_disk(*_, **__):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", full_disk)
    with expect_user_error("out was not written: the disk is full; nothing was left behind"):
        export_draft(make_draft(), tmp_path / "out", {})
    assert list(tmp_path.iterdir()) == []


def test_earlier_export_survives_a_failed_rename(tmp_path, monkeypatch):
    out = tmp_path / "out"
    export_draft(make_draft(), out, {"run": 1})
    rename = Path.rename

    def refuse(self, target):
        if self.name == ".out.partial":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with expect_user_error("out was not written: .*Operation not permitted; nothing was left"):
        export_draft(make_draft(), out, {"run": 2})
    assert json.loads((out / "sorted_draft.json").read_text())["provenance"] == {"run": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(path, tensors):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "save_safetensors", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_draft(make_draft(), tmp_path / "out", {})
    assert list(tmp_path.iterdir()) == []


def test_remains_of_a_killed_export_are_removed(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "config.json").touch()
    export_draft(make_draft(), tmp_path / "out", {})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_integers_are_no_weights(tmp_path):
    with expect_user_error("a has dtype int32; export parameters in f32, f16 or bf16"):
        save_safetensors(tmp_path / "x.safetensors", {"a": jnp.zeros(2, jnp.int32)})
    assert list(tmp_path.iterdir()) == []


def test_gguf_to_export_without_torch(tmp_path):
    """A GGUF file with its tokenizer is read, exported and read again where torch cannot be imported."""
    config = tiny_config(num_layers=2)
    write_gguf(tmp_path / "m.gguf", config, tiny_params(config))
    program = """
import sys
sys.modules["torch"] = None
from s2d_jax.weights.export import export_draft
from s2d_jax.weights.load import load_draft
draft = load_draft(sys.argv[1])
export_draft(draft, sys.argv[2], {})
print(load_draft(sys.argv[2]).tokenizer.encode("ABC"), draft.tokenizer.encode("ABC"))
"""
    arguments = [sys.executable, "-c", program, str(tmp_path / "m.gguf"), str(tmp_path / "out")]
    root = Path(export.__file__).parents[2]
    done = subprocess.run(arguments, cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout == "[32, 33, 34] [32, 33, 34]\n", done.stderr


@pytest.mark.exhaustive("tiny drafts of every kind are compared with torch")
@pytest.mark.weights
def test_smollm2_draft_equals_torch_at_each_exit(smollm2_path, tmp_path, capsys):
    target = load_model(smollm2_path)
    config, params = truncated(target.config, target.params, 8)
    draft = Draft(config, params, target.tokenizer, "SmolLM2", DraftConfig((4, 8)))
    export_draft(draft, tmp_path / "out", {})
    ids = target.tokenizer.encode("The capital of France is Paris, and 2 + 2 = 4.")
    tokens_BT = np.asarray([ids], np.int32)
    ours, worst = exit_logits(draft, (4, 8), tokens_BT), 0.0
    for depth, name in ((4, "exit_04"), (8, "")):
        theirs = hf_logits(hf_load(tmp_path / "out" / name), tokens_BT)
        worst = max(worst, float(np.abs(ours[depth] - theirs).max()))
    assert worst <= MAX_ABS
    with capsys.disabled():
        print(f"\nSmolLM2's first 8 layers, exported: largest logit difference {worst:.1e}")
