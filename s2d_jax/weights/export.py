"""A sorted draft as directories that PyTorch users load: full depth, and one truncated model per earlier exit."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from s2d_jax.config.model import ModelConfig
from s2d_jax.errors import UserError
from s2d_jax.files import expanded
from s2d_jax.formats.eos_ids import merged_ids
from s2d_jax.formats.hf_config import config_to_hf
from s2d_jax.formats.hub import EXIT_PARTS, SORTED_DRAFT, locate
from s2d_jax.formats.names import get_weight, part_names, weight_names
from s2d_jax.formats.safetensors import save_safetensors
from s2d_jax.model.exit_parts import exit_model
from s2d_jax.model.lora import lora_of, merge_lora
from s2d_jax.model.params import Params
from s2d_jax.model.products.weight_formats import Int8Weight
from s2d_jax.model.select_layers import check_layers
from s2d_jax.text.tokenizer import Tokenizer
from s2d_jax.weights.model import Draft
from s2d_jax.weights.peft import save_peft
from s2d_jax.weights.sorted_draft import Base, SortedDraft, base_fingerprint
from s2d_jax.weights.stored import StoredModel, open_model

# How Hugging Face's assisted generation drafts with these directories: by the paper's heuristic, which starts at 5 tokens,
# and without stopping at a low confidence.
_ASSISTED_GENERATION = {
    "num_assistant_tokens": 5,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.0,
}


def exit_directory(exit_layer: int) -> str:
    """The name of the truncated model inside an export."""
    return f"exit_{exit_layer:02d}"


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

    `out_dir` holds the full depth as a plain `LlamaForCausalLM` or `Qwen2ForCausalLM`. `exit_06/` and the like hold each
    earlier exit, and each exit with a head of its own, as such a model: the layers up to it with the head that it reads. An
    exit with a residual adapter is no such model and has no directory (`exits_left_out`). `exit_parts.safetensors` holds own
    heads and adapters, and `sorted_draft.json` the exits, thresholds, draft vocabulary and provenance. Low-rank adapters of the
    trunk are folded in. All weights are written whole, also those of a trimmed head. The directory appears under its name only
    when it is complete; an earlier export there is replaced.

    Args:
        draft: f32, f16 or bf16 parameters; they are written as they are.
        out_dir: a new or empty directory, or an earlier export.
        provenance: JSON-able facts about where the draft comes from.

    Raises:
        UserError: if `out_dir` holds anything else, an exit is too deep, or the disk is full.
    """
    out = _destination(out_dir)
    config, parts = draft.config, draft.draft_config.parts
    draft.draft_config.check_depth(config.num_layers)
    params = merge_lora(draft.params)
    with _replaced_at_once(out) as partial:
        save_model(partial, config, params, draft.tokenizer)
        for depth in _plain_exits(draft):
            exit_config, exit_params = exit_model(config, params, parts, depth)
            directory = partial / exit_directory(depth)
            save_model(directory, exit_config, exit_params, draft.tokenizer)
        _save_parts(partial, draft)
        described = SortedDraft(draft.draft_config, draft.vocabulary)
        _write_json(partial / SORTED_DRAFT, described.to_json(provenance))


def export_parts(
    draft: Draft,
    out_dir: str | Path,
    *,
    base: str | Path,
    layers: Sequence[int] | None = None,
    provenance: Mapping[str, Any],
) -> None:
    """Writes what a draft adds to the model that its trunk comes from, and the name of that model.

    `out_dir` holds `sorted_draft.json`, the tokenizer, `exit_parts.safetensors` if exits have heads or adapters of their own,
    and the low-rank adapters of the trunk, if it has some, as PEFT writes them. `load_draft` reads it together with the base.

    Args:
        draft: f32, f16 or bf16 parameters; its trunk is that of the base, apart from low-rank adapters beside it.
        out_dir, provenance: as for `export_draft`.
        base: directory, hub id or `.gguf` file of the model that the draft was made from.
        layers: the layers of the base that the draft consists of; None is all.

    Raises:
        UserError: as `export_draft`, and if the draft's trunk is not that of the base.
    """
    out = _destination(out_dir)
    draft.draft_config.check_depth(draft.config.num_layers)
    lora = lora_of(draft.params)
    local = locate(base)
    # A hub id stays one, so that the draft finds its base on every machine.
    path = str(local.absolute()) if expanded(base).exists() else str(base)
    seen = _fingerprint_of_trunk(draft, path, open_model(local), layers)
    chosen = None if layers is None else tuple(layers)
    described = SortedDraft(
        draft.draft_config, draft.vocabulary, Base(path, chosen, seen, lora is not None)
    )
    with _replaced_at_once(out) as partial:
        partial.mkdir()
        if draft.tokenizer is not None:
            draft.tokenizer.save(partial)
        if lora is not None:
            save_peft(partial, draft.config, draft.params, lora, path)
        _save_parts(partial, draft)
        _write_json(partial / SORTED_DRAFT, described.to_json(provenance))


def exits_left_out(draft: Draft) -> tuple[int, ...]:
    """The exits that `export_draft` cannot write as plain models: those with a residual adapter."""
    return draft.draft_config.parts.adapters


def _plain_exits(draft: Draft) -> list[int]:
    """The exits that get a directory of their own; the top directory is the full depth with the shared head."""
    exits, parts = draft.draft_config.exit_layers, draft.draft_config.parts
    other = [e for e in exits if e < draft.config.num_layers or e in parts.heads]
    return [exit for exit in other if exit not in exits_left_out(draft)]


def _save_parts(directory: Path, draft: Draft) -> None:
    parts = draft.draft_config.parts
    if parts.exits:
        tensors = {name.hf: get_weight(draft.params, name) for name in part_names(parts)}
        save_safetensors(directory / EXIT_PARTS, tensors)


def _fingerprint_of_trunk(
    draft: Draft, path: str, base: StoredModel, layers: Sequence[int] | None
) -> str:
    """The fingerprint of the base's chosen layers. Raises UserError if the draft does not consist of them."""
    config = base.config
    if layers is not None:
        check_layers(layers, config.num_layers)
        config = dataclasses.replace(config, num_layers=len(layers))
    seen = base_fingerprint(config)
    if str(seen) != str(base_fingerprint(draft.config)):
        raise UserError(
            f"{path}, layers={layers}, gives {config.num_layers} layers of another shape than the draft's "
            f"{draft.config.num_layers}; name the model and the layers that it was made from"
        )
    for name, array in base.tensors(layers):
        own = get_weight(draft.params, name)
        if isinstance(own, Int8Weight):
            raise UserError(f"{'.'.join(name.ours)} is int8; export parameters in f32, f16 or bf16")
        if not np.array_equal(np.asarray(own), array.astype(own.dtype)):
            raise UserError(
                f"the draft's {'.'.join(name.ours)} differs from that of {path}: its trunk was trained; export it whole"
            )
        seen.add(".".join(name.ours), array)
    return str(seen)


def _destination(out_dir: str | Path) -> Path:
    """Where an export goes. Raises UserError if that holds anything but an earlier export."""
    # A link is followed, so that what it points to is replaced.
    out = expanded(out_dir).resolve()
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a new directory")
    if out.exists() and any(out.iterdir()) and not (out / SORTED_DRAFT).exists():
        raise UserError(f"{out} is not empty and is no earlier export; give a new directory")
    return out
