"""Measures what the parts of a round cost, each inside the compiled loop that it runs in when decoding."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from s2d_jax.calibration.costs import Costs
from s2d_jax.calibration.time_trees import tree_builders, tree_costs_of
from s2d_jax.calibration.timing import (
    CONTEXT,
    Program,
    filled,
    head_program,
    placed_beside,
    prepared,
    timed,
)
from s2d_jax.config.costs import RoundCosts
from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.decode.acceptance import accept_greedy, accept_sampled
from s2d_jax.decode.programs import compile_part
from s2d_jax.draft.drafter import Proposal
from s2d_jax.draft.sorted import SortedDrafter
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.sampling import SamplingArrays, keys_of, probabilities
from s2d_jax.weights.model import Draft

# Rounds per measurement, drafted tokens per round, and positions that a row has missed after plain rounds.
ROUNDS, TOKENS, RETURN = 4, 4, 32


def verify_program(target, width: int) -> Program:
    """Seconds of a round of plain decoding whose target pass has `width` positions."""
    decoder = SpeculativeDecoder(target, None, DecodeConfig(verify_width=width))
    static, args, state = prepared(decoder, rounds=ROUNDS)
    inputs = (*args[:2], state)
    run = compile_part(static.run, inputs)
    return timed(lambda: run(*inputs).rounds_B, ROUNDS)


def draft_programs(target, draft: Draft, exits: tuple[int, ...]) -> dict[tuple, Program]:
    """Measures seconds of drafting a token, by the exit that is forced: `("step", exit, exits)`; and of a round that
    first takes in what a row missed while it was plain: `("behind", exit, exits)`."""
    # With costs the drafter computes what the rules that may end a chain need, as it will under a policy.
    nothing = RoundCosts((0.0,) * len(exits), (1.0,) * (TOKENS + 1))
    config = DecodeConfig(exits=exits, num_draft_tokens=TOKENS, costs=nothing)
    decoder = SpeculativeDecoder(target, draft, config)
    static, args, state = prepared(decoder, rounds=ROUNDS * (TOKENS + 1))
    assert isinstance(static.drafter, SortedDrafter)  # it drafts chains
    drafter = dataclasses.replace(static.drafter, return_width=RETURN)
    params, request, tokens_BC, _ = args
    placement, rows = placed_beside(target)

    def rounds(params, request, tokens_BC, draft_state, behind_B):
        length_B = jnp.full_like(behind_B, CONTEXT)

        def one(_, draft_state):
            # One position waits, as after most rounds, or `behind` more.
            draft_state = drafter.rewind(draft_state, length_B - 1 - behind_B)
            count_B = jnp.full_like(length_B, TOKENS)
            return drafter.propose(
                params, draft_state, tokens_BC, length_B, count_B, request.key_B, request, {}
            )[1]

        return jax.lax.fori_loop(0, ROUNDS, one, draft_state)

    ready = filled(state.draft_state, state.length_B - 1)

    def inputs(thresholds, behind):
        asked = request.replace(exit_threshold_E=jnp.asarray(thresholds, jnp.float32))
        behind_B = placement.put(jnp.full(rows, behind, jnp.int32))
        whole = placement.put(asked)
        return params["draft"], whole, tokens_BC, ready, behind_B

    run = compile_part(rounds, inputs((0.0,) * len(exits), 0))

    def program(thresholds, behind, count):
        given = inputs(thresholds, behind)
        return timed(lambda: drafter.stats(run(*given))["exit_counts"], count)

    steps = ROUNDS * TOKENS
    # No confidence exceeds a threshold of 1; every confidence exceeds -1.
    forcing = [(1.0,) * index + (-1.0,) * (len(exits) - index) for index in range(len(exits))]
    found: dict[tuple, Program] = {}
    for exit, thresholds in zip(exits, forcing, strict=True):
        found["step", exit, exits] = program(thresholds, 0, steps)
    found["behind", exits[-1], exits] = program(forcing[-1], RETURN + 1, ROUNDS)
    return found


def judge_program(target, width: int, temperature: float) -> Program:
    """Seconds of accepting: argmax when greedy, probabilities and coins when sampled."""
    V, G = target.config.vocab_size, width - 1
    placement, rows = placed_beside(target)
    sampling = SamplingArrays.stack([SamplingParams(temperature=temperature)] * rows)
    drafted_BGV = jnp.full((rows, G, V), 1.0 / V, jnp.float32)
    nothing_BG = jnp.zeros((rows, G), jnp.int32)
    proposal = Proposal(nothing_BG, jnp.full(rows, G, jnp.int32), drafted_BGV, nothing_BG)

    def judge(logits_BTV, sampling, proposal, key_B):
        def one(_, logits_BTV):
            if temperature == 0:
                _, token_B = accept_greedy(proposal, logits_BTV)
            else:
                probs_BTV = probabilities(logits_BTV, sampling)
                _, token_B = accept_sampled(proposal, probs_BTV, key_B)
            return logits_BTV.at[:, :, 0].add(token_B[:, None].astype(jnp.float32) * 1e-6)

        return jax.lax.fori_loop(0, ROUNDS, one, logits_BTV)

    logits_BTV = jnp.zeros((rows, width, V), jnp.float32)
    inputs = tuple(map(placement.put, (logits_BTV, sampling, proposal, keys_of([0] * rows))))
    run = compile_part(judge, inputs)
    return timed(lambda: run(*inputs), ROUNDS)


def program_builders(
    target, draft: Draft, widths: Sequence[int], temperatures: Sequence[float], *, trees: bool
) -> list[Callable[[], dict[tuple, Program]]]:
    """Independent functions that compile the programs that `costs_of` needs, by name."""
    exits = draft.draft_config.exit_layers
    builders: list[Callable[[], dict[tuple, Program]]] = []

    def add(build, *names):
        builders.append(lambda: {names: build()})

    for width in widths:
        add(functools.partial(verify_program, target, width), "verify", width)
    chosen = [(exit,) for exit in exits] + ([exits] if len(exits) > 1 else [])
    builders += [functools.partial(draft_programs, target, draft, used) for used in chosen]
    add(functools.partial(head_program, target, draft), "head")
    for temperature in {0.0, *temperatures}:
        for width in widths:
            build = functools.partial(judge_program, target, width, temperature)
            add(build, "judge", width, temperature)
    return builders + (tree_builders(target, draft) if trees else [])


def costs_of(
    seconds: dict,
    draft: Draft,
    widths: Sequence[int],
    temperature: float,
    chunk: int,
    *,
    trees: bool,
) -> Costs:
    """Computes the costs from the medians. A sampled round is a greedy one that accepts and chooses drafts differently."""
    exits = draft.draft_config.exit_layers

    def judging(width):
        return seconds["judge", width, temperature] - seconds["judge", width, 0.0]

    drawing = judging(1)
    alone = {exit: seconds["step", exit, (exit,)] + drawing for exit in exits}
    through = {exit: seconds["step", exit, exits] + drawing for exit in exits}
    catch_up = {
        exit: max(seconds["behind", exit, (exit,)] - TOKENS * seconds["step", exit, (exit,)], 0.0)
        / RETURN
        for exit in exits
    }
    return Costs(
        verify={width: seconds["verify", width] + judging(width) for width in widths},
        head=seconds["head",] + drawing,
        alone=alone,
        through=through,
        catch_up=catch_up,
        chunk=chunk,
        tree=tree_costs_of(seconds, draft, drawing) if trees else None,
    )
