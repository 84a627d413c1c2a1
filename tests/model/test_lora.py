"""Low-rank adapters on the trunk: merged equals unmerged, shapes and shardings, PEFT's files both ways, runs, exports."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml
from exported import MAX_ABS, VOCABULARY, exit_logits, files_in, hf_load, make_draft
from hf_tiny import CASES, expect_user_error, hf_logits, random_tokens
from tiny import adapted, tiny_config, tiny_model, tiny_params, tiny_tokenizer, with_parts

from infer.export import Args, export
from s2d_jax.config.draft import DraftConfig, ExitParts
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.model.lora import LoraConfig, init_lora, lora_of, merge_lora, with_lora
from s2d_jax.model.params import abstract_params, logical_axes
from s2d_jax.model.products.weight_formats import Int8Weight
from s2d_jax.model.select_layers import selected
from s2d_jax.model.transformer import Transformer
from s2d_jax.sharding import MeshConfig, make_mesh, params_sharding
from s2d_jax.weights.checkpoints import Checkpoints
from s2d_jax.weights.export import export_draft, export_parts, save_model
from s2d_jax.weights.load import load_draft, load_model, read_description
from s2d_jax.weights.model import Draft
from s2d_jax.weights.peft import load_peft, save_peft
from s2d_jax.weights.prepare import prepare_for_decode
from s2d_jax.weights.runs import CHECKPOINTS, load_run, read_lora, write_run

LORA = LoraConfig(3)
SOME = LoraConfig(2, ("q_proj", "down_proj"))
PARTS = ExitParts(heads=(1,), adapters=(2,), adapter_rank=4)


def logits_of(config, params, tokens_BT=random_tokens(64)):  # noqa: B008
    apply = jax.jit(Transformer(config).apply)
    return np.asarray(apply({"params": params}, jnp.asarray(tokens_BT)))


@pytest.mark.parametrize(
    "name", [pytest.param("llama", marks=pytest.mark.exhaustive("qwen2 has more")), "qwen2 tied"]
)
def test_merged_equals_unmerged(name):
    config = dataclasses.replace(CASES[name], num_layers=2)
    params = tiny_params(config, spread=5.0)
    begun = init_lora(params, LORA, jax.random.key(0))
    np.testing.assert_array_equal(logits_of(config, begun), logits_of(config, params))
    changed = adapted(params, LORA)
    merged = merge_lora(changed)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    found = logits_of(config, changed)
    np.testing.assert_allclose(found, logits_of(config, merged), atol=MAX_ABS)
    assert np.abs(found - logits_of(config, params)).max() > 0.1


def test_a_merged_kernel_is_its_definition():
    params = adapted(tiny_params(tiny_config(num_layers=1)), SOME)
    module = params["layers_0"]["mlp"]["down_proj"]
    kernel, a, b = (np.asarray(module[key], np.float64) for key in ("kernel", "lora_a", "lora_b"))
    found = merge_lora(params)["layers_0"]["mlp"]["down_proj"]["kernel"]
    np.testing.assert_allclose(found, kernel + b @ a, atol=1e-6)


def test_shapes_axes_and_shardings():
    config = tiny_config()
    begun = init_lora(tiny_params(config), SOME, jax.random.key(0))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), begun)
    assert with_lora(abstract_params(config), SOME) == shapes
    assert "lora_a" not in begun["layers_0"]["attn"]["k_proj"]
    axes = with_lora(logical_axes(config), SOME)
    assert axes["layers_3"]["attn"]["q_proj"] == {
        "kernel": ("heads", "embed"),
        "lora_a": ("rank", "embed"),
        "lora_b": ("heads", "rank"),
    }
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    split = jax.device_put(tiny_params(config), params_sharding(config, logical_axes(config), mesh))
    begun = init_lora(split, SOME, jax.random.key(0))
    assert jax.tree.map(lambda x: x.sharding, begun) == params_sharding(config, axes, mesh)
    assert lora_of(begun) == SOME
    assert lora_of(split) is None
    assert with_lora(axes, None) is axes
    merged = merge_lora(adapted(split, SOME))
    np.testing.assert_allclose(
        merged["layers_1"]["mlp"]["down_proj"]["kernel"],
        merge_lora(adapted(tiny_params(config), SOME))["layers_1"]["mlp"]["down_proj"]["kernel"],
        atol=1e-6,
    )


def test_rows_of_a_factor_begin_as_pefts_do():
    begun = init_lora(tiny_params(tiny_config()), LoraConfig(8), jax.random.key(0))
    a_RI = begun["layers_0"]["mlp"]["down_proj"]["lora_a"]
    bound = 1 / np.sqrt(48)
    assert 0.9 * bound < float(jnp.abs(a_RI).max()) <= bound
    assert not np.asarray(begun["layers_0"]["mlp"]["down_proj"]["lora_b"]).any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "LoRA rank=0 must be at least 1"),
        ({"rank": 4, "targets": ()}, r"LoRA targets=\(\) must be some of q_proj, k_proj, v_proj"),
        ({"rank": 4, "targets": ("q_proj", "lm_head")}, "must be some of q_proj"),
    ],
)
def test_adapters_that_cannot_be(fields, message):
    with expect_user_error(message):
        LoraConfig(**fields)


def test_adapters_are_folded_in_before_int8():
    draft = tiny_model(num_layers=1, spread=5.0)
    changed = dataclasses.replace(draft, params=adapted(draft.params, LORA))
    whole = dataclasses.replace(draft, params=merge_lora(changed.params))
    found = prepare_for_decode(changed, "int8").params
    jax.tree.map(np.testing.assert_array_equal, found, prepare_for_decode(whole, "int8").params)
    int8 = prepare_for_decode(draft, "int8")
    assert isinstance(int8.params["layers_0"]["attn"]["q_proj"]["kernel"], Int8Weight)
    beside = adapted(int8.params, SOME)
    plain, other = (logits_of(draft.config, p) for p in (int8.params, beside))
    assert np.abs(plain - other).max() > 0.1
    with expect_user_error(r"cannot be folded into layers_0.attn.q_proj.kernel, which is int8"):
        merge_lora(beside)


@pytest.mark.parametrize("lora", [LORA, SOME])
def test_peft_files_there_and_back(lora, tmp_path):
    config = tiny_config(num_layers=2)
    params = tiny_params(config)
    changed = adapted(params, lora)
    save_peft(tmp_path, config, changed, lora, "some/base")
    assert files_in(tmp_path) == {"adapter_config.json", "adapter_model.safetensors"}
    back = load_peft(tmp_path, config, params)
    jax.tree.map(np.testing.assert_array_equal, back, changed)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["target_modules"] == list(lora.targets)
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw | {"lora_alpha": 4 * lora.rank}))
    scaled = load_peft(tmp_path, config, params)["layers_0"]["attn"]["q_proj"]["lora_b"]
    np.testing.assert_allclose(scaled, 4 * changed["layers_0"]["attn"]["q_proj"]["lora_b"])


def test_peft_reads_what_is_written(tmp_path):
    """PEFT applies the adapters to the torch model of the same trunk, and saves files that are read back."""
    peft = pytest.importorskip("peft", reason="install the test extra to compare with PEFT")
    draft = make_draft("qwen2 tied")
    export_draft(draft, tmp_path / "base", {})
    changed = dataclasses.replace(draft, params=adapted(draft.params, LORA))
    (tmp_path / "lora").mkdir()
    save_peft(tmp_path / "lora", draft.config, changed.params, LORA, str(tmp_path / "base"))
    model = peft.PeftModel.from_pretrained(hf_load(tmp_path / "base"), tmp_path / "lora").eval()
    tokens_BT = random_tokens(VOCABULARY)
    theirs = hf_logits(model, tokens_BT)
    assert np.abs(theirs - exit_logits(changed, (4,), tokens_BT)[4]).max() <= MAX_ABS
    assert np.abs(theirs - exit_logits(draft, (4,), tokens_BT)[4]).max() > 0.1

    options = {"r": 2, "lora_alpha": 8, "target_modules": ["v_proj", "up_proj"], "use_rslora": True}
    fresh = peft.get_peft_model(hf_load(tmp_path / "base"), peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        for name, weight in fresh.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    fresh.save_pretrained(tmp_path / "theirs")
    ours = dataclasses.replace(
        draft, params=load_peft(tmp_path / "theirs", draft.config, draft.params)
    )
    found = exit_logits(ours, (4,), tokens_BT)[4]
    assert np.abs(hf_logits(fresh, tokens_BT) - found).max() <= MAX_ABS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA' is not supported; only 'LORA'"),
        ({"use_dora": True}, "use_dora=True is not supported; only False"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"r": 5}, r"q_proj.lora_A.weight and lora_B have shapes \(\(2, 32\), \(32, 2\)\), the"),
        ({"r": None}, "adapter_config.json lacks r; give a LoRA that PEFT saved"),
        ({"r": True}, "r=True must be a whole number from 1"),
        ({"lora_alpha": math.nan}, "lora_alpha=nan must be a number"),
        ({"use_rslora": "no"}, "use_rslora='no' must be true or false"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported, because it"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights='pissa_niter_16' is not"),
        ({"init_lora_weights": "olora"}, "save the adapter as a plain LoRA: save_pretrained"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq' is not supported"),
        ({"init_lora_weights": ["gaussian"]}, r"init_lora_weights=\['gaussian'\] is not supported"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora=.* is not supported; train without it"),
    ],
)
def test_peft_files_that_cannot_be_read(changes, message, tmp_path):
    config = tiny_config(num_layers=2)
    params = tiny_params(config)
    save_peft(tmp_path, config, adapted(params, SOME), SOME, "some/base")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with expect_user_error(message):
        load_peft(tmp_path, config, params)


def test_peft_files_of_another_model(tmp_path):
    config = tiny_config(num_layers=2)
    params = tiny_params(config)
    save_peft(tmp_path, config, adapted(params, SOME), SOME, "some/base")
    shallow = selected(config, params, [0])
    with expect_user_error("holds 4 tensors that the model has no place for, the first is base_"):
        load_peft(tmp_path, *shallow)
    (tmp_path / "adapter_model.safetensors").unlink()
    with expect_user_error("has no adapter_model.safetensors; give a directory that PEFT saved"):
        load_peft(tmp_path, config, params)


# Drafts on a base.

BASE_LAYERS = (0, 2, 3)
EXITS = DraftConfig((1, 2, 3), (0.3, 0.3, 0.0))
PROMPTS = [[5, 9, 2], [7, 7, 1, 3, 30, 12, 50]]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A whole model on disk."""
    directory = tmp_path_factory.mktemp("models") / "base"
    model = tiny_model(VOCABULARY, spread=6.0)
    save_model(directory, model.config, model.params, tiny_tokenizer(VOCABULARY))
    return load_model(directory)


