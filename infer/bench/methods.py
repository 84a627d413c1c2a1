"""The ways of decoding that a benchmark compares, by the names users type."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from s2d_jax.cli.options import DraftingOptions
from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.draft import DraftConfig
from s2d_jax.errors import UserError
from s2d_jax.generation.decoder import SpeculativeDecoder
from s2d_jax.weights.model import Draft, Model

BASELINE = "ar"
# A tree's number counts nodes, a chain's tokens.
_NAME = re.compile(r"ar|auto|(?P<base>draft|s2d|sd@\d+)(?P<tree>\+tree)?(:(?P<count>\d+))?")


@dataclasses.dataclass(frozen=True)
class Method:
    """A decoder with its name on the command line and in the tables."""

    name: str
    label: str
    decoder: SpeculativeDecoder


def parse_methods(text: str) -> tuple[str, ...]:
    """Splits "ar,sd@6,s2d"; the baseline comes first, and is added if it is missing.

    Raises:
        UserError: for an unknown name, or one given twice.
    """
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"method {name!r} is unknown; use ar, draft, s2d, auto, or sd@K with an exit K; :G drafts G tokens, as in "
                "s2d:3, +tree a tree, +tree:N one of N nodes"
            )
        if names.count(name) > 1:
            raise UserError(f"method {name!r} is given twice in {text}; name it once")
    return (BASELINE, *(name for name in names if name != BASELINE))


def build_methods(
    names: tuple[str, ...],
    target: Model,
    draft: Draft | None,
    independent: Draft | None,
    options: DraftingOptions,
) -> list[Method]:
    """Decoders of one target for all names; they share its weights and the draft's.

    Raises:
        UserError: if a method needs a draft or an exit that does not exist.
    """
    return [_build(name, target, draft, independent, options) for name in names]


def check_trees(names: tuple[str, ...], options: DraftingOptions) -> None:
    """Raises UserError for an impossible tree, for tree flags without a tree method, and for costs beside a tree method."""
    if options.tree:
        raise UserError("--tree is set by method here; add +tree, as in --methods s2d,s2d+tree")
    drafting = [_of_method(name, options) for name in names]
    for one in drafting:
        one.config()
    if (given := options.tree_flags()) and not any(one.tree for one in drafting):
        raise UserError(f"{given[0]} shapes trees; add a method with one, such as s2d+tree")
    trees = [name for name, one in zip(names, drafting, strict=True) if one.tree]
    if trees and (given := options.cost_flags()):
        raise UserError(
            f"{given[0]} is for chains; leave it out, or {trees[0]} (infer.calibrate measures what trees cost, for auto)"
        )


def _of_method(name: str, given: DraftingOptions) -> DraftingOptions:
    """The options of one method."""
    options = dataclasses.replace(given, policy_file=None)  # only `auto` reads it
    found = _NAME.fullmatch(name)
    assert found is not None, name
    count = None if found["count"] is None else int(found["count"])
    if found["tree"]:
        return options.with_tree(count)
    return options if count is None else dataclasses.replace(options, num_draft_tokens=count)


def _build(name, target, draft, independent, given: DraftingOptions) -> Method:
    options = _of_method(name, given)
    whole, _, count = name.partition(":")
    base = whole.removesuffix("+tree")
    method = _build_base(base, target, draft, independent, options, given.policy_file)
    label = f"{method.label} + tree" if options.tree else method.label
    if count:
        label += f", {count} nodes" if options.tree else f", {count} tokens"
    return dataclasses.replace(method, name=name, label=label)


def _build_base(name, target, draft, independent, options: DraftingOptions, policy_file) -> Method:
    if name == BASELINE:
        return Method(name, "Autoregressive", SpeculativeDecoder(target))
    if name == "auto" and (draft or independent):
        config = DecodeConfig(policy="auto", policy_file=policy_file)
        return Method(name, "auto", SpeculativeDecoder(target, draft or independent, config))
    if name == "draft" and independent is not None:
        config = options.config(exits=None, exit_thresholds=None)
        label = f"{Path(independent.source).stem} + SD"
        return Method(name, label, SpeculativeDecoder(target, _whole(independent), config))
    if draft is None:
        raise UserError(f"method {name!r} needs a draft; give --draft DIR")
    if name == "s2d":
        return Method(name, "SoFT + S2D", SpeculativeDecoder(target, draft, options.config()))
    if name == "draft":
        config = options.config(exits=None, exit_thresholds=None)
        return Method(name, "whole draft + SD", SpeculativeDecoder(target, _whole(draft), config))
    exit_layer, exits = int(name.removeprefix("sd@")), draft.draft_config.exit_layers
    if exit_layer not in exits:
        have = ", ".join(f"sd@{e}" for e in exits)
        raise UserError(f"method {name!r}: {draft.source} has no exit {exit_layer}; use {have}")
    config = options.config(exits=(exit_layer,), exit_thresholds=(0.0,))
    return Method(name, f"SoFT L{exit_layer} + SD", SpeculativeDecoder(target, draft, config))


def _whole(draft: Draft) -> Draft:
    """The draft without its early exits."""
    return dataclasses.replace(draft, draft_config=DraftConfig((draft.config.num_layers,)))
