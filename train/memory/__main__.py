"""Memory of training, a sorted draft against Medusa heads: `python -m train.memory [--target NAME_OR_DIR ...]`.

The real steps are compiled ahead of time from shapes alone: no weights and no accelerator are needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from jax.sharding import Mesh
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from s2d_jax.cli.command import status_of
from s2d_jax.cli.flags import Switch, flag
from s2d_jax.cli.outputs import check_directory
from s2d_jax.cli.parsing import parse
from s2d_jax.cli.screen import PlainColumn, screen
from s2d_jax.compilers.chips import chip_named
from s2d_jax.compilers.topologies import check_cpu_devices, topology_devices
from s2d_jax.config.model import ModelConfig
from s2d_jax.errors import UserError
from s2d_jax.files import expanded, read_json, write_text
from s2d_jax.formats.hf_config import config_from_hf
from s2d_jax.model.remat import RematPolicy
from s2d_jax.sharding import MESH_AXES, MeshConfig, make_mesh
from train.config.sections import Config, DataSection, DraftSection, ModelSection, TrainSection
from train.medusa import MedusaConfig, MedusaTrainer
from train.memory.systems import medusa_step, soft_step
from train.plan.step_memory import StepMemory, StepToCompile, measure_step
from train.step.trainer import Trainer

_LLAMA_7B = ModelConfig(
    family="llama",
    vocab_size=32000,
    embed_dim=4096,
    ffw_dim=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    norm_eps=1e-5,
    rope_theta=10_000.0,
    max_context=4096,
)
# The shapes of the S2D paper's table; those of any other model are read from its config.json.
MODELS: dict[str, ModelConfig] = {
    "vicuna-7b": _LLAMA_7B,
    "vicuna-13b": dataclasses.replace(
        _LLAMA_7B, embed_dim=5120, ffw_dim=13824, num_layers=40, num_heads=40, num_kv_heads=40
    ),
    "llama-2-70b": dataclasses.replace(
        _LLAMA_7B, embed_dim=8192, ffw_dim=28672, num_layers=80, num_heads=64, num_kv_heads=8
    ),
}
# arXiv 2407.01955; MB. The paper does not say on how many devices.
PUBLISHED = {
    ("SoFT draft", None): "92,744",
    ("Medusa", "vicuna-7b"): "113,416",
    ("Medusa", "vicuna-13b"): "152,616",
    ("Medusa", "llama-2-70b"): "out of memory",
}
CAPACITIES = (80e9, 95e9)
_TPU = "v5p:2x2x2"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Memory of each device while a sorted draft, or Medusa heads of a target, are trained.

    The defaults are the paper's batch and length, with one row at a time on each device.
    """

    target: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], flag("MODEL")] = ()
    """vicuna-7b, vicuna-13b, llama-2-70b, or a directory with a config.json. Without this flag: all three."""
    draft: Annotated[str, flag("MODEL")] = "vicuna-7b"
    """The model whose first layers are the draft: a name or a directory, as above."""
    exit_layers: Annotated[tuple[int, ...], flag("INT ...")] = (6, 9, 12)
    """The draft's exits; it is as deep as the last."""
    heads: int = 5
    """Medusa heads."""
    topology: Annotated[str, flag("TOPOLOGY")] = "auto"
    """What to compile for: cpu (devices of this machine, however few cores it has), TPU chips such as v5p:2x2x2, or GPUs such
    as h100:8. Chips need their compiler (the extra s2d-jax[compilers]) but need not be here. auto is v5p:2x2x2 if libtpu is
    installed, else cpu."""
    mesh: MeshConfig = MeshConfig(fsdp=8)
    batch_size: int = 128
    """Packed rows per step, over all devices."""
    length: int = 2048
    """Tokens per row."""
    accumulate: int = 16
    """Each step is computed in this many equal parts."""
    loss_chunk: int = 256
    """Positions per row whose logits are held at once."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of activations and products. Trained weights are float32."""
    target_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the frozen target's weights."""
    remat: RematPolicy = "block"
    """What of the draft's layers the backward pass computes again. (A frozen target has no backward pass.)"""
    quick: Switch = True
    """Let the TPU compiler optimise less: it compiles several times as fast, and temporaries differ a little."""
    out: Annotated[Path | None, flag("DIR", "the screen only")] = None
    """Write memory.json and memory.md into this directory."""


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; returns the exit status. A mistake of the user's is one line on stderr and status 2."""
    return status_of(
        lambda: run(parse(Args, arguments, module="train.memory")), "nothing was written"
    )


