"""Compiled programs, shared by all decoders of the process: a prefill per prompt width, a loop per capacity."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from s2d_jax.backends import compiling_for, forms_of, platform_of_arrays
from s2d_jax.decode.loop import Decoder
from s2d_jax.decode.row_groups import over_groups
from s2d_jax.decode.state import DecodeState
from s2d_jax.progress.compiling import compiling
from s2d_jax.sharding import is_split, mesh_of, split_over


class Programs(NamedTuple):
    """The two compiled programs of a call.

    Attributes:
        prefill: `(params, request, tokens_BC, length_B) -> DecodeState`.
        run: `(params, request, state) -> DecodeState`; the state is donated.
    """

    prefill: Any
    run: Any


class RoundPrograms(NamedTuple):
    """The three parts of a round, each as a program; states are donated.

    Attributes:
        propose: `(params, request, state) -> (proposal, state)`.
        verify: `(params, request, state, proposal) -> (verified, state)`.
        accept: `(request, state, verified) -> state`.
    """

    propose: Any
    verify: Any
    accept: Any


_CACHE: dict[Any, Any] = {}
_FRAMES = "jax_traceback_in_locations_limit"
_FRAMES_LOCK = threading.RLock()
# The text that is shown while a program compiles; {} is the width or the capacity in its key.
_WORDS = {
    "prefill": "compiling prefill for {} tokens",
    "run": "compiling the decoding loop",
    "extend": "compiling prefill for {} more tokens",
    "grow": "compiling a cache of {} tokens",
    "propose": "compiling drafting",
    "verify": "compiling verification",
    "accept": "compiling acceptance",
}


def programs(decoder: Decoder, prompt_width: int, args: tuple) -> tuple[Programs, float]:
    """The programs for `args = (params, request, tokens_BC, length_B)`, and the seconds spent compiling (0 if known).

    The arguments are arrays, or `jax.ShapeDtypeStruct`s that say where the arrays will be.
    """
    program, state, spent = prefill_program(decoder, prompt_width, args)
    params, request, *_ = args
    run, more = run_program(decoder, (params, request, state))
    return Programs(program, run), spent + more


def prefill_program(decoder: Decoder, prompt_width: int, args: tuple) -> tuple[Any, Any, float]:
    """`Programs.prefill` for `args` as `programs` takes them, the shapes of its state, and the seconds spent compiling."""

    def prefill(params, request, tokens_BC, length_B):
        return decoder.prefill(params, request, tokens_BC, length_B, prompt_width)

    (program, state), spent = _compiled(("prefill", decoder, prompt_width), prefill, args)
    return program, state, spent


def run_program(decoder: Decoder, inputs: tuple) -> tuple[Any, float]:
    """`Programs.run` for `inputs = (params, request, state)`, and the seconds spent compiling."""
    (program, _), spent = _compiled(("run", decoder), decoder.run, inputs, donate=2)
    return program, spent


def extend_program(decoder: Decoder, width: int, inputs: tuple) -> tuple[Any, float]:
    """`Decoder.extend` for `(params, request, state, tokens_BC, length_B, kept_B)`; the state is donated.

    The loop that goes on from there is compiled too, so that nobody waits for it after the first word of an answer.
    """

    def extend(params, request, state, tokens_BC, length_B, kept_B):
        return decoder.extend(params, request, state, tokens_BC, length_B, kept_B, width)

    (program, after), spent = _compiled(("extend", decoder, width), extend, inputs, donate=2)
    params, request, *_ = inputs
    _, more = run_program(decoder, (params, request, after))
    return program, spent + more


def grow_program(decoder: Decoder, capacity: int, state: Any) -> tuple[Any, float]:
    """`state -> state` of this capacity, split over devices as before."""

    def grow(state):
        return decoder.grow(state, capacity)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    (program, _), spent = _compiled(("grow", decoder, capacity), grow, (state,), out=shardings)
    return program, spent


def round_programs(decoder: Decoder, inputs: tuple) -> tuple[RoundPrograms, float]:
    """The parts of a round for `inputs = (params, request, state)`, and the seconds spent compiling."""
    params, request, _ = inputs
    (propose, (proposal, state)), first = _compiled(
        ("propose", decoder), decoder.propose, inputs, donate=2
    )
    inputs = (params, request, state, proposal)
    (verify, (verified, state)), second = _compiled(
        ("verify", decoder), decoder.verify, inputs, donate=2
    )
    inputs = (request, state, verified)
    (accept, _), third = _compiled(("accept", decoder), decoder.accept, inputs, donate=1)
    return RoundPrograms(propose, verify, accept), first + second + third


def compile_part(function: Callable, inputs: tuple) -> jax.stages.Compiled:
    """`function`, compiled for `inputs` as parts of a round are: for their backend, and by groups of rows on a mesh.

    It is not kept here, and nothing is donated, so it may run again on the same inputs.

    Args:
        function: as `row_groups.over_groups` takes it.
        inputs: its arguments, where they will lie; as `row_groups.specs_of` reads them.
    """
    return _lower_and_compile(function, inputs)[1]


def use_compile_cache(directory: str | Path | None = None) -> None:
    """Keeps compiled programs on disk, so that later processes load them instead of compiling.

    Args:
        directory: where, on this machine or, as JAX allows, at a place such as gs://bucket/programs. None takes the environment
            variable `JAX_COMPILATION_CACHE_DIR`, and does nothing if that is not set. Programs are kept however quickly they
            compiled, unless `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS` says otherwise.
    """
    directory = directory or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if not directory:
        return
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _compiled(key: tuple, function: Callable, inputs: tuple, *, donate=(), out=None):
    """The compiled function with the `ShapeDtypeStruct`s of its result, and the seconds spent compiling (0 if known)."""
    key = (*key, _signature(inputs))
    if key in _CACHE:
        return _CACHE[key], 0.0
    started = time.perf_counter()
    with compiling(key[0], _WORDS[key[0]].format(*key[2:-1]), inputs):
        lowered, compiled = _lower_and_compile(function, inputs, donate, out)
    result = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        lowered.out_info,
        compiled.output_shardings,
    )
    _CACHE[key] = compiled, result
    return _CACHE[key], time.perf_counter() - started


def _lower_and_compile(function: Callable, inputs: tuple, donate=(), out=None):
    """The function lowered, and compiled with the options of the backend that its inputs are on."""
    # Where a program has switched JAX to 64 bits, sums of int32 would become int64, and no loop could carry them.
    with jax.enable_x64(False):
        lowered = _lowered(function, inputs, donate, out)
        options = forms_of(platform_of_arrays(inputs)).compiler_options
        return lowered, lowered.compile(dict(options))


def _lowered(function: Callable, inputs: tuple, donate=(), out=None) -> jax.stages.Lowered:
    """The function, traced for the backend and the mesh that its inputs are on."""
    shardings = {} if out is None else {"out_shardings": out}
    traced = jax.jit(_traced(function, inputs), donate_argnums=donate, **shardings)
    with _python_frames(forms_of(platform_of_arrays(inputs)).python_frames):
        return traced.lower(*inputs)


@contextlib.contextmanager
def _python_frames(most: int | None) -> Iterator[None]:
    """What is lowered in the block says of each instruction no more Python frames than these."""
    if most is None:
        yield
        return
    with _FRAMES_LOCK:  # the setting is that of all threads, and calibration compiles in several
        before = getattr(jax.config, _FRAMES)  # below 0: all
        if not 0 <= before <= most:
            jax.config.update(_FRAMES, most)
        try:
            yield
        finally:
            jax.config.update(_FRAMES, before)


def _traced(function: Callable, inputs: tuple) -> Callable:
    """The function, to be traced for the backend and the mesh that its inputs are on."""
    platform, mesh = platform_of_arrays(inputs), mesh_of(inputs)

    def traced(*inputs):
        with compiling_for(platform), split_over(mesh):
            return over_groups(function, mesh, inputs)(*inputs)

    return traced


def state_shapes(decoder: Decoder, prompt_width: int, args: tuple) -> DecodeState:
    """The state that prefill would leave for `args` as `programs` takes them: shapes, on a mesh with shardings.

    Nothing is compiled.
    """

    def prefill(params, request, tokens_BC, length_B):
        return decoder.prefill(params, request, tokens_BC, length_B, prompt_width)

    with jax.enable_x64(False):
        state = jax.eval_shape(_traced(prefill, args), *args)
    mesh = mesh_of(args)
    if mesh is None:
        return state
    shardings = state.shardings(mesh, split_draft=is_split(args[0]["draft"]))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        *(state, shardings),
    )


def lower_run(decoder: Decoder, prompt_width: int, args: tuple) -> jax.stages.Lowered:
    """The loop of rounds for `args` as `programs` takes them, lowered and not compiled, to look at what a compiler makes of it.

    Args:
        decoder: its target has a mesh, whose devices need not exist.
        prompt_width: of the prefill that would come before; nothing of it is compiled.
        args: shapes with shardings.
    """
    params, request, *_ = args
    state = state_shapes(decoder, prompt_width, args)
    return _lowered(decoder.run, (params, request, state), 2)


def _signature(args: Any) -> tuple:
    leaves, tree = jax.tree.flatten(args)
    return (tree, *((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves))
