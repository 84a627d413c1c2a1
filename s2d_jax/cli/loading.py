"""Targets and drafts from paths, for command lines."""

from __future__ import annotations

from s2d_jax.cli.command import say_devices, say_notices
from s2d_jax.cli.options import DraftingOptions, LoadingOptions
from s2d_jax.config.decode import DecodeConfig
from s2d_jax.errors import UserError
from s2d_jax.text.tokenizer import Tokenizer
from s2d_jax.weights.load import load_draft, load_model
from s2d_jax.weights.model import Draft, Model, with_trimmed_head
from s2d_jax.weights.vocabulary import read_vocabulary


def load_target(path: str, weight_format: str) -> Model:
    """A model with a tokenizer. Raises UserError if it has none."""
    model = load_model(path, weight_format=weight_format)
    say_notices(model.notices)
    tokenizer_of(model)
    say_devices()
    return model


def load_listed_draft(path: str | None, vocabulary: str | None, weight_format: str) -> Draft | None:
    """The draft of `--draft`, its head read over the list of `--draft-vocabulary`.

    Args:
        path: where the draft is; None gives None.
        vocabulary: a file that `infer.trim` wrote, or `full` for all tokens; None keeps the draft's own list.
        weight_format: of the draft's weights.

    Raises:
        UserError: for a list without a draft, or one that is not the draft's.
    """
    if path is None:
        if vocabulary is not None:
            raise UserError("--draft-vocabulary needs a draft; give --draft DIR")
        return None
    listed = None if vocabulary in (None, "full") else read_vocabulary(vocabulary)
    draft = load_draft(path, weight_format=weight_format)
    say_notices(draft.notices)
    say_devices()
    return draft if vocabulary is None else with_trimmed_head(draft, listed)


def load_drafting(
    path: str | None, loading: LoadingOptions, drafting: DraftingOptions
) -> tuple[Draft | None, DecodeConfig]:
    """The draft of `--draft`, if any, and how it is used.

    Raises:
        UserError: for flags that need a draft where there is none.
    """
    config = drafting.config()
    if (given := drafting.tree_flags()) and not drafting.tree:
        raise UserError(f"{given[0]} shapes a tree, and --tree is not given; give both")
    draft = load_listed_draft(path, loading.draft_vocabulary, loading.draft_format)
    if draft is None and (config.exits or config.exit_thresholds):
        raise UserError("--exits and --exit-thresholds need a draft; give --draft DIR")
    if draft is None and config.tree:
        raise UserError("--tree is a tree of drafted tokens; give --draft DIR")
    if draft is None and config.policy:
        raise UserError("--policy auto chooses how to use a draft; give --draft DIR")
    return draft, config


def tokenizer_of(model: Model) -> Tokenizer:
    """The model's tokenizer. Raises UserError if it has none."""
    if model.tokenizer is None:
        raise UserError(f"{model.source} has no tokenizer; add its tokenizer.json to the directory")
    return model.tokenizer
