"""A training run from its configuration to its last checkpoint."""

from __future__ import annotations

import contextlib
import json
import operator
import shutil
from pathlib import Path

import datasets
import numpy as np

from s2d_jax.cli.outputs import check_directory
from s2d_jax.cli.screen import PlainConsole
from s2d_jax.errors import UserError
from s2d_jax.files import expanded, write_text
from s2d_jax.machine import device_notice
from s2d_jax.model.lora import lora_of
from s2d_jax.processes import is_main_process, wait_for_all
from s2d_jax.sharding import make_mesh
from s2d_jax.text.pairing import check_same_tokenizer
from s2d_jax.text.tokenizer import Tokenizer
from s2d_jax.weights.checkpoints import Checkpoints, placed
from s2d_jax.weights.load import read_description
from s2d_jax.weights.runs import CHECKPOINTS, read_run, read_run_vocabulary, write_run
from s2d_jax.weights.vocabulary import DraftVocabulary
from train.config.files import load_config
from train.config.sections import Config
from train.data.batches import split_rows, weighted_rows
from train.data.rows import build_rows, check_rows, load_rows, save_rows
from train.run.initial_draft import load_start
from train.run.loop import Run
from train.run.metrics import METRICS, TENSORBOARD, MetricsFile
from train.run.teachers import prepare_teachers, resume_teachers
from train.run.terminal import ProgressReport
from train.step.trainer import Trainer, TrainState

_CONFIG = "config.yaml"
_ROWS = "rows"
# Fields that a resumed run must keep.
_KEPT = (
    "model.path", "model.num_layers", "model.layers", "model.lora_rank", "draft.exit_layers", "draft.parts",
    "draft.vocabulary", "objective.teachers", "objective.teacher_top_k", "watch.target", "train.learn", "data.paths",
    "data.weights", "data.chat_template", "data.max_length", "data.held_out_fraction", "train.seed", "train.batch_size",
)  # fmt: skip


def train(config: Config) -> Path:
    """Trains a sorted draft.

    Returns:
        The run's directory.

    Raises:
        UserError: for anything that the user can repair; the last good checkpoint stays intact.
    """
    run_dir = expanded(config.train.run_dir)
    _check_run_dir(run_dir, config)
    wait_for_all("run directory checked")
    console = None if is_main_process() else PlainConsole(quiet=True)
    with ProgressReport(console) as report, contextlib.ExitStack() as stack:
        undo = stack.enter_context(contextlib.ExitStack())
        if is_main_process():
            _remove_partial(run_dir)
            undo.callback(_remove_all_but, _entries(run_dir), run_dir)
        start = _resume if config.train.resume else _begin
        for line in device_notice():
            report.say(line)
        run = start(config, run_dir, report)
        stack.callback(run.checkpoints.close)
        stack.callback(run.metrics.close)
        if is_main_process():
            write_text(run_dir / _CONFIG, config.to_yaml())
        wait_for_all("config written")
        undo.pop_all()  # from here on the run can be resumed, or started again
        run.loop()
    return run_dir


def _remove_partial(run_dir: Path) -> None:
    """Removes half-written files of a killed process."""
    for path in run_dir.glob(".*partial*"):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _entries(run_dir: Path) -> set[Path] | None:
    return set(run_dir.iterdir()) if run_dir.is_dir() else None


def _remove_all_but(before: set[Path] | None, run_dir: Path) -> None:
    """Undoes a start that failed, for example on a full disk."""
    for path in [run_dir] if before is None else set(run_dir.iterdir()) - before:
        _remove(path)


def _check_run_dir(run_dir: Path, config: Config) -> None:
    """Refuses to train over an earlier run by accident; one that never reached a checkpoint may be started again.

    A directory that cannot be written is refused, too, before anything is loaded.
    """
    if is_main_process():
        check_directory(run_dir, "train.run_dir")
    with contextlib.closing(Checkpoints(run_dir / CHECKPOINTS)) as checkpoints:
        if config.train.resume:
            checkpoints.find(None)
        elif checkpoints.steps:
            raise UserError(
                f"train.run_dir={run_dir} holds checkpoints {checkpoints.steps}; "
                "add --train.resume, or choose another directory"
            )


def _check_resume(run_dir: Path, config: Config) -> None:
    """Refuses changes to fields that decide which rows a step sees, or what the checkpoint holds."""
    before = load_config(run_dir / _CONFIG)
    for field in _KEPT:
        old, new = (operator.attrgetter(field)(each) for each in (before, config))
        if old != new:
            raise UserError(
                f"{field}={new!r} differs from {old!r} in {run_dir / _CONFIG}; "
                "a resumed run keeps it, so set it back or start another run"
            )


