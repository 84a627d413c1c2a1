"""`python -m infer.export --run DIR --out DIR`: a trained draft as directories that PyTorch users load."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from s2d_jax.cli.command import run_command_line, say_devices, starting
from s2d_jax.cli.flags import Switch, flag
from s2d_jax.cli.outputs import check_directory
from s2d_jax.errors import UserError, visible
from s2d_jax.fields import Fields
from s2d_jax.files import local_path
from s2d_jax.formats.yaml_file import read_yaml
from s2d_jax.progress.activity import activity

_FORMATS = {"float32": "f32", "bfloat16": "bf16"}


@dataclasses.dataclass(frozen=True)
class Args:
    """Export the draft of a training run.

    Full depth, one model per earlier exit, the parts of single exits, and sorted_draft.json;
    or only what was trained beside a frozen trunk.
    """

    run: Annotated[Path, flag("DIR")]
    """The directory that train.main wrote."""
    out: Annotated[Path, flag("DIR")]
    """Where the export appears, once it is complete."""
    step: Annotated[int | Literal["best"] | None, flag("{INT,best}", "the newest")] = None
    """Which checkpoint; best has the highest mean acceptance length on held-out rows."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the exported weights."""
    pad_vocabulary: Annotated[int | None, flag("N")] = None
    """Copy the row of an unused token until the vocabulary has N entries, for programs (vLLM, transformers) that want the
    target's number."""
    adapters_only: Switch = False
    """Write only the exits' own heads, residual adapters and LoRA (as PEFT does); the trunk stays in its own files."""


def main() -> None:
    run_command_line(Args, export)


def export(args: Args) -> None:
    """Writes `args.out`.

    Raises:
        UserError: if there is no such run or step, the directory holds something else, or the vocabulary is longer than asked
            for.
    """
    run, out = local_path(args.run, "--run"), check_directory(args.out)
    if args.adapters_only and args.pad_vocabulary is not None:
        raise UserError(
            "--pad-vocabulary needs the whole draft, and --adapters-only writes a part; give one of them"
        )
    config = _config_of(run)
    with starting():  # JAX
        import jax.numpy as jnp

        from s2d_jax.weights.export import exits_left_out, export_draft, export_parts
        from s2d_jax.weights.pad_vocabulary import pad_vocabulary
        from s2d_jax.weights.prepare import prepare_for_decode
        from s2d_jax.weights.runs import load_run

    with activity(f"exporting to {out}", key="export"):
        # A whole export folds LoRA in before it rounds.
        dtype = args.dtype if args.adapters_only else "float32"
        draft = load_run(run, args.step, dtype=jnp.dtype(dtype))
        say_devices()
        base = config["model"]["path"]
        if args.adapters_only:
            layers = config["model"].get("layers") or range(draft.config.num_layers)
            provenance = {"run": draft.source, "config": config}
            export_parts(draft, out, base=base, layers=layers, provenance=provenance)
        else:
            prepared = prepare_for_decode(draft, _FORMATS[args.dtype])
            if args.pad_vocabulary is not None:
                prepared = pad_vocabulary(prepared, args.pad_vocabulary)
            provenance = {"run": draft.source, "initialised_from": base, "config": config}
            export_draft(prepared, out, provenance)
    if args.adapters_only:
        print(visible(f"exported what {draft.source} has beside {base} to {out}"))
        return
    exits = ", ".join(map(str, draft.draft_config.exit_layers))
    print(visible(f"exported {draft.source} with exits {exits} to {out}"))
    if left_out := exits_left_out(draft):
        exits = ", ".join(map(str, left_out))
        print(f"exits {exits} have residual adapters, so no plain model and no directory")


def _config_of(run_dir: Path) -> dict[str, Any]:
    """What a run's config.yaml says.

    Raises:
        UserError: if it cannot be read, or does not name the model that the draft was made from.
    """
    file, remedy = (
        run_dir / "config.yaml",
        "give the directory of a training run, as it was written",
    )
    fields = Fields(read_yaml(file, remedy), file, remedy)
    model = fields.fields("model")
    model.text("path")
    model.integers("layers", 0, default=None)
    try:
        return json.loads(json.dumps(fields.raw))
    except (TypeError, ValueError):  # a date, or another value that only YAML has
        raise UserError(f"{file} holds a value that JSON cannot; {remedy}") from None


if __name__ == "__main__":
    main()
