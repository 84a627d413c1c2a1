"""Whatever a file holds: its reader gives the result, or one line that names the file, quickly and in bounded memory."""

from __future__ import annotations

import json
import resource
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_bytes import gguf_file, tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_config

from s2d_jax.config.draft import DraftConfig
from s2d_jax.config.model import ModelConfig
from s2d_jax.errors import UserError
from s2d_jax.files import read_json
from s2d_jax.formats.eos_ids import saved_eos_token_ids
from s2d_jax.formats.gguf import GGUFFile
from s2d_jax.formats.gguf_config import config_from_gguf
from s2d_jax.formats.hf_config import config_from_hf, config_to_hf
from s2d_jax.formats.safetensors import SafetensorsFiles
from s2d_jax.generation.policy import read_policies
from s2d_jax.weights.peft import peft_scale
from s2d_jax.weights.sorted_draft import Base, SortedDraft, read_sorted_draft
from s2d_jax.weights.vocabulary import DraftVocabulary

_MOST_GROWTH = 300 * 2**20  # bytes
# Quick ones in the ordinary suite, always the same; others every time in `make test-all`.
EFFORTS = [
    pytest.param(80, True, id="few"),
    pytest.param(
        5_000,
        False,
        marks=pytest.mark.exhaustive("many more files, and others each time"),
        id="many",
    ),
]

NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([10**7, 2**31, 2**63, 2**64 - 1, 10**30, 10**400]),
    st.floats(),
    st.sampled_from([0.0, -1.0, 1e-320, 1e308]),
)
TEXTS = st.one_of(
    st.text(max_size=5),
    st.sampled_from(
        [
            "llama",
            "qwen2",
            "llama3",
            "default",
            "none",
            "0-1999999999",
            "0-99999999999999",
            "3-1,2",
            "../x",
            "\0",
            "\udfff",
        ]
    ),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
DEEP = "[" * 100_000
BYTES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [b"", b"{", b"null", b"3", b"[]", DEEP.encode(), b"9" * 5_000, b"\xff\xfe{\0}\0"]
    ),
    st.sampled_from([b'{"a":' * 100_000, b'{"format": ' + b"9" * 5_000 + b"}"]),
)


