"""Compiled programs, shared by all decoders of the process: one pair per decoder shape and bucket."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax

from s2d_jax.decoder import Decoder


class Programs(NamedTuple):
    """The two compiled programs of a bucket.

    Attributes:
        prefill: `(params, request, tokens_BC, length_B) -> DecodeState`.
        run: `(params, request, state) -> DecodeState`; the state is donated.
    """

    prefill: Any
    run: Any


_PROGRAMS: dict[Any, Programs] = {}


def programs(decoder: Decoder, prompt_width: int, args: tuple) -> tuple[Programs, float]:
    """The programs for `args = (params, request, tokens_BC, length_B)`, and the seconds that compiling them took (0 if known)."""
    started = time.perf_counter()
    leaves, tree = jax.tree.flatten(args)
    key = (decoder, prompt_width, tree, tuple((x.shape, x.dtype, x.sharding) for x in leaves))
    if key in _PROGRAMS:
        return _PROGRAMS[key], 0.0
    _PROGRAMS[key] = compile_programs(decoder, prompt_width, args)
    return _PROGRAMS[key], time.perf_counter() - started


def compile_programs(decoder: Decoder, prompt_width: int, args: tuple) -> Programs:
    """Compiles for arrays, or for `jax.ShapeDtypeStruct`s that say where they will be."""

    def prefill(params, request, tokens_BC, length_B):
        return decoder.prefill(params, request, tokens_BC, length_B, prompt_width)

    compiled_prefill = jax.jit(prefill).lower(*args).compile()
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(prefill, *args),
        compiled_prefill.output_shardings,
    )
    params, request, *_ = args
    compiled_run = jax.jit(decoder.run, donate_argnums=2).lower(params, request, state).compile()
    return Programs(compiled_prefill, compiled_run)
