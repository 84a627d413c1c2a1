"""Checkpoints of a training run on disk: written while training goes on, kept by score, found again after a crash."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from s2d_jax.errors import UserError
from s2d_jax.fields import Fields
from s2d_jax.files import read_json
from s2d_jax.formats.finite import count_not_finite
from s2d_jax.progress.activity import activity

_SCORE = "score"
# Seconds to wait for the threads of a failed save.
_LONGEST_ABANDON = 10.0


def placed(abstract: Any, shardings: Any) -> Any:
    """`abstract` with each leaf's sharding: what Orbax restores onto."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        shardings,
    )


class Checkpoints:
    """The numbered checkpoints of a run; the newest `keep` stay, and the best.

    A save runs in the background. It appears under its own name only once it is complete, so a killed or failed save leaves the
    earlier ones as they were. The remains of a failed save are removed at once, those of a killed one before the first save
    of a run that was opened for writing (`keep` given).
    """

    def __init__(self, directory: Path, keep: int | None = None):
        self._directory = directory
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_not_of_orbax)
        self._checkpointer = None
        if keep is not None:
            directory.mkdir(parents=True, exist_ok=True)
        if directory.is_dir():
            _check_scores(directory)
            self._checkpointer = ocp.training.Checkpointer(
                str(directory.absolute()),
                preservation_policy=_preserved(keep),
                cleanup_tmp_directories=keep is not None,
            )

    @property
    def steps(self) -> list[int]:
        """The complete checkpoints, oldest first."""
        if self._checkpointer is None:
            return []
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def find(self, step: int | Literal["best"] | None) -> int:
        """`step`, the newest one, or the best.

        Raises:
            UserError: if it does not exist.
        """
        steps = self.steps
        if not steps:
            raise UserError(f"{self._directory} holds no checkpoint; train first")
        if step == "best":
            return self._best()
        if step is not None and step not in steps:
            have = ", ".join(map(str, steps))
            raise UserError(f"step={step} is not in {self._directory}; it holds {have}")
        return steps[-1] if step is None else step

    def _best(self) -> int:
        assert self._checkpointer is not None
        found = [(_score(c.metrics), c.step) for c in self._checkpointer.checkpoints if c.metrics]
        if not found:
            raise UserError(
                f"the checkpoints in {self._directory} were not evaluated; give --step N, or train with "
                "data.held_out_fraction above 0"
            )
        return max(found)[1]

    def save(
        self, step: int, metadata: dict[str, Any], score: float | None = None, **trees: Any
    ) -> None:
        """Starts to save named trees of arrays, after waiting for the save before.

        Args:
            step: its number.
            metadata: JSON-able facts beside the arrays.
            score: how good it is, higher is better; None where that is not known.
            trees: what to save.

        Raises:
            UserError: if this or the save before fails, for example on a full disk.
        """
        assert self._checkpointer is not None
        with self._explained(), activity(f"saving step {step}"):
            self._checkpointer.wait()
            self._checkpointer.save_checkpointables_async(
                step,
                trees,
                force=True,
                metrics=None if score is None else {_SCORE: score},
                custom_metadata=metadata,
            )

    def restore(self, step: int, **abstract: Any) -> dict[str, Any]:
        """The named trees of a checkpoint, shaped and placed as the `jax.ShapeDtypeStruct`s given.

        Raises:
            UserError: if its files are damaged, hold something else, or values that are no finite numbers.
        """
        try:
            return self._loaded(step, abstract)
        except (MemoryError, jax.errors.JaxRuntimeError):  # too large for this machine, not damaged
            raise
        except Exception as error:
            raise self.damaged(step, _root(error), abstract) from error

    def _loaded(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        assert self._checkpointer is not None
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
        with activity(f"reading the checkpoint of step {step}", total=size, key="restore"):
            trees = self._checkpointer.load_checkpointables(step, abstract)
            _check_finite(trees)
        return trees

    def check_depth(self, step: int, num_layers: int) -> None:
        """Makes sure that a checkpoint is of a draft of `num_layers` layers, before anything is made for each of them.

        Raises:
            UserError: if it is of another depth, or does not say what it holds.
        """
        assert self._checkpointer is not None
        params = self._checkpointer.checkpointables_metadata(step).metadata.get("params")
        if not isinstance(params, dict):
            raise self.damaged(step, "what its params are cannot be read")
        stored = sum(name.startswith("layers_") for name in params)
        if stored != num_layers:
            raise UserError(
                f"checkpoint {step} in {self._directory} is of a draft of {stored} layers, the run's description has "
                f"num_layers={num_layers}; put back the model_config.json that training wrote"
            )

    def damaged(
        self, step: int, reason: object, abstract: dict[str, Any] | None = None
    ) -> UserError:
        """The error for a checkpoint that cannot be read; it names the newest one that can.

        Args:
            step: the checkpoint.
            reason: what is wrong.
            abstract: what `restore` was asked for; without it, other checkpoints are judged by what they say of themselves.
        """
        others = [other for other in self.steps if other != step]
        whole = next((each for each in reversed(others) if self._is_whole(each, abstract)), None)
        if whole is not None:
            delete = ", ".join(str(self._directory / str(s)) for s in self.steps if s > whole)
            remedy = f"take step {whole} (--step {whole}), or delete {delete} to go on from there"
        else:
            kept = "no other is whole" if others else "there is no other"
            remedy = f"{kept}, so train again in another directory"
        words = " ".join(str(reason).split())[:160]
        return UserError(
            f"checkpoint {step} in {self._directory} is damaged ({words}); complete files of this run are expected; {remedy}"
        )

    def _is_whole(self, step: int, abstract: dict[str, Any] | None) -> bool:
        try:
            return bool(self.metadata(step) if abstract is None else self._loaded(step, abstract))
        except Exception:  # whatever is wrong, it is not whole
            return False

    def metadata(self, step: int) -> dict[str, Any]:
        """What `save` was given beside the arrays; empty if that is damaged."""
        assert self._checkpointer is not None
        found = self._checkpointer.checkpointables_metadata(step).custom_metadata
        return found if isinstance(found, dict) else {}

    def wait(self) -> None:
        """Returns once the last save is on disk.

        Raises:
            UserError: if it failed.
        """
        if self._checkpointer is not None:
            with self._explained(), activity("writing the checkpoint to disk"):
                self._checkpointer.wait()

    def close(self) -> None:
        """Waits, and frees Orbax's threads."""
        if self._checkpointer is not None:
            self._checkpointer.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            cause = _os_error(error)
            if cause is None:
                raise
            steps = self.steps
            self._abandon_save()
            kept = f"checkpoints {steps} are intact" if steps else "none was saved before"
            remedy = "free some space" if cause.errno == errno.ENOSPC else "check the directory"
            raise UserError(
                f"saving to {self._directory} failed: {cause.strerror or cause}; {kept}; {remedy} and resume"
            ) from error

    def _abandon_save(self) -> None:
        """Removes what a failed save left. Until its other threads end, they may bring back what is removed."""
        assert self._checkpointer is not None
        with contextlib.suppress(Exception):
            self._checkpointer.close()
        self._checkpointer = None
        deadline = time.monotonic() + _LONGEST_ABANDON
        while remains := list(self._directory.glob("*.orbax-checkpoint-tmp*")):
            for path in remains:
                shutil.rmtree(path, ignore_errors=True)
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)


