"""The flags of `infer.generate`."""

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
    SamplingOptions,
    TreeOptions,
)
from s2d_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class AnsweringOptions:
    """What is done with the prompts."""

    stream: Switch = False
    """Answer one prompt after the other, and print text as it comes."""
    batch_size: int = 8
    """Prompts decoded together."""
    raw: Switch = False
    """Continue the bare text instead of putting it through the chat template."""
    as_conversations: Switch = False
    """Replace every answer in the conversations of --prompts by the target's own, for training.
    A run that was killed goes on with the same command."""

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"batch-size {self.batch_size} must be at least 1")


@dataclasses.dataclass(frozen=True)
class LookingOptions:
    """A look inside."""

    explain: Annotated[int, flag(unset="0, nothing")] = 0
    """Show what the first this many rounds drafted for the first prompt, with probabilities and exits, and what was accepted.
    For --tree, or greedy chains of fixed length."""
    explain_out: Annotated[Path, flag("DIR")] = Path("runs/explain")
    """Where --explain puts text, JSON and pictures, one directory per target."""
    profile: Annotated[Path | None, flag("DIR", "no trace")] = None
    """Write a trace of a warm generation here, one directory per target, for TensorBoard or Perfetto."""

    def __post_init__(self):
        if self.explain < 0:
            raise UserError(f"explain {self.explain} must be 0 or more")


@dataclasses.dataclass(frozen=True)
class Args:
    """Answer prompts with one or several targets in turn, drafting with one draft."""

    target: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], flag("MODEL")] = ()
    """Model directory, hub id or .gguf file; several are used in turn."""
    draft: Annotated[str | None, flag("MODEL", "plain decoding")] = None
    """Exported sorted draft, or any model with the same vocabulary."""
    prompt: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], flag("TEXT")] = ()
    """A prompt; several are answered together in a batch."""
    prompts: Annotated[Path | None, flag("FILE", "those of --prompt")] = None
    """JSON or JSONL with prompt, turns or messages per row, or .txt with a prompt per line.
    With --as-conversations, also the other formats that training reads: ShareGPT, saved datasets, parquet."""
    out: Annotated[Path | None, flag("FILE", "the screen")] = None
    """Write the answers here as JSONL, which train.main reads."""
    answering: tyro.conf.OmitArgPrefixes[AnsweringOptions] = AnsweringOptions()
    sampling: tyro.conf.OmitArgPrefixes[SamplingOptions] = SamplingOptions()
    chain: tyro.conf.OmitArgPrefixes[ChainOptions] = ChainOptions()
    length: tyro.conf.OmitArgPrefixes[LengthOptions] = LengthOptions()
    tree: tyro.conf.OmitArgPrefixes[TreeOptions] = TreeOptions()
    loading: tyro.conf.OmitArgPrefixes[LoadingOptions] = LoadingOptions()
    looking: tyro.conf.OmitArgPrefixes[LookingOptions] = LookingOptions()

    @property
    def drafting(self) -> DraftingOptions:
        """How tokens are drafted."""
        return DraftingOptions.of(self.chain, self.length, self.tree)
