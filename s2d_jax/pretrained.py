"""Weights in: a Hugging Face directory, a hub id or a GGUF file becomes a `Model`, one tensor at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import safetensors

from s2d_jax.config import DraftConfig, ModelConfig, UserError
from s2d_jax.config_translation import (
    ROPE_FACTORS,
    config_from_gguf,
    config_from_hf,
    merged_ids,
    read_json,
    saved_eos_token_ids,
)
from s2d_jax.draft_vocabulary import DraftVocabulary, trimmed_params
from s2d_jax.gguf_reader import GGUFFile
from s2d_jax.locate import SORTED_DRAFT, locate
from s2d_jax.model import Params, Transformer, abstract_params, logical_axes
from s2d_jax.prepare import load_weight, platform_of
from s2d_jax.sharding import params_sharding
from s2d_jax.tokenizer import TOKENIZER_FILES, Tokenizer
from s2d_jax.weight_formats import check_weight_format, compute_dtype
from s2d_jax.weight_names import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    WeightName,
    get_weight,
    set_weight,
    weight_names,
)

SORTED_DRAFT_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Model:
    """A transformer that can decode.

    Attributes:
        config: its shape.
        params: nested dict of arrays; matrices are `[out, in]`, or `Int8Weight`s of that shape.
        tokenizer: None for a directory without one.
        source: where it came from, for messages and reports.
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None
    source: str

    @property
    def dtype(self) -> Any:
        """Of activations and caches: that of the norms and biases, whatever the format of the matrices."""
        return get_weight(self.params, FINAL_NORM).dtype

    @property
    def transformer(self) -> Transformer:
        """The module that `params` belong to, with its whole head."""
        return Transformer(self.config, self.dtype)


@dataclasses.dataclass(frozen=True)
class Draft(Model):
    """A model whose states may be read at several depths, through its one norm and head or through parts of single exits.

    Attributes:
        draft_config: its exits; `params` hold the parts that it names.
        vocabulary: the tokens that its head is read over; None for all. Set it with `with_trimmed_head`.
    """

    draft_config: DraftConfig
    vocabulary: DraftVocabulary | None = None

    @property
    def drafting_transformer(self) -> Transformer:
        """The same with what drafting reads: the parts of single exits, and heads over the listed tokens if there is a list."""
        size = None if self.vocabulary is None else self.vocabulary.size
        return Transformer(self.config, self.dtype, size, self.draft_config.parts)


class WeightSource(Protocol):
    """Tensors by name: `shapes` says what there is, `read` gives one as NumPy."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str) -> np.ndarray: ...


class SafetensorsFiles:
    """The tensors of one or several safetensors files.

    Raises:
        UserError: for a truncated file, or a dtype other than F32, F16 and BF16.
    """

    def __init__(self, paths: list[Path]):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._handles: dict[str, Any] = {}
        for path in paths:
            try:
                # NumPy knows bfloat16 here because jax registers ml_dtypes on import.
                handle = safetensors.safe_open(path, framework="np")
            except (safetensors.SafetensorError, OSError) as error:
                raise UserError(
                    f"{path} is truncated or damaged ({error}); fetch it again"
                ) from error
            for name in handle.keys():  # noqa: SIM118 - not a dict
                tensor = handle.get_slice(name)
                if tensor.get_dtype() not in ("F32", "F16", "BF16"):
                    raise UserError(
                        f"{path}: tensor {name} has dtype {tensor.get_dtype()}; only F32, F16 and BF16 weights can be read"
                    )
                self.shapes[name] = tuple(tensor.get_shape())
                self._handles[name] = handle

    def read(self, name: str) -> np.ndarray:
        """One tensor, as it is stored."""
        return self._handles[name].get_tensor(name)


class GGUFWeights:
    """The tensors of a GGUF file, with the rows of q and k in the order of Hugging Face."""

    def __init__(self, file: GGUFFile, config: ModelConfig):
        self._file = file
        self._heads_of = {}
        if config.family == "llama":
            self._heads_of = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
        self.shapes = {
            name: info.shape for name, info in file.tensors.items() if name != ROPE_FACTORS
        }

    def read(self, name: str) -> np.ndarray:
        """One tensor in f32, rows of q and k in Hugging Face's order."""
        weight = self._file.tensor(name)
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


