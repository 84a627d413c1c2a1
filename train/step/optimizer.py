"""AdamW with clipping, and a schedule that follows the progress of the run, not its steps."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from train.config.sections import OptimSection


def learning_rate(progress: jax.Array, config: OptimSection) -> jax.Array:
    """Linear warm-up, then a cosine (Loshchilov & Hutter 2017, eq. 5) down to `final_fraction` of the peak.

    Progress instead of a step count lets a run end on time on a machine of unknown speed.

    Args:
        progress: f32 scalar, the share of the run that is over after this step; clipped to [0, 1].
        config: peak, warm-up share and final share.

    Returns:
        f32 scalar.
    """
    progress = jnp.clip(progress, 0.0, 1.0)
    warmup = config.warmup_fraction
    rising = progress / max(warmup, 1e-9)
    falling = 0.5 * (1.0 + jnp.cos(math.pi * (progress - warmup) / (1.0 - warmup)))
    floor = config.final_fraction
    return config.learning_rate * jnp.where(
        progress < warmup, rising, floor + (1.0 - floor) * falling
    )


def make_optimizer(config: OptimSection) -> optax.GradientTransformation:
    """Clipping by global norm, Adam, decoupled weight decay (Loshchilov & Hutter 2019); the step applies the learning rate.

    Decay applies to matrices only, not to norms and biases, which are vectors.
    """

    def is_matrix(params: Any) -> Any:
        return jax.tree.map(lambda x: x.ndim >= 2, params)

    parts = [
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
    ]
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=is_matrix))
    return optax.chain(*parts)
