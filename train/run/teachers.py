"""Targets in training: teachers that run in every step, stored probabilities, and what targets would write on held-out rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from s2d_jax.config.model import ModelConfig
from s2d_jax.errors import UserError
from s2d_jax.files import written_whole
from s2d_jax.model.params import Params, logical_axes
from s2d_jax.processes import is_main_process, wait_for_all
from s2d_jax.progress.compiling import compiling
from s2d_jax.sharding import batch_sharding, params_sharding, replicated
from s2d_jax.text.pairing import check_same_tokenizer
from s2d_jax.text.tokenizer import Tokenizer
from s2d_jax.weights.load import load_model
from s2d_jax.weights.model import Model
from train.config.sections import Config
from train.data.batch import Batch, TopK
from train.data.batches import batches_of, make_batch
from train.data.rows import check_rows
from train.objective.exit_reader import Reading
from train.objective.labels import Labels, TokenFunction
from train.objective.sorted_loss import values_of_positions
from train.run.terminal import ProgressReport

_EXPECTED = "held_out_tokens.npy"
_STORED = "teacher_{}"
_FORMATS = {"float32": "f32", "bfloat16": "bf16"}


def load_teacher(
    path: str, config: Config, tokenizer: Tokenizer, mesh: Mesh, rows: datasets.Dataset
) -> Model:
    """A target of the draft's vocabulary, placed on the mesh in `objective.teacher_dtype`.

    Raises:
        UserError: if it cannot be loaded, has another tokenizer, a shorter context than the rows, or no embedding for one of
            their tokens.
    """
    model = load_model(path, weight_format=_FORMATS[config.objective.teacher_dtype], mesh=mesh)
    if model.tokenizer is not None:
        check_same_tokenizer(model.tokenizer, tokenizer)
    check_rows(rows, model.config.vocab_size, tokenizer, path)
    if config.data.max_length > model.config.max_context:
        raise UserError(
            f"data.max_length={config.data.max_length} exceeds the context of {model.config.max_context} of {path}; lower it"
        )
    return model


def _compiled(
    model: Model, config: Config, mesh: Mesh, batch: Batch, values_of: Callable[..., TokenFunction]
):
    """`(params, batch) -> values [1, B, T, ...]` of the model's last layer at the positions that count."""
    reading = Reading.of(model.config, jnp.dtype(config.objective.teacher_dtype))

    def read(params, batch: Batch):
        return values_of_positions(
            values_of(reading),
            reading.head_params(params),
            reading.exit_hiddens(params, batch),
            Labels(batch.targets_BT, batch.weights_BT),
            chunk=config.train.loss_chunk,
        )

    placement = params_sharding(model.config, logical_axes(model.config), mesh)
    step = jax.jit(
        read, in_shardings=(placement, batch_sharding(mesh)), out_shardings=replicated(mesh)
    )
    inputs = model.params, batch
    with compiling("evaluate", "compiling a pass of the target", inputs), jax.set_mesh(mesh):
        return step.lower(*inputs).compile()  # `over_rows` needs the mesh


def best_tokens(
    model: Model,
    config: Config,
    mesh: Mesh,
    batches: Iterator[tuple[np.ndarray, Batch]],
    shape: tuple[int, int],
) -> np.ndarray:
    """What a target would write after each counted position: its argmax, int32 `[rows, T]`.

    Args:
        batches: pairs of a batch and, before it, the places of its rows in the result (negative: not a row).
        shape: the shape of the result.
    """
    found = np.zeros(shape, np.int32)
    step = None
    for places, batch in batches:
        step = step or _compiled(model, config, mesh, batch, lambda reading: reading.watched)
        best_BT = jax.device_get(step(model.params, batch)["best"][0])
        found[places[places >= 0]] = best_BT[places >= 0]
    return found


def store_top_k(
    directory: Path,
    model: Model,
    config: Config,
    mesh: Mesh,
    batches: Iterator[tuple[np.ndarray, Batch]],
    num_rows: int,
) -> None:
    """Writes the k most probable tokens of a teacher at every counted position, and their log-probabilities in f16.

    f16 rounds a log-probability of -8 by 0.004, which is less than the rounding of bfloat16 teachers.
    """
    k, T = config.objective.teacher_top_k, config.data.max_length
    ids = log_probs = None
    if is_main_process():
        directory.mkdir(parents=True, exist_ok=True)
        ids, log_probs = (
            np.lib.format.open_memmap(
                directory / name, mode="w+", dtype=dtype, shape=(num_rows, T, k)
            )
            for name, dtype in (("ids.npy", np.int32), ("log_probs.npy", np.float16))
        )
    step = None
    for places, batch in batches:
        step = step or _compiled(model, config, mesh, batch, lambda reading: _top_k(reading, k))
        values = jax.device_get(step(model.params, batch))
        if ids is not None and log_probs is not None:
            here = places >= 0
            ids[places[here]] = values["ids"][0][here]
            log_probs[places[here]] = values["log_probs"][0][here].astype(np.float16)


def _top_k(reading: Reading, k: int) -> TokenFunction:
    def values(learned, fixed, h_EBWD, labels) -> dict[str, Any]:
        (layer,) = reading.exit_layers
        logits_BWV = reading.logits(learned, h_EBWD[0], layer)
        log_probs, ids = jax.lax.top_k(jax.nn.log_softmax(logits_BWV, axis=-1), k)
        return {"ids": ids[None], "log_probs": log_probs[None]}

    return values


