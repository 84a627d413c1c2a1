"""Targets and drafts from paths, for command lines."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from s2d_jax.cli.command import say_devices, say_once
from s2d_jax.cli.options import DraftingOptions, LoadingOptions, MeshOptions
from s2d_jax.cli.outputs import check_directory
from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.mesh import MeshConfig
from s2d_jax.config.model import ModelConfig
from s2d_jax.decode.programs import use_compile_cache
from s2d_jax.errors import UserError
from s2d_jax.files import local_path
from s2d_jax.processes import is_main_process, number_of_processes
from s2d_jax.sharding import make_mesh
from s2d_jax.text.pairing import check_same_tokenizer
from s2d_jax.text.tokenizer import Tokenizer
from s2d_jax.weights.load import load_draft, load_model, read_description
from s2d_jax.weights.model import Draft, Model, with_trimmed_head
from s2d_jax.weights.vocabulary import read_vocabulary


def keep_programs(directory: Path | None) -> None:
    """Keeps compiled programs in `directory`, or else where $JAX_COMPILATION_CACHE_DIR says, if at all.

    Raises:
        UserError: if nothing can be kept there. JAX itself would go on without a word.
    """
    variable = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if directory is not None:
        check = check_directory if is_main_process() else local_path  # which tries and undoes
        directory = check(directory, "--compile-cache")
    elif variable and "://" not in variable:  # JAX keeps programs elsewhere, too
        check_directory(Path(variable), "$JAX_COMPILATION_CACHE_DIR")
    use_compile_cache(directory)


class Meshes(NamedTuple):
    """What targets, and the draft, are split over; None puts them on the default device."""

    target: jax.sharding.Mesh | None
    draft: jax.sharding.Mesh | None


def meshes_of_flags(options: MeshOptions) -> Meshes:
    """The meshes of `--mesh.data`, `--mesh.tensor` and `--mesh.draft`.

    Raises:
        UserError: if there are fewer devices than it takes, or if it would leave a process out.
    """
    tensor, data = options.tensor or 1, options.data or 1
    if options.data is None and number_of_processes() > 1:
        data = max(1, jax.device_count() // tensor)
    if data * tensor == 1 and number_of_processes() == 1:
        return Meshes(None, None)
    mesh = make_mesh(MeshConfig(data=data, tensor=tensor))
    return Meshes(mesh, mesh if options.draft == "split" else None)


def load_target(
    path: str,
    loading: LoadingOptions,
    drafts: Sequence[Draft | None] = (),
    *,
    raw: bool = False,
    mesh: jax.sharding.Mesh | None = None,
) -> Model:
    """A model with a tokenizer; says what a user should know about its chat template, and beside the drafts.

    Args:
        path: where the model is.
        loading: its format and chat template.
        drafts: what drafts for it, if anything does.
        raw: prompts do not go through the chat template.
        mesh: where its parameters are put; None is the default device.

    Raises:
        UserError: if it has no tokenizer, does not divide over the mesh, drafts have another tokenizer, or a chat template was
            chosen and is not used.
    """
    _check_template(loading, raw)
    model = load_model(
        path, weight_format=loading.target_format, mesh=mesh, chat_template=loading.chat_template
    )
    tokenizer = tokenizer_of(model)
    say_devices()
    others = [draft.tokenizer for draft in drafts if draft is not None]
    _say_notices(model.notices, tokenizer, others, raw)
    return model


def describe_target(
    path: str, loading: LoadingOptions, draft: str | None, *, raw: bool = False
) -> tuple[ModelConfig, Tokenizer]:
    """A target's shape and tokenizer as `load_target` gives them, and what it says, for a process that loads no weights.

    Args:
        path: where the model is.
        loading: its chat template.
        draft: where what drafts for it is, if anything does.
        raw: prompts do not go through the chat template.

    Raises:
        UserError: as `load_target`.
    """
    _check_template(loading, raw)
    config, tokenizer = read_description(path)
    tokenizer = _present(tokenizer, path)
    if loading.chat_template is not None:
        tokenizer = tokenizer.with_chat_template(loading.chat_template)
    others = [] if draft is None else [read_description(draft)[1]]
    _say_notices((), tokenizer, others, raw)
    return config, tokenizer


def _check_template(loading: LoadingOptions, raw: bool) -> None:
    if raw and loading.chat_template is not None:
        raise UserError(
            "--raw leaves the chat template out, and --chat-template chooses one; leave one of them out"
        )


def _say_notices(
    notices: Sequence[str], tokenizer: Tokenizer, others: Sequence[Tokenizer | None], raw: bool
) -> None:
    """What a user should know of a target, of its chat template, and beside the tokenizers of drafts."""
    lines = [*notices, *([] if raw else [tokenizer.template_notice])]
    for other in others:
        if other is not None:
            lines += check_same_tokenizer(tokenizer, other)
    for line in lines:
        if line is not None:
            say_once(line)


def load_listed_draft(
    path: str | None,
    vocabulary: str | None,
    weight_format: str | None,
    mesh: jax.sharding.Mesh | None = None,
) -> Draft | None:
    """The draft of `--draft`, its head read over the list of `--draft-vocabulary`.

    Args:
        path: where the draft is; None gives None.
        vocabulary: a file that `infer.trim` wrote, or `full` for all tokens; None keeps the draft's own list.
        weight_format: of the draft's weights; None is as stored, and f32 on a CPU.
        mesh: that which the draft is split over; None keeps it whole.

    Raises:
        UserError: for a list without a draft, or one that is not the draft's.
    """
    if path is None:
        if vocabulary is not None:
            raise UserError("--draft-vocabulary needs a draft; give --draft DIR")
        return None
    listed = None if vocabulary in (None, "full") else read_vocabulary(vocabulary)
    draft = load_draft(path, weight_format=weight_format, mesh=mesh)
    say_devices()
    draft = draft if vocabulary is None else with_trimmed_head(draft, listed)
    line = draft.vocabulary.notice(draft.tokenizer) if draft.vocabulary is not None else None
    for notice in (*draft.notices, *([] if line is None else [line])):
        say_once(notice)
    return draft


def load_drafting(
    path: str | None,
    loading: LoadingOptions,
    drafting: DraftingOptions,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Draft | None, DecodeConfig]:
    """The draft of `--draft`, if any, and how it is used.

    Raises:
        UserError: for flags that need a draft where there is none.
    """
    config = check_drafting(path, loading, drafting)
    named = loading.draft_vocabulary, loading.draft_format
    return load_listed_draft(path, *named, mesh), config


def check_drafting(
    path: str | None, loading: LoadingOptions, drafting: DraftingOptions
) -> DecodeConfig:
    """How the draft of `--draft` is used, before it is loaded. Raises UserError for flags that do not go together."""
    config = drafting.config()
    if (given := drafting.tree_flags()) and not drafting.tree:
        raise UserError(f"{given[0]} shapes a tree, and --tree is not given; give both")
    if path is not None:
        return config
    if loading.draft_vocabulary is not None:
        raise UserError("--draft-vocabulary needs a draft; give --draft DIR")
    if config.exits or config.exit_thresholds:
        raise UserError("--exits and --exit-thresholds need a draft; give --draft DIR")
    if config.tree:
        raise UserError("--tree is a tree of drafted tokens; give --draft DIR")
    if config.policy:
        raise UserError("--policy auto chooses how to use a draft; give --draft DIR")
    return config


def tokenizer_of(model: Model) -> Tokenizer:
    """The model's tokenizer. Raises UserError if it has none."""
    return _present(model.tokenizer, model.source)


def _present(tokenizer: Tokenizer | None, source: object) -> Tokenizer:
    if tokenizer is None:
        raise UserError(f"{source} has no tokenizer; add its tokenizer.json to the directory")
    return tokenizer
