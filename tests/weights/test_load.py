"""Hugging Face directories in: parity with torch, placement on a mesh, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from hf_tiny import (
    CASES,
    expect_user_error,
    first_divergent_layer,
    hf_model,
    hf_states,
    our_logits,
    our_states,
    random_tokens,
)
from tiny import tiny_config, tiny_qwen2_config

from s2d_jax.config.draft import DraftConfig
from s2d_jax.config.model import ModelConfig
from s2d_jax.formats.hf_config import config_from_hf, config_to_hf
from s2d_jax.formats.names import get_weight, weight_names
from s2d_jax.model.params import abstract_params
from s2d_jax.sharding import MeshConfig, make_mesh
from s2d_jax.weights.load import load_draft, load_model

MAX_ABS = 2e-4


@pytest.fixture(scope="module")
def llama_directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    hf_model(tiny_config()).save_pretrained(directory)
    return directory


@pytest.fixture
def directory(llama_directory, tmp_path) -> Path:
    """A tiny Llama that a test may damage."""
    return Path(shutil.copytree(llama_directory, tmp_path / "model"))


def edit_config(directory: Path, **changes) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(directory: Path, change) -> None:
    file = directory / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


ALONE = ("llama", "llama without groups", "llama one kv head", "llama3 short scaling", "qwen2")
IN_OTHERS = [pytest.mark.exhaustive("others have what is special here, or more of it")]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=IN_OTHERS * (name in ALONE)) for name in CASES]
)
def test_logits_equal_torch(name, tmp_path):
    config = CASES[name]
    model = hf_model(config)
    model.save_pretrained(tmp_path)
    tokens_BT = random_tokens(config.vocab_size)

    loaded = load_model(tmp_path)

    assert loaded.config == config
    ours, theirs = our_states(loaded.config, loaded.params, tokens_BT), hf_states(model, tokens_BT)
    assert first_divergent_layer(ours, theirs) is None
    assert np.abs(theirs[-1]).max() > 1, "logits too small for the bound to mean anything"
    assert np.abs(ours[-1] - theirs[-1]).max() <= MAX_ABS
    assert np.abs(our_logits(loaded.config, loaded.params, tokens_BT) - theirs[-1]).max() <= MAX_ABS


@pytest.mark.parametrize(
    ("weight", "where"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("model.layers.0.self_attn.k_proj.weight", "layer 1"),
        ("model.layers.2.mlp.down_proj.weight", "layer 3"),
        ("model.layers.3.input_layernorm.weight", "layer 4"),
        ("model.norm.weight", "logits"),
    ],
)
def test_first_divergent_layer_finds_a_planted_fault(weight, where):
    config = tiny_config()
    torch_model, tokens_BT = hf_model(config), random_tokens(config.vocab_size)
    healthy = hf_states(torch_model, tokens_BT)
    with torch.no_grad():
        torch_model.get_parameter(weight).mul_(1.1)
    assert first_divergent_layer(healthy, hf_states(torch_model, tokens_BT)) == where
    assert first_divergent_layer(healthy, healthy) is None


def test_sharded_safetensors(llama_directory, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        llama_directory, dtype=torch.float32, trust_remote_code=False
    )
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    whole, sharded = load_model(llama_directory), load_model(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, sharded.params, whole.params)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("weight_format", "dtype"), [("f32", jnp.float32), ("bf16", jnp.bfloat16)])
def test_dtypes(llama_directory, tmp_path, stored, weight_format, dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        llama_directory, dtype=stored, trust_remote_code=False
    )
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, weight_format=weight_format)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(dtype)}
    theirs = model.model.layers[1].mlp.up_proj.weight.detach().float().numpy()
    ours = loaded.params["layers_1"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(ours, jnp.asarray(theirs).astype(dtype))


def test_mesh_places_every_tensor(llama_directory):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
    placed, whole = load_model(llama_directory, mesh=mesh), load_model(llama_directory)
    jax.tree.map(np.testing.assert_array_equal, placed.params, whole.params)
    kernel = placed.params["layers_0"]["attn"]["k_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (kernel.shape[0] // 2, kernel.shape[1] // 2)


def test_one_table_serves_every_parameter():
    for config in (tiny_config(), tiny_qwen2_config(tie_embeddings=True)):
        names, params = weight_names(config), abstract_params(config)
        leaves = {id(get_weight(params, name)) for name in names}
        assert leaves == {id(leaf) for leaf in jax.tree.leaves(params)}
        assert len({n.hf for n in names}) == len({n.gguf for n in names}) == len(names)


@pytest.mark.parametrize("name", CASES)
def test_config_round_trip(name):
    config = dataclasses.replace(CASES[name], bos_token_id=1, eos_token_ids=(2, 3))
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config, "float32")))) == config


def test_config_of_transformers_4():
    """Vicuna-7B's own config.json, which has neither rope_theta nor head_dim nor biases."""
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vocab_size": 32000,
    }
    expected = ModelConfig(
        family="llama",
        vocab_size=32_000,
        embed_dim=4096,
        ffw_dim=11_008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        norm_eps=1e-5,
        rope_theta=10_000.0,
        max_context=4096,
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    assert config_from_hf(raw) == expected
    scaled = config_from_hf(raw | {"rope_scaling": llama3(), "rope_theta": 500_000.0})
    assert scaled.rope_theta == 500_000.0
    assert scaled.rope_scaling is not None
    assert scaled.rope_scaling.original_max_position == 8192


def llama3(**changes):
    """The RoPE scaling of Llama-3.1 as its config.json has it."""
    return {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "architecture 'MistralForCausalLM' is not"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "'LlamaForSequenceClassific"),
        ({"architectures": None, "model_type": "gpt2"}, "architecture 'gpt2' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "RoPE scaling 'linear' is not"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "RoPE scaling 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "llama3 lacks low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; only silu"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types=.* is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config=.*gptq.* is not"),
        ({"rope_theta": "1e4", "rope_parameters": None}, "rope_theta='1e4' must be a number"),
        ({"rope_parameters": {"rope_theta": [1]}}, r"rope_theta=\[1\] must be a number; correct"),
        ({"rope_scaling": "llama3"}, "rope_scaling: 'llama3' must be an object"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small' must be a number"),
        (
            {"rope_scaling": llama3(high_freq_factor=1.0)},
            "llama3 with factor=8.0, .* is impossible",
        ),
        ({"rope_scaling": llama3(factor=0)}, "llama3 with factor=0, .* is impossible; positive"),
        ({"rope_scaling": llama3(low_freq_factor="1")}, "low_freq_factor='1' must be a number"),
        ({"hidden_size": None}, "config.json lacks hidden_size; correct the config"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers='4' must be a whole number"),
        ({"num_attention_heads": 5}, "hidden_size=32 must be a multiple of num_attention_heads=5"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be a whole number from 1"),
    ],
)
def test_unsupported_configs_are_refused_by_name(directory, changes, message):
    edit_config(directory, **changes)
    with expect_user_error(message):
        load_model(directory)


def test_missing_tensor(directory):
    edit_weights(directory, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    with expect_user_error("lacks 1 tensors, the first is model.layers.2.mlp.up_proj.weight"):
        load_model(directory)


def test_unexpected_tensor(directory):
    name = "model.layers.0.self_attn.q_norm.weight"
    edit_weights(directory, lambda tensors: tensors.update({name: torch.ones(8)}))
    with expect_user_error(f"holds 1 tensors that its architecture does not .* {name}"):
        load_model(directory)


def test_wrong_shape(directory):
    edit_config(directory, intermediate_size=64)
    with expect_user_error(r"gate_proj.weight has shape \(48, 32\), the config asks for \(64, 32"):
        load_model(directory)


def test_old_rotary_tables_are_ignored(directory):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(directory, lambda tensors: tensors.update({name: torch.ones(4)}))
    load_model(directory)


def test_tied_head(directory, llama_directory):
    edit_config(directory, tie_word_embeddings=True)
    with expect_user_error("tie_word_embeddings is true but lm_head.weight differs"):
        load_model(directory)
    same = "model.embed_tokens.weight"
    edit_weights(directory, lambda tensors: tensors.update({"lm_head.weight": tensors[same] + 0}))
    assert "lm_head" not in load_model(directory).params


@pytest.mark.parametrize("kept", [4, 40, -3])
def test_truncated_weights(directory, kept):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with expect_user_error(r"model.safetensors is truncated or damaged \(.*\); fetch it again"):
        load_model(directory)


def test_quantised_tensor(directory):
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(directory, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with expect_user_error(f"tensor {name} has dtype I8; only F32, F16 and BF16"):
        load_model(directory)


def test_missing_shard(directory):
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with expect_user_error("lacks model-00001-of-00002.safetensors, named in"):
        load_model(directory)


def test_torch_only_weights(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with expect_user_error(
        r"only PyTorch .bin weights \(pytorch_model.bin\); convert them once .*save_pretrained.*give NEW"
    ):
        load_model(directory)
    # Of a model on the hub, only the index is fetched.
    (directory / "pytorch_model.bin").rename(directory / "pytorch_model.bin.index.json")
    with expect_user_error(r"only PyTorch .bin weights \(pytorch_model.bin.index.json\); convert"):
        load_model(directory)


def test_no_weights(directory):
    (directory / "model.safetensors").unlink()
    with expect_user_error("holds no model.safetensors; give a Hugging Face directory"):
        load_model(directory)


def test_no_config(tmp_path):
    with expect_user_error("has no config.json; give a Hugging Face directory"):
        load_model(tmp_path)
    (tmp_path / "some.gguf").touch()
    with expect_user_error("has no config.json; give the path of some.gguf"):
        load_model(tmp_path)


def test_damaged_config(directory):
    (directory / "config.json").write_text("{")
    with expect_user_error("config.json is not valid JSON"):
        load_model(directory)
    (directory / "config.json").write_text("[]")
    with expect_user_error("config.json holds a JSON list, an object is expected; fetch it again"):
        load_model(directory)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": None}])
def test_an_index_without_files(directory, index):
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with expect_user_error("index.json lacks weight_map, which names the files; fetch it again"):
        load_model(directory)


def test_no_such_path(tmp_path):
    with expect_user_error("does not exist; give a Hugging Face directory, a hub id or a .gguf"):
        load_model(tmp_path / "nowhere")


def test_any_model_is_a_draft_with_one_exit(llama_directory):
    draft = load_draft(llama_directory)
    assert draft.draft_config == DraftConfig((4,), (0.0,))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"format": 1, "exit_layers": [2, 5]}, r"exit_layers=\(2, 5\) exceeds num_layers=4"),
        ({"format": 2, "exit_layers": [2, 4]}, "format 2 is unknown, 1 is expected"),
        (
            {"format": 1, "exit_layers": "6"},
            "exit_layers='6' must be a list; export the draft again",
        ),
        ({"format": 1, "exit_layers": 4}, "exit_layers=4 must be a list"),
        (
            {"format": 1, "exit_layers": ["6"]},
            r"exit_layers=\['6'\] must be a list of whole numbers",
        ),
        (
            {"format": 1, "exit_layers": [4], "exit_thresholds": "0"},
            "exit_thresholds='0' must be a list",
        ),
        ({"format": 1}, "lacks exit_layers; export the draft again"),
        (
            {"format": 1, "exit_layers": [4], "vocabulary_subset": [1]},
            r"the draft vocabulary: \[1\] must be an object",
        ),
        ({"format": 1, "exit_layers": [2, 4], "exit_thresholds": [0.5]}, "1 values for 2 exits"),
    ],
)
def test_bad_sorted_draft(directory, content, message):
    (directory / "sorted_draft.json").write_text(json.dumps(content))
    with expect_user_error(message):
        load_draft(directory)
