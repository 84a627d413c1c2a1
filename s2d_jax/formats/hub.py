"""Where a model's files are: on this machine, or fetched from the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from s2d_jax.errors import UserError, printable, shown
from s2d_jax.files import expanded

SORTED_DRAFT = "sorted_draft.json"
EXIT_PARTS = "exit_parts.safetensors"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What is fetched of a model on the hub. A `*` there crosses folders, and a sorted draft has its truncated copies in folders, so
# each pattern begins with a name. The index of .bin weights shows that a model has no others.
HUB_PATTERNS = (
    "config.json", "generation_config.json", SORTED_DRAFT, EXIT_PARTS, PEFT_CONFIG, PEFT_WEIGHTS,
    "model*.safetensors", "model.safetensors.index.json", "pytorch_model.bin.index.json",
    "tokenizer*.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.*",
    "special_tokens_map.json", "added_tokens.json", "additional_chat_templates/*.jinja",
)  # fmt: skip


def locate(path: str | Path) -> Path:
    """Where a model is: a local path as it is given, or the copy of a model on the hub.

    Raises:
        UserError: if it is neither, or no path at all.
    """
    if not isinstance(path, str | Path):
        raise UserError(
            f"{shown(path)} ({type(path).__name__}) is no model; give a Hugging Face directory, a hub id or a .gguf file"
        )
    local = expanded(path)
    if "\0" not in str(path) and local.exists():
        return local
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and local.suffix != ".gguf":
        return _fetch(str(path))
    raise UserError(
        f"{printable(path)} does not exist; give a Hugging Face directory, a hub id or a .gguf file"
    )


def _fetch(name: str) -> Path:
    """Downloads a model of the Hugging Face hub, or finds it in the hub's cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_PATTERNS)))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name} is no local path and could not be fetched from the hub ({reason}); give a directory or a .gguf file"
        ) from error
