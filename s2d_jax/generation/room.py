"""Whether a call can fit at all, judged from sizes before anything is made: caches, logits and tables of a tree."""

from __future__ import annotations

import math

from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.model import ModelConfig
from s2d_jax.errors import UserError
from s2d_jax.generation.plan import Plan
from s2d_jax.machine import memory_of_a_device
from s2d_jax.weights.model import Model

_F32 = 4


def check_width(target: Model, draft: Model | None, config: DecodeConfig) -> None:
    """Raises UserError for a target pass of more positions than the target's context holds."""
    width = config.full_width if draft is not None else config.verify_width or 1
    context = target.config.max_context
    if width > context:
        drafted = "the tree has" if config.tree is not None and draft is not None else "a round has"
        raise UserError(
            f"{drafted} {width} positions, more than the target's context of {context}; draft fewer tokens"
        )


def check_room(plan: Plan, target: Model, draft: Model | None, config: DecodeConfig) -> None:
    """Raises UserError if the first caches and one round's logits alone are more than the devices can hold."""
    if plan.placement.abstract:  # nothing is made, so nothing has to fit
        return
    mesh = plan.placement.mesh
    available = memory_of_a_device() * (1 if mesh is None else mesh.size)
    needed = _bytes(plan, target, draft, config)
    if needed > available:
        rows, longest = len(plan.prompts), max(map(len, plan.prompts))
        raise UserError(
            f"{rows} prompts of up to {longest} tokens need {needed / 1e9:,.0f} GB for caches and logits, there are "
            f"{available / 1e9:,.0f} GB; give fewer at once, draft fewer tokens, or lower initial_room={plan.initial_room}"
        )


def _bytes(plan: Plan, target: Model, draft: Model | None, config: DecodeConfig) -> int:
    """A lower bound of what a call holds at once."""
    rows, none_kept = len(plan.prompts), [0] * len(plan.prompts)
    capacity = plan.capacity(none_kept, plan.width(none_kept))
    width = plan.decoder.verifier.widths[-1]
    caches = sum(
        _position_bytes(model.config, model.dtype.itemsize) for model in (target, draft) if model
    )
    logits = width * target.config.vocab_size * _F32
    tree = 0
    if config.tree is not None and draft is not None:
        tree = width * capacity  # which cached positions each node looks at
    return rows * (capacity * caches + logits + tree)


def _position_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes of one position's keys and values."""
    return 2 * itemsize * math.prod((config.num_layers, config.num_kv_heads, config.head_dim))
