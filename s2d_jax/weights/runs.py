"""Training runs on disk: what the draft is, and Orbax checkpoints that restore onto any mesh.

```
run_dir/
  config.yaml  metrics.jsonl                 written by `train`
  model_config.json  draft_config.json       the draft's shape; its exits, their parts, adapters on its trunk
  tokenizer files
  checkpoints/00000200/{params, opt_state}
```
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp

from s2d_jax.config.draft import DraftConfig
from s2d_jax.config.model import MOST_SIZE, ModelConfig, RopeScaling
from s2d_jax.errors import UserError, told_of
from s2d_jax.fields import Fields
from s2d_jax.files import read_json, write_text
from s2d_jax.model.lora import LoraConfig, with_lora
from s2d_jax.model.params import abstract_params, logical_axes
from s2d_jax.sharding import params_sharding
from s2d_jax.text.tokenizer import Tokenizer
from s2d_jax.weights.checkpoints import Checkpoints, placed
from s2d_jax.weights.model import Draft, with_trimmed_head
from s2d_jax.weights.sorted_draft import parts_from_json
from s2d_jax.weights.vocabulary import DraftVocabulary

CHECKPOINTS = "checkpoints"
_MODEL_CONFIG = "model_config.json"
_DRAFT_CONFIG = "draft_config.json"

T = TypeVar("T")


def write_run(
    run_dir: Path,
    config: ModelConfig,
    draft_config: DraftConfig,
    tokenizer: Tokenizer,
    lora: LoraConfig | None = None,
    vocabulary: DraftVocabulary | None = None,
) -> None:
    """Writes what makes up a draft except its weights: shape, exits and their parts, adapters, list of tokens, tokenizer."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tokenizer.partial-", dir=run_dir) as partial:
        tokenizer.save(partial)
        for file in Path(partial).iterdir():
            os.replace(file, run_dir / file.name)
    described = {"lora": None if lora is None else dataclasses.asdict(lora)}
    described["vocabulary_subset"] = None if vocabulary is None else vocabulary.to_json()
    described |= dataclasses.asdict(draft_config)
    for name, value in ((_MODEL_CONFIG, dataclasses.asdict(config)), (_DRAFT_CONFIG, described)):
        write_text(run_dir / name, json.dumps(value, indent=2) + "\n")


def read_run(run_dir: Path) -> tuple[ModelConfig, DraftConfig]:
    """The draft's shape and exits, as `write_run` left them.

    Raises:
        UserError: if `run_dir` is not the directory of a training run, or its description was changed.
    """
    model, draft = (_read(run_dir, name) for name in (_MODEL_CONFIG, _DRAFT_CONFIG))
    config = _built(ModelConfig, model)
    exits, thresholds = draft.integers("exit_layers"), draft.numbers("exit_thresholds")
    parts = parts_from_json(draft, "parts")
    with told_of(draft.where):
        draft_config = DraftConfig(exits, thresholds, parts)
        draft_config.check_depth(config.num_layers)
    return config, draft_config


def _built(kind: type[T], fields: Fields) -> T:
    """A configuration from the fields that `dataclasses.asdict` made, all of which must be there."""
    names = [field.name for field in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]
    fields.only(names)
    if missing := [name for name in names if name not in fields.raw]:
        raise UserError(f"{fields.where} lacks {missing[0]}; {fields.remedy}")
    values = dict(fields.raw)
    scaling = fields.fields("rope_scaling", None) if "rope_scaling" in values else None
    if scaling is not None:
        values["rope_scaling"] = _built(RopeScaling, scaling)
    with told_of(fields.where):
        return kind(**values)


def read_lora(run_dir: Path) -> LoraConfig | None:
    """The adapters on the trunk of a run's draft, as `write_run` left them; None if it has none.

    Raises:
        UserError: if `run_dir` is not the directory of a training run, or its description was changed.
    """
    lora = _read(run_dir, _DRAFT_CONFIG).fields("lora", None)
    if lora is None:
        return None
    rank, targets = lora.integer("rank", 1, MOST_SIZE), lora.texts("targets")
    with told_of(lora.where):
        return LoraConfig(rank, targets)


def read_run_vocabulary(run_dir: Path) -> DraftVocabulary | None:
    """The list of tokens that the heads of a run's draft are read over, as `write_run` left it; None for all.

    Raises:
        UserError: if `run_dir` is not the directory of a training run, or its description was changed.
    """
    raw = _read(run_dir, _DRAFT_CONFIG).raw.get("vocabulary_subset")
    return None if raw is None else DraftVocabulary.from_json(raw, run_dir / _DRAFT_CONFIG)


def _read(run_dir: Path, name: str) -> Fields:
    file = run_dir / name
    if not file.exists():
        raise UserError(f"{run_dir} holds no readable {name}; give the directory of a training run")
    remedy = "put back the file that training wrote"
    return Fields(read_json(file, remedy), file, remedy)


def load_run(
    run_dir: str | Path,
    step: int | Literal["best"] | None = None,
    *,
    dtype: Any = jnp.float32,
    mesh=None,
) -> Draft:
    """The draft of a training run; adapters on its trunk lie beside their kernels.

    Args:
        run_dir: written by `python -m train.main`.
        step: which checkpoint; None takes the newest, "best" the one of the highest mean acceptance length on held-out rows.
        dtype: of the parameters.
        mesh: places them by `s2d_jax.sharding`; None puts them on the default device.

    Raises:
        UserError: if there is no such run or checkpoint, or the checkpoint is damaged.
    """
    run_dir = Path(run_dir)
    config, draft_config = read_run(run_dir)
    checkpoints = Checkpoints(run_dir / CHECKPOINTS)
    with contextlib.closing(checkpoints):
        step = checkpoints.find(step)
        checkpoints.check_depth(step, config.num_layers)
        lora, parts = read_lora(run_dir), draft_config.parts
        abstract = with_lora(abstract_params(config, dtype, parts), lora)
        if mesh is None:
            one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            shardings = jax.tree.map(lambda _: one_device, abstract)
        else:
            axes = with_lora(logical_axes(config, parts), lora)
            shardings = params_sharding(config, axes, mesh)
        params = checkpoints.restore(step, params=placed(abstract, shardings))["params"]
    tokenizer = Tokenizer.from_directory(run_dir)
    draft = Draft(config, params, tokenizer, f"{run_dir} step {step}", draft_config)
    return with_trimmed_head(draft, read_run_vocabulary(run_dir))
