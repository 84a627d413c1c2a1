"""Without a weight format, GPUs and TPUs keep the dtype that a model is stored in, and a CPU takes f32."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_tiny import expect_user_error, write_gguf
from tiny import adapted, tiny_config, tiny_params, tiny_tokenizer, with_parts

from s2d_jax import backends
from s2d_jax.config.draft import DraftConfig, ExitParts
from s2d_jax.formats.gguf import GGUFFile
from s2d_jax.model.lora import LoraConfig
from s2d_jax.model.products.weight_formats import Int8Weight, chosen_format
from s2d_jax.weights.export import export_draft, export_parts, save_model
from s2d_jax.weights.load import load_draft, load_model
from s2d_jax.weights.model import Draft
from s2d_jax.weights.prepare import format_kept
from s2d_jax.weights.stored import open_model


@pytest.mark.parametrize(
    ("asked", "stored", "platform", "expected"),
    [
        (None, "f32", "cpu", "f32"),
        (None, "bf16", "cpu", "f32"),
        (None, "f32", "gpu", "f32"),
        (None, "bf16", "gpu", "bf16"),
        (None, "bf16", "cuda", "bf16"),
        (None, "f32", "tpu", "f32"),
        (None, "bf16", "tpu", "bf16"),
        *((asked, "bf16", p, asked) for asked in ("f32", "bf16", "int8") for p in ("cpu", "tpu")),
        *((asked, "f32", p, asked) for asked in ("f32", "bf16", "int8") for p in ("cpu", "gpu")),
    ],
)
def test_what_is_asked_for_holds_and_else_the_backend_decides(asked, stored, platform, expected):
    assert chosen_format(asked, stored, platform) == expected


def test_an_unknown_format_is_refused():
    with expect_user_error("weight format 'f8' is unknown; use one of f32, bf16, int8"):
        chosen_format("f8", "bf16", "gpu")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """One tiny model, stored in each dtype, and a draft on its own trunk in bf16."""
    directory = tmp_path_factory.mktemp("stored")
    config = tiny_config(300, num_layers=2)
    params = tiny_params(config)
    for name in ("float32", "bfloat16", "float16"):
        cast = jax.tree.map(lambda x, dtype=name: x.astype(dtype), params)
        save_model(directory / name, config, cast, tiny_tokenizer(300))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    draft = Draft(config, half, tiny_tokenizer(300), "draft", DraftConfig((1, 2)))
    export_draft(draft, directory / "draft", {})
    return directory


@pytest.fixture
def as_an_accelerator(monkeypatch):
    """The CPU keeps dtypes, as GPU and TPU do."""
    keeps = dataclasses.replace(backends.CPU, keeps_dtype=True)
    monkeypatch.setattr(backends, "BACKENDS", {**backends.BACKENDS, "cpu": keeps})


def _dtypes(model) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)}


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_cpu_takes_f32(stored, name):
    assert _dtypes(load_model(stored / name)) == {"float32"}


@pytest.mark.parametrize(
    ("name", "kept"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "bfloat16")]
)
def test_an_accelerator_keeps_what_is_stored(stored, as_an_accelerator, name, kept):
    model = load_model(stored / name)
    assert _dtypes(model) == {kept}
    assert model.dtype == kept
    assert format_kept(model) == {"float32": "f32", "bfloat16": "bf16"}[kept]


def test_a_format_that_is_asked_for_holds_on_an_accelerator(stored, as_an_accelerator):
    assert _dtypes(load_model(stored / "bfloat16", weight_format="f32")) == {"float32"}
    whole = load_model(stored / "float32", weight_format="int8")
    assert isinstance(whole.params["embed"]["embedding"], Int8Weight)
    assert format_kept(whole) == "int8"


def test_bf16_is_never_widened_on_the_way(stored, as_an_accelerator, monkeypatch):
    widened, astype = [], np.ndarray.astype

    class Watched(np.ndarray):
        def astype(self, dtype, *args, **kwargs):
            widened.append(np.dtype(dtype))
            return astype(self, dtype, *args, **kwargs)

    source = open_model(stored / "bfloat16")
    name, array = next(iter(source.tensors()))
    assert array.dtype == jnp.bfloat16, name
    tensors = type(source).tensors

    def watched(self, layers=None):
        return ((name, array.view(Watched)) for name, array in tensors(self, layers))

    monkeypatch.setattr(type(source), "tensors", watched)
    assert _dtypes(load_model(stored / "bfloat16")) == {"bfloat16"}
    assert not widened


def test_a_draft_follows_its_own_trunk(stored, as_an_accelerator):
    assert _dtypes(load_draft(stored / "draft")) == {"bfloat16"}
    assert _dtypes(load_draft(stored / "draft", weight_format="f32")) == {"float32"}


def test_parts_and_adapters_follow_the_base(stored, as_an_accelerator, tmp_path):
    """What was trained beside a base is stored in f32, and the base in bf16."""
    base = load_model(stored / "bfloat16", weight_format="f32")
    own = ExitParts(heads=(1,), adapters=(2,), adapter_rank=4)
    config = DraftConfig((1, 2))
    draft = with_parts(Draft(base.config, base.params, base.tokenizer, "draft", config), own)
    draft = dataclasses.replace(draft, params=adapted(draft.params, LoraConfig(2)))
    export_parts(draft, tmp_path / "draft", base=stored / "bfloat16", provenance={})
    assert _dtypes(load_draft(tmp_path / "draft")) == {"bfloat16"}
    assert _dtypes(load_draft(tmp_path / "draft", weight_format="f32")) == {"float32"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_is_known_whatever_its_draft_is_loaded_in(
    stored, as_an_accelerator, tmp_path, dtype
):
    """Its fingerprint is of the numbers in its files; f16 would be rounded on the way to bf16."""
    for name, asked in (("widened", "f32"), ("kept", None)):
        trunk = load_model(stored / dtype, weight_format=asked)
        draft = Draft(trunk.config, trunk.params, None, "draft", DraftConfig((1, 2)))
        export_parts(draft, tmp_path / name, base=stored / dtype, provenance={})
    files = [tmp_path / name / "sorted_draft.json" for name in ("widened", "kept")]
    assert files[0].read_text() == files[1].read_text()


def test_most_numbers_in_the_matrices_decide(stored):
    """Neither the number of tensors decides, nor one odd tensor; norms do not count."""
    model = open_model(stored / "bfloat16")
    sizes = {name: math.prod(shape) for name, shape in model.source.shapes.items()}
    matrices = {name for name, shape in model.source.shapes.items() if len(shape) > 1}
    norms, largest = set(sizes) - matrices, max(matrices, key=sizes.__getitem__)
    smallest = min(matrices, key=sizes.__getitem__)

    def format_with(in_f32: set[str]) -> str:
        source = SimpleNamespace(shapes=model.source.shapes, is_f32=in_f32.__contains__)
        return dataclasses.replace(model, source=source).weight_format

    assert format_with(set()) == format_with(norms) == format_with({smallest}) == "bf16"
    assert format_with(matrices) == format_with(matrices - {smallest}) == "f32"
    # The table of the vocabulary is one of many tensors, and holds less than half of the numbers.
    assert 0 < 2 * sizes[largest] < sum(sizes[name] for name in matrices)
    assert format_with({largest}) == "bf16"
    assert format_with(matrices - {largest}) == "f32"


def test_quantised_gguf_becomes_bf16(as_an_accelerator, tmp_path):
    config = tiny_config(num_layers=2, ffw_dim=64)
    q4 = gguf.GGMLQuantizationType.Q4_0
    file = write_gguf(tmp_path / "q4.gguf", config, tiny_params(config), matrix_type=q4)
    whole = write_gguf(tmp_path / "f32.gguf", config, tiny_params(config))
    assert _dtypes(load_model(file)) == {"bfloat16"}
    assert _dtypes(load_model(file, weight_format="f32")) == {"float32"}
    assert format_kept(load_model(file, weight_format="int8")) == "int8"
    assert _dtypes(load_model(whole)) == {"float32"}


@pytest.mark.weights
def test_quantised_gguf_is_no_f32(smollm2_path):
    file = GGUFFile(smollm2_path)
    assert not file.is_f32("blk.0.attn_q.weight")
    assert file.is_f32("blk.0.attn_norm.weight")
