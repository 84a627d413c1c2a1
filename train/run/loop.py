"""The steps of a run: training, with evaluations and checkpoints on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from pathlib import Path

import datasets
import jax
import jax.numpy as jnp
import numpy as np

from s2d_jax.errors import UserError
from s2d_jax.processes import is_main_process, of_main_process
from s2d_jax.progress.activity import activity
from s2d_jax.progress.compiling import compiling
from s2d_jax.weights.checkpoints import Checkpoints
from train.data.batch import Batch
from train.data.batches import make_batch, rows_of_step
from train.run.held_out import Watch, summary
from train.run.metrics import METRICS, MetricsFile, losses
from train.run.preemption import Preempted, Preemption
from train.run.progress_plot import draw_progress
from train.run.teachers import Teachers
from train.run.terminal import ProgressReport
from train.step.trainer import Trainer, TrainState

PICTURE = "progress.png"
# The figure that says how good a checkpoint is.
_SCORE = "s2d_mat"


@dataclasses.dataclass
class Run:
    """The state of a run on the host.

    Attributes:
        step: steps taken; with the seed it is the whole state of the data.
        elapsed: seconds of training so far, without compilation.
        training, held_out: indices of rows.
        mat: the mean acceptance length of the last evaluation and its step; None before the first, or with nothing held out.
    """

    trainer: Trainer
    run_dir: Path
    rows: datasets.Dataset
    training: np.ndarray
    held_out: np.ndarray
    teachers: Teachers
    checkpoints: Checkpoints
    report: ProgressReport
    metrics: MetricsFile
    state: TrainState
    step: int = 0
    elapsed: float = 0.0
    mat: tuple[int, float] | None = None
    preemption: Preemption = dataclasses.field(default_factory=Preemption)

    @property
    def total_steps(self) -> int:
        """The step at which the run ends, unless its minutes are over before."""
        section = self.trainer.config.train
        per_epoch = len(self.training) // section.batch_size
        return section.max_steps or max(1, round(per_epoch * section.epochs))

    def loop(self) -> None:
        """Trains to the end, with evaluations and checkpoints on the way.

        Raises:
            Preempted: after SIGTERM, once a checkpoint is written.
            UserError: once a loss or a gradient is not finite; parameters that give one are never written to a checkpoint.
        """
        section = self.trainer.config.train
        batch = self._batch(self.step)
        self.report.say(f"compiling for {self.trainer.mesh.size} device(s)")
        inputs = self.state, batch, self.teachers.params
        with compiling("train", "compiling the training step", inputs):
            self._step = self.trainer.compile_step(*inputs)
        inputs = self.state.params, batch.replace(top_k=())
        with compiling("evaluate", "compiling the evaluation", inputs):
            self._eval_step = self.trainer.compile_eval(*inputs)
        make = lambda indices: make_batch(self.rows, indices, self.trainer.batch_sharding)  # noqa: E731
        self._watch = Watch(self.trainer.config, self.held_out, make, self.teachers.expected_tokens)
        self._began, self._stepped = time.perf_counter() - self.elapsed, False
        with self.preemption.listening():
            if self.step == 0:
                self._evaluate()
            while self.share < 1:
                self._train_one()
                last = self.share >= 1
                if last or self.step % section.eval_every == 0:
                    self._evaluate()
                stopped = not last and self.preemption.reached(self.step)
                due = last or self.step % section.checkpoint_every == 0
                if due or stopped:
                    self._save(judged=due)
                if stopped:
                    self.checkpoints.wait()
                    raise Preempted(self.step)
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
        first = not self._stepped
        with activity("taking the first step") if first else contextlib.nullcontext():
            metrics = self._run_step(update=True)
        self._stepped = True
        self.step += 1
        self.elapsed = self._clock()
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
            if "divergence_E" in metrics:
                row["divergence_per_exit"] = _per_exit(draft.exit_layers, metrics["divergence_E"])
            self.metrics.write(row)
            self.report.update(min(1.0, self.share), row)

    def _clock(self) -> float:
        """Seconds of training so far. If they decide when the run ends, all processes read one clock."""
        seconds = time.perf_counter() - self._began
        limited = self.trainer.config.train.max_minutes is not None
        return of_main_process(seconds) if limited else seconds

    def _run_step(self, *, update: bool) -> dict[str, np.ndarray]:
        """Computes loss and gradient of the next step's rows and, if `update`, updates the parameters; returns the metrics."""
        # Half a step ahead, so that neither the first nor the last step has a rate of 0.
        progress = jnp.float32(self.share + 0.5 / self.total_steps)
        batch = self._batch(self.step)
        self.state, metrics = self._step(
            self.state, self.teachers.params, batch, progress, jnp.bool_(update)
        )
        # Waiting after every step costs little compared with the step.
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

    def _batch(self, step: int) -> Batch:
        section = self.trainer.config.train
        indices = rows_of_step(step, self.training, section.batch_size, section.seed)
        batch = make_batch(self.rows, indices, self.trainer.batch_sharding)
        return self.teachers.add_to(batch, indices, self.trainer.batch_sharding)

    def _evaluate(self) -> None:
        """Loss and acceptance of each exit on the held-out rows."""
        found = self._watch.evaluate(self._eval_step, self.state.params)
        if found is None:
            return
        row = {"step": self.step, "held_out": True, **found}
        self._check_finite({"loss": row["loss"]}, f"on the held-out rows after step {self.step}")
        if row[_SCORE] is not None:
            self.mat = (self.step, row[_SCORE])
        self.metrics.write(row)
        self.report.say(f"step {self.step}: held-out {losses(row)}, {summary(row)}")
        if is_main_process():
            with activity(f"drawing {PICTURE}"):
                draw_progress(self.run_dir / METRICS, self.run_dir / PICTURE)

    def _save(self, *, judged: bool) -> None:
        """Starts a checkpoint; after SIGTERM not `judged`, because there may be no time for an evaluation.

        A step's loss is that of the parameters before its update. So the loss and the gradient of the next step's rows, which a
        resumed run would compute first, are checked before anything is written.
        """
        with activity("checking the parameters to be saved"):
            metrics = self._run_step(update=False)
        self._check_finite(metrics, f"after the update of step {self.step}")
        if judged and len(self.held_out) and (self.mat is None or self.mat[0] != self.step):
            self._evaluate()  # every checkpoint gets a score
        metadata = {"elapsed_seconds": self.elapsed}
        score = None if self.mat is None or self.mat[0] != self.step else self.mat[1]
        trees = {"params": self.state.params, "opt_state": self.state.opt_state}
        self.checkpoints.save(self.step, metadata, score, **trees)


def _per_exit(exit_layers: tuple[int, ...], values) -> dict[str, float]:
    return {str(layer): float(value) for layer, value in zip(exit_layers, values, strict=True)}
