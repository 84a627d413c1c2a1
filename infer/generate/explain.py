"""What single rounds drafted, and what of it was accepted: `infer.generate --explain N`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from infer.generate.explain_show import round_figure, round_tree, rounds_json, rounds_text
from infer.generate.rounds import Node, Round
from s2d_jax.cli.figures import save_figure
from s2d_jax.cli.loading import tokenizer_of
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.config.tree import TreeShape
from s2d_jax.decode import programs as compilation
from s2d_jax.errors import UserError
from s2d_jax.files import write_text
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.tree.nodes import Tree
from s2d_jax.weights.model import Draft


def explain(
    console: Console,
    decoder: SpeculativeDecoder,
    prompt: list[int],
    params: SamplingParams,
    count: int,
    directory: Path,
) -> None:
    """Decodes the first `count` rounds after `prompt`, prints their trees, and writes them to `directory`.

    There, trees.txt holds what is printed, trees.json the same for programs, and round_1.png and so on the pictures.

    Raises:
        UserError: for a decoder that drafts nothing, or for chains that are not greedy or not of fixed length.
    """
    rounds = read_rounds(decoder, prompt, params, count)
    for round in rounds:
        console.print(round_tree(round))
    write_text(directory / "trees.txt", rounds_text(rounds))
    write_text(directory / "trees.json", rounds_json(rounds))
    draft = decoder.draft
    exits = draft.draft_config.exit_layers if isinstance(draft, Draft) else decoder.exits
    for round in rounds:
        save_figure(round_figure(round, exits), directory / f"round_{round.number}.png")
    console.print(f"{len(rounds)} rounds written to {directory}", soft_wrap=True)


def read_rounds(
    decoder: SpeculativeDecoder, prompt: list[int], params: SamplingParams, count: int
) -> list[Round]:
    """The first `count` rounds after `prompt`, fewer if the answer ends; they are the rounds of `generate`, run one by one."""
    decoder = drafting_trees(decoder, params.temperature)
    # Room for the whole answer, because nothing grows the caches here.
    config = dataclasses.replace(decoder.config, initial_room=params.max_new_tokens)
    decoder = SpeculativeDecoder(decoder.target, decoder.draft, config)
    static, width, args = decoder.prepare([prompt], [params])
    model_params, request, *_ = args
    prefill, *_ = compilation.prefill_program(static, width, args)
    state = prefill(*args)
    parts, _ = compilation.round_programs(static, (model_params, request, state))
    rounds = []
    while len(rounds) < count and not state.done_B.all() and static.has_room(state):
        start = int(state.length_B[0])
        proposal, state = parts.propose(model_params, request, state)
        verified, state = parts.verify(model_params, request, state, proposal)
        state = parts.accept(request, state, verified)
        emitted = np.asarray(state.tokens_BC)[0, start : int(state.length_B[0])].tolist()
        tree = jax.tree.map(lambda leaf: np.asarray(leaf)[0], proposal.tree)
        rounds.append(_round(len(rounds) + 1, decoder, tree, emitted))
    return rounds


def drafting_trees(decoder: SpeculativeDecoder, temperature: float) -> SpeculativeDecoder:
    """The decoder that runs at this temperature; a greedy chain of fixed length is drafted as the tree of a single path.

    Raises:
        UserError: for a decoder that drafts nothing, or other chains.
    """
    asked, decoder = decoder.config, decoder.settled(temperature)
    config = decoder.config
    if decoder.draft is None:
        raise UserError("--explain shows what a draft proposes, and nothing is drafted here")
    if config.tree is not None:
        return decoder
    if temperature > 0 or config.draft_length_rule != "fixed" or config.guard:
        remedy = "add --tree, or use temperature 0, the fixed rule and no guard"
        if asked.policy is not None:
            remedy = "the policy has other chains here, so leave out --policy auto"
        raise UserError(f"--explain shows trees, and greedy chains of a fixed length; {remedy}")
    chain = TreeShape.static([(0,) * config.num_draft_tokens])
    config = dataclasses.replace(config, tree=chain, narrow_widths=None, costs=None)
    return SpeculativeDecoder(decoder.target, decoder.draft, config)


def _round(number: int, decoder: SpeculativeDecoder, tree: Tree, emitted: list[int]) -> Round:
    """Puts together what was drafted (arrays without a batch axis) and what was then emitted."""
    tokenizer = tokenizer_of(decoder.target)

    def text(token_id):
        return tokenizer.decode([token_id], skip_special_tokens=False)

    path = _accepted(tree, emitted)
    kept = [int(i) for i in np.flatnonzero(tree.valid_BM)]
    new_index = {old: new for new, old in enumerate(kept)}
    nodes = []
    for i in kept:
        parent, token_id = int(tree.parent_BM[i]), int(tree.tokens_BM[i])
        nodes.append(
            Node(
                parent=new_index[parent],
                depth=int(tree.depth_BM[i]),
                token_id=token_id,
                text=text(token_id),
                probability=float(np.exp(tree.score_BM[i] - tree.score_BM[parent])) if i else None,
                exit=decoder.exits[int(tree.exit_BM[i])] if i else None,
                accepted=i in path,
            )
        )
    own = emitted[len(path) - 1] if len(emitted) >= len(path) else None
    return Round(number, tuple(nodes), own, None if own is None else text(own))


def _accepted(tree: Tree, emitted: list[int]) -> list[int]:
    """The path from the root on whose tokens begin `emitted`.

    It is the accepted path: if the target's own token were that of a child of the last node, the child would be accepted.
    """
    path = [0]
    for token_id in emitted:
        children = (tree.parent_BM == path[-1]) & tree.valid_BM & (tree.tokens_BM == token_id)
        children[0] = False  # the root is its own parent
        if not children.any():
            break
        path.append(int(children.argmax()))
    return path
