"""`python -m train.plan --config FILE --topology v5p:2x2x2`: what a training step needs on each chip, without weights or chips.

The real step is compiled ahead of time for chips of a TPU or GPU (their compilers are enough, no chip is needed) or for
fake CPU devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import jax
from jax.sharding import Mesh
from rich.table import Table

from s2d_jax.cli.command import status_of
from s2d_jax.cli.flags import flag
from s2d_jax.cli.outputs import check_writable
from s2d_jax.cli.screen import screen
from s2d_jax.compilers.chips import Chip, chip_named
from s2d_jax.compilers.collectives import Collectives, count_collectives
from s2d_jax.compilers.hlo import parse_hlo
from s2d_jax.compilers.topologies import check_cpu_devices, topology_devices
from s2d_jax.config.model import ModelConfig
from s2d_jax.errors import UserError
from s2d_jax.files import expanded, here_or_shipped, read_json, write_text
from s2d_jax.formats.hf_config import config_from_hf
from s2d_jax.sharding import make_mesh
from s2d_jax.weights.checkpoints import placed
from s2d_jax.weights.load import read_description
from train.config.files import FlagsWithConfig, parse_command_line
from train.config.sections import Config
from train.plan.step_memory import bytes_needed, bytes_per_device, shapes_of_batch
from train.plan.step_work import work_of_step
from train.step.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Bytes on one chip, and what the chips send each other.

    Attributes:
        devices: chips of the mesh.
        params, optimizer, batch: the step's arguments, computed from their shardings.
        arguments: all arguments as the compiler counts them, with its padding.
        temporaries: activations, gradients and whatever else exists only during the step.
        collectives: what the chips send each other, by kind.
        flops: operations of a step on one chip, computed from shapes (`work_of_step`).
        least_bytes: bytes that a chip reads and writes at least, computed from shapes.
    """

    devices: int
    params: int
    optimizer: int
    batch: int
    arguments: int
    temporaries: int
    collectives: dict[str, Collectives]
    flops: float
    least_bytes: float

    @property
    def total(self) -> int:
        """Arguments and temporaries; there is nothing else, since the state is updated in place."""
        return self.arguments + self.temporaries


def make_plan(config: Config, model_config: ModelConfig, mesh: Mesh) -> StepPlan:
    """Compiles the training step for `mesh`, whose devices need not exist.

    Args:
        config: the run.
        model_config: the draft's shape.
        mesh: from `make_mesh`.

    Raises:
        UserError: if the shape does not divide over the mesh, or the step does not fit the chips' memory.
    """
    trainer = Trainer(config, model_config, mesh)
    state = placed(trainer.abstract_state(), trainer.state_sharding)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=trainer.batch_sharding),
        shapes_of_batch(config.train.batch_size, config.data.max_length),
    )
    try:
        compiled = trainer.compile_step(state, batch)
    except jax.errors.JaxRuntimeError as error:
        needed = bytes_needed(str(error))
        if needed is None:
            raise
        raise UserError(
            f"the step needs {needed / 1e9:.1f} GB on each of {mesh.size} chips, more than they have; "
            "raise mesh.fsdp or train.accumulate"
        ) from None
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None  # CPU, GPU and TPU all tell
    assert hlo is not None
    work = work_of_step(config, model_config, state.params, mesh)
    return StepPlan(
        devices=mesh.size,
        params=bytes_per_device(state.params),
        optimizer=bytes_per_device(state.opt_state),
        batch=bytes_per_device(batch),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        collectives=count_collectives(parse_hlo(hlo)),
        flops=work.flops,
        least_bytes=work.least_bytes,
    )


def draft_shape(config: Config, config_file: Path, shape_file: Path | None) -> ModelConfig:
    """The shape of the draft without reading weights.

    It comes from `shape_file`, a Hugging Face config.json; else from the model, where it is on this machine; else from
    `shapes/NAME.json` beside the config, NAME being the last part of `model.path`.

    Raises:
        UserError: if none of them exists, or the exits do not fit.
    """
    path = expanded(config.model.path)
    beside = config_file.parent / "shapes" / f"{path.name}.json"
    if shape_file is None and not path.exists() and beside.exists():
        shape_file = beside
    if shape_file is not None:
        if not shape_file.is_file():
            raise UserError(f"--shape {shape_file} does not exist; give a model's config.json")
        shape = config_from_hf(read_json(shape_file))
    elif path.exists():
        shape = read_description(path)[0]
    else:
        raise UserError(
            f"model.path={path} is not on this machine; give its config.json as --shape FILE"
        )
    depth = config.model.depth or shape.num_layers
    config.check_exits(depth)
    if depth > shape.num_layers:
        raise UserError(
            f"model.num_layers={depth} exceeds the {shape.num_layers} layers of {path}; lower it"
        )
    return dataclasses.replace(shape, num_layers=depth)