def run(args: Args) -> list[StepMemory]:
    """Compiles the steps, prints the table, and writes it where `out` says.

    Raises:
        UserError: for an unknown model or topology, or values that do not go together.
    """
    if args.out is not None:
        check_directory(args.out)
    topology = args.topology
    if topology == "auto":
        topology = _TPU if importlib.util.find_spec("libtpu") else "cpu"
    if topology != "cpu" and args.quick:
        if jax.__version_info__ < (0, 11):
            jax.config.update("jax_exec_time_optimization_effort", -1.0)
        else:  # later versions have levels instead
            jax.config.update("jax_optimization_level", "O1")
    try:
        mesh = make_mesh(args.mesh, _devices(topology, math.prod(args.mesh.shape)))
    except AssertionError as error:  # JAX refuses chips whose cores are separate devices with this
        raise UserError(f"--topology {topology} makes no mesh: {error}") from None
    steps = plan(args, mesh)
    console = screen()
    rows = _measure_all(steps, mesh.size, console)
    console.print(_table(args, rows, _caption(args, topology)))
    if args.out is not None:
        write_text(args.out / "memory.json", json.dumps(_json(args, topology, rows), indent=2))
        write_text(args.out / "memory.md", _markdown(args, rows, _caption(args, topology)))
    return rows


def plan(args: Args, mesh: Mesh) -> list[StepToCompile]:
    """The steps of the table: the draft's, then the heads' of each target.

    Raises:
        UserError: for an unknown model, or values that do not go together.
    """
    depth = args.exit_layers[-1] if args.exit_layers else 0
    config = Config(
        model=ModelSection(
            path=args.draft, num_layers=depth, compute_dtype=args.compute_dtype, remat=args.remat
        ),
        data=DataSection(paths=("none are read",), max_length=args.length),
        draft=DraftSection(exit_layers=args.exit_layers),
        mesh=args.mesh,
        train=TrainSection(
            batch_size=args.batch_size, accumulate=args.accumulate, loss_chunk=args.loss_chunk
        ),
    )
    medusa = MedusaConfig(
        num_heads=args.heads,
        target_dtype=args.target_dtype,
        compute_dtype=args.compute_dtype,
        batch_size=args.batch_size,
        accumulate=args.accumulate,
        loss_chunk=args.loss_chunk,
    )
    model = shape_of(args.draft)
    config.draft.draft_config().check_depth(model.num_layers)
    draft = dataclasses.replace(model, num_layers=depth)
    trainers = {
        name: MedusaTrainer(medusa, shape_of(name), mesh) for name in args.target or tuple(MODELS)
    }
    return [
        soft_step(Trainer(config, draft, mesh)),
        *(medusa_step(trainer, name, args.length) for name, trainer in trainers.items()),
    ]


def shape_of(name: str) -> ModelConfig:
    """The shape of a model of `MODELS`, or of a directory with a config.json.

    Raises:
        UserError: if it is neither, or of an architecture that is not supported.
    """
    if name in MODELS:
        return MODELS[name]
    file = expanded(name) / "config.json"
    if not file.is_file():
        raise UserError(
            f"model {name!r} is unknown; give {', '.join(MODELS)}, or a directory with a config.json"
        )
    return config_from_hf(read_json(file))


def _devices(topology: str, count: int) -> list[Any]:
    """Devices to compile for.

    Raises:
        UserError: if the chip's compiler is absent, or does not know the topology.
    """
    if topology == "cpu":
        check_cpu_devices(count)
        # Too late if the process has used its devices, as in tests; then making the mesh says what is missing.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)
        return jax.devices("cpu")
    return list(topology_devices(topology))


