"""Which parameters learn: the trunk, low-rank adapters on it, or the parts that belong to single exits."""

from __future__ import annotations

from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from s2d_jax.formats.names import EXIT_ADAPTERS, EXIT_HEADS
from s2d_jax.model.params import Params
from s2d_jax.weights.vocabulary import TRIMMED
from train.config.sections import Part


def part_of(path: tuple[str, ...]) -> Part:
    """The part that a parameter belongs to, by its path.

    >>> part_of(("exit_heads_6", "kernel")), part_of(("layers_0", "mlp", "up_proj", "lora_a"))
    ('exit_heads', 'lora')
    """
    module = path[0].removeprefix(TRIMMED)
    if module.startswith(EXIT_HEADS):
        return "exit_heads"
    if module.startswith(EXIT_ADAPTERS):
        return "exit_adapters"
    return "lora" if path[-1] in ("lora_a", "lora_b") else "trunk"


def split_params(params: Params, parts: tuple[Part, ...]) -> tuple[Params, Params]:
    """The parameters that learn and those that are frozen; each tree lacks what the other has."""
    flat = flatten_dict(params)
    learned = {path: value for path, value in flat.items() if part_of(path) in parts}
    frozen = {path: value for path, value in flat.items() if path not in learned}
    return unflatten_dict(learned), unflatten_dict(frozen)


def join_params(learned: Params, frozen: Params) -> Any:
    """Undoes `split_params`."""
    return unflatten_dict({**flatten_dict(frozen), **flatten_dict(learned)})