@pytest.fixture(scope="module")
def draft(base) -> Draft:
    """Of some layers of the base, with parts and LoRA."""
    config, params = selected(base.config, base.params, BASE_LAYERS)
    draft = with_parts(Draft(config, params, base.tokenizer, "trained", EXITS), PARTS)
    return dataclasses.replace(draft, params=adapted(draft.params, LORA))


@pytest.mark.parametrize(
    "weight_format",
    ["bf16", "int8", pytest.param("f32", marks=pytest.mark.exhaustive("what others are made of"))],
)
def test_a_draft_on_a_base_is_the_whole_one(base, draft, weight_format, tmp_path):
    export_draft(draft, tmp_path / "whole", {})
    export_parts(
        draft, tmp_path / "small", base=base.source, layers=BASE_LAYERS, provenance={"run": 1}
    )
    names = {"sorted_draft.json", "exit_parts.safetensors"}
    names |= {"adapter_config.json", "adapter_model.safetensors"}
    assert files_in(tmp_path / "small") >= names
    assert not files_in(tmp_path / "small") & {"config.json", "model.safetensors"}
    whole, small = (
        load_draft(tmp_path / name, weight_format=weight_format) for name in ("whole", "small")
    )
    assert small.config == whole.config
    assert small.draft_config == whole.draft_config == draft.draft_config
    assert small.tokenizer.vocabulary() == draft.tokenizer.vocabulary()
    jax.tree.map(np.testing.assert_array_equal, small.params, whole.params)
    assert read_description(tmp_path / "small")[0] == draft.config
    with expect_user_error("it is a draft without its trunk, so give it as a draft"):
        load_model(tmp_path / "small")
    if weight_format == "f32":
        sampling = SamplingParams(temperature=1.0, max_new_tokens=20)
        results = [SpeculativeDecoder(base, m).generate(PROMPTS, sampling) for m in (whole, small)]
        assert results[0].token_ids == results[1].token_ids
        assert results[0].stats.exit_histogram == results[1].stats.exit_histogram