class StoredTeacher:
    """What `store_top_k` wrote, read row by row.

    Raises:
        UserError: if it is missing or damaged.
    """

    def __init__(self, directory: Path):
        try:
            self._ids = np.load(directory / "ids.npy", mmap_mode="r")
            self._log_probs = np.load(directory / "log_probs.npy", mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(
                f"{directory} holds no readable teacher ({error}); start another run"
            ) from None

    def batch(self, indices: np.ndarray, sharding: NamedSharding) -> TopK:
        """The rows `indices` on the mesh; each process reads only its own rows."""

        def place(stored, dtype):
            def read(slices):
                chosen = np.maximum(indices[slices[0]], 0)
                return np.asarray(stored[chosen]).astype(dtype)

            shape = (len(indices), *stored.shape[1:])
            return jax.make_array_from_callback(shape, sharding, read)

        return TopK(place(self._ids, np.int32), place(self._log_probs, np.float32))


@dataclasses.dataclass(frozen=True)
class Teachers:
    """What a run uses of its targets.

    Attributes:
        models: the teachers that run in every step.
        stored: the stored probabilities of the teachers that do not.
        expected_tokens: int32, the token that the watched target writes at each position of the held-out rows; None if no
            target is watched.
    """

    models: tuple[Model, ...] = ()
    stored: tuple[StoredTeacher, ...] = ()
    expected_tokens: np.ndarray | None = None

    @property
    def shapes(self) -> tuple[ModelConfig, ...]:
        """Of the running ones."""
        return tuple(model.config for model in self.models)

    @property
    def params(self) -> tuple[Params, ...]:
        """Of the running ones."""
        return tuple(model.params for model in self.models)

    def add_to(self, batch: Batch, indices: np.ndarray, sharding: NamedSharding) -> Batch:
        """The batch of these rows, with the stored probabilities for them."""
        top_k = tuple(stored.batch(indices, sharding) for stored in self.stored)
        return batch.replace(top_k=top_k) if top_k else batch


def prepare_teachers(
    config: Config,
    run_dir: Path,
    tokenizer: Tokenizer,
    mesh: Mesh,
    rows: datasets.Dataset,
    held_out: np.ndarray,
    report: ProgressReport,
) -> Teachers:
    """Loads the targets of a new run, one after the other, and stores what the run will need from them.

    Raises:
        UserError: for a target that cannot be loaded or is of another vocabulary.
    """
    objective, watched = config.objective, _watched(config)
    models, read = [], _reader(config, mesh, rows, report)
    paths = (*objective.teachers, watched) if watched else objective.teachers
    for path in dict.fromkeys(paths):
        model = load_teacher(path, config, tokenizer, mesh, rows)
        for notice in model.notices:
            report.say(f"note: {notice}")
        if path == watched and len(held_out):
            batches = read(f"what {path} writes on held-out rows", held_out)
            shape = (len(held_out), config.data.max_length)
            found = best_tokens(model, config, mesh, batches, shape)
            if is_main_process():
                with written_whole(run_dir / _EXPECTED) as partial, partial.open("wb") as file:
                    np.save(file, found)
        if path in objective.teachers and objective.teacher_top_k:
            directory = run_dir / _STORED.format(objective.teachers.index(path))
            batches = read(f"storing probabilities of {path}", np.arange(len(rows)))
            store_top_k(directory, model, config, mesh, batches, len(rows))
        elif path in objective.teachers:
            models.append(model)
    wait_for_all("teachers prepared")
    return _found(config, run_dir, tuple(models))


def resume_teachers(
    config: Config, run_dir: Path, tokenizer: Tokenizer, mesh: Mesh, rows: datasets.Dataset
) -> Teachers:
    """The targets of a resumed run.

    Raises:
        UserError: as `prepare_teachers`, and if what was stored is damaged.
    """
    objective = config.objective
    running = () if objective.teacher_top_k else objective.teachers
    models = tuple(load_teacher(path, config, tokenizer, mesh, rows) for path in running)
    return _found(config, run_dir, models)


def _found(config: Config, run_dir: Path, models: tuple[Model, ...]) -> Teachers:
    objective, file = config.objective, run_dir / _EXPECTED
    count = len(objective.teachers) if objective.teacher_top_k else 0
    stored = tuple(StoredTeacher(run_dir / _STORED.format(i)) for i in range(count))
    expected_tokens = np.load(file) if _watched(config) and file.exists() else None
    return Teachers(models, stored, expected_tokens)


def _watched(config: Config) -> str | None:
    """The target whose argmax the exits should meet."""
    return config.watch.target or next(iter(config.objective.teachers), None)


def _reader(config: Config, mesh: Mesh, rows: datasets.Dataset, report: ProgressReport):
    """`(what, indices)` -> batches of these rows; the report shows meanwhile how far `what` is."""
    sharding = batch_sharding(mesh)

    def read(what: str, indices: np.ndarray):
        make = lambda chosen: make_batch(rows, chosen, sharding)  # noqa: E731
        report.working(what, 0, len(indices))
        for places, batch in batches_of(indices, config.train.batch_size, make):
            yield places, batch
            report.working(what, int(places.max()) + 1, len(indices))

    return read
