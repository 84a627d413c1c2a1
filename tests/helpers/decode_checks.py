"""What a program of several processes generates; `test_several_processes.py` starts this file, and reads the JSON it prints."""

from __future__ import annotations

import json
import sys

import jax

from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.mesh import MeshConfig
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.config.tree import TreeShape
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.processes import start_processes
from s2d_jax.sharding import make_mesh
from s2d_jax.weights.load import load_draft, load_model

PROMPTS = [[5, 9, 2], [7, 7, 1, 3, 30, 12, 50], [4]]


def main(target: str, draft: str, data: str, tensor: str, kept: str) -> None:
    """A call, a stream, and two turns whose caches grow, of chains and of trees, greedy and sampled."""
    start_processes()
    shape = MeshConfig(data=int(data), tensor=int(tensor))
    mesh = make_mesh(shape) if shape != MeshConfig() else None
    models = (
        load_model(target, mesh=mesh, weight_format=kept),
        load_draft(draft, mesh=mesh if shape.tensor > 1 else None, weight_format=kept),
    )
    found = []
    for tree, temperature in ((None, 0.0), (TreeShape(3, 3, 8), 0.9)):
        config = DecodeConfig(tree=tree, initial_room=8)
        decoder = SpeculativeDecoder(*models, config)
        sampling = SamplingParams(max_new_tokens=24, temperature=temperature, seed=3)
        found.append(decoder.generate(PROMPTS, sampling).token_ids)
        found.append(decoder.stream(PROMPTS, sampling).finish().token_ids)
        conversation = decoder.conversation()
        first = conversation.generate(PROMPTS, sampling).token_ids
        later = [[*prompt, *ids, 3] for prompt, ids in zip(PROMPTS, first, strict=True)]
        found.append(conversation.generate(later, sampling).token_ids)
    print(json.dumps({"process": jax.process_index(), "found": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
