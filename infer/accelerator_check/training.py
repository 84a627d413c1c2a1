"""Training steps of the draft: the one place of `infer` that uses `train`."""

from __future__ import annotations

import gc
import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infer.accelerator_check.arithmetic import training_flops
from infer.accelerator_check.loops import Tick
from infer.accelerator_check.memory import is_out_of_memory
from infer.accelerator_check.subject import Subject, random_params
from s2d_jax.config.mesh import MeshConfig
from s2d_jax.sharding import make_mesh
from train.config.sections import Config, DataSection, DraftSection, ModelSection, TrainSection
from train.data.batch import Batch
from train.step.trainer import Trainer


def train_steps(subject: Subject, repeats: int, tick: Tick) -> dict[str, Any]:
    """Tokens per second of Sorted Fine-Tuning, all weights and f32 moments split over the devices, and the operations needed.

    The number of rows is halved until a step fits. Target and draft are freed before.
    """
    subject.release()
    gc.collect()
    devices = 1 if subject.mesh is None else subject.mesh.size
    rows = subject.size.rows * devices
    while True:
        try:
            return _steps(subject, devices, rows, repeats, tick)
        except jax.errors.JaxRuntimeError as error:
            if rows == devices or not is_out_of_memory(error):
                raise
        gc.collect()
        rows = max(rows // 2 // devices, 1) * devices


def _steps(subject: Subject, devices: int, rows: int, repeats: int, tick: Tick) -> dict[str, Any]:
    trainer = trainer_of(subject, devices, rows)
    length = subject.size.length
    batch = jax.device_put(_batch(rows, length, subject), trainer.batch_sharding)
    sharding = trainer.state_sharding.params
    params = random_params(subject.draft_config, jnp.float32, subject.seed, sharding)
    state = trainer.init_state(params)
    del params  # the first step takes their memory
    step = trainer.compile_step(state, batch)
    progress, update = np.float32(0.5), np.bool_(True)
    state, _ = jax.block_until_ready(step(state, (), batch, progress, update))
    tick(f"compiling a step of {rows} rows")
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, (), batch, progress, update))
        seconds.append(time.perf_counter() - started)
        tick(f"a step of {rows} rows")
    rate = rows * length / statistics.median(seconds)
    needed = training_flops(subject.draft_config, len(subject.size.exits), length)
    return {
        "rows": rows,
        "length": length,
        "exits": list(subject.size.exits),
        "tokens_per_second": rate,
        "flops_per_token": needed,
        "flops_per_second": needed * rate,
        "raw_seconds": seconds,
    }


def trainer_of(subject: Subject, devices: int, rows: int) -> Trainer:
    """The steps of a draft of the subject's shape, without a teacher, in bf16 on f32 weights."""
    config = Config(
        model=ModelSection(path="random weights", compute_dtype="bfloat16"),
        data=DataSection(paths=("none are read",), max_length=subject.size.length),
        draft=DraftSection(exit_layers=subject.size.exits),
        mesh=MeshConfig(fsdp=devices),
        train=TrainSection(batch_size=rows, loss_chunk=math.gcd(256, subject.size.length)),
    )
    return Trainer(config, subject.draft_config, make_mesh(config.mesh))


def _batch(rows: int, length: int, subject: Subject) -> Batch:
    """Random tokens, one document in each row."""
    rng = np.random.default_rng(subject.seed)
    shape = (rows, length)
    tokens_BT = rng.integers(0, subject.size.config.vocab_size, shape, np.int32)
    return Batch(
        tokens_BT=jnp.asarray(tokens_BT),
        targets_BT=jnp.asarray(np.roll(tokens_BT, -1, axis=1)),
        weights_BT=jnp.ones(shape, jnp.float32),
        positions_BT=jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), shape),
        segment_ids_BT=jnp.ones(shape, jnp.int32),
    )
