"""A program that is compiled to be looked at: what its loops, kernels, copies and collectives are."""

from __future__ import annotations

import collections
import dataclasses
import re
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import jax

from s2d_jax.backends import forms_of
from s2d_jax.compilers.collectives import count_collectives
from s2d_jax.compilers.hlo import BOOKKEEPING, Hlo, Instruction, parse_hlo

_CONTROL = ("while", "conditional", "call")
_HOST_MEMORY = 5
_HOST = ("infeed", "outfeed", "send", "recv", "send-done", "recv-done")
_THUNK = re.compile(r"^\s*\d+: (k\w+)", re.MULTILINE)
_LAST_THUNKS = "*thunk_sequence_after_thunk_passes.txt"
# What a GPU's command buffers hold and what starts them; neither runs anything of its own.
_NO_KERNELS = frozenset(
    ("kCommandBuffer", "kWhile", "kConditional", "kCopy", "kSequential", "kDynamicSliceFusion")
)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program and what its compiler says about it.

    Attributes:
        hlo: the optimised program.
        thunks: of a GPU, how many steps of each kind the program runs; those inside of loops count once. Else empty.
        arguments: bytes on each device that the program takes: weights, caches and the rest of the state.
        temporaries: bytes on each device beside arguments and results.
        aliased: bytes of results that lie where arguments were.
    """

    hlo: Hlo
    thunks: dict[str, int]
    arguments: int
    temporaries: int
    aliased: int

    @property
    def loop(self) -> Instruction:
        """The outermost loop."""
        entry = self.hlo.computations[self.hlo.entry]
        return next(i for i in entry.instructions if i.opcode == "while")

    def in_loop(self) -> list[Instruction]:
        """The instructions of the outermost loop's body, those of inner loops and branches included."""
        return list(self.hlo.walk(self.loop.called["body"]))

    @property
    def loops(self) -> int:
        return self._number("while")

    @property
    def conditions(self) -> int:
        return self._number("conditional")

    def _number(self, opcode: str) -> int:
        return sum(i.opcode == opcode for i in self.hlo.walk())

    @property
    def kernels(self) -> int:
        """Steps that the device runs, those inside of loops once; of a TPU, the instructions that are no mere bookkeeping."""
        if self.thunks:
            return sum(n for kind, n in self.thunks.items() if kind not in _NO_KERNELS)
        return sum(
            i.opcode not in BOOKKEEPING and i.opcode not in _CONTROL and not is_copy(i)
            for i in self.hlo.walk()
        )

    @property
    def command_buffers(self) -> int:
        return self.thunks.get("kCommandBuffer", 0)

    def copies(
        self, types: Collection[str], instructions: Iterable[Instruction] | None = None
    ) -> int:
        """How many arrays of these types, such as "bf16[1,32,384,128]", are copied within the device's main memory.

        Moves into a faster memory are none: what is computed with has to get there. Moves out of it are.
        """
        found = self.hlo.walk() if instructions is None else instructions
        return sum(
            is_copy(i) and str(i.shapes[0]) in types and i.shapes[0].space == 0 for i in found
        )

    @property
    def collectives(self) -> dict[str, int]:
        """How many there are of each kind, those inside of loops once."""
        return {kind: found.count for kind, found in count_collectives(self.hlo).items()}

    @property
    def host_transfers(self) -> int:
        """Instructions of the outermost loop that wait for the host, or send it something."""
        return sum(
            i.opcode in _HOST or any(shape.space == _HOST_MEMORY for shape in i.shapes)
            for i in self.in_loop()
        )


def is_copy(instruction: Instruction) -> bool:
    return instruction.opcode in ("copy", "copy-start")


def read_program(lowered: jax.stages.Lowered, platform: str) -> Program:
    """Compiles for `platform` ("cpu", "gpu", "tpu") with the options of its programs, and reads the result."""
    options: dict[str, Any] = dict(forms_of(platform).compiler_options)
    with tempfile.TemporaryDirectory() as directory:
        if platform == "gpu":  # only there does the compiler write down what it starts
            options["xla_dump_to"] = directory
        compiled = lowered.compile(options)
        text = next(iter(Path(directory).glob(_LAST_THUNKS)), None)
        thunks = collections.Counter(_THUNK.findall(text.read_text()) if text else ())
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    assert hlo is not None
    assert memory is not None
    return Program(
        hlo=parse_hlo(hlo),
        thunks=dict(thunks),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
    )
