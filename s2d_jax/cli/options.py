"""Flags that commands share, in the groups that `--help` shows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from s2d_jax.cli.flags import Switch, flag
from s2d_jax.config.costs import RoundCosts
from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.config.tree import TreeShape
from s2d_jax.errors import UserError, shown
from s2d_jax.files import local_path, parse_json, read_text

# Flags of trees, and flags of chains. A `+tree` method of infer.bench ignores the flags of chains.
_OF_TREES = ("tree_depth", "tree_top_k", "tree_nodes", "tree_leaving", "tree_paths")
_COSTS = ("draft_step_costs", "verify_costs", "guard", "narrow_widths")
_OF_CHAINS = (
    "num_draft_tokens", "draft_length_rule", "max_draft_tokens", "min_confidence", "gain_rate", *_COSTS,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen."""

    temperature: float = 0.0
    """0 is greedy."""
    top_k: Annotated[int, flag(unset="0, which keeps all")] = 0
    """Keep the k most probable tokens."""
    top_p: Annotated[float, flag(unset="1, which keeps all")] = 1.0
    """Keep the smallest set of tokens whose probability reaches this."""
    min_p: Annotated[float, flag(unset="0, which keeps all")] = 0.0
    """Drop tokens below this fraction of the largest probability."""
    seed: int = 0
    """Prompt number i is sampled with seed + i, whichever batch it is in."""
    max_new_tokens: int = 256
    """At most this many tokens per answer."""
    stop: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], flag("TEXT")] = ()
    """End an answer before this text."""

    def params(self, index: int = 0) -> SamplingParams:
        """The sampling parameters of prompt number `index`. Raises UserError for a bad value."""
        return SamplingParams(**dataclasses.asdict(self)).of_row(index)


@dataclasses.dataclass(frozen=True)
class ChainOptions:
    """Which exits of the draft are used, and how many tokens a round drafts."""

    exits: Annotated[str | None, flag("6,9,12", "all")] = None
    """The draft's exits to use; one exit is the fixed-exit policy."""
    exit_thresholds: Annotated[str | None, flag(".5,.5,0", "those of the draft")] = None
    """Confidence above which a token leaves, one per exit; the last is 0."""
    num_draft_tokens: int = 5
    """Tokens drafted per round (at the start, with the heuristic rule)."""
    draft_sampling: Literal["sample", "argmax"] = "sample"
    """At temperatures above 0: draft a sample of the exit's distribution, or its mode.
    A tree draws children without replacement, or takes the most probable ones."""
    policy: Annotated[Literal["auto"] | None, flag("auto", "as the other flags say")] = None
    """auto: draft as infer.calibrate found best for this target, device and temperature."""
    policy_file: Annotated[str | None, flag("FILE", "the draft's sorted_draft.json")] = None
    """Where infer.calibrate --out wrote the policy."""


@dataclasses.dataclass(frozen=True)
class LengthOptions:
    """Rules that end a draft early, and what they need to know."""

    draft_length_rule: Literal["fixed", "heuristic", "confidence", "expected_gain"] = "fixed"
    """heuristic: +2 after a round that accepted everything, else -1.
    confidence: a token of low confidence is the last of its round.
    expected_gain: draft on while another token pays (needs costs)."""
    max_draft_tokens: Annotated[
        int | None, flag("INT", "10 for the heuristic, else --num-draft-tokens")
    ] = None
    """The most tokens that a round may draft."""
    min_confidence: float = 0.4
    """Confidence below which the confidence rule stops."""
    gain_rate: float = 1.0
    """For expected_gain: tokens per plain round's time that drafting on must bring; 1 is plain decoding's rate."""
    draft_step_costs: Annotated[str | None, flag(".2,.3,.4", "unknown")] = None
    """Cost of drafting a token, per exit in use, in plain rounds."""
    verify_costs: Annotated[str | None, flag("1,1.1,1.3", "unknown")] = None
    """Cost of the rest of a round, after 0, 1, 2, ... drafted tokens."""
    guard: Switch = False
    """Fall back to plain rounds where drafting does not pay (needs costs)."""
    narrow_widths: Annotated[
        str | None, flag("1,3", "1 with --guard or expected_gain, else none")
    ] = None
    """Further widths of a target pass for rounds with short chains."""


