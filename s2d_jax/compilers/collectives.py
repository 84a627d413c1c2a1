"""What the chips of a mesh send each other in a compiled program, and whether they compute meanwhile."""

from __future__ import annotations

import dataclasses

from s2d_jax.compilers.hlo import BOOKKEEPING, CALLERS, Computation, Hlo, Instruction

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_START, _DONE = "-start", "-done"
# With options that ask for it, a TPU's compiler cuts a collective into pieces of the products beside it.
_IN_PIECES = "async-collective-start"


@dataclasses.dataclass(frozen=True)
class Collectives:
    """Instructions of one kind in a compiled program; those inside a loop count once.

    Attributes:
        count: how many.
        bytes: bytes of their results on one chip, added up.
        in_loops: how many of them stand in a loop, which sends again in every trip.
        overlapped: how many of them are begun, and waited for after other work.
    """

    count: int
    bytes: int
    in_loops: int = 0
    overlapped: int = 0

    def __add__(self, other: Collectives) -> Collectives:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Collectives(*(a + b for a, b in pairs))


def count_collectives(hlo: Hlo) -> dict[str, Collectives]:
    """The collectives of a compiled program, by kind.

    >>> from s2d_jax.compilers.hlo import parse_hlo
    >>> count_collectives(parse_hlo('''
    ... ENTRY %main (y: f32[4,4]) -> f32[8,4] {
    ...   %y = f32[4,4]{1,0} parameter(0)
    ...   ROOT %x = f32[8,4]{1,0} all-gather(%y), dimensions={0}
    ... }
    ... '''))
    {'all-gather': Collectives(count=1, bytes=128, in_loops=0, overlapped=0)}
    """
    found: dict[str, Collectives] = {}
    _count(hlo, hlo.entry, False, found)
    return dict(sorted(found.items()))


def _count(hlo: Hlo, name: str, in_loop: bool, found: dict[str, Collectives]) -> None:
    computation = hlo.computations[name]
    for instruction in computation.instructions:
        if kind := _kind(hlo, instruction):
            one = Collectives(
                1, _result(instruction), in_loop, _works_meanwhile(hlo, computation, instruction)
            )
            found[kind] = found.get(kind, Collectives(0, 0)) + one
        elif instruction.opcode in CALLERS:
            for called in instruction.called.values():
                _count(hlo, called, in_loop or instruction.opcode == "while", found)


def _kind(hlo: Hlo, instruction: Instruction) -> str | None:
    """The kind of collective that an instruction is, or begins."""
    if instruction.opcode == "async-start" or instruction.name.startswith(_IN_PIECES):
        inside = hlo.computations[instruction.called["calls"]].instructions
        return next((i.opcode for i in inside if i.opcode in KINDS), None)
    kind = instruction.opcode.removesuffix(_START)
    return kind if kind in KINDS else None


def _result(instruction: Instruction) -> int:
    # What begins one also returns its operands; its result is the largest.
    if _begins(instruction):
        return max((shape.num_bytes for shape in instruction.shapes), default=0)
    return instruction.num_bytes


def _begins(instruction: Instruction) -> bool:
    return instruction.opcode.endswith(_START) or instruction.name.startswith(_IN_PIECES)


def _works_meanwhile(hlo: Hlo, computation: Computation, start: Instruction) -> bool:
    """Whether a computation does something else between the beginning of a collective and its end."""
    if not _begins(start):
        return False
    behind = computation.instructions[computation.instructions.index(start) + 1 :]
    for instruction in behind:
        if instruction.opcode.endswith(_DONE) and start.name in instruction.operands:
            return False
        if instruction.opcode not in BOOKKEEPING and not _kind(hlo, instruction):
            return True
    return False
