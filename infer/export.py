"""`python -m infer.export --run DIR --out DIR`: a trained draft as directories that PyTorch users load."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import yaml

from infer.cli import run_command_line
from s2d_jax.checkpoint import load_run
from s2d_jax.export import export_draft


@dataclasses.dataclass(frozen=True)
class Args:
    """Export the draft of a training run: full depth, one truncated model per earlier exit, sorted_draft.json."""

    run: Path
    """The directory that train.main wrote."""
    out: Path
    """Where the export appears, once it is complete."""
    step: int | Literal["best"] | None = None
    """Which checkpoint; best is that of the highest acceptance on held-out rows. Default: the newest."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights written."""


def main() -> None:
    run_command_line(Args, export)


def export(args: Args) -> None:
    """Writes `args.out`.

    Raises:
        UserError: if there is no such run or step, or the directory holds something else.
    """
    draft = load_run(args.run, args.step, dtype=jnp.dtype(args.dtype))
    config = yaml.safe_load((args.run / "config.yaml").read_text(encoding="utf-8"))
    provenance = {
        "run": draft.source,
        "initialised_from": config["model"]["path"],
        "config": config,
    }
    export_draft(draft, args.out, provenance)
    exits = ", ".join(map(str, draft.draft_config.exit_layers))
    print(f"exported {draft.source} with exits {exits} to {args.out}")


if __name__ == "__main__":
    main()