def _check_finite(trees: dict[str, Any]) -> None:
    """Raises ValueError for an array with NaN or infinity. Each process looks at its own pieces."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
        if not jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
            continue
        if count := sum(count_not_finite(np.asarray(s.data)) for s in leaf.addressable_shards):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(f"{name} holds {count} values that are no finite numbers")


def _check_scores(directory: Path) -> None:
    """Raises UserError for a score that cannot be read. Orbax, which reads all of them first, would raise what it meets."""
    for file in sorted(directory.glob("[0-9]*/metrics/metrics")):
        remedy = "delete it, and the checkpoint stays without its score"
        Fields(read_json(file, remedy), file, remedy).number(_SCORE)


def _score(metrics: Any) -> float:
    return metrics[_SCORE]


def _preserved(keep: int | None) -> Any:
    """Which checkpoints stay: all, or the newest and the best. The types of Orbax's policies do not fit its own protocol."""
    policy = ocp.training.preservation_policies
    if not keep:
        return policy.PreserveAll()
    best = policy.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
    return policy.AnyPreservationPolicy([policy.LatestN(keep), best])


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """False for what Orbax logs about an error, since the error that is raised says it in one line.

    Orbax logs a traceback for each thread that the error passes through; asyncio reports failed reads when they are collected.
    """
    if record.levelno < logging.ERROR:
        return not record.getMessage().startswith("Failed to get metadata for checkpointable")
    if record.name == "asyncio":
        return re.search("orbax|tensorstore", record.getMessage()) is None
    return "orbax" not in Path(record.pathname).parts


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _root(error: BaseException) -> BaseException:
    """The first exception in the chain, which caused the others."""
    return list(_chain(error))[-1]


def _os_error(error: BaseException) -> OSError | None:
    """The operating system's error behind an exception of Orbax's, if there is one.

    TensorStore, which writes the arrays, raises a ValueError whose text holds the error number.
    """
    for link in _chain(error):
        if isinstance(link, OSError):
            return link
        if found := re.search(r"\[os_error_code='(\d+)'\]", str(link)):
            return OSError(int(found[1]), os.strerror(int(found[1])))
    return None
