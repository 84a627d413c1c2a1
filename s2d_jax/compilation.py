"""Compiled programs, shared by all decoders of the process: a prefill per prompt width, a loop per capacity."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from s2d_jax.decoder import Decoder


class Programs(NamedTuple):
    """The two compiled programs of a call.

    Attributes:
        prefill: `(params, request, tokens_BC, length_B) -> DecodeState`.
        run: `(params, request, state) -> DecodeState`; the state is donated.
    """

    prefill: Any
    run: Any


_CACHE: dict[Any, Any] = {}


def programs(decoder: Decoder, prompt_width: int, args: tuple) -> tuple[Programs, float]:
    """The programs for `args = (params, request, tokens_BC, length_B)`, and the seconds spent compiling (0 if known).

    The arguments are arrays, or `jax.ShapeDtypeStruct`s that say where the arrays will be.
    """
    started, known = time.perf_counter(), len(_CACHE)
    key = ("prefill", decoder, prompt_width, _signature(args))
    prefill, state = _once(key, lambda: _compile_prefill(decoder, prompt_width, args))
    params, request, *_ = args
    inputs = (params, request, state)
    run = _once(("run", decoder, _signature(inputs)), lambda: _compile_run(decoder, inputs))
    seconds = time.perf_counter() - started if len(_CACHE) > known else 0.0
    return Programs(prefill, run), seconds


def _compile_prefill(decoder: Decoder, prompt_width: int, args: tuple):
    """The compiled prefill, and the `ShapeDtypeStruct`s of the state that it returns."""

    def prefill(params, request, tokens_BC, length_B):
        return decoder.prefill(params, request, tokens_BC, length_B, prompt_width)

    compiled = jax.jit(prefill).lower(*args).compile()
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(prefill, *args),
        compiled.output_shardings,
    )
    return compiled, state


def _compile_run(decoder: Decoder, inputs: tuple):
    return jax.jit(decoder.run, donate_argnums=2).lower(*inputs).compile()


def _signature(args: Any) -> tuple:
    leaves, tree = jax.tree.flatten(args)
    return (tree, *((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves))


def _once(key: Any, make: Callable[[], Any]) -> Any:
    if key not in _CACHE:
        _CACHE[key] = make()
    return _CACHE[key]
