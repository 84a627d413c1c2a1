"""Whether a draft, a target and a `DecodeConfig` fit each other, checked before anything is compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.draft import check_thresholds
from s2d_jax.errors import UserError, shown
from s2d_jax.text.pairing import check_same_tokenizer
from s2d_jax.weights.model import Draft, Model
from s2d_jax.weights.vocabulary import DraftVocabulary


def opened(name: str, model: Any, load: Callable[[str | Path], Model]) -> Model:
    """The model, loaded if it is a path or a hub id; messages use `name` to say what it is for.

    Raises:
        UserError: for anything else, and as `load`.
    """
    if isinstance(model, str | Path):
        return load(model)
    if not isinstance(model, Model):
        kind = type(model).__name__
        raise UserError(
            f"{name}={shown(model)} ({kind}) is no model; give a path, or what {load.__name__} returns"
        )
    return model


def vocabulary_of(draft: Model | None) -> DraftVocabulary | None:
    """The tokens that a draft's head is read over; None for all."""
    return draft.vocabulary if isinstance(draft, Draft) else None


def num_known_tokens(draft: Model, vocab_size: int) -> int:
    """How many of `vocab_size` tokens the draft can propose: all, or those that its trimmed head lists."""
    listed = vocabulary_of(draft)
    return vocab_size if listed is None else listed.size


def resolve_exits(
    draft: Model | None, config: DecodeConfig
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The exits in use and their thresholds; a model that is no sorted draft has one exit, its last layer.

    Raises:
        UserError: for exits that the draft does not have, or thresholds that do not fit them.
    """
    if draft is None:
        return (), ()
    if not isinstance(draft, Draft):
        own_exits, own_thresholds = (draft.config.num_layers,), (0.0,)
    else:
        own_exits = draft.draft_config.exit_layers
        own_thresholds = draft.draft_config.exit_thresholds
    exits = config.exits or own_exits
    missing = sorted(set(exits) - set(own_exits))
    if missing:
        raise UserError(f"exits={exits}: the draft has no exit at {missing}; it has {own_exits}")
    if config.exit_thresholds is not None:
        thresholds = config.exit_thresholds
        check_thresholds(exits, thresholds)
    else:
        thresholds = (*(own_thresholds[own_exits.index(e)] for e in exits[:-1]), 0.0)
    return exits, thresholds


def check_pair(target: Model, draft: Model, exits: tuple[int, ...], config: DecodeConfig) -> None:
    """Refuses a draft that cannot serve this target as `config` asks.

    Raises:
        UserError: for different vocabularies, costs that are not one per exit, or a tree whose nodes have more children than
            there are tokens.
    """
    _check_vocabularies(target, draft)
    _check_costs(exits, config)
    _check_tree(target, draft, config)


def _check_costs(exits: tuple[int, ...], config: DecodeConfig) -> None:
    if config.costs is not None and len(config.costs.draft_step) != len(exits):
        raise UserError(
            f"costs.draft_step has {len(config.costs.draft_step)} values for {len(exits)} exits {exits}; give one per exit"
        )


def _check_tree(target: Model, draft: Model, config: DecodeConfig) -> None:
    known = num_known_tokens(draft, target.config.vocab_size)
    if config.tree is not None and config.tree.top_k > known:
        raise UserError(
            f"top_k={config.tree.top_k} of the tree is more than the {known} tokens that the draft knows; lower it"
        )


def _check_vocabularies(target: Model, draft: Model) -> None:
    listed = vocabulary_of(draft)
    if listed is not None and listed.ids_U[0] >= target.config.vocab_size:
        raise UserError(
            f"the draft vocabulary starts at id {listed.ids_U[0]}, the target has {target.config.vocab_size} tokens; "
            "make the list from this target's answers"
        )
    if target.tokenizer is not None and draft.tokenizer is not None:
        check_same_tokenizer(target.tokenizer, draft.tokenizer)
    elif target.config.vocab_size != draft.config.vocab_size:
        raise UserError(
            f"the draft's vocab_size={draft.config.vocab_size} differs from the target's {target.config.vocab_size} "
            "and there is no tokenizer to compare; use a draft of the target's vocabulary"
        )
