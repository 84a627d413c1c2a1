"""A training run from its configuration to its last checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import datasets
import jax
import jax.numpy as jnp
import numpy as np

from s2d_jax.checkpoint import CHECKPOINTS, Checkpoints, placed, read_run, write_run
from s2d_jax.config import ModelConfig, UserError
from s2d_jax.files import write_text
from s2d_jax.model import truncated
from s2d_jax.pretrained import load_model
from s2d_jax.sharding import make_mesh
from s2d_jax.tokenizer import Tokenizer
from train.config import Config, load_config
from train.data import (
    build_rows,
    load_rows,
    make_batch,
    rows_of_step,
    save_rows,
    split_rows,
    weighted_rows,
)
from train.progress import MetricsFile, ProgressReport, losses
from train.step import Trainer, TrainState

_CONFIG = "config.yaml"
_METRICS = "metrics.jsonl"
_ROWS = "rows"


def train(config: Config) -> Path:
    """Trains a sorted draft.

    Returns:
        The run's directory.

    Raises:
        UserError: for anything that the user can repair; the last good checkpoint is then intact.
    """
    run_dir = Path(config.train.run_dir)
    _check_run_dir(run_dir, config)
    with ProgressReport() as report, contextlib.ExitStack() as stack:
        undo = stack.enter_context(contextlib.ExitStack())
        undo.callback(_remove_all_but, _entries(run_dir), run_dir)
        start = _resume if config.train.resume else _begin
        run = start(config, run_dir, report)
        stack.callback(run.checkpoints.close)
        stack.callback(run.metrics.close)
        write_text(run_dir / _CONFIG, config.to_yaml())
        undo.pop_all()  # from here on the run can be resumed, or started again
        run.loop()
    return run_dir


def _entries(run_dir: Path) -> set[Path] | None:
    return set(run_dir.iterdir()) if run_dir.is_dir() else None


def _remove_all_but(before: set[Path] | None, run_dir: Path) -> None:
    """Undoes a start that failed, for example on a full disk."""
    for path in [run_dir] if before is None else set(run_dir.iterdir()) - before:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _check_run_dir(run_dir: Path, config: Config) -> None:
    """Refuses to train over an earlier run by accident; one that never reached a checkpoint may be started again."""
    with contextlib.closing(Checkpoints(run_dir / CHECKPOINTS)) as checkpoints:
        if config.train.resume:
            checkpoints.find(None)
        elif checkpoints.steps:
            raise UserError(
                f"train.run_dir={run_dir} holds checkpoints {checkpoints.steps}; "
                "add --train.resume True, or choose another directory"
            )


def _check_resume(run_dir: Path, config: Config) -> None:
    """What decides which rows a step sees, or what the checkpoint holds, cannot change when a run goes on."""
    before = load_config(run_dir / _CONFIG)
    for section, name in (
        *(("model", "path"), ("model", "num_layers"), ("draft", "exit_layers")),
        *(("data", "paths"), ("data", "weights"), ("data", "max_length")),
        ("data", "held_out_fraction"),
        *(("train", "seed"), ("train", "batch_size")),
    ):
        old, new = (getattr(getattr(c, section), name) for c in (before, config))
        if old != new:
            raise UserError(
                f"{section}.{name}={new!r} differs from {old!r} in {run_dir / _CONFIG}; "
                "a resumed run keeps it, so set it back or start another run"
            )


def load_draft_start(config: Config, mesh) -> tuple[ModelConfig, Any, Tokenizer]:
    """Shape, f32 weights and tokenizer of the draft before training: the first layers of a model, or all of them.

    Raises:
        UserError: if the exits do not fit the depth, the rows the context, or there is no tokenizer.
    """
    model = load_model(config.model.path, mesh=mesh)
    depth = config.model.num_layers or model.config.num_layers
    config.check_exits(depth)
    model_config, params = truncated(model.config, model.params, depth)
    if config.data.max_length > model_config.max_context:
        raise UserError(
            f"data.max_length={config.data.max_length} exceeds the model's context of "
            f"{model_config.max_context}; lower it"
        )
    if model.tokenizer is None:
        raise UserError(f"{config.model.path} has no tokenizer; add its tokenizer.json")
    return model_config, params, model.tokenizer


def _begin(config: Config, run_dir: Path, report: ProgressReport) -> Run:
    """A new run; nothing is written before model and data are known to be good."""
    mesh = make_mesh(config.mesh)
    model_config, params, tokenizer = load_draft_start(config, mesh)
    rows, summary = build_rows(
        config.data,
        tokenizer,
        vocab_size=model_config.vocab_size,
        on_progress=report.working,
    )
    report.say(str(summary))
    training, held_out = _split(config, rows)
    write_run(run_dir, model_config, config.draft.draft_config(), tokenizer)
    save_rows(rows, run_dir / _ROWS)
    write_text(run_dir / "data.json", json.dumps(summary.to_json(), indent=2) + "\n")
    trainer = Trainer(config, model_config, mesh)
    return Run(
        trainer=trainer,
        rows=rows,
        training=training,
        held_out=held_out,
        checkpoints=Checkpoints(run_dir / CHECKPOINTS, config.train.keep_checkpoints),
        report=report,
        metrics=MetricsFile(run_dir / _METRICS, last_step=-1),
        state=trainer.init_state(params),
    )


def _resume(config: Config, run_dir: Path, report: ProgressReport) -> Run:
    """The run of `run_dir` after its newest checkpoint, on any mesh."""
    _check_resume(run_dir, config)
    model_config, _ = read_run(run_dir)
    rows = load_rows(run_dir / _ROWS)
    training, held_out = _split(config, rows)
    trainer = Trainer(config, model_config, make_mesh(config.mesh))
    checkpoints = Checkpoints(run_dir / CHECKPOINTS, config.train.keep_checkpoints)
    step = checkpoints.find(None)
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
        rows=rows,
        training=training,
        held_out=held_out,
        checkpoints=checkpoints,
        report=report,
        metrics=MetricsFile(run_dir / _METRICS, last_step=step),
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


@dataclasses.dataclass
class Run:
    """The state of a run on the host.

    Attributes:
        step: steps taken; with the seed it is the whole state of the data.
        elapsed: seconds of training so far, compilation apart.
        training, held_out: indices of rows.
    """

    trainer: Trainer
    rows: datasets.Dataset
    training: np.ndarray
    held_out: np.ndarray
    checkpoints: Checkpoints
    report: ProgressReport
    metrics: MetricsFile
    state: TrainState
    step: int = 0
    elapsed: float = 0.0

    @property
    def total_steps(self) -> int:
        """Where the run ends unless its minutes are over before."""
        section = self.trainer.config.train
        per_epoch = len(self.training) // section.batch_size
        return section.max_steps or max(1, round(per_epoch * section.epochs))

    def loop(self) -> None:
        """Trains to the end, with evaluations and checkpoints on the way.

        Raises:
            UserError: once a loss or a gradient is not finite; no checkpoint is written of parameters that give such a one.
        """
        section = self.trainer.config.train
        batch = self._batch(self.step)
        self.report.say(f"compiling for {self.trainer.mesh.size} device(s)")
        self._step = self.trainer.compile_step(self.state, batch)
        self._eval_step = self.trainer.compile_eval(self.state.params, batch)
        self._began = time.perf_counter() - self.elapsed
        evaluated = saved = self.step
        if self.step == 0:
            self._evaluate()
        while self.share < 1:
            self._train_one()
            if self.step % section.eval_every == 0:
                evaluated = self._evaluate()
            if self.step % section.checkpoint_every == 0:
                saved = self._save()
        if evaluated != self.step:
            self._evaluate()
        if saved != self.step:
            self._save()
        self.checkpoints.wait()

    @property
    def share(self) -> float:
        """How much of the run is over: by steps or by time, whichever is further."""
        minutes = self.trainer.config.train.max_minutes
        by_time = 0.0 if minutes is None else self.elapsed / (60 * minutes)
        return max(self.step / self.total_steps, by_time)

    def _train_one(self) -> None:
        section, draft = self.trainer.config.train, self.trainer.config.draft
        started = time.perf_counter()
        metrics = self._run_step(update=True)
        self.step += 1
        self.elapsed = time.perf_counter() - self._began
        self._check_finite(metrics, f"at step {self.step}")
        loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        seconds = time.perf_counter() - started
        if self.step % section.log_every == 0 or self.step == self.total_steps:
            row = {
                "step": self.step,
                "loss": loss,
                "loss_per_exit": _per_exit(draft.exit_layers, metrics["loss_E"]),
                "accuracy_per_exit": _per_exit(draft.exit_layers, metrics["accuracy_E"]),
                "learning_rate": float(metrics["learning_rate"]),
                "grad_norm": grad_norm,
                "tokens_per_second": float(metrics["tokens"]) / seconds,
                "elapsed_seconds": self.elapsed,
            }
            self.metrics.write(row)
            self.report.update(min(1.0, self.share), row)

    def _run_step(self, *, update: bool) -> dict[str, np.ndarray]:
        """Loss, gradient and, if `update`, the update of the next step's rows; returns the metrics."""
        # Half a step ahead, so that neither the first nor the last step has a rate of 0.
        progress = jnp.float32(self.share + 0.5 / self.total_steps)
        batch = self._batch(self.step)
        self.state, metrics = self._step(self.state, batch, progress, jnp.bool_(update))
        # Waiting for every step costs little beside one.
        return jax.device_get(metrics)

    def _check_finite(self, metrics: dict[str, np.ndarray], when: str) -> None:
        names = {"loss": "loss", "grad_norm": "gradient norm", "param_norm": "parameter norm"}
        values = {name: float(metrics[key]) for key, name in names.items() if key in metrics}
        if all(map(math.isfinite, values.values())):
            return
        self.checkpoints.wait()
        steps = self.checkpoints.steps
        kept = (
            f"the last good checkpoint is step {steps[-1]}"
            if steps
            else "no checkpoint was written yet"
        )
        remedy = "resume with" if steps else "start again with"
        told = ", ".join(f"{name}={value}" for name, value in values.items())
        raise UserError(
            f"{told} {when}: training stopped; {kept}; {remedy} a lower --optim.learning-rate, or check the data"
        )

    def _batch(self, step: int):
        section = self.trainer.config.train
        indices = rows_of_step(step, self.training, section.batch_size, section.seed)
        return make_batch(self.rows, indices, self.trainer.batch_sharding)

    def _evaluate(self) -> int:
        """Loss and next-token accuracy of each exit on the held-out rows; returns the step."""
        size, exits = self.trainer.config.train.batch_size, self.trainer.config.draft.exit_layers
        loss_E, correct_E, counted = np.zeros(len(exits)), np.zeros(len(exits)), 0.0
        for start in range(0, len(self.held_out), size):
            indices = self.held_out[start : start + size]
            indices = np.pad(indices, (0, size - len(indices)), constant_values=-1)
            batch = make_batch(self.rows, indices, self.trainer.batch_sharding)
            sums, tokens = jax.device_get(self._eval_step(self.state.params, batch))
            loss_E, correct_E = loss_E + sums.loss_E, correct_E + sums.correct_E
            counted += float(tokens)
        if counted:
            weights = self.trainer.config.draft.loss_weights
            row = {
                "step": self.step,
                "held_out": True,
                "loss": float(np.average(loss_E / counted, weights=weights)),
                "loss_per_exit": _per_exit(exits, loss_E / counted),
                "accuracy_per_exit": _per_exit(exits, correct_E / counted),
            }
            self._check_finite(
                {"loss": row["loss"]}, f"on the held-out rows after step {self.step}"
            )
            self.metrics.write(row)
            accuracy = ", ".join(f"{k}: {v:.1%}" for k, v in row["accuracy_per_exit"].items())
            self.report.say(f"step {self.step}: held-out {losses(row)}, accuracy ({accuracy})")
        return self.step

    def _save(self) -> int:
        """Starts a checkpoint; returns its step.

        A step's loss tells of the parameters before its update. So what a resumed run would compute first, the loss and the
        gradient of the next step's rows, is computed before anything is written.
        """
        self._check_finite(self._run_step(update=False), f"after the update of step {self.step}")
        metadata = {"elapsed_seconds": self.elapsed}
        trees = {"params": self.state.params, "opt_state": self.state.opt_state}
        self.checkpoints.save(self.step, metadata, **trees)
        return self.step


def _per_exit(exit_layers: tuple[int, ...], values) -> dict[str, float]:
    return {str(layer): float(value) for layer, value in zip(exit_layers, values, strict=True)}