def mutated(valid: dict[str, Any], places: list[tuple[str, ...]]):
    """`valid` with something else in up to four of the `places`, or without it."""
    gone = object()
    changes = st.lists(
        st.tuples(st.sampled_from(places), JSON | st.just(gone)), min_size=1, max_size=4
    )

    def apply(changes: list[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
        made = json.loads(json.dumps(valid))
        for path, value in changes:
            *parents, last = path
            at = made
            for part in parents:
                at = at.get(part) if isinstance(at, dict) else None
            if isinstance(at, dict):
                at.pop(last, None) if value is gone else at.update({last: value})
        return made

    return changes.map(apply)


def places_in(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of all fields."""
    if not isinstance(value, dict):
        return []
    below = [place for key, inner in value.items() for place in places_in(inner, (*path, key))]
    return [(*path, key) for key in value] + below


def check(read: Callable[[Any], Any], files: Any, effort: int, derandomize: bool) -> None:
    """Reads many `files`. Each gives a result or a UserError of one line, and the memory stays as it was."""
    outcomes = {"read": 0, "refused": 0}

    @settings(
        max_examples=effort,
        derandomize=derandomize,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(files)
    def one(content: Any) -> None:
        try:
            read(content)
        except UserError as error:
            outcomes["refused"] += 1
            line = str(error)
        else:
            outcomes["read"] += 1
            line = ""
        assert "\n" not in line
        assert len(line) < 1_000

    scale = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    one()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale < before + _MOST_GROWTH
    # Without files of both kinds, a reader that refuses or takes everything would pass.
    assert all(outcomes.values()), outcomes


def json_file(path: Path, valid: dict[str, Any]):
    """A function that writes content to `path`, and files of JSON or of other bytes for it."""
    contents = st.one_of(st.just(valid), mutated(valid, places_in(valid)), BYTES)

    def write(content: Any) -> Path:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        path.write_bytes(data)
        return path

    return write, contents


@pytest.mark.parametrize(("effort", "derandomize"), EFFORTS)
def test_config_json(tmp_path, effort, derandomize):
    valid = config_to_hf(tiny_config(eos_token_ids=(1, 2), bos_token_id=1), "float32")
    valid |= {"layer_types": ["full_attention"], "partial_rotary_factor": 1.0}
    write, contents = json_file(tmp_path / "config.json", valid)

    def read(content: Any) -> None:
        file = write(content)
        config = config_from_hf(read_json(file), file)
        assert isinstance(config, ModelConfig)
        saved_eos_token_ids(tmp_path, config.vocab_size)

    check(read, contents, effort, derandomize)


@pytest.mark.parametrize(("effort", "derandomize"), EFFORTS)
def test_sorted_draft_json(tmp_path, effort, derandomize):
    draft = SortedDraft(
        DraftConfig((2, 4)), DraftVocabulary(np.arange(5), "abc"), Base("x", (0, 1), "f", True)
    )
    valid = json.loads(json.dumps(draft.to_json({})))
    valid["exit_parts"] = {"heads": [2], "adapters": [4], "adapter_rank": 3}
    write, contents = json_file(tmp_path / "sorted_draft.json", valid)
    check(lambda content: read_sorted_draft(write(content)), contents, effort, derandomize)


@pytest.mark.parametrize(("effort", "derandomize"), EFFORTS)
def test_policies(tmp_path, effort, derandomize):
    key = {"target": "t", "draft": "d", "formats": "f", "device": "cpu", "temperature": 0.5}
    costs = {"draft_step": [0.1], "verify": [1.0, 1.2, 1.3, 1.4], "catch_up": 0.1}
    config = {"exits": [2], "num_draft_tokens": 3, "costs": costs, "guard": True, "tree": None}
    tree = {"depth": 2, "top_k": 2, "nodes": 4, "paths": [], "leaving": "level"}
    write, contents = json_file(tmp_path / "policies.json", {"policies": []})

    def with_entries(entry: Any) -> Any:
        return {"policies": [entry]}

    entries = [{"key": key, "config": config, "evidence": {}}]
    entries.append({"key": key, "config": {"tree": tree}, "evidence": {}})
    changed = st.one_of(mutated(entry, places_in(entry)) for entry in entries).map(with_entries)
    check(lambda content: read_policies(write(content)), contents | changed, effort, derandomize)


@pytest.mark.parametrize(("effort", "derandomize"), EFFORTS)
def test_adapter_config_json(tmp_path, effort, derandomize):
    valid = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True, "use_dora": False}
    valid |= {"init_lora_weights": True, "modules_to_save": None, "bias": "none"}
    write, contents = json_file(tmp_path / "adapter_config.json", valid)

    def read(content: Any) -> None:
        file = write(content)
        rank, scale = peft_scale(read_json(file), file)
        assert rank >= 1
        assert np.isfinite(scale)

    check(read, contents, effort, derandomize)


@pytest.mark.parametrize(("effort", "derandomize"), EFFORTS)
def test_safetensors(tmp_path, effort, derandomize):
    file = tmp_path / "model.safetensors"
    valid = {
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
        "__metadata__": {"format": "pt"},
    }
    lengths = st.none() | st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1])
    data = st.binary(min_size=24, max_size=24) | st.just(b"\0" * 24) | st.binary(max_size=30)
    headers = st.one_of(st.just(valid), mutated(valid, places_in(valid)), BYTES)

    def read(content: tuple[Any, int | None, bytes]) -> None:
        header, length, data = content
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
        source = SafetensorsFiles([file])
        for name, shape in source.shapes.items():
            array = source.read(name)
            assert array.shape == shape
            assert np.isfinite(array.astype(np.float32)).all()

    check(read, st.tuples(headers, lengths, data), effort, derandomize)


GGUF_VALUES = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    TEXTS,
    st.lists(st.integers(0, 70), max_size=3),
    st.lists(TEXTS, max_size=3),
    st.binary(max_size=20),  # no value at all
    st.just(struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5_000),
    st.tuples(st.sampled_from([0, 8, 9, 77]), st.sampled_from([2**20, 2**40, 2**64 - 1])).map(
        lambda array: struct.pack("<IIQ", 9, *array)
    ),
)
GGUF_VALID = {
    "general.architecture": "llama",
    "general.alignment": 32,
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 48,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e4,
    "tokenizer.ggml.eos_token_id": 3,
    "split.count": 0,
}
SIZES = st.sampled_from([0, 1, 4, 31, 32, 2**31, 2**40, 2**63, 2**64 - 1])
TENSORS = st.builds(
    tensor,
    st.sampled_from(["token_embd.weight", "rope_freqs.weight", "output.weight", "\n"]),
    st.lists(SIZES, max_size=5),
    st.integers(0, 40),
    SIZES,
)


@pytest.mark.parametrize(("effort", "derandomize"), EFFORTS)
def test_gguf(tmp_path, effort, derandomize):
    file = tmp_path / "m.gguf"
    embedding = tensor("token_embd.weight", (4, 8))
    changed = st.dictionaries(st.sampled_from(list(GGUF_VALID)), GGUF_VALUES, max_size=3)
    counts = st.none() | st.tuples(SIZES, SIZES)
    made = st.builds(
        lambda changes, tensors, counts: gguf_file(
            GGUF_VALID | changes, [embedding, *tensors], b"\0" * 128, counts=counts
        ),
        changed,
        st.lists(TENSORS, max_size=2),
        counts,
    )
    whole = gguf_file(GGUF_VALID, [embedding], b"\0" * 128)
    cut = st.integers(0, len(whole)).map(lambda kept: whole[:kept])
    flips = st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4)

    def flipped(changes: list[tuple[int, int]]) -> bytes:
        data = bytearray(whole)
        for at, byte in changes:
            data[at] = byte
        return bytes(data)

    def read(data: bytes) -> None:
        file.write_bytes(data)
        found = GGUFFile(file)
        assert isinstance(config_from_gguf(found), ModelConfig)
        for name in found.tensors:
            assert found.tensor(name).shape == found.tensors[name].shape

    check(read, st.one_of(st.just(whole), made, cut, flips.map(flipped)), effort, derandomize)
