"""Bytes per device of a compiled training step, by what they hold."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from train.data.batch import Batch

_SIZES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class StepToCompile:
    """A step, and the state that it takes, as shapes with shardings.

    Attributes:
        system: what is trained.
        target: the target that it needs; None where any will do.
        num_layers: layers that run in a step.
        frozen: weights that are only read.
        trained: weights that are learned.
        optimizer: the moments of the trained weights.
        compile: compiles the step.
    """

    system: str
    target: str | None
    num_layers: int
    frozen: Any
    trained: Any
    optimizer: Any
    compile: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes on each device while a step runs.

    Attributes:
        system, target: of `StepToCompile`.
        devices: how many devices share the step.
        frozen, trained, optimizer: the state, from shapes and shardings.
        arguments, outputs, aliased, temporaries, code: from `compiled.memory_analysis()`; None if the compiler found that the
            step does not fit.
        peak: arguments, outputs that do not reuse the memory of arguments, temporaries and code. For a step that does not fit,
            the need that the compiler states, or None.
        compile_seconds: seconds of compiling.
    """

    system: str
    target: str | None
    devices: int
    frozen: int
    trained: int
    optimizer: int
    arguments: int | None
    outputs: int | None
    aliased: int | None
    temporaries: int | None
    code: int | None
    peak: int | None
    compile_seconds: float

    def fits(self, capacity: float) -> bool:
        """Whether a device of this many bytes holds the step."""
        return self.peak is not None and self.peak <= capacity


def shapes_of_batch(rows: int, length: int) -> Batch:
    """Packed rows as shapes."""

    def zeros() -> Batch:
        integers = jnp.zeros((rows, length), jnp.int32)
        return Batch(
            tokens_BT=integers,
            targets_BT=integers,
            weights_BT=jnp.zeros((rows, length), jnp.float32),
            positions_BT=integers,
            segment_ids_BT=integers,
        )

    return jax.eval_shape(zeros)


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def bytes_per_device(placed: Any) -> int:
    """The most bytes that a device holds of a tree of arrays, or of shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(placed)
    )


def measure_step(step: StepToCompile, devices: int) -> StepMemory:
    """Compiles the step, which may take minutes, and asks the compiler for its memory.

    Raises:
        jax.errors.JaxRuntimeError: if the compiler fails for a reason other than too little memory.
    """
    started = time.perf_counter()
    found = _analysis(step)
    return StepMemory(
        system=step.system,
        target=step.target,
        devices=devices,
        frozen=bytes_per_device(step.frozen),
        trained=bytes_per_device(step.trained),
        optimizer=bytes_per_device(step.optimizer),
        **found,
        compile_seconds=time.perf_counter() - started,
    )


def _analysis(step: StepToCompile) -> dict[str, int | None]:
    try:
        compiled = step.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        unknown = dict.fromkeys(("arguments", "outputs", "aliased", "temporaries", "code"))
        return {**unknown, "peak": bytes_needed(str(error))}
    memory = compiled.memory_analysis()
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
    aliased, temporaries = memory.alias_size_in_bytes, memory.temp_size_in_bytes
    code = memory.generated_code_size_in_bytes
    return {
        "arguments": arguments,
        "outputs": outputs,
        "aliased": aliased,
        "temporaries": temporaries,
        "code": code,
        "peak": arguments + outputs - aliased + temporaries + code,
    }


def bytes_needed(message: str) -> int | None:
    """What a program that does not fit would need, from the message of XLA's TPU compiler; None if it gives no number.

    The message has `Used 215.17G of 95.74G hbm` or `the total memory required for HLO temporaries (161.54G)`; both include
    arguments.
    """
    found = re.search(r"(?:Used |required for HLO temporaries \()([\d.]+)([KMGT])", message)
    return int(float(found[1]) * _SIZES[found[2]]) if found else None