def _check_shapes(
    source: WeightSource,
    names: tuple[WeightName, ...],
    name_of: Callable[[WeightName], str],
    expected: Params,
    where: str,
) -> None:
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


def _load_params(
    source: WeightSource,
    name_of: Callable[[WeightName], str],
    config: ModelConfig,
    where: str,
    weight_format: str,
    mesh: jax.sharding.Mesh | None,
) -> Params:
    """Reads, converts and places one tensor after another, so that only one is held twice."""
    names = weight_names(config)
    _check_shapes(source, names, name_of, abstract_params(config), where)
    placement = None if mesh is None else params_sharding(config, logical_axes(config), mesh)
    params: Params = {}
    dtype = compute_dtype(weight_format, platform_of(mesh))
    for name in names:
        array = np.asarray(source.read(name_of(name)))
        sharding = None if placement is None else get_weight(placement, name)
        set_weight(params, name, load_weight(array, weight_format, dtype, sharding))
    return params


def _safetensors_paths(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not (weight_map and isinstance(weight_map, dict)):
            raise UserError(f"{index} lacks weight_map, which names the files; fetch it again")
        names = sorted(set(weight_map.values()))
        paths = [directory / name for name in names]
        if absent := [path.name for path in paths if not path.exists()]:
            raise UserError(
                f"{directory} lacks {', '.join(absent)}, named in {index.name}; fetch the complete model"
            )
        return paths
    single = directory / "model.safetensors"
    if single.exists():
        return [single]
    convert = (
        "convert them once where torch is installed, with AutoModelForCausalLM.from_pretrained(MODEL)"
        ".save_pretrained(NEW), copy the tokenizer's files to NEW, and give NEW"
    )
    if found := sorted(path.name for path in directory.glob("pytorch_model*.bin*")):
        raise UserError(f"{directory} holds only PyTorch .bin weights ({found[0]}); {convert}")
    raise UserError(
        f"{directory} holds no model.safetensors; give a Hugging Face directory with it. If the model has "
        f".bin weights only, {convert}"
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
        raise UserError(f"{directory} has no config.json; {remedy}")
    return directory / "config.json"


def _describe_directory(directory: Path) -> tuple[ModelConfig, Tokenizer | None]:
    config = config_from_hf(read_json(_config_file(directory)))
    config = dataclasses.replace(config, eos_token_ids=saved_eos_token_ids(directory))
    has_tokenizer = any((directory / name).exists() for name in TOKENIZER_FILES)
    return config, Tokenizer.from_directory(directory) if has_tokenizer else None


def _load_directory(directory: Path, weight_format: str, mesh: jax.sharding.Mesh | None) -> Model:
    config, tokenizer = _describe_directory(directory)
    source = SafetensorsFiles(_safetensors_paths(directory))
    _drop_redundant(source, config, str(directory))
    params = _load_params(source, lambda name: name.hf, config, str(directory), weight_format, mesh)
    return Model(config, params, tokenizer, str(directory))


def _load_gguf(path: Path, weight_format: str, mesh: jax.sharding.Mesh | None) -> Model:
    file = GGUFFile(path)
    config = config_from_gguf(file)
    source = GGUFWeights(file, config)
    params = _load_params(source, lambda name: name.gguf, config, str(path), weight_format, mesh)
    return Model(config, params, Tokenizer.from_gguf(file), str(path))


def load_model(
    path: str | Path, *, weight_format: str = "f32", mesh: jax.sharding.Mesh | None = None
) -> Model:
    """Reads a Llama or Qwen2 model.

    Args:
        path: a directory with config.json and safetensors, a hub id such as `org/name`, or a `.gguf` file.
        weight_format: "f32", "bf16" or "int8"; each tensor is converted as it is read, so memory stays near the final size.
        mesh: places every tensor by `s2d_jax.sharding`; None leaves them on the default device.

    Raises:
        UserError: if the path holds no supported, complete model, or the format is unknown.
    """
    check_weight_format(weight_format)
    return _load(locate(path), str(path), weight_format, mesh)


def _load(local: Path, source: str, weight_format: str, mesh: jax.sharding.Mesh | None) -> Model:
    model = (_load_directory if local.is_dir() else _load_gguf)(local, weight_format, mesh)
    tokenizer, config = model.tokenizer, model.config
    if tokenizer is not None:
        eos = merged_ids(config.eos_token_ids, tokenizer.stop_token_ids)
        config = dataclasses.replace(config, eos_token_ids=eos)
    return dataclasses.replace(model, config=config, source=source)


def load_draft(
    path: str | Path, *, weight_format: str = "f32", mesh: jax.sharding.Mesh | None = None
) -> Draft:
    """Reads an exported sorted draft; any other model becomes a draft whose only exit is its last layer.

    Args:
        path, weight_format, mesh: as for `load_model`.

    Raises:
        UserError: as `load_model`, and if an exit is deeper than the draft, or its vocabulary is of another tokenizer.
    """
    check_weight_format(weight_format)
    local = locate(path)
    model = _load(local, str(path), weight_format, mesh)
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    file = local / SORTED_DRAFT
    if not file.exists():
        return Draft(**fields, draft_config=DraftConfig((model.config.num_layers,)))
    draft_config, vocabulary = _read_sorted_draft(file)
    draft_config.check_depth(model.config.num_layers)
    return with_trimmed_head(Draft(**fields, draft_config=draft_config), vocabulary)


def with_trimmed_head(draft: Draft, vocabulary: DraftVocabulary | None) -> Draft:
    """The draft with its head read over the listed tokens only, at every exit; None reads it over all.

    The rows are gathered once and kept beside the whole tables, so an export is whole.

    Raises:
        UserError: for ids that the draft lacks, or a list made for another tokenizer.
    """
    if vocabulary is not None:
        vocabulary.check(draft.config.vocab_size, draft.tokenizer)
    params = trimmed_params(draft.config, draft.params, vocabulary)
    return dataclasses.replace(draft, params=params, vocabulary=vocabulary)


def read_description(path: str | Path) -> tuple[ModelConfig, Tokenizer | None]:
    """A model's shape and tokenizer, without its weights.

    Raises:
        UserError: if the path holds no supported model.
    """
    local = locate(path)
    if not local.is_dir():
        file = GGUFFile(local)
        return config_from_gguf(file), Tokenizer.from_gguf(file)
    return _describe_directory(local)


def _read_sorted_draft(file: Path) -> tuple[DraftConfig, DraftVocabulary | None]:
    raw = read_json(file)
    if raw.get("format") != SORTED_DRAFT_FORMAT:
        raise UserError(
            f"{file}: format {raw.get('format')!r} is unknown, {SORTED_DRAFT_FORMAT} is expected; export the draft again"
        )
    if "exit_layers" not in raw:
        raise UserError(f"{file} lacks exit_layers; export the draft again")
    exits, thresholds = raw["exit_layers"], raw.get("exit_thresholds", [])
    for name, values, kind in (
        ("exit_layers", exits, int),
        ("exit_thresholds", thresholds, int | float),
    ):
        if not (isinstance(values, list) and all(isinstance(value, kind) for value in values)):
            raise UserError(
                f"{file}: {name}={values!r} must be a list of numbers, such as [6, 9, 12] exits; export the draft again"
            )
    subset = raw.get("vocabulary_subset")
    vocabulary = None if subset is None else DraftVocabulary.from_json(subset, file)
    return DraftConfig(tuple(exits), tuple(thresholds)), vocabulary
