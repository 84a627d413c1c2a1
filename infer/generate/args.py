"""The flags of `infer.generate`."""

from __future__ import annotations

import dataclasses
import re
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
from s2d_jax.errors import UserError, printable, shown

_ADDRESS = re.compile(r"\S+:\d+")


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
class RayOptions:
    """A cluster of machines, each decoding with the whole model (docs/ray.md)."""

    ray: Annotated[str | None, flag("ADDRESS", "this process answers")] = None
    """auto: the Ray cluster that this machine belongs to; HOST:PORT: another one; local: a Ray that is started here.
    Needs --out. A run that was killed goes on with the same command."""
    ray_workers: Annotated[int | None, flag("INT", "as many as the cluster has room for")] = None
    """Decoders, each with the whole target and draft."""
    ray_resources: Annotated[str | None, flag("GPU=1", "one decoder per machine, on its CPU")] = (
        None
    )
    """What each decoder asks for: GPU=1, or TPU=4, or several such as GPU=1,CPU=8."""

    def __post_init__(self):
        if self.ray is None and (self.ray_workers, self.ray_resources) != (None, None):
            raise UserError("--ray-workers and --ray-resources are of a cluster; give --ray, too")
        if self.ray is not None and self.ray.startswith("ray://"):
            raise UserError(
                f"--ray {printable(self.ray)} is an address of Ray Client, which Ray Data does not work with; run the command "
                "on a machine of the cluster with --ray auto (from elsewhere: ray job submit)"
            )
        if self.ray not in (None, "auto", "local") and not _ADDRESS.fullmatch(self.ray):
            raise UserError(
                f"--ray {printable(self.ray)} is no HOST:PORT; give that, auto or local"
            )
        if self.ray_workers is not None and self.ray_workers < 1:
            raise UserError(f"ray-workers {self.ray_workers} must be at least 1")
        self.asked()

    def asked(self) -> dict[str, float]:
        """What each decoder asks for, by Ray's names; CPU is always among it. Raises UserError for what cannot be read."""
        asked = {"CPU": 1.0}
        for part in () if self.ray_resources is None else self.ray_resources.split(","):
            name, _, number = part.strip().partition("=")
            try:
                asked[name] = float(number)
            except ValueError:
                asked[name] = 0.0
            whole = (
                asked[name] < 1 or asked[name].is_integer()
            )  # Ray shares one of a kind, but no two
            if not name or not whole or not 0 < asked[name] < float("inf"):
                raise UserError(
                    f"--ray-resources {shown(self.ray_resources)} is not a list of amounts; write it like GPU=1 or TPU=4"
                )
        return asked


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
    mesh: MeshOptions = MeshOptions()
    cluster: tyro.conf.OmitArgPrefixes[RayOptions] = RayOptions()
    looking: tyro.conf.OmitArgPrefixes[LookingOptions] = LookingOptions()

    @property
    def drafting(self) -> DraftingOptions:
        """How tokens are drafted."""
        return DraftingOptions.of(self.chain, self.length, self.tree)


def refuse_beside(chosen: str, **values: object) -> None:
    """Raises UserError for the first of these flags that has a value and so does not go with the flag `chosen`."""
    for name, value in values.items():
        if value:
            raise UserError(f"--{name} does not go with {chosen}; leave it out")
