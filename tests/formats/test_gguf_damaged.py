"""GGUF files in parts, and files whose fields hold something else than they should."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from gguf_bytes import gguf_file, tensor
from hf_tiny import expect_user_error, tiny_gguf_vocabulary, write_gguf
from tiny import tiny_config, tiny_params

from s2d_jax.formats.gguf import GGUFFile
from s2d_jax.formats.gguf_config import config_from_gguf
from s2d_jax.weights.load import load_model

VALID = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 48,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
EMBEDDING = tensor("token_embd.weight", (4, 8))
DATA = b"\0" * 128
SIZES = [
    *("block_count", "context_length", "embedding_length", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv"),
]


def described(tmp_path: Path, changes: dict, tensors: tuple[bytes, ...] = (EMBEDDING,), **more):
    """The config of a file with these changes."""
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_file(VALID | changes, tensors, DATA, **more))
    return config_from_gguf(GGUFFile(path))


def test_the_file_without_changes_is_read(tmp_path):
    config = described(tmp_path, {})
    assert (config.num_layers, config.vocab_size, config.norm_eps) == (2, 8, 1e-5)


@pytest.mark.parametrize("value", ["4", [4], [], 0, -1, 4.0, True, 2**63])
@pytest.mark.parametrize("key", SIZES)
def test_sizes_are_whole_numbers(tmp_path, key, value):
    shown = re.escape(repr(value))
    with expect_user_error(rf"m.gguf: llama.{key}={shown} must be a whole number from 1 to \d+"):
        described(tmp_path, {f"llama.{key}": value})


@pytest.mark.parametrize("value", ["1", [1.0], 0.0, -1.0, float("nan"), float("inf"), True])
@pytest.mark.parametrize("key", ["attention.layer_norm_rms_epsilon", "rope.freq_base"])
def test_numbers_are_above_0(tmp_path, key, value):
    with expect_user_error(rf"m.gguf: llama.{key}=\S+ must be a number"):
        described(tmp_path, {f"llama.{key}": value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.alignment": 0}, "general.alignment=0 must be a whole number from 1"),
        ({"general.alignment": "32"}, "general.alignment='32' must be a whole number"),
        ({"general.alignment": 2**60}, "general.alignment=.* must be a whole number"),
        ({"general.architecture": ["llama"]}, r"general.architecture=\['llama'\] must be a text"),
        ({"general.architecture": 3}, "general.architecture=3 must be a text"),
        ({"llama.expert_count": [8]}, r"llama.expert_count=\[8\] is not supported; only 0"),
        ({"tokenizer.ggml.eos_token_id": 8}, "eos_token_id=8 must be a whole number from 0 to 7"),
        ({"tokenizer.ggml.eos_token_id": "8"}, "eos_token_id='8' must be a whole number"),
        ({"split.count": "2"}, "split.count='2' must be a whole number"),
        ({"a": struct.pack("<I", 77)}, "header is incomplete .unknown value type 77"),
        (
            {"a": struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5_000},
            "arrays nested more than 8",
        ),
        ({"a": struct.pack("<IIQ", 9, 0, 2**62)}, r"\d+ numbers beyond the end of the file"),
        ({"a": struct.pack("<IIQ", 9, 8, 2**40)}, r"\d+ entries of an array beyond the end"),
        ({"a": struct.pack("<IQ", 8, 2**63)}, r"\d+ bytes of a string beyond the end"),
    ],
)
def test_metadata_that_cannot_be(tmp_path, changes, message):
    with expect_user_error(f"m.gguf.*{message}"):
        described(tmp_path, changes)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (tensor("w", (2**63, 2**63)), "tensor w ends beyond the end of the file"),
        (tensor("w", (4,), offset=2**64 - 32), "tensor w ends beyond the end of the file"),
        (tensor("w", (1,) * 5), "a tensor of 5 dimensions"),
        (tensor("w", (4,), kind=999), "tensor w has unknown type 999; update the gguf package"),
        (tensor("w", (33,), kind=2), "tensor w has rows of 33, no multiple of 32"),
        (EMBEDDING, "two tensors token_embd.weight"),
        (tensor("a\nb", (2**40,)), r"tensor a\\nb ends beyond"),
    ],
)
def test_tensors_that_cannot_be(tmp_path, entry, message):
    with expect_user_error(message):
        described(tmp_path, {}, (EMBEDDING, entry))


@pytest.mark.parametrize("counts", [(2**60, 7), (1, 2**60), (2**64 - 1, 2**64 - 1)])
def test_counts_beyond_the_file(tmp_path, counts):
    with expect_user_error("m.gguf is truncated or damaged at .* its header is incomplete"):
        described(tmp_path, {}, counts=counts)


def test_more_layers_than_tensors(tmp_path):
    """Before anything is made for each layer."""
    config = tiny_config(num_layers=1)
    params = tiny_params(config)
    path = write_gguf(tmp_path / "m.gguf", config, params, metadata={"block_count": 9_999})
    with expect_user_error("asks for 9999 layers, its files hold 12 tensors; correct the config"):
        load_model(path)


# Parts.


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[Path, list[Path]]:
    """A model in one file, and in parts of five tensors, as the gguf package splits it."""
    config, directory = tiny_config(num_layers=1), tmp_path_factory.mktemp("parts")
    whole = write_gguf(directory / "whole.gguf", config, tiny_params(config))
    reader = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(directory / "m.gguf", "llama", split_max_tensors=5)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind, *inner = field.types
        writer.add_key_value(field.name, field.contents(), kind, inner[0] if inner else None)
    for info in reader.tensors:
        writer.add_tensor(info.name, info.data, raw_dtype=info.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return whole, sorted(directory.glob("m-*.gguf"))


@pytest.fixture
def copies(parts, tmp_path) -> list[Path]:
    """Parts that a test may damage."""
    for path in parts[1]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return sorted(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize("given", [0, 1, 2])
def test_any_part_stands_for_all(parts, given):
    whole, paths = parts
    assert [path.name for path in paths] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    found, expected = GGUFFile(paths[given]), GGUFFile(whole)
    assert found.tensors.keys() == expected.tensors.keys()
    for name in found.tensors:
        np.testing.assert_array_equal(found.tensor(name), expected.tensor(name))
    assert config_from_gguf(found) == config_from_gguf(expected)
    assert found.num_bytes == sum(path.stat().st_size for path in paths)
    tokens = found.metadata["tokenizer.ggml.tokens"]
    assert tokens == tiny_gguf_vocabulary()["ggml.tokens"]


def test_a_model_in_parts_is_loaded(parts):
    whole, paths = parts
    loaded, expected = load_model(paths[1]), load_model(whole)
    assert loaded.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected.params)


def test_missing_parts_are_named(copies):
    copies[1].unlink()
    for path in (copies[0], copies[2]):
        with expect_user_error(
            rf"{path.name} is one of 3 parts, and .* lacks m-00002-of-00003.gguf; fetch all parts"
        ):
            GGUFFile(path)


def test_a_part_under_another_name(copies):
    renamed = copies[0].rename(copies[0].with_name("model.gguf"))
    with expect_user_error("is one of 3 parts, but its name does not say which; name the parts"):
        GGUFFile(renamed)


def test_parts_that_do_not_belong_together(copies):
    _, second, third = (path.read_bytes() for path in copies)
    copies[1].write_bytes(third)
    copies[2].write_bytes(second)
    with expect_user_error(
        r"says that it is part split.no=2 of split.count=3, its name says 1 of 3"
    ):
        GGUFFile(copies[0])
    copies[1].write_bytes(second)
    copies[2].write_bytes(third[: len(third) // 2])
    with expect_user_error("m-00003-of-00003.gguf is truncated or damaged"):
        GGUFFile(copies[0])


def test_parts_with_too_few_tensors(tmp_path):
    """An older part among newer ones."""
    split = {"split.count": 2, "split.tensors.count": 3}
    one, two = (tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2))
    one.write_bytes(gguf_file(VALID | split | {"split.no": 0}, (EMBEDDING,), DATA))
    two.write_bytes(gguf_file(split | {"split.no": 1}, (tensor("w", (4,)),), DATA))
    with expect_user_error("hold 2 tensors, split.tensors.count=3 is expected; fetch all parts"):
        GGUFFile(one)
    two.write_bytes(gguf_file(split | {"split.no": 1}, (EMBEDDING,), DATA))
    with expect_user_error(rf"tensor token_embd.weight stands in {one} and in {two}"):
        GGUFFile(two)
