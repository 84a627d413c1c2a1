"""Programs that are timed: how they are set up, and how often they are run.

They are compiled as rounds are (`s2d_jax.decode.programs.compile_part`). On a mesh every group of devices has one row, so what
is timed is what a row costs where groups decode beside each other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

from s2d_jax.config.sampling import SamplingParams
from s2d_jax.decode.programs import compile_part, state_shapes
from s2d_jax.decode.row_groups import groups_of
from s2d_jax.decode.state import DecodeState
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.generation.placement import Placement
from s2d_jax.generation.result import GenerationResult
from s2d_jax.model.transformer import apply_model
from s2d_jax.processes import of_main_process
from s2d_jax.sharding import gathered_last, mesh_in_use
from s2d_jax.weights.model import Draft, Model

# Positions of context that the caches hold; readings of the head per measurement.
CONTEXT, READINGS = 128, 16
# A program that has taken PATIENCE seconds altogether is not run again, once it has had FEWEST_RUNS runs.
PATIENCE, FEWEST_RUNS = 5.0, 5

Program = Callable[[], float]


def placed_beside(target: Model) -> tuple[Placement, int]:
    """Where the arrays of a round lie beside the target's parameters, and how many rows it has here: one for each group."""
    placement = Placement.beside(target.device_params)
    return placement, groups_of(placement.mesh)


def _empty_state(decoder, width: int, args: tuple) -> DecodeState:
    """A state in mid-text whose caches hold zeros: the cost of a round does not depend on their content."""
    shapes = state_shapes(decoder, width, args)
    state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, device=s.sharding), shapes)
    length_B = jnp.full_like(state.length_B, CONTEXT)
    return state.replace(
        length_B=length_B,
        target_cache=state.target_cache.advance_to(length_B - 1),
        draft_length_B=args[1].drafting.first_B,
        guard=state.guard.replace(credit_B=args[1].drafting.allowance_B),
    )


def prepared(decoder: SpeculativeDecoder, *, rounds: int):
    """Static decoder, arguments and state of rows that go on for `rounds` tokens, one row in each group of a mesh."""
    placement, rows = placed_beside(decoder.target)
    sampling = SamplingParams(max_new_tokens=rounds, ignore_eos=True)
    static, width, args = decoder.prepare([[1] * CONTEXT] * rows, [sampling] * rows)
    params, request, tokens_BC, length_B = args
    # No token ends the row, whatever the model computes from caches of zeros.
    request = request.replace(stop_ids_BZ=jnp.full_like(request.stop_ids_BZ, -1))
    args = (params, placement.put(request), tokens_BC, length_B)
    return static, args, _empty_state(static, width, args)


def filled(draft_state, length_B):
    """The drafter's state with `length_B` positions computed in all of its caches."""

    def fill(leaf):
        return leaf.advance_to(length_B) if hasattr(leaf, "advance_to") else leaf

    return jax.tree.map(fill, draft_state, is_leaf=lambda leaf: hasattr(leaf, "advance_to"))


def head_program(target: Model, draft: Draft, positions: int = 1) -> Program:
    """Seconds of reading the draft's logits at some positions of its first exit, and their argmax."""
    model, exit_layer = draft.drafting_transformer, draft.draft_config.exit_layers[0]
    placement, groups = placed_beside(target)

    def heads(params, h_TD):
        def one(_, h_TD):
            logits_TV = apply_model(model, params, "logits", h_TD, exit_layer)
            logits_TV = gathered_last(logits_TV, mesh_in_use())  # as `Segments` reads them
            token_T = jnp.argmax(logits_TV, axis=-1)
            return h_TD.at[:, 0].set(token_T.astype(draft.dtype))

        return jax.lax.fori_loop(0, READINGS, one, h_TD)

    # The positions of one group after those of another.
    h_TD = jnp.ones((groups * positions, draft.config.embed_dim), draft.dtype)
    inputs = placement.put_draft(draft.device_params), placement.put(h_TD)
    run = compile_part(heads, inputs)
    return timed(lambda: run(*inputs), READINGS)


def timed(run: Callable, count: int) -> Program:
    """Seconds of one of the `count` things that a compiled program does.

    It does not run here, where several threads prepare programs: devices that wait for each other must be given the same
    program first.
    """

    def program() -> float:
        started = time.perf_counter()
        jax.block_until_ready(run())
        return (time.perf_counter() - started) / count

    return program


def medians(programs: dict, repeats: int, on_run: Callable[[], None]) -> dict:
    """Runs all programs once to warm up, then in turn, `repeats` times, slow ones less often; the median seconds of each.

    Several processes run them in the same order, and all take the seconds of the main process.
    """
    programs = dict(sorted(programs.items(), key=str))
    for program in programs.values():
        program()
    seconds: dict = {name: [] for name in programs}
    spent = dict.fromkeys(programs, 0.0)
    for turn in range(repeats):
        for name, program in programs.items():
            if turn < FEWEST_RUNS or spent[name] < PATIENCE:
                started = time.perf_counter()
                seconds[name].append(program())
                spent[name] += of_main_process(time.perf_counter() - started)
            on_run()
    return {name: of_main_process(statistics.median(column)) for name, column in seconds.items()}


Item = TypeVar("Item")


def rotated(items: Sequence[Item], by: int) -> tuple[Item, ...]:
    """The items with the first `by` moved to the end, so that none always follows another."""
    first = by % len(items)
    return (*items[first:], *items[:first])


def warm_run(
    decoder: SpeculativeDecoder, prompt: list[int], params: SamplingParams
) -> tuple[GenerationResult, float]:
    """The result of a run of compiled, warm programs, and the seconds that compiling took.

    A run that had to compile is the warm-up, and is repeated.
    """
    result = decoder.generate([prompt], [params], time_phases=True)
    compile_seconds = result.stats.seconds["compile"]
    if compile_seconds > 0:
        result = decoder.generate([prompt], [params], time_phases=True)
    return result, compile_seconds
