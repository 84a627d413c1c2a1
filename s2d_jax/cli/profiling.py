"""Traces of what the machine does during a generation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax

from s2d_jax.config.sampling import SamplingParams
from s2d_jax.generation.decoder import SpeculativeDecoder

# A trace has an event for every operation of every layer: more tokens make it larger, not clearer.
_TRACED_TOKENS = 16


def write_profile(
    directory: Path, decoder: SpeculativeDecoder, prompt: list[int], params: SamplingParams
) -> None:
    """Writes a trace of a warm generation of at most 16 tokens after `prompt`.

    `tensorboard --logdir DIRECTORY` opens it; so does https://ui.perfetto.dev with the `perfetto_trace.json.gz` in it.
    """
    few = min(params.max_new_tokens, _TRACED_TOKENS)
    params = dataclasses.replace(params, max_new_tokens=few)
    decoder.generate([prompt], [params])  # compiles
    with jax.profiler.trace(str(directory), create_perfetto_trace=True):
        decoder.generate([prompt], [params])
