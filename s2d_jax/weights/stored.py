"""Models in files, Hugging Face's or GGUF: what shape they have, and their tensors one after another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from s2d_jax.config.model import ModelConfig
from s2d_jax.errors import UserError, shown
from s2d_jax.files import check_no_lfs_pointer, read_json, regular_file
from s2d_jax.formats.eos_ids import merged_ids, saved_eos_token_ids
from s2d_jax.formats.finite import check_finite
from s2d_jax.formats.gguf import GGUFFile
from s2d_jax.formats.gguf_config import ROPE_FACTORS, config_from_gguf
from s2d_jax.formats.hf_config import config_from_hf
from s2d_jax.formats.hub import SORTED_DRAFT
from s2d_jax.formats.names import EMBEDDING, LM_HEAD, WeightName, get_weight, weight_names
from s2d_jax.formats.safetensors import SafetensorsFiles
from s2d_jax.formats.shards import find_safetensors
from s2d_jax.model.params import Params, abstract_params
from s2d_jax.text.tokenizer import Tokenizer
from s2d_jax.text.tokenizer_files import TOKENIZER_FILES


class WeightSource(Protocol):
    """Tensors by name: `shapes` says what there is, `read` gives one as NumPy, `num_bytes` is the size of their files.

    `is_f32` says whether a tensor is stored in 32 bits, and not in fewer.
    """

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def num_bytes(self) -> int: ...

    def read(self, name: str) -> np.ndarray: ...

    def is_f32(self, name: str) -> bool: ...


class GGUFWeights:
    """The tensors of a GGUF file, with the rows of q and k in the order of Hugging Face."""

    def __init__(self, file: GGUFFile, config: ModelConfig):
        self._file = file
        self.num_bytes = file.num_bytes
        self._heads_of = {}
        if config.family == "llama":
            self._heads_of = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
        self.shapes = {
            name: info.shape for name, info in file.tensors.items() if name != ROPE_FACTORS
        }

    def is_f32(self, name: str) -> bool:
        """Whether the tensor is stored in 32 bits."""
        return self._file.is_f32(name)

    def read(self, name: str) -> np.ndarray:
        """One tensor in f32, rows of q and k in Hugging Face's order. Raises UserError if it holds NaN or infinity."""
        weight = self._file.tensor(name)
        check_finite(name, weight, self._file.path)
        num_heads = self._heads_of.get(name.split(".")[-2])
        return weight if num_heads is None else unpermute_rope_rows(weight, num_heads)


def unpermute_rope_rows(weight_OI: np.ndarray, num_heads: int) -> np.ndarray:
    """Undoes llama.cpp's interleaving of the two halves of each head's rows.

    GGUF files of the Llama architecture rotate neighbouring rows `(0, 1), (2, 3), ...`; Hugging Face and this library
    rotate row `i` with row `i + H/2`.

    >>> unpermute_rope_rows(np.array([[0], [2], [1], [3]]), num_heads=1).ravel().tolist()
    [0, 1, 2, 3]
    """
    halves = weight_OI.reshape(num_heads, -1, 2, *weight_OI.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight_OI.shape)


def check_shapes(
    source: WeightSource,
    names: tuple[WeightName, ...],
    name_of: Callable[[WeightName], str],
    expected: Params,
    where: str,
) -> None:
    """Raises UserError unless `source` holds tensors of these names and of the `expected` shapes, and no others."""
    wanted = {name_of(name): tuple(get_weight(expected, name).shape) for name in names}
    if missing := [name for name in wanted if name not in source.shapes]:
        raise UserError(
            f"{where} lacks {len(missing)} tensors, the first is {missing[0]}; fetch the complete model"
        )
    if unexpected := sorted(set(source.shapes) - set(wanted)):
        raise UserError(
            f"{where} holds {len(unexpected)} tensors that its architecture does not have, the first is {unexpected[0]}; "
            "such a model is not supported"
        )
    for name, shape in wanted.items():
        if source.shapes[name] != shape:
            raise UserError(
                f"{where}: tensor {name} has shape {source.shapes[name]}, the config asks for {shape}; correct the config"
            )


def _check_depth(config: ModelConfig, source: WeightSource, where: str) -> None:
    """Raises UserError for more layers than there are tensors, before anything is made for each layer."""
    if config.num_layers > len(source.shapes):
        raise UserError(
            f"{where}: its config asks for {config.num_layers} layers, its files hold {len(source.shapes)} tensors; correct "
            "the config, or fetch the complete model"
        )


def _drop_redundant(source: SafetensorsFiles, config: ModelConfig, where: str) -> None:
    """Forgets tensors that repeat what the config says: RoPE tables of old files, a tied head."""
    for name in [name for name in source.shapes if name.endswith(".rotary_emb.inv_freq")]:
        del source.shapes[name]
    if config.tie_embeddings and LM_HEAD.hf in source.shapes and EMBEDDING.hf in source.shapes:
        if not np.array_equal(source.read(LM_HEAD.hf), source.read(EMBEDDING.hf)):
            raise UserError(
                f"{where}: tie_word_embeddings is true but {LM_HEAD.hf} differs from the embedding; "
                "set it to false in config.json"
            )
        del source.shapes[LM_HEAD.hf]