def _table(plan: StepPlan, title: str, chip: Chip | None) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("on each chip")
    table.add_column("GB", justify="right")
    for name, size in (
        ("parameters, f32", plan.params),
        ("optimizer state", plan.optimizer),
        ("batch", plan.batch),
        ("temporaries: activations, gradients", plan.temporaries),
        ("in all, padding included", plan.total),
    ):
        table.add_row(name, f"{size / 1e9:.2f}")
    table.add_section()
    for kind, found in plan.collectives.items():
        beside = f" ({found.overlapped} beside other work)" if found.overlapped else ""
        table.add_row(f"{found.count} x {kind}{beside}, results", f"{found.bytes / 1e9:.2f}")
    table.add_section()
    table.add_row("read and written, from shapes: at least", f"{plan.least_bytes / 1e9:.2f}")
    table.add_row("operations, from shapes: TFLOP", f"{plan.flops / 1e12:.2f}")
    if chip is not None:
        seconds = chip.seconds(plan.flops, plan.least_bytes)
        table.add_row(f"a step on {chip.name} takes at least: seconds", f"{seconds:.3f}")
    return table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(FlagsWithConfig):
    """What a training step needs on each chip, without weights or chips.

    The real step is compiled ahead of time for chips of a TPU or GPU, or for fake CPU devices.
    Their compilers are enough (the extra s2d-jax[compilers]); no chip is needed.
    """

    topology: Annotated[str | None, flag("TOPOLOGY", "as --devices says")] = None
    """Chips to compile for: TPUs such as v5p:2x2x2, or GPUs such as h100:8."""
    devices: Annotated[int | None, flag("INT", "as --topology says")] = None
    """Or the number of fake CPU devices to compile for."""
    slices: int = 1
    """How many TPU slices of that topology."""
    shape: Annotated[
        Path | None, flag("FILE", "that of --model.path, or one that s2d-jax knows")
    ] = None
    """config.json of a model that is not on this machine."""
    json: Annotated[Path | None, flag("FILE", "the screen only")] = None
    """Write the same figures to this file."""


def main(arguments: list[str] | None = None) -> int:
    """Prints the plan of a run; returns the exit status, 2 for a mistake of the user's."""
    return status_of(
        lambda: run(parse_command_line(Args, arguments, "train.plan")), "nothing was written"
    )


def run(args: Args) -> None:
    """Compiles the step, prints its table, and writes it where `json` says.

    Raises:
        UserError: for an unknown model or topology, or values that do not go together.
    """
    if (args.topology is None) == (args.devices is None):
        raise UserError("give --topology v5p:2x2x2, --topology h100:8 or --devices 8: one of them")
    if args.json is not None:
        check_writable(args.json, "--json")
    jax.config.update("jax_platforms", "cpu")  # nothing runs, so no accelerator is taken
    # A cached program for chips that this machine lacks cannot be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    config, console = args.settings, screen()
    shape = draft_shape(config, here_or_shipped(args.config), args.shape)
    chip = None
    if args.topology is not None:
        chip = chip_named(args.topology.partition(":")[0])
        devices = topology_devices(args.topology, args.slices)
        place = f"{args.slices} x {args.topology}" if args.slices > 1 else args.topology
    else:
        assert args.devices is not None  # one of them was given
        devices, place = _fake_devices(args.devices), f"{args.devices} CPU devices"
    mesh = make_mesh(config.mesh, devices)
    with console.status(f"compiling for {mesh.size} devices"):
        plan = make_plan(config, shape, mesh)
    rows = f"{config.train.batch_size} rows of {config.data.max_length} tokens"
    parts = f"in {config.train.accumulate} part(s)"
    console.print(_table(plan, f"{args.config.name} on {place}: {rows} {parts}", chip))
    if args.json is not None:
        write_text(args.json, json.dumps(dataclasses.asdict(plan), indent=2) + "\n")


def _fake_devices(count: int) -> list:
    if count < 1:
        raise UserError(f"--devices {count} must be at least 1")
    check_cpu_devices(count)
    # JAX adds its flags to the class at run time.
    before = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    with contextlib.suppress(RuntimeError):  # too late if something was computed already
        jax.config.update("jax_num_cpu_devices", max(count, before))
    if len(jax.devices("cpu")) < count:
        raise UserError(
            f"--devices {count} exceeds the {len(jax.devices('cpu'))} that JAX began with; set JAX_NUM_CPU_DEVICES={count}"
        )
    return jax.devices("cpu")[:count]


if __name__ == "__main__":
    sys.exit(main())
