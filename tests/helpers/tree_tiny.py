"""What the tests of tree decoding share: a tiny pair, trees, and configurations that draft them."""

from __future__ import annotations

import dataclasses

from tiny import noisy_draft, tiny_model

from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.config.tree import TreeShape
from s2d_jax.weights.model import Draft, Model

PROMPTS = [[5, 9, 2], [7, 7, 1, 3, 30, 12, 50], [33, 4, 21, 60, 2], [1]]
EXITS, THRESHOLDS = (1, 2, 3), (0.4, 0.4, 0.0)

# All requests of at most so many tokens have caches of one size, so they share their programs.
GREEDY = SamplingParams(max_new_tokens=30)
HOT = SamplingParams(temperature=1.0, max_new_tokens=20, seed=3)
CAPACITY = 128  # 32 prompt positions, 30 tokens, a margin of 64

# Trees of as many nodes share their width-matched reference.
TREE = TreeShape(depth=3, top_k=3, nodes=11)
BY_NODE = dataclasses.replace(TREE, leaving="node")
WIDE = TreeShape(depth=4, top_k=4, nodes=24)
STATIC = TreeShape.static(((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0), (1, 1), (2,)))
# Four nodes of its second level have children: more than the two that each node has.
FULL = TreeShape.static([(a, b, 0) for a in (0, 1) for b in (0, 1)])
STATIC_BY_NODE = dataclasses.replace(STATIC, leaving="node")

POLICIES = {
    "s2d": DecodeConfig(tree=TREE),
    "s2d by node": DecodeConfig(tree=BY_NODE),
    "s2d static": DecodeConfig(tree=STATIC),
    "s2d static by node": DecodeConfig(tree=STATIC_BY_NODE),
    "s2d wide, catching up one by one": DecodeConfig(tree=WIDE, catch_up_width=1),
    "two exits": DecodeConfig(tree=BY_NODE, exits=(1, 3), exit_thresholds=(0.5, 0.0)),
    "sd@1": DecodeConfig(tree=TREE, exits=(1,)),
    "independent": DecodeConfig(tree=TREE, exits=(3,)),
    "independent static": DecodeConfig(tree=FULL, exits=(3,)),
    "never early": DecodeConfig(tree=TREE, exit_thresholds=(1.0, 1.0, 0.0)),
    "always first": DecodeConfig(tree=BY_NODE, exit_thresholds=(0.0, 0.0, 0.0)),
}


def tiny_pair() -> tuple[Model, Draft]:
    """The draft is the target with noise: often right, sometimes wrong, with exits that disagree."""
    target = tiny_model(num_layers=3, spread=14.0)
    return target, noisy_draft(target, EXITS, THRESHOLDS)
