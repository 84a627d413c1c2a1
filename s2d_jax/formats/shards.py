"""Which safetensors files of a Hugging Face directory are its weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path, PurePath
from typing import Any

from s2d_jax.errors import UserError, first_of, shown
from s2d_jax.files import read_json

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class FoundWeights:
    """The files that hold a model's weights.

    Attributes:
        paths: the files.
        notices: lines for the user about what was chosen among the files.
    """

    paths: tuple[Path, ...]
    notices: tuple[str, ...] = ()


def find_safetensors(directory: Path) -> FoundWeights:
    """The weights in a directory: `model.safetensors`, else the files that its index names, as transformers has it.

    Raises:
        UserError: if there are none, files are missing, or the index names something outside the directory.
    """
    single, index = directory / _SINGLE, directory / _INDEX
    if single.exists() and index.exists():
        notice = (
            f"{directory} holds {_SINGLE} and {_INDEX}; the single file is read, as transformers does, and the files that the "
            "index names are not"
        )
        return FoundWeights((single,), (notice,))
    if single.exists():
        return FoundWeights((single,))
    if index.exists():
        return FoundWeights(tuple(_shards(directory, index)))
    convert = (
        "convert them once where torch is installed, with AutoModelForCausalLM.from_pretrained(MODEL)"
        ".save_pretrained(NEW), copy the tokenizer's files to NEW, and give NEW"
    )
    if found := sorted(path.name for path in directory.glob("pytorch_model*.bin*")):
        raise UserError(f"{directory} holds only PyTorch .bin weights ({found[0]}); {convert}")
    raise UserError(
        f"{directory} holds no {_SINGLE}; give a Hugging Face directory with it. If the model has "
        f".bin weights only, {convert}"
    )


def _shards(directory: Path, index: Path) -> list[Path]:
    """The files that an index names, all of which lie in its directory."""
    weight_map = read_json(index).get("weight_map")
    if not (weight_map and isinstance(weight_map, dict)):
        raise UserError(f"{index} lacks weight_map, which names the files; fetch it again")
    named = weight_map.values()
    if outside := [name for name in named if not _is_inside(name)]:
        raise UserError(
            f"{index} names {shown(outside[0])}, a path inside {directory} is expected; fetch the model again, from its authors"
        )
    paths = [directory / name for name in sorted(set(named))]
    if absent := [path.name for path in paths if not path.exists()]:
        raise UserError(
            f"{directory} lacks {first_of(absent)}, named in {index.name}; fetch the complete model"
        )
    return paths


def _is_inside(name: Any) -> bool:
    """Whether a name from a file is a relative path that stays below where it starts; links there may lead elsewhere."""
    if not isinstance(name, str) or not name or not name.isprintable():
        return False
    path = PurePath(name)
    return not path.is_absolute() and ".." not in path.parts
