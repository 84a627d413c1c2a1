"""The flags of `infer.bench`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from s2d_jax.cli.flags import Switch, flag
from s2d_jax.cli.options import (
    ChainOptions,
    DraftingOptions,
    LengthOptions,
    LoadingOptions,
    MeshOptions,
    SamplingOptions,
    TreeOptions,
)
from s2d_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class MeasuringOptions:
    """What is measured, and how often."""

    max_questions: Annotated[int | None, flag("INT", "all")] = None
    """Only the first this many questions."""
    categories: Annotated[str | None, flag("A,B", "all")] = None
    """Only these categories."""
    repeats: int = 1
    """Runs of each method on each prompt."""
    independent_draft: Annotated[str | None, flag("MODEL", "none")] = None
    """Another model of the same vocabulary, for the method `draft`."""
    raw: Switch = False
    """Leave the chat template out."""
    skip_identity_check: Switch = False
    """Do not compare greedy tokens with the width-matched reference."""
    phase_questions: Annotated[int, flag(unset="0, none")] = 0
    """On the first this many questions, split the time of a round into draft, verify and rest."""
    profile: Annotated[Path | None, flag("DIR", "no trace")] = None
    """Write a trace of a warm generation of each method here, for TensorBoard or Perfetto."""
    kernels: Switch = False
    """Time the forms of matrix products instead, with the first target's shapes; needs no weights."""

    def __post_init__(self):
        if self.repeats < 1:
            raise UserError(f"repeats {self.repeats} must be at least 1")
        if self.phase_questions < 0:
            raise UserError(f"phase-questions {self.phase_questions} must be 0 or more")


@dataclasses.dataclass(frozen=True)
class Args:
    """Compare ways of decoding on the same prompts, one prompt at a time."""

    target: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], flag("MODEL")] = ()
    """Model directory, hub id or .gguf file; several are measured in turn."""
    draft: Annotated[str | None, flag("MODEL", "none")] = None
    """Exported sorted draft, loaded once for all targets."""
    questions: Annotated[Path | None, flag("FILE", "none; must be given")] = None
    """Prompts file, or Spec-Bench's (question_id, category, turns)."""
    methods: str = "ar,s2d"
    """Some of ar, draft, sd@K (exit K of the draft), s2d, auto. The baseline, ar, is always measured.
    :G after a method drafts G tokens a round, as in s2d:2,s2d:5.
    +tree after a method drafts a tree, +tree:N a tree of N nodes, as in s2d+tree:16."""
    out: Annotated[Path, flag("DIR")] = Path("runs/bench")
    """Directory of report.json, report.md, samples.jsonl and plots."""
    measuring: tyro.conf.OmitArgPrefixes[MeasuringOptions] = MeasuringOptions()
    sampling: tyro.conf.OmitArgPrefixes[SamplingOptions] = SamplingOptions()
    chain: tyro.conf.OmitArgPrefixes[ChainOptions] = ChainOptions()
    length: tyro.conf.OmitArgPrefixes[LengthOptions] = LengthOptions()
    tree: tyro.conf.OmitArgPrefixes[TreeOptions] = TreeOptions()
    loading: tyro.conf.OmitArgPrefixes[LoadingOptions] = LoadingOptions()
    mesh: MeshOptions = MeshOptions()

    @property
    def drafting(self) -> DraftingOptions:
        """How tokens are drafted."""
        return DraftingOptions.of(self.chain, self.length, self.tree)
