"""The flags of `infer.accelerator_check`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from s2d_jax.cli.flags import flag
from s2d_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """Over how many devices the target is split."""

    tensor: Annotated[int | None, flag("INT", "all devices")] = None
    """Devices that split the target's heads, hidden units and vocabulary. The draft is whole on each."""

    def __post_init__(self):
        if self.tensor is not None and self.tensor < 1:
            raise UserError(f"mesh.tensor {self.tensor} must be at least 1; leave it out for all")


@dataclasses.dataclass(frozen=True)
class Args:
    """Measure what the library reaches on this accelerator, beside the chip's limits. Acceptance of drafts is simulated."""

    out: Annotated[Path, flag("DIR")] = Path("runs/accelerator_check")
    """Directory of accelerator_check.json, report.md and verify.png."""
    size: Annotated[Literal["7b", "1b", "tiny"] | None, flag("7b|1b|tiny", "what fits")] = None
    """Shapes of the random weights: those of LLaMA-2-7B, of a model of 1.1 billion, or of a toy."""
    model: Annotated[str | None, flag("MODEL", "random weights")] = None
    """A target to measure instead, such as SmolLM2: model directory, hub id or .gguf file, kept as bf16 on one device."""
    repeats: int = 5
    """Runs of each program; the median counts."""
    seed: int = 0
    """Seed of weights and of the coins that accept drafted tokens."""
    mesh: MeshOptions = MeshOptions()

    def __post_init__(self):
        if self.repeats < 1:
            raise UserError(f"repeats {self.repeats} must be at least 1")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"seed {self.seed} must be from 0 to {2**31 - 1}")
        if self.model is not None and self.size is not None:
            raise UserError(f"--model {self.model} has a size of its own; leave --size out")
        if self.model is not None and (self.mesh.tensor or 1) > 1:
            raise UserError(
                f"--model is measured on one device; leave --mesh.tensor {self.mesh.tensor} out"
            )
