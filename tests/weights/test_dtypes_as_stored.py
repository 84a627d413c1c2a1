"""Without a weight format, GPUs and TPUs keep the dtype that a model is stored in, and a CPU takes f32."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_tiny import expect_user_error
from tiny import tiny_config, tiny_params, tiny_tokenizer

from s2d_jax import backends
from s2d_jax.config.draft import DraftConfig
from s2d_jax.formats.gguf import GGUFFile
from s2d_jax.model.products.weight_formats import Int8Weight, chosen_format
from s2d_jax.weights.export import export_draft, save_model
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


def test_most_of_the_matrices_decide(stored):
    model = open_model(stored / "bfloat16")
    assert model.weight_format == "bf16"
    largest = max(model.source.shapes, key=lambda name: np.prod(model.source.shapes[name]))
    few = {name for name in model.source.shapes if name != largest}

    class Mixed:
        shapes, num_bytes = model.source.shapes, 0

        def __init__(self, wide):
            self.wide = wide

        def is_f32(self, name):
            return name in self.wide

    def of(wide):
        return dataclasses.replace(model, source=Mixed(wide)).weight_format

    norms = {name for name in few if len(model.source.shapes[name]) == 1}
    assert of(norms) == "bf16"  # norms do not count
    assert of(set(model.source.shapes)) == "f32"


@pytest.mark.weights
def test_quantised_gguf_is_no_f32(smollm2_path):
    file = GGUFFile(smollm2_path)
    assert not file.is_f32("blk.0.attn_q.weight")
    assert file.is_f32("blk.0.attn_norm.weight")
