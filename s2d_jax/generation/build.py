"""The static decoder of a target, a draft and a config."""

from __future__ import annotations

from jax.sharding import Mesh

from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.tree import TreeShape
from s2d_jax.decode.loop import Decoder
from s2d_jax.decode.target import Target
from s2d_jax.decode.verifier import ChainVerifier
from s2d_jax.draft.chain import ChainConfig
from s2d_jax.draft.none import NoDrafter
from s2d_jax.draft.segments import Segments
from s2d_jax.draft.sorted import SortedDrafter
from s2d_jax.model.transformer import Transformer
from s2d_jax.tree.drafter import TreeDrafter
from s2d_jax.tree.growth import Growth
from s2d_jax.tree.verifier import TreeVerifier
from s2d_jax.weights.model import Draft, Model

# Positions that the draft takes in at once after plain rounds: passes this wide cost least per position (docs/experiments.md).
_RETURN_WIDTH = 32


def build_decoder(
    target: Model,
    draft: Model | None,
    exits: tuple[int, ...],
    config: DecodeConfig,
    *,
    greedy: bool,
    mesh: Mesh | None = None,
) -> Decoder:
    """The static decoder: what the compiled loop is made of.

    Args:
        target, draft: the models; without a draft nothing is drafted.
        exits: layers of the draft at which tokens may leave.
        config: draft length, tree and widths.
        greedy: every row has temperature 0.
        mesh: that of the target's parameters.
    """
    vocab_size = target.config.vocab_size
    if draft is None:
        width = config.verify_width or 1
        drafter, verifier = NoDrafter(width - 1), ChainVerifier(greedy, (width,))
    elif config.tree is None:
        drafter = _chain_drafter(draft, exits, vocab_size, config, greedy)
        verifier = ChainVerifier(greedy, config.verify_widths)
    else:
        drafter = _tree_drafter(draft, exits, vocab_size, config, config.tree, greedy)
        nodes = drafter.growth.nodes
        narrow = (width for width in config.verify_widths if width < nodes)
        verifier = TreeVerifier(greedy, (*narrow, nodes), drafter)
    shown = Target(target.transformer, mesh, drafter.target_states)
    return Decoder(shown, drafter, verifier)


def _drafting_model(draft: Model) -> Transformer:
    """The draft, read through its trimmed head if it has one."""
    return draft.drafting_transformer if isinstance(draft, Draft) else draft.transformer


def _return_width(config: DecodeConfig) -> int:
    return _RETURN_WIDTH if config.guard else 0


def _chain_drafter(
    draft: Model, exits: tuple[int, ...], vocab_size: int, config: DecodeConfig, greedy: bool
) -> SortedDrafter:
    chain = ChainConfig(
        width=config.draft_width,
        vocab_size=vocab_size,
        greedy=greedy,
        sampled=config.draft_sampling == "sample",
        watched=config.costs is not None
        or config.draft_length_rule in ("confidence", "expected_gain"),
    )
    segments = Segments(_drafting_model(draft), exits, vocab_size)
    return SortedDrafter(segments, chain, config.catch_up_width, _return_width(config))


def _tree_drafter(
    draft: Model,
    exits: tuple[int, ...],
    vocab_size: int,
    config: DecodeConfig,
    shape: TreeShape,
    greedy: bool,
) -> TreeDrafter:
    growth = Growth(shape, sampled=config.draft_sampling == "sample" and not greedy)
    segments = Segments(
        _drafting_model(draft), exits, vocab_size, together=shape.leaving == "level"
    )
    return TreeDrafter(segments, growth, config.catch_up_width, _return_width(config))
