"""The flags of `infer.calibrate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from s2d_jax.cli.flags import Switch, flag
from s2d_jax.cli.options import LoadingOptions, MeshOptions
from s2d_jax.config.plain import plain_fields
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.errors import UserError
from s2d_jax.files import SHIPPED

DEFAULT_QUESTIONS = SHIPPED / "configs" / "demo_prompts_train.jsonl"


@dataclasses.dataclass(frozen=True)
class EffortOptions:
    """How much is measured."""

    prompts: int = 6
    """Answers that the trace is recorded on; the best candidates are timed on some of them."""
    new_tokens: int = 48
    """Tokens of each answer."""
    minutes: float = 9.5
    """No more prompts are timed after this many minutes per target; it does not limit compiling and recording."""
    trees: Switch = True
    """Compare trees of tokens too."""
    raw: Switch = False
    """Leave the chat template out."""

    def __post_init__(self):
        plain_fields(self)
        for name in ("prompts", "new_tokens", "minutes"):
            value = getattr(self, name)
            if value <= 0:
                raise UserError(f"{name.replace('_', '-')} {value} must be above 0")
        if self.new_tokens < 2:  # the first comes from prefill, and is not drafted
            raise UserError(f"new-tokens {self.new_tokens} must be at least 2")


@dataclasses.dataclass(frozen=True)
class Args:
    """Measure costs, record acceptance, compute the best policy, confirm it, and write it down."""

    target: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], flag("MODEL")] = ()
    """Model directory, hub id or .gguf file; several are calibrated in turn."""
    draft: Annotated[str | None, flag("MODEL", "none; must be given")] = None
    """Exported sorted draft, or any model with the same vocabulary."""
    questions: Annotated[Path, flag("FILE", "demo prompts that come with s2d-jax")] = (
        DEFAULT_QUESTIONS
    )
    """Prompts like those of later use."""
    temperature: tyro.conf.UseAppendAction[tuple[float, ...]] = ()
    """Temperatures to calibrate for. Without this flag: 0 and 1."""
    out: Annotated[Path | None, flag("FILE", "the draft's sorted_draft.json")] = None
    """Write policies here (see --policy-file of infer.generate)."""
    effort: tyro.conf.OmitArgPrefixes[EffortOptions] = EffortOptions()
    loading: tyro.conf.OmitArgPrefixes[LoadingOptions] = LoadingOptions()
    mesh: MeshOptions = MeshOptions()

    def __post_init__(self):
        for temperature in self.temperature:
            SamplingParams(temperature=temperature)