def _check_tokenizer(config: Config, run_dir: Path, tokenizer: Tokenizer) -> None:
    """Refuses to go on with rows that an earlier version made with other ids, where the model is still there to compare.

    A run resumes without the model that it started from, and then nothing can be compared.
    """
    path = config.model.path
    if not expanded(path).exists():
        return
    _, own = read_description(path)
    if own is None:
        return
    try:
        check_same_tokenizer(own, tokenizer)
    except UserError as error:
        raise UserError(
            f"the rows of {run_dir} were made with another tokenizer than {path} has, as earlier versions read it; start "
            f"another run ({error})"
        ) from None


def _begin(config: Config, run_dir: Path, report: ProgressReport) -> Run:
    """Begins a new run; nothing is written before model and data are known to be good."""
    mesh = make_mesh(config.mesh)
    start = load_start(config, mesh)
    wait_for_all("draft loaded")
    for notice in start.notices:
        report.say(f"note: {notice}")
    if is_main_process():
        rows, summary = build_rows(
            config.data,
            start.tokenizer,
            vocab_size=start.config.vocab_size,
            on_progress=report.working,
        )
        report.say(summary.table(report.width))
        _split(config, rows)
        description = (start.config, config.draft.draft_config(), start.tokenizer)
        write_run(run_dir, *description, lora_of(start.params), start.vocabulary)
        save_rows(rows, run_dir / _ROWS)
        write_text(run_dir / "data.json", json.dumps(summary.to_json(), indent=2) + "\n")
    wait_for_all("rows written")
    rows = load_rows(run_dir / _ROWS)
    training, held_out = _split(config, rows)
    teachers = prepare_teachers(config, run_dir, start.tokenizer, mesh, rows, held_out, report)
    trainer = Trainer(config, start.config, mesh, teachers.shapes, _listed(start.vocabulary))
    return Run(
        trainer=trainer,
        run_dir=run_dir,
        rows=rows,
        training=training,
        held_out=held_out,
        teachers=teachers,
        checkpoints=Checkpoints(run_dir / CHECKPOINTS, config.train.keep_checkpoints),
        report=report,
        metrics=_metrics(config, run_dir, last_step=-1),
        state=trainer.init_state(start.params),
    )


def _metrics(config: Config, run_dir: Path, *, last_step: int) -> MetricsFile:
    board = run_dir / TENSORBOARD if config.watch.tensorboard else None
    file = run_dir / METRICS
    return MetricsFile(file, last_step=last_step, active=is_main_process(), tensorboard=board)


def _listed(vocabulary: DraftVocabulary | None) -> np.ndarray | None:
    return None if vocabulary is None else vocabulary.ids_U


def _resume(config: Config, run_dir: Path, report: ProgressReport) -> Run:
    """Continues the run of `run_dir` from its newest checkpoint, on any mesh."""
    _check_resume(run_dir, config)
    model_config, _ = read_run(run_dir)
    checkpoints = Checkpoints(run_dir / CHECKPOINTS, config.train.keep_checkpoints)
    step = checkpoints.find(None)
    checkpoints.check_depth(step, model_config.num_layers)
    rows = load_rows(run_dir / _ROWS)
    training, held_out = _split(config, rows)
    mesh = make_mesh(config.mesh)
    tokenizer = Tokenizer.from_directory(run_dir)
    _check_tokenizer(config, run_dir, tokenizer)
    check_rows(rows, model_config.vocab_size, tokenizer, str(run_dir))
    teachers = resume_teachers(config, run_dir, tokenizer, mesh, rows)
    vocabulary = read_run_vocabulary(run_dir)
    trainer = Trainer(config, model_config, mesh, teachers.shapes, _listed(vocabulary))
    metadata = checkpoints.metadata(step)
    if "elapsed_seconds" not in metadata:
        raise checkpoints.damaged(step, "_CHECKPOINT_METADATA is not readable")
    abstract, sharding = trainer.abstract_state(), trainer.state_sharding
    restored = checkpoints.restore(
        step,
        params=placed(abstract.params, sharding.params),
        opt_state=placed(abstract.opt_state, sharding.opt_state),
    )
    report.say(f"resuming {run_dir} after step {step}")
    return Run(
        trainer=trainer,
        run_dir=run_dir,
        rows=rows,
        training=training,
        held_out=held_out,
        teachers=teachers,
        checkpoints=checkpoints,
        report=report,
        metrics=_metrics(config, run_dir, last_step=step),
        state=TrainState(restored["params"], restored["opt_state"]),
        step=step,
        elapsed=metadata["elapsed_seconds"],
    )


def _split(config: Config, rows: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
    section, seed = config.data, config.train.seed
    training, held_out = split_rows(len(rows), section.held_out_fraction, seed)
    sources = np.asarray(rows.with_format("numpy")["source"][:])
    training = weighted_rows(training, sources, section.source_weights, seed)
    if len(training) < config.train.batch_size:
        raise UserError(
            f"train.batch_size={config.train.batch_size} exceeds the {len(training)} rows to train on; "
            "lower it, or data.max_length, or add data"
        )
    return training, held_out