@dataclasses.dataclass(frozen=True)
class TreeOptions:
    """Trees of drafted tokens instead of chains: several tokens to choose from at every depth, verified in one pass."""

    tree: Switch = False
    """Draft a tree in each round. For infer.bench, add +tree to a method instead."""
    tree_depth: int = 4
    """Levels of the tree below the last emitted token; compare with a chain of as many --num-draft-tokens."""
    tree_top_k: int = 10
    """Children of a node, and nodes of a level that get children."""
    tree_nodes: int = 60
    """The most probable nodes, which the target verifies; the last emitted token counts as one.
    When children are drawn, fewer are verified: 41 of 60 at depth 4, top-k 10."""
    tree_leaving: Literal["level", "node"] = "level"
    """With several exits. level: all nodes of a level leave as soon as one of them is confident.
    node: each node leaves on its own."""
    tree_paths: Annotated[str | None, flag("FILE", "trees follow the draft's confidence")] = None
    """A JSON list of paths of ranks: the same tree in every round. It sets depth, top-k and nodes.
    In [[0], [1], [0, 0]], [1] is the second most probable token, [0, 0] the most probable one after [0]."""


@dataclasses.dataclass(frozen=True)
class DraftingOptions(TreeOptions, LengthOptions, ChainOptions):
    """How tokens are drafted: the flags of all three groups."""

    @classmethod
    def of(cls, *groups: ChainOptions | LengthOptions | TreeOptions) -> DraftingOptions:
        """The flags of these groups together."""
        return cls(**{name: value for group in groups for name, value in vars(group).items()})

    def shape(self) -> TreeShape:
        """The tree that the flags describe. Raises UserError for a bad value, or a file that holds no paths."""
        if self.tree_paths is None:
            size = (self.tree_depth, self.tree_top_k, self.tree_nodes)
            return TreeShape(*size, leaving=self.tree_leaving)
        for name in self._changed(("tree_depth", "tree_top_k", "tree_nodes")):
            raise UserError(f"{_flag(name)} follows from --tree-paths; leave one of them out")
        return TreeShape.static(read_paths(self.tree_paths), self.tree_leaving)

    def with_tree(self, nodes: int | None = None) -> DraftingOptions:
        """The same options with a tree, of `nodes` nodes if given, and without the flags of chains.

        Raises:
            UserError: for a number of nodes beside --tree-paths.
        """
        if nodes is not None and self.tree_paths is not None:
            raise UserError(f"--tree-paths says which nodes a tree has; leave out :{nodes}")
        defaults = {f.name: f.default for f in dataclasses.fields(self) if f.name in _OF_CHAINS}
        nodes = self.tree_nodes if nodes is None else nodes
        return dataclasses.replace(self, **{**defaults, "tree": True, "tree_nodes": nodes})

    def tree_flags(self) -> list[str]:
        """The flags that shape a tree and were given."""
        return [_flag(name) for name in self._changed(_OF_TREES)]

    def cost_flags(self) -> list[str]:
        """The flags that were given and depend on measured costs, which differ between chains and trees."""
        return [_flag(name) for name in self._changed(_COSTS)]

    def _changed(self, names: tuple[str, ...]) -> list[str]:
        fields = [field for field in dataclasses.fields(self) if field.name in names]
        return [field.name for field in fields if getattr(self, field.name) != field.default]

    def config(self, **changes) -> DecodeConfig:
        """The decode configuration; `changes` replaces fields. Raises UserError for a bad value."""
        if self.tree and (given := self._changed(("num_draft_tokens", "max_draft_tokens"))):
            raise UserError(f"{_flag(given[0])} counts a chain's tokens; a tree has --tree-depth")
        values = dataclasses.asdict(self)
        values = {name: value for name, value in values.items() if name not in _OF_TREES}
        values["tree"] = self.shape() if self.tree else None
        values["exits"] = parse_numbers("exits", self.exits, int)
        values["exit_thresholds"] = parse_numbers("exit-thresholds", self.exit_thresholds, float)
        values["narrow_widths"] = parse_numbers("narrow-widths", self.narrow_widths, int)
        steps = parse_numbers("draft-step-costs", values.pop("draft_step_costs"), float)
        verify = parse_numbers("verify-costs", values.pop("verify_costs"), float)
        if (steps is None) != (verify is None):
            raise UserError("--draft-step-costs and --verify-costs go together; give both")
        values["costs"] = None if steps is None or verify is None else RoundCosts(steps, verify)
        return DecodeConfig(**{**values, **changes})


