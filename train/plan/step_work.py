"""Operations and bytes of a training step, from its shapes: the compiler counts what stands in a loop only once."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh

from s2d_jax.config.model import ModelConfig
from train.config.sections import Config
from train.plan.step_memory import bytes_per_device


@dataclasses.dataclass(frozen=True)
class StepWork:
    """What one chip does in a step.

    Attributes:
        flops: multiplications and additions of products, as if every position counted in the loss, and with what masks hide.
        least_bytes: bytes of its main memory that it reads and writes at least: the state once each way, and the weights once
            for every pass of every part. Activations are left out.
    """

    flops: float
    least_bytes: float


def work_of_step(config: Config, model: ModelConfig, params: Any, mesh: Mesh) -> StepWork:
    """The work of a step without teachers, evenly shared by the chips of `mesh`.

    A product costs two operations per weight and token forwards, and twice as much backwards (Kaplan et al. 2020, section 2.1):
    once for the states and once for the weights, where those learn. `model.remat` adds what is computed again.

    Args:
        config: the run.
        model: the draft's shape.
        params: its parameters, as shapes with shardings.
        mesh: from `make_mesh`.
    """
    learned, remat = config.learned_parts, config.model.remat
    full, states = "trunk" in learned, not {"trunk", "lora"}.isdisjoint(learned)
    backward, recompute = states + full, states and remat == "block"
    depth = max(config.draft.exit_layers)
    blocks = [params[f"layers_{layer}"] for layer in range(depth)]
    weights = sum(math.prod(x.shape) for x in jax.tree.leaves(blocks) if len(x.shape) == 2)
    head = model.vocab_size * model.embed_dim * len(config.draft.exit_layers)
    tokens = config.train.batch_size * config.data.max_length
    # Scores and mixed values: two products over all pairs of positions of a row.
    mixing = 4 * config.data.max_length * model.num_heads * model.head_dim * depth
    again = states and remat != "none"
    of_token = 2 * weights * (1 + backward + recompute) + mixing * (1 + 2 * states + again)
    of_token += 2 * head * (1 + states + (full or "exit_heads" in learned))
    passes = config.train.accumulate * (1 + states + recompute)
    read = passes * 2 * weights / mesh.shape["tensor"]
    # The state is read and written: parameters in f32 and two moments of those that learn.
    state = 2 * 3 * bytes_per_device(params) if full else bytes_per_device(params)
    return StepWork(tokens * of_token / mesh.size, read + state)