def _measure_all(steps: list[StepToCompile], devices: int, console: Console) -> list[StepMemory]:
    """Measures steps under a bar, or with a line for each step if there is no terminal."""
    rows: list[StepMemory] = []
    with Progress(
        PlainColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        PlainColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        speed_estimate_period=3600.0,  # seconds; a program of many layers compiles for minutes
        disable=not console.is_terminal,
    ) as bar:
        # Compiling a backward pass, too, takes about as long as compiling three forward passes.
        work = [step.num_layers * (1 if step.frozen else 4) for step in steps]
        task = bar.add_task("", total=sum(work))
        for step, amount in zip(steps, work, strict=True):
            label = f"compiling {step.system}, {step.target or 'any target'}"
            bar.update(task, description=label)
            rows.append(measure_step(step, devices))
            bar.advance(task, amount)
            done = f"{label}: {rows[-1].compile_seconds:.0f} s"
            console.print(done)
    return rows


_HEADINGS = (
    "step", "target", "frozen", "trained", "optim.", "temp.", "peak", "total", "fits 80/95", "paper, MB",
)  # fmt: skip


def _cells(row: StepMemory, args: Args) -> tuple[str, ...]:
    """One row of the table, in the order of `_HEADINGS`."""
    defaults = Args()
    is_papers = row.target or (args.draft, args.exit_layers) == (
        defaults.draft,
        defaults.exit_layers,
    )

    def giga(size: int | None) -> str:
        return "-" if size is None else f"{size / 1e9:,.2f}"

    return (
        row.system,
        Path(row.target).name if row.target else "any",
        giga(row.frozen),
        giga(row.trained),
        giga(row.optimizer),
        giga(row.temporaries),
        giga(row.peak),
        "-" if row.peak is None else f"{row.devices * row.peak / 1e9:,.1f}",
        "/".join("yes" if row.fits(size) else "no" for size in CAPACITIES),
        PUBLISHED.get((row.system, row.target), "") if is_papers else "",
    )


def _caption(args: Args, topology: str) -> str:
    mesh = " x ".join(
        f"{axis} {size}" for axis, size in zip(MESH_AXES, args.mesh.shape, strict=True) if size > 1
    )
    chip = chip_named(topology.partition(":")[0])
    kind = "CPU" if topology == "cpu" else (chip.platform if chip else "tpu").upper()
    what = f"XLA's {kind} compiler, {topology}"
    return (
        "GB (1e9 bytes) on each device; total: on all; paper: for how many devices it does not say. "
        f"Compiled by {what}, mesh {mesh or 'of one device'}. "
        f"{args.batch_size} rows of {args.length} tokens a step in {args.accumulate} parts, {args.compute_dtype}; "
        f"frozen weights {args.target_dtype}; {args.heads} Medusa heads."
    )


def _table(args: Args, rows: list[StepMemory], caption: str) -> Table:
    table = Table(caption=caption, caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, heading in enumerate(_HEADINGS):
        table.add_column(heading, justify="left" if index < 2 else "right")
    for row in rows:
        table.add_row(*_cells(row, args))
    return table


def _markdown(args: Args, rows: list[StepMemory], caption: str) -> str:
    lines = [_HEADINGS, ("---",) * len(_HEADINGS), *(_cells(row, args) for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + f"\n{caption}\n"


def _json(args: Args, topology: str, rows: list[StepMemory]) -> dict[str, Any]:
    options = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(args).items()}
    return {
        "options": {**options, "topology": topology},
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def _prepare_process() -> None:
    """Keeps off this machine's accelerator, since nothing runs here."""
    jax.config.update("jax_platforms", "cpu")
    # Without this, XLA orders work on a CPU for its threads, and every layer's temporaries would exist at once.
    flags = (os.environ.get("XLA_FLAGS"), "--xla_cpu_enable_concurrency_optimized_scheduler=false")
    os.environ["XLA_FLAGS"] = " ".join(filter(None, flags))


if __name__ == "__main__":
    _prepare_process()
    sys.exit(main())