@dataclasses.dataclass(frozen=True)
class LoadingOptions:
    """How models are read and kept."""

    target_format: Annotated[
        Literal["f32", "bf16", "int8"] | None, flag(unset="as stored; f32 on a CPU")
    ] = None
    """Format of the target's weights; int8 takes a quarter of the memory of f32, and changes the target a little."""
    draft_format: Annotated[
        Literal["f32", "bf16", "int8"] | None, flag(unset="as stored; f32 on a CPU")
    ] = None
    """Format of the draft's weights; it does not change the output, which stays the target's."""
    draft_vocabulary: Annotated[
        str | None, flag("FILE", "the list in the draft's sorted_draft.json, if any")
    ] = None
    """List of tokens that the draft's head is read over, from infer.trim; full: all tokens."""
    chat_template: Annotated[str | None, flag("NAME_OR_FILE", "the model's default")] = None
    """Chat template of the targets: one that the model has under this name, a file with one, or vicuna."""
    compile_cache: Annotated[Path | None, flag("DIR", "$JAX_COMPILATION_CACHE_DIR, if set")] = None
    """Keep compiled programs here, so that the next start is quick."""


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """The devices that the target lies on (docs/pods.md)."""

    data: Annotated[int | None, flag("INT", "1; of several processes, all devices over tensor")] = (
        None
    )
    """Groups of devices. Each holds the whole target, and decodes its share of a batch's rows."""
    tensor: Annotated[int | None, flag("INT", "1")] = None
    """Devices of a group, which split the target's heads, hidden units and vocabulary."""
    draft: Literal["whole", "split"] = "whole"
    """split: the devices of a group split the draft as they do the target; whole: each has all of it."""

    def __post_init__(self):
        for name in ("data", "tensor"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(
                    f"mesh.{name} {value} must be at least 1; leave it out for one device"
                )
        if self.draft == "split" and (self.tensor or 1) == 1:
            raise UserError("--mesh.draft split splits over --mesh.tensor; give that, too")


def read_paths(file: str) -> list[list[int]]:
    """The paths of a static tree from a JSON file. Raises UserError if it holds none."""
    expected = "write a list of lists of ranks from 0, such as [[0], [1], [0, 0]]"
    place = local_path(file, "--tree-paths")
    paths = parse_json(read_text(place, expected), f"--tree-paths {place}", expected)
    if not isinstance(paths, list) or not all(isinstance(path, list) for path in paths):
        raise UserError(f"--tree-paths {file} is not a list of paths; {expected}")
    for rank in (rank for path in paths for rank in path):
        if type(rank) is not int:
            raise UserError(f"--tree-paths {file} has the rank {shown(rank)}; {expected}")
    return paths


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_numbers(flag: str, text: str | None, number: type) -> tuple | None:
    """Parses "6,9,12" into a tuple of `number`; None stays None. Raises UserError."""
    if text is None:
        return None
    try:
        return tuple(number(part) for part in text.split(","))
    except ValueError:
        example = "6,9,12" if number is int else "0.5,0.5,0"
        raise UserError(
            f"--{flag} {text!r} is not a list of numbers; write it like {example}"
        ) from None


def require_targets(targets: tuple[str, ...]) -> None:
    """Raises UserError unless at least one target was given."""
    if not targets:
        raise UserError("no --target was given; give a model directory or a .gguf file")