def test_a_draft_on_a_mesh_takes_its_base_there(base, draft, tmp_path):
    export_parts(draft, tmp_path / "small", base=base.source, layers=BASE_LAYERS, provenance={})
    mesh = make_mesh(MeshConfig(fsdp=2))
    loaded = load_draft(tmp_path / "small", mesh=mesh)
    expected = params_sharding(draft.config, logical_axes(draft.config, PARTS), mesh)
    assert jax.tree.map(lambda x: x.sharding, loaded.params) == expected


def test_a_small_export_of_bf16(base, draft, tmp_path):
    """What is compared with the base is rounded as the draft is; the trunk itself stays as exact as the base."""
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), draft.params)
    draft = dataclasses.replace(draft, params=low)
    export_parts(draft, tmp_path / "small", base=base.source, layers=BASE_LAYERS, provenance={})
    loaded = load_draft(tmp_path / "small")
    embedding = loaded.params["embed"]["embedding"]
    np.testing.assert_array_equal(embedding, base.params["embed"]["embedding"])
    head = loaded.params["exit_heads_1"]["kernel"]
    np.testing.assert_array_equal(head, low["exit_heads_1"]["kernel"].astype(jnp.float32))


def test_a_draft_without_parts_is_a_pointer(base, tmp_path):
    draft = Draft(base.config, base.params, base.tokenizer, "whole", DraftConfig((2, 4)))
    export_parts(draft, tmp_path / "small", base=base.source, provenance={})
    loaded = load_draft(tmp_path / "small")
    assert loaded.draft_config == draft.draft_config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, base.params)


