"""Models by hub id: what is asked of the hub, and how often."""

from __future__ import annotations

import huggingface_hub
from hf_tiny import expect_user_error
from tiny import tiny_model

from s2d_jax.weights.export import save_model
from s2d_jax.weights.load import load_draft, load_model


def test_hub_id_offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with expect_user_error(r"nobody/nothing is no local path and could not be fetched .*; give a"):
        load_model("nobody/nothing")


def test_hub_id_loads_the_snapshot(monkeypatch, tmp_path):
    model = tiny_model()
    save_model(tmp_path / "snapshot", model.config, model.params, None)
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = load_model("some-org/Some-Model.v1")
    assert model.source == "some-org/Some-Model.v1"
    assert [name for name, _ in asked] == ["some-org/Some-Model.v1"]
    assert load_draft("some-org/Some-Draft").source == "some-org/Some-Draft"
    assert [name for name, _ in asked[1:]] == ["some-org/Some-Draft"], "fetched once"
    files = {
        *("config.json", "generation_config.json", "sorted_draft.json"),
        *("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        *(
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
        ),
        *("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja"),
        *("pytorch_model.bin.index.json", "additional_chat_templates/tool_use.jinja"),
    }
    unwanted = {
        *(f"exit_06/{file}" for file in files),
        *("pytorch_model-00001-of-00002.bin", "onnx/model.safetensors", "consolidated.safetensors"),
        *("README.md", "original/tokenizer.model", "flax_model.msgpack"),
    }
    fetched = huggingface_hub.utils.filter_repo_objects(
        sorted(files | unwanted), allow_patterns=asked[0][1]
    )
    assert set(fetched) == files
