"""Measures what the parts of a round with a tree cost, each inside the compiled loop that it runs in when decoding."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from s2d_jax.calibration.costs import TreeCosts
from s2d_jax.calibration.timing import (
    CONTEXT,
    Program,
    filled,
    head_program,
    placed_beside,
    prepared,
    timed,
)
from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.tree import TreeShape
from s2d_jax.decode.programs import compile_part
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.tree.drafter import TreeProposal
from s2d_jax.tree.nodes import Tree
from s2d_jax.weights.model import Draft

# The sizes that are measured; those between are interpolated.
MEASURED_NODES, MEASURED_TOP_KS = (8, 16, 60), (2, 10)
# Levels of the trees that are grown; levels of those that are verified; rounds per measurement.
GROWN, VERIFIED, ROUNDS = 3, 4, 2


def level_programs(target, draft: Draft, top_k: int) -> dict[tuple, Program]:
    """Seconds of growing a tree, by its levels and the exit that is forced on them: `("grow", top_k, levels, exit)`."""
    exits = draft.draft_config.exit_layers
    config = DecodeConfig(exits=exits, tree=TreeShape(GROWN, top_k, 2 * top_k + 1))
    decoder = SpeculativeDecoder(target, draft, config)
    static, args, state = prepared(decoder, rounds=ROUNDS * (GROWN + 1))
    drafter, (params, request, tokens_BC, _) = static.drafter, args
    placement, rows = placed_beside(target)

    def rounds(params, request, tokens_BC, draft_state, levels_B):
        length_B = jnp.full_like(levels_B, CONTEXT)

        def one(_, carry):
            draft_state, used_1 = carry
            # One position waits, as after most rounds.
            draft_state = drafter.rewind(draft_state, length_B - 1)
            proposal, draft_state = drafter.propose(
                params,
                draft_state,
                tokens_BC,
                length_B,
                levels_B,
                request.key_B,
                request,
                {},
            )
            # The sum uses all of the tree, so that XLA computes all of it.
            leaves = [jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(proposal.tree)]
            return draft_state, used_1 + sum(leaves)

        return jax.lax.fori_loop(0, ROUNDS, one, (draft_state, jnp.zeros(1, jnp.float32)))[1]

    ready = filled(state.draft_state, state.length_B - 1)

    def inputs(thresholds, levels):
        asked = request.replace(exit_threshold_E=jnp.asarray(thresholds, jnp.float32))
        levels_B = placement.put(jnp.full(rows, levels, jnp.int32))
        whole = placement.put(asked)
        return params["draft"], whole, tokens_BC, ready, levels_B

    run = compile_part(rounds, inputs((0.0,) * len(exits), GROWN))
    found: dict[tuple, Program] = {}
    for index, exit in enumerate(exits):  # no confidence exceeds 1, every one exceeds -1
        thresholds = (*(1.0 for _ in exits[:index]), *(-1.0 for _ in exits[index:]))
        for levels in (1, GROWN):
            given = functools.partial(run, *inputs(thresholds, levels))
            found["grow", top_k, levels, exit] = timed(given, ROUNDS)
    return found


def verify_tree_program(target, draft: Draft, nodes: int) -> Program:
    """Seconds of a round with a tree of `nodes`, without growing it, when a path through all levels is accepted."""
    shape = TreeShape(VERIFIED, max(MEASURED_TOP_KS), nodes)
    decoder = SpeculativeDecoder(target, draft, DecodeConfig(tree=shape))
    count = max(1, ROUNDS * MEASURED_NODES[0] // nodes)
    static, args, state = prepared(decoder, rounds=count * (VERIFIED + 1))
    state = state.replace(draft_state=filled(state.draft_state, state.length_B - 1))
    placement, groups = placed_beside(target)
    proposal = placement.put(_proposal(groups, nodes, shape))

    def rounds(params, request, state, proposal):
        def one(_, state):
            verified, state = static.verify(params, request, state, proposal)
            # Makes the target agree with all that was drafted.
            logits_BMV = verified.logits_BTV.at[:, :, 0].set(1e9)
            return static.accept(request, state, verified.replace(logits_BTV=logits_BMV))

        return jax.lax.fori_loop(0, count, one, state)

    inputs = (*args[:2], state, proposal)
    run = compile_part(rounds, inputs)
    return timed(lambda: run(*inputs).rounds_B, count)


def _proposal(rows: int, nodes: int, shape: TreeShape) -> TreeProposal:
    """In each row a path through all levels, and further children of the root; the draft ran all of the path but its end."""
    depth = np.minimum(np.arange(nodes), shape.depth)
    depth[shape.depth + 1 :] = 1
    on_path = np.arange(nodes) <= shape.depth
    parent = np.where(on_path, np.maximum(np.arange(nodes) - 1, 0), 0)
    slot = np.where(on_path & (depth < shape.depth), 1 + (depth - 1) * shape.top_k, -1)
    slot[0] = 0
    zeros_BM = jnp.zeros((rows, nodes), jnp.int32)

    def in_each_row(values):
        return jnp.asarray(np.tile(values, (rows, 1)), jnp.int32)

    tree = Tree(
        tokens_BM=zeros_BM,
        parent_BM=in_each_row(parent),
        depth_BM=in_each_row(depth),
        valid_BM=zeros_BM == 0,
        slot_BM=in_each_row(slot),
        score_BM=jnp.zeros((rows, nodes), jnp.float32),
        exit_BM=zeros_BM,
    )
    return TreeProposal(tree, jnp.full(rows, shape.depth, jnp.int32), None)


def tree_builders(target, draft: Draft) -> list[Callable[[], dict[tuple, Program]]]:
    """Functions that compile the programs that `tree_costs_of` needs."""
    builders: list[Callable[[], dict[tuple, Program]]] = []

    def add(build, *names):
        builders.append(lambda: {names: build()})

    for nodes in MEASURED_NODES:
        add(functools.partial(verify_tree_program, target, draft, nodes), "verify tree", nodes)
    for top_k in MEASURED_TOP_KS:
        builders.append(functools.partial(level_programs, target, draft, top_k))
        add(functools.partial(head_program, target, draft, top_k), "head", top_k)
    return builders


def tree_costs_of(seconds: dict, draft: Draft, drawing: float) -> TreeCosts:
    """Computes the costs of trees from the medians.

    Args:
        seconds: medians, by the names of the programs.
        draft: the draft that they were measured with.
        drawing: the extra cost of a token that is drawn. Children are not drawn.
    """
    exits = draft.draft_config.exit_layers

    def grown(top_k, levels, exit):
        return seconds["grow", top_k, levels, exit]

    level = {
        top_k: {
            exit: max(grown(top_k, GROWN, exit) - grown(top_k, 1, exit), 0.0) / (GROWN - 1)
            for exit in exits
        }
        for top_k in MEASURED_TOP_KS
    }
    root = {
        exit: sum(grown(top_k, 1, exit) for top_k in MEASURED_TOP_KS) / len(MEASURED_TOP_KS)
        for exit in exits
    }
    return TreeCosts(
        # A tree never costs more than one with more nodes; noise may measure otherwise.
        verify={
            n: min(seconds["verify tree", m] for m in MEASURED_NODES if m >= n)
            for n in MEASURED_NODES
        },
        visit=drawing,
        level={1: root, **level},
        head={1: seconds["head",], **{top_k: seconds["head", top_k] for top_k in MEASURED_TOP_KS}},
    )
