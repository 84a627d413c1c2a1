"""One SoFT step after the other with s2d-jax: the first 12 layers of SmolLM2, exits 6, 9, 12; prints tokens/s, the median.

Before that, the floating-point operations of the step against what the machine does in a large matrix product.

Usage: train_ours.py GGUF STEPS float32|bfloat16   (bfloat16: products over float32 weights)
"""

import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import train_row as row

from s2d_jax import MeshConfig, load_model, make_mesh
from s2d_jax.model import truncated
from train.config import (
    Config,
    DataSection,
    DraftSection,
    ModelSection,
    OptimSection,
    TrainSection,
)
from train.step import Batch, Trainer

path, steps, dtype = sys.argv[1], int(sys.argv[2]), sys.argv[3]
config = Config(
    model=ModelSection(path=path, num_layers=row.EXITS[-1], compute_dtype=dtype, remat=False),
    data=DataSection(paths=("none",), max_length=row.LENGTH),
    draft=DraftSection(exit_layers=row.EXITS),
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
model = load_model(path)
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
batch = jax.device_put(batch, trainer.batch_sharding)
state = trainer.init_state(params)
step = trainer.compile_step(state, batch)


def run(state):
    state, metrics = step(state, (), batch, jnp.float32(0), jnp.bool_(True))
    return state, float(metrics["loss"])


def matmul_peak() -> float:
    """Floating-point operations a second of a product of 2048 x 2048 matrices in the step's precision; the best of ten."""
    x = jnp.ones((2048, 2048), dtype)
    product = jax.jit(lambda a, b: a @ b.T)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(seconds)


state, loss = run(state)
print(f"loss before training {loss:.4f}", flush=True)
seconds = []
for _ in range(steps):
    started = time.perf_counter()
    state, loss = run(state)
    seconds.append(time.perf_counter() - started)
print(f"loss after {steps} further steps {loss:.4f}")
median = statistics.median(seconds)
done = row.floating_point_operations(weights, head_weights, draft_config.embed_dim) / median
peak = matmul_peak()
print(f"{done / 1e9:.1f} GFLOP/s, {done / peak:.0%} of a large product's {peak / 1e9:.1f}")
print(f"{row.LENGTH / median:.2f}")
