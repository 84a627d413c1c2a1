"""The flags of `infer.generate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from s2d_jax.cli.options import (
    ComputeOptions,
    DraftingOptions,
    DraftOptions,
    SamplingOptions,
)
from s2d_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Args:
    """Answer prompts with one or several targets in turn, drafting with one draft."""

    target: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Model directory, hub id or .gguf file; several are used in turn."""
    draft: str | None = None
    """Exported sorted draft, or any model with the same vocabulary. Without it: plain decoding."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A prompt; several are answered together in a batch."""
    prompts: Path | None = None
    """JSONL with prompt, turns or messages per row, or .txt with a prompt per line; with
    --as-conversations whatever training reads as well: ShareGPT, saved datasets, parquet."""
    as_conversations: bool = False
    """Replace every answer in the conversations of --prompts by the target's own, for training. A run
    that was killed goes on with the same command."""
    out: Path | None = None
    """Write the answers here as JSONL, which train.main reads. Default: show them."""
    raw: bool = False
    """Continue the bare text instead of putting it through the chat template."""
    batch_size: int = 8
    """Prompts decoded together."""
    stream: bool = False
    """Answer one prompt after the other, and print text as it comes."""
    profile: Path | None = None
    """Write a trace of a warm generation here, one directory per target, for TensorBoard or Perfetto."""
    explain: int = 0
    """Show what the first so many rounds after the first prompt drafted, with probabilities and exits, and what
    was accepted: --tree, or a greedy chain of fixed length."""
    explain_out: Path = Path("runs/explain")
    """Directory of what --explain shows, as text, JSON and pictures, one directory per target."""
    draft_options: tyro.conf.OmitArgPrefixes[DraftOptions] = DraftOptions()
    sampling: tyro.conf.OmitArgPrefixes[SamplingOptions] = SamplingOptions()
    drafting: tyro.conf.OmitArgPrefixes[DraftingOptions] = DraftingOptions()
    compute: tyro.conf.OmitArgPrefixes[ComputeOptions] = ComputeOptions()

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"batch-size {self.batch_size} must be at least 1")
        if self.explain < 0:
            raise UserError(f"explain {self.explain} must be 0 or more")
