"""A sorted draft as directories that PyTorch users load: full depth, and one truncated model per earlier exit."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from s2d_jax.config import ModelConfig, UserError
from s2d_jax.config_translation import config_to_hf, merged_ids
from s2d_jax.locate import SORTED_DRAFT
from s2d_jax.model import Params, truncated
from s2d_jax.pretrained import SORTED_DRAFT_FORMAT, Draft
from s2d_jax.tokenizer import Tokenizer
from s2d_jax.weight_names import get_weight, weight_names

_SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

# How Hugging Face's assisted generation drafts with these directories: the heuristic of the paper, which starts at 5
# tokens, and no stopping below a confidence.
_ASSISTED_GENERATION = {
    "num_assistant_tokens": 5,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.0,
}


def exit_directory(exit_layer: int) -> str:
    """The name of the truncated model inside an export."""
    return f"exit_{exit_layer:02d}"


def save_safetensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Writes arrays in safetensors format, one after another, and waits until they are on the disk.

    Args:
        tensors: name -> f32, f16 or bf16 array; each is copied to the host only while it is written.

    Raises:
        UserError: for another dtype.

    Source: https://github.com/huggingface/safetensors#format
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, array in tensors.items():
        dtype = jnp.dtype(array.dtype).name
        if dtype not in _SAFETENSORS_DTYPES:
            raise UserError(f"{name} has dtype {dtype}; export parameters in f32, f16 or bf16")
        end = start + array.size * array.dtype.itemsize
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[dtype],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
        start = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for array in tensors.values():
            host = np.ascontiguousarray(np.asarray(array))
            file.write(host.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_model(
    directory: Path, config: ModelConfig, params: Params, tokenizer: Tokenizer | None
) -> None:
    """Writes one plain Hugging Face model directory: config, generation config, weights, tokenizer."""
    directory.mkdir()
    stop_ids = merged_ids(config.eos_token_ids, tokenizer.stop_token_ids if tokenizer else None)
    if tokenizer is not None:
        tokenizer.save(directory)
    weights = {name.hf: get_weight(params, name) for name in weight_names(config)}
    dtype = jnp.dtype(next(iter(weights.values())).dtype).name
    _write_json(directory / "config.json", config_to_hf(config, dtype))
    generation = {"eos_token_id": list(stop_ids) or None, **_ASSISTED_GENERATION}
    if config.bos_token_id is not None:
        generation["bos_token_id"] = config.bos_token_id
    _write_json(directory / "generation_config.json", generation)
    save_safetensors(directory / "model.safetensors", weights)


@contextlib.contextmanager
def _replaced_at_once(out: Path) -> Iterator[Path]:
    """A temporary directory that takes the place of `out` when the block ends well, and vanishes when it does not.

    Raises:
        UserError: if the disk is full or not writable.
    """
    partial, old = (out.with_name(f".{out.name}.{suffix}") for suffix in ("partial", "old"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Left behind by an export that was killed.
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        yield partial
        if out.exists():
            out.rename(old)
        try:
            partial.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        raise UserError(f"{out} was not written: {reason}; nothing was left behind") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def export_draft(draft: Draft, out_dir: str | Path, provenance: Mapping[str, Any]) -> None:
    """Writes a sorted draft for PyTorch users, without PyTorch.

    `out_dir` holds the full depth as a plain `LlamaForCausalLM` or `Qwen2ForCausalLM`, `exit_06/` and the like hold the same
    files truncated at each earlier exit, and `sorted_draft.json` the exits, thresholds, draft vocabulary and provenance. All
    weights are written whole, also those of a trimmed head. The directory appears under its name only when it is complete; an
    earlier export there is replaced.

    Args:
        draft: f32, f16 or bf16 parameters; they are written as they are.
        out_dir: a new or empty directory, or an earlier export.
        provenance: JSON-able facts about where the draft comes from.

    Raises:
        UserError: if `out_dir` holds anything else, an exit is too deep, or the disk is full.
    """
    # A link is followed, so that what it points to is replaced.
    out = Path(out_dir).expanduser().resolve()
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a new directory")
    if out.exists() and any(out.iterdir()) and not (out / SORTED_DRAFT).exists():
        raise UserError(f"{out} is not empty and is no earlier export; give a new directory")
    exits = draft.draft_config.exit_layers
    draft.draft_config.check_depth(draft.config.num_layers)
    sorted_draft = {
        "format": SORTED_DRAFT_FORMAT,
        **dataclasses.asdict(draft.draft_config),
        "vocabulary_subset": None if draft.vocabulary is None else draft.vocabulary.to_json(),
        "provenance": dict(provenance),
    }
    with _replaced_at_once(out) as partial:
        save_model(partial, draft.config, draft.params, draft.tokenizer)
        for depth in exits:
            if depth < draft.config.num_layers:
                config, params = truncated(draft.config, draft.params, depth)
                save_model(partial / exit_directory(depth), config, params, draft.tokenizer)
        _write_json(partial / SORTED_DRAFT, sorted_draft)
