"""The compiled step that learns the row of train_row.py: the first 12 layers of a model, with the exits asked for."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import train_row as row

from s2d_jax import MeshConfig, Model, make_mesh
from s2d_jax.model.products.forms import plain
from s2d_jax.model.select_layers import truncated
from train.config.sections import (
    Config,
    DataSection,
    DraftSection,
    ModelSection,
    OptimSection,
    TrainSection,
)
from train.data.batch import Batch
from train.step.trainer import Trainer


class RowStep:
    """Steps one after the other on the same row.

    Args:
        model: a target, float32.
        exits: that learn; the last is layer 12.
        dtype: "float32", or "bfloat16" for products over float32 weights.
    """

    def __init__(self, model: Model, exits: tuple[int, ...], dtype: str):
        config = Config(
            model=ModelSection(
                path=model.source, num_layers=row.EXITS[-1], compute_dtype=dtype, remat="none"
            ),
            data=DataSection(paths=("none",), max_length=row.LENGTH),
            draft=DraftSection(exit_layers=exits),
            optim=OptimSection(
                learning_rate=row.LEARNING_RATE,
                beta1=row.BETAS[0],
                beta2=row.BETAS[1],
                epsilon=row.EPSILON,
                clip_norm=row.CLIP,
                warmup_fraction=0.0,
            ),
            train=TrainSection(batch_size=1, loss_chunk=128),
        )
        draft_config, params = truncated(model.config, model.params, row.EXITS[-1])
        trainer = Trainer(config, draft_config, make_mesh(MeshConfig()))
        head_weights = params["embed"]["embedding"].size
        weights = sum(leaf.size for leaf in jax.tree.leaves(params)) - head_weights
        batch = Batch(
            tokens_BT=row.TOKENS[None],
            targets_BT=row.TARGETS[None],
            weights_BT=row.COUNTED[None].astype(np.float32),
            positions_BT=np.arange(row.LENGTH, dtype=np.int32)[None],
            segment_ids_BT=np.ones((1, row.LENGTH), np.int32),
        )
        self.exits = exits
        self.operations = row.floating_point_operations(
            weights, head_weights, draft_config.embed_dim, len(exits)
        )
        self._batch = jax.device_put(batch, trainer.batch_sharding)
        # A step takes its state's memory; other steps may start from the same model.
        self._state = trainer.init_state(jax.tree.map(jnp.copy, params))
        self._step = trainer.compile_step(self._state, self._batch)

    @property
    def peak_bytes(self) -> int:
        """What XLA allots: parameters, moments, batch, and temporaries at their largest; the state is updated in place."""
        found = self._step.memory_analysis()
        return (
            found.argument_size_in_bytes
            + found.temp_size_in_bytes
            + found.output_size_in_bytes
            - found.alias_size_in_bytes
        )

    def run(self) -> tuple[float, float]:
        """One step: its loss, and its seconds."""
        started = time.perf_counter()
        inputs = (), self._batch, jnp.float32(0), jnp.bool_(True)
        self._state, metrics = self._step(self._state, *inputs)
        return float(metrics["loss"]), time.perf_counter() - started


def matmul_peak(dtype: str) -> float:
    """Floating-point operations a second of a product of 2048 x 2048 matrices, sums in f32; the best of ten."""
    x = jnp.ones((2048, 2048), dtype)
    product = jax.jit(plain)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(seconds)