def _config_file(directory: Path) -> Path:
    if not (directory / "config.json").exists():
        ggufs = sorted(path.name for path in directory.glob("*.gguf"))
        remedy = f"give the path of {ggufs[0]}" if ggufs else "give a Hugging Face directory"
        if (directory / SORTED_DRAFT).exists():
            remedy = "it is a draft without its trunk, so give it as a draft (load_draft, --draft)"
        raise UserError(f"{directory} has no config.json; {remedy}")
    return directory / "config.json"


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """A model whose weights are still in files.

    Attributes:
        config: its shape; its end-of-sequence ids include the tokenizer's stop tokens.
        tokenizer: None where there is none.
        source: its tensors.
        name_of: what a tensor is called there.
        notices: lines that tell what was chosen among the files.
    """

    config: ModelConfig
    tokenizer: Tokenizer | None
    source: WeightSource
    name_of: Callable[[WeightName], str]
    notices: tuple[str, ...] = ()

    def tensors(self, layers: Sequence[int] | None = None) -> Iterator[tuple[WeightName, Any]]:
        """Every tensor, as a NumPy array, with its name; `layers` gives those of the model of these layers, with its names."""
        for name in self._names(layers):
            yield name, np.asarray(self.source.read(self.name_of(name)))

    @property
    def weight_format(self) -> str:
        """The format that most numbers in the matrices fit into: "f32", or "bf16" for all that are stored in fewer bits."""
        sizes = {True: 0, False: 0}
        for name in map(self.name_of, self._names(None)):
            if len(shape := self.source.shapes[name]) > 1:
                sizes[self.source.is_f32(name)] += math.prod(shape)
        return "f32" if sizes[True] >= sizes[False] else "bf16"

    def num_weights(self, layers: Sequence[int] | None = None) -> int:
        """How many numbers `tensors` gives."""
        shapes = (self.source.shapes[self.name_of(name)] for name in self._names(layers))
        return sum(math.prod(shape) for shape in shapes)

    def _names(self, layers: Sequence[int] | None) -> tuple[WeightName, ...]:
        config = self.config
        if layers is not None:
            config = dataclasses.replace(config, num_layers=len(layers))
        return weight_names(config, layers)


def describe_model(path: Path) -> tuple[ModelConfig, Tokenizer | None]:
    """Shape and tokenizer of the model at a path that exists, as `open_model` finds them.

    Raises:
        UserError: if there is no supported model.
    """
    return _describe_directory(path) if path.is_dir() else _describe_gguf(GGUFFile(path))


def _describe_directory(directory: Path) -> tuple[ModelConfig, Tokenizer | None]:
    file = _config_file(directory)
    config = config_from_hf(read_json(file), file)
    eos_ids = saved_eos_token_ids(directory, config.vocab_size)
    config = dataclasses.replace(config, eos_token_ids=eos_ids)
    tokenizer = tokenizer_in(directory)
    return _with_stop_tokens(config, tokenizer, directory), tokenizer


def _describe_gguf(file: GGUFFile) -> tuple[ModelConfig, Tokenizer | None]:
    config, tokenizer = config_from_gguf(file), Tokenizer.from_gguf(file)
    return _with_stop_tokens(config, tokenizer, file.path), tokenizer


def tokenizer_in(directory: Path) -> Tokenizer | None:
    """The tokenizer in a directory; None where there is none.

    Raises:
        UserError: if it cannot be read.
    """
    files = [directory / name for name in TOKENIZER_FILES if (directory / name).exists()]
    if not files:
        return None
    for file in files:
        check_no_lfs_pointer(regular_file(file, "fetch the model's tokenizer"))
    return Tokenizer.from_directory(directory)


def _with_stop_tokens(config: ModelConfig, tokenizer: Tokenizer | None, where: Path) -> ModelConfig:
    """The config with the ids that end an answer for the tokenizer, too."""
    if tokenizer is None:
        return config
    # An added token without a row in the embedding can never be written, so it ends nothing.
    written = [i for i in tokenizer.stop_token_ids if i < config.vocab_size]
    if tokenizer.stop_token_ids and not written:
        raise UserError(
            f"{where}: the tokenizer ends a text with {shown(tokenizer.stop_token_ids)}, the vocabulary has ids 0 to "
            f"{config.vocab_size - 1}; fetch the tokenizer of this model"
        )
    return dataclasses.replace(config, eos_token_ids=merged_ids(config.eos_token_ids, written))


def open_model(path: Path) -> StoredModel:
    """The model at a path that exists: a directory with config.json and safetensors, or a `.gguf` file.

    Raises:
        UserError: if it is not supported, incomplete, or its tensors do not have the shapes of its config.
    """
    if path.is_dir():
        config, tokenizer = _describe_directory(path)
        found = find_safetensors(path)
        files = SafetensorsFiles(found.paths)
        _check_depth(config, files, str(path))
        _drop_redundant(files, config, str(path))
        name_of = lambda name: name.hf  # noqa: E731
        stored = StoredModel(config, tokenizer, files, name_of, found.notices)
    else:
        file = GGUFFile(path)
        config, tokenizer = _describe_gguf(file)
        weights = GGUFWeights(file, config)
        _check_depth(config, weights, str(path))
        stored = StoredModel(config, tokenizer, weights, lambda name: name.gguf)
    expected = weight_names(config), stored.name_of, abstract_params(config)
    check_shapes(stored.source, *expected, str(path))
    return stored
