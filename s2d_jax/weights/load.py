"""Loads a Hugging Face directory, a hub id, a GGUF file or an exported draft as a `Model`, one tensor at a time."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from s2d_jax.backends import platform_of
from s2d_jax.config.draft import NO_PARTS, DraftConfig, ExitParts
from s2d_jax.config.model import ModelConfig
from s2d_jax.errors import UserError
from s2d_jax.formats.hub import EXIT_PARTS, SORTED_DRAFT, locate
from s2d_jax.formats.names import WeightName, get_weight, part_names, set_weight
from s2d_jax.formats.safetensors import SafetensorsFiles
from s2d_jax.model.lora import merged_kernel
from s2d_jax.model.params import Params, abstract_params, logical_axes
from s2d_jax.model.products.weight_formats import (
    check_weight_format,
    chosen_format,
    compute_dtype,
)
from s2d_jax.progress.activity import activity
from s2d_jax.sharding import check_mesh, params_sharding
from s2d_jax.text.tokenizer import Tokenizer
from s2d_jax.weights.model import Draft, Model, with_trimmed_head
from s2d_jax.weights.peft import read_peft
from s2d_jax.weights.prepare import format_kept, load_weight
from s2d_jax.weights.sorted_draft import Base, base_fingerprint, read_sorted_draft
from s2d_jax.weights.stored import (
    StoredModel,
    check_shapes,
    describe_model,
    open_model,
    tokenizer_in,
)


def load_model(
    path: str | Path,
    *,
    weight_format: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    chat_template: str | None = None,
) -> Model:
    """Reads a Llama or Qwen2 model.

    Args:
        path: a directory with config.json and safetensors, a hub id such as `org/name`, or a `.gguf` file.
        weight_format: "f32", "bf16" or "int8"; each tensor is converted as it is read, so memory stays near the final size.
            None keeps the dtype that the model is stored in on GPUs and TPUs (bf16 for f16 and for quantised GGUF), and is
            f32 on a CPU; `chosen_format` has the rule.
        mesh: places every tensor by `s2d_jax.sharding`; None leaves them on the default device.
        chat_template: the name of one of the model's chat templates, `vicuna`, or a file that holds one; None is its default.

    Raises:
        UserError: if the path holds no supported, complete model, the format is unknown, or there is no such chat template.
    """
    _check(weight_format, mesh)
    return _load(locate(path), str(path), weight_format, mesh, chat_template)


def _load(
    local: Path,
    source: str,
    weight_format: str | None,
    mesh: jax.sharding.Mesh | None,
    chat_template: str | None = None,
) -> Model:
    with activity(f"opening {Path(source).name}"):
        stored = open_model(local)
    tokenizer = stored.tokenizer
    if chat_template is not None:
        if tokenizer is None:
            raise UserError(
                f"{source} has no tokenizer, so chat_template={chat_template!r} serves nothing; leave it out"
            )
        tokenizer = tokenizer.with_chat_template(chat_template)
    kept = chosen_format(weight_format, stored.weight_format, platform_of(mesh))
    with _loading(stored, source, kept) as told:
        params = _read_params(stored.config, stored.tensors(), kept, mesh, told=told)
    return Model(stored.config, params, tokenizer, source, notices=stored.notices)


def load_draft(
    path: str | Path, *, weight_format: str | None = None, mesh: jax.sharding.Mesh | None = None
) -> Draft:
    """Reads an exported sorted draft, whole or on a base; any other model becomes a draft whose only exit is its last layer.

    Args:
        path, weight_format, mesh: as for `load_model`. Low-rank adapters are folded into their kernels before these are
            converted. Without a format, the model that a draft is a part of decides, or its own trunk.

    Raises:
        UserError: as `load_model`, and if an exit is deeper than the draft, its vocabulary was made for another tokenizer, or
            its base is missing or is another model.
    """
    _check(weight_format, mesh)
    local, source = locate(path), str(path)
    file = local / SORTED_DRAFT
    if not file.exists():
        model = _load(local, source, weight_format, mesh)
        return _draft(model, DraftConfig((model.config.num_layers,)))
    described = read_sorted_draft(file)
    if described.base is None:
        model = _load(local, source, weight_format, mesh)
    else:
        model = _load_on_base(local, source, described.base, weight_format, mesh)
    described.draft_config.check_depth(model.config.num_layers)
    parts = described.draft_config.parts
    if parts.exits:
        tensors = _tensors_of_parts(local / EXIT_PARTS, model.config, parts)
        added = _read_params(model.config, tensors, format_kept(model), mesh, parts)
        model = dataclasses.replace(model, params=model.params | added)
    draft = _draft(model, described.draft_config)
    return with_trimmed_head(draft, described.vocabulary)


def _check(weight_format: str | None, mesh: Any) -> None:
    if weight_format is not None:
        check_weight_format(weight_format)
    check_mesh(mesh)


def _draft(model: Model, draft_config: DraftConfig) -> Draft:
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    return Draft(**fields, draft_config=draft_config)


def _read_params(
    config: ModelConfig,
    tensors: Iterable[tuple[WeightName, np.ndarray]],
    weight_format: str,
    mesh: jax.sharding.Mesh | None,
    parts: ExitParts = NO_PARTS,
    told: Callable[[np.ndarray], None] = lambda array: None,
) -> Params:
    """Converts and places one tensor after another, so that only one is held twice; `told` is called with each."""
    placement = None if mesh is None else params_sharding(config, logical_axes(config, parts), mesh)
    params: Params = {}
    dtype = compute_dtype(weight_format, platform_of(mesh))
    for name, array in tensors:
        sharding = None if placement is None else get_weight(placement, name)
        set_weight(params, name, load_weight(array, weight_format, dtype, sharding))
        told(array)
    return params


@contextlib.contextmanager
def _loading(
    stored: StoredModel, source: str, weight_format: str, layers: Sequence[int] | None = None
) -> Iterator[Callable[[np.ndarray], None]]:
    """Shows how far loading is, in bytes of the files. Yields a function that must be called with each tensor that was read."""
    weights = stored.num_weights(layers)
    bytes_per_weight = stored.source.num_bytes / stored.num_weights()
    kind = Path(source).suffix if source.endswith(".gguf") else "safetensors"
    with activity(
        f"loading {Path(source).name}",
        total=weights * bytes_per_weight,
        unit="B",
        key=f"load/{kind.lstrip('.')}/{weight_format}",
    ) as loading:
        yield lambda array: loading.advance(array.size * bytes_per_weight)


def _tensors_of_parts(file: Path, config: ModelConfig, parts: ExitParts):
    """The tensors of own heads and adapters, as `_read_params` takes them."""
    if not file.exists():
        raise UserError(f"{file} does not exist, but {SORTED_DRAFT} names exit parts; export again")
    source, names = SafetensorsFiles([file]), part_names(parts)
    expected = abstract_params(config, parts=parts)
    check_shapes(source, names, lambda name: name.hf, expected, str(file))
    return ((name, source.read(name.hf)) for name in names)


def _load_on_base(
    local: Path, source: str, base: Base, weight_format: str | None, mesh: jax.sharding.Mesh | None
) -> Model:
    """The trunk of a draft that was exported without it."""
    try:
        stored = open_model(locate(base.path))
    except UserError as error:
        raise UserError(
            f"the base of {local} cannot be read: {error} (or correct base.path in its {SORTED_DRAFT})"
        ) from error
    layers = base.checked_layers(stored.config.num_layers)
    config = dataclasses.replace(stored.config, num_layers=len(layers))
    factors = read_peft(local, config) if base.lora else {}
    seen = base_fingerprint(config)

    def tensors():
        for name, array in stored.tensors(layers):
            seen.add(".".join(name.ours), array)
            if name.ours in factors:
                array = np.asarray(merged_kernel(array.astype(np.float32), *factors[name.ours]))
            yield name, array

    kept = chosen_format(weight_format, stored.weight_format, platform_of(mesh))
    with _loading(stored, base.path, kept, layers) as told:
        params = _read_params(config, tensors(), kept, mesh, told=told)
    if not seen.matches(base.fingerprint):
        raise UserError(
            f"{base.path} is not the model that {local} was trained on (fingerprint {seen}, {base.fingerprint} is expected); "
            f"correct base.path in its {SORTED_DRAFT}"
        )
    tokenizer = tokenizer_in(local) or stored.tokenizer
    return Model(config, params, tokenizer, source, notices=stored.notices)


def read_description(path: str | Path) -> tuple[ModelConfig, Tokenizer | None]:
    """A model's or draft's shape and tokenizer, without its weights.

    Raises:
        UserError: if the path holds no supported model.
    """
    local = locate(path)
    file = local / SORTED_DRAFT
    base = read_sorted_draft(file).base if file.exists() else None
    if base is None:
        return describe_model(local)
    config, tokenizer = describe_model(locate(base.path))
    layers = base.checked_layers(config.num_layers)
    return dataclasses.replace(config, num_layers=len(layers)), tokenizer_in(local) or tokenizer