def test_trunks_that_are_not_the_base(base, draft, tmp_path):
    out = tmp_path / "small"
    with expect_user_error("layers=None, gives 4 layers of another shape than the draft's 3"):
        export_parts(draft, out, base=base.source, provenance={})
    with expect_user_error("layers_1.attn.q_proj.kernel differs from that of .*; export it whole"):
        export_parts(draft, out, base=base.source, layers=(0, 1, 3), provenance={})
    with expect_user_error("layer 4 is not in the model"):
        export_parts(draft, out, base=base.source, layers=(0, 1, 4), provenance={})
    int8 = prepare_for_decode(draft, "int8")
    with expect_user_error("embed.embedding is int8; export parameters in f32, f16 or bf16"):
        export_parts(int8, out, base=base.source, layers=BASE_LAYERS, provenance={})
    assert not out.exists()


def test_a_base_that_is_missing_or_another(base, draft, tmp_path):
    out = tmp_path / "small"
    moved = shutil.copytree(base.source, tmp_path / "base")
    export_parts(draft, out, base=str(moved), layers=BASE_LAYERS, provenance={})
    other = tiny_model(VOCABULARY, seed=3, spread=6.0)
    (tmp_path / "base").rename(tmp_path / "moved")
    with expect_user_error(
        r"the base of .*small cannot be read: .*base does not exist; .*base.path"
    ):
        load_draft(out)
    save_model(tmp_path / "base", other.config, other.params, base.tokenizer)
    with expect_user_error(r"base is not the model that .*small was trained on \(fingerprint"):
        load_draft(out)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "there",
            "sorted_draft.json: base: 'there' must be an object with fields; export the draft again",
        ),
        ({"path": "x"}, "base lacks fingerprint; export the draft again"),
    ],
)
def test_a_damaged_base(base, draft, value, message, tmp_path):
    out = tmp_path / "small"
    export_parts(draft, out, base=base.source, layers=BASE_LAYERS, provenance={})
    file = out / "sorted_draft.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base": value}))
    with expect_user_error(message):
        load_draft(out)


# Runs.


@pytest.fixture(scope="module")
def run_dir(base, draft, tmp_path_factory):
    """A run whose draft has LoRA and parts."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    write_run(run_dir, draft.config, draft.draft_config, draft.tokenizer, LORA)
    (run_dir / "config.yaml").write_text(
        yaml.safe_dump({"model": {"path": base.source, "layers": list(BASE_LAYERS)}})
    )
    with contextlib.closing(Checkpoints(run_dir / CHECKPOINTS, keep=1)) as checkpoints:
        checkpoints.save(4, {}, params=draft.params)
        checkpoints.wait()
    return run_dir


def test_runs_restore_adapters_and_parts(draft, run_dir):
    assert read_lora(run_dir) == LORA
    loaded = load_run(run_dir)
    assert loaded.draft_config == draft.draft_config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, draft.params)
    mesh = make_mesh(MeshConfig(fsdp=2))
    axes = with_lora(logical_axes(draft.config, PARTS), LORA)
    expected = params_sharding(draft.config, axes, mesh)
    assert jax.tree.map(lambda x: x.sharding, load_run(run_dir, mesh=mesh).params) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_exports_of_a_run(run_dir, dtype, tmp_path, capsys):
    export(Args(run_dir, tmp_path / "whole", dtype=dtype))
    said = " ".join(capsys.readouterr().out.split())
    assert "exits 2 have residual adapters, so no plain model and no directory" in said
    export(Args(run_dir, tmp_path / "small", dtype=dtype, adapters_only=True))
    size = sum(f.stat().st_size for f in (tmp_path / "small").glob("*.safetensors"))
    assert size < 0.5 * (tmp_path / "whole" / "model.safetensors").stat().st_size
    whole = load_draft(tmp_path / "whole")
    trunk = merge_lora(load_run(run_dir).params)["layers_1"]["attn"]["q_proj"]["kernel"]
    expected = np.asarray(trunk.astype(dtype), np.float32)
    found = whole.params["layers_1"]["attn"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(found, expected)
    small = load_draft(tmp_path / "small")
    close = {"float32": 0.0, "bfloat16": 0.05}[dtype]
    for ours, theirs in zip(*map(jax.tree.leaves, (small.params, whole.params)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=close)
