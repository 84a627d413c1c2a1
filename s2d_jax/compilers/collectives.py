"""What the chips of a mesh send each other in a compiled program, and whether they compute meanwhile."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

from s2d_jax.compilers.hlo import BOOKKEEPING, CALLERS, Computation, Hlo, Instruction

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_START, _DONE = "-start", "-done"
# How a program writes which devices send each other something: `{{0,1},{2,3}}`; all numbers in rows, perhaps turned before,
# `[2,4]<=[4,2]T(1,0)`; or axes of a mesh of the compiler's own, `mesh['a'=2,'b'=4] {'b'}`.
_LISTED = re.compile(r"replica_groups=\{(?P<groups>(?:\{[\d,]*\},?)*)\}")
_IN_ROWS = re.compile(
    r"replica_groups=\[(?P<shape>[\d,]+)\]<=\[(?P<of>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?"
)
_ON_AXES = re.compile(
    r"replica_groups=mesh\[(?P<sizes>[^\]]*)\](?P<ids>, device_ids=\S+)? \{(?P<axes>[^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{(?P<groups>(?:\{\d+,\d+\},?)*)\}")
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
    for computation, instruction, kind, in_loop in _found(hlo):
        overlapped = _works_meanwhile(hlo, computation, instruction)
        one = Collectives(1, _result(instruction), in_loop, overlapped)
        found[kind] = found.get(kind, Collectives(0, 0)) + one
    return dict(sorted(found.items()))


def collectives_by_axis(hlo: Hlo, shape: Mapping[str, int]) -> dict[str, Counter[str]]:
    """How many collectives of each kind send over an axis of the mesh; one that sends over two axes counts for both.

    A collective sends over an axis where one of its groups has devices at different places along it. One whose groups have one
    device each sends nothing, and stands under no axis.

    Args:
        hlo: a program whose devices are numbered in the order of the mesh, as JAX numbers them.
        shape: the sizes of the mesh's axes by name, in the order of the mesh, as `Mesh.shape`.

    Returns:
        For each axis of the mesh, its collectives by kind, those inside of loops once.

    Raises:
        ValueError: if a collective says in no known way which devices take part.

    >>> from s2d_jax.compilers.hlo import parse_hlo
    >>> collectives_by_axis(parse_hlo('''
    ... ENTRY %main (y: f32[4]) -> f32[4] {
    ...   %y = f32[4]{0} parameter(0)
    ...   ROOT %x = f32[4]{0} all-reduce(%y), replica_groups=[2,4]<=[8], to_apply=%add
    ... }
    ... '''), {"data": 2, "tensor": 4})
    {'data': Counter(), 'tensor': Counter({'all-reduce': 1})}
    """
    found: dict[str, Counter[str]] = {axis: Counter() for axis in shape}
    for _, instruction, kind, _ in _found(hlo):
        groups = _groups(_sending(hlo, instruction).text, math.prod(shape.values()))
        for axis in _axes_of(groups, shape):
            found[axis][kind] += 1
    return found


def _sending(hlo: Hlo, instruction: Instruction) -> Instruction:
    """The collective itself, where an instruction begins one that stands in a computation of its own."""
    if instruction.opcode == "async-start" or instruction.name.startswith(_IN_PIECES):
        inside = hlo.computations[instruction.called["calls"]].instructions
        return next(i for i in inside if i.opcode in KINDS)
    return instruction


def _groups(text: str, devices: int) -> list[list[int]]:
    """The numbers of the devices that send each other something, group by group; of pairs, both ends."""
    if match := _LISTED.search(text) or _PAIRS.search(text):
        # No groups at all: all devices are one.
        return [_numbers(group) for group in re.findall(r"[\d,]+\d|\d", match["groups"])] or [
            list(range(devices))
        ]
    if match := _IN_ROWS.search(text):
        numbers = np.arange(devices).reshape(_numbers(match["of"]))
        order = match["order"]
        numbers = numbers if order is None else numbers.transpose(_numbers(order))
        return numbers.reshape(_numbers(match["shape"])).tolist()
    match = _ON_AXES.search(text)
    if match is None or match["ids"] or ":" in match["axes"]:
        raise ValueError(f"which devices does this collective send to? {text[:300]}")
    sizes = {name: int(size) for name, size in (x.split("=") for x in match["sizes"].split(","))}
    together = [list(sizes).index(name) for name in match["axes"].split(",")]
    numbers = np.moveaxis(
        np.arange(devices).reshape(*sizes.values()), together, range(len(together))
    )
    count = math.prod(numbers.shape[: len(together)])
    return numbers.reshape(count, -1).T.tolist()


def _axes_of(groups: list[list[int]], shape: Mapping[str, int]) -> list[str]:
    """The axes of the mesh along which the devices of one of the groups differ."""
    places = np.indices(tuple(shape.values())).reshape(len(shape), -1)
    return [
        axis
        for place, axis in zip(places, shape, strict=True)
        if any(len(set(place[group])) > 1 for group in groups)
    ]


def _numbers(listed: str) -> list[int]:
    return [int(number) for number in listed.split(",")]


def _found(
    hlo: Hlo, name: str | None = None, in_loop: bool = False
) -> Iterator[tuple[Computation, Instruction, str, bool]]:
    """Each collective with its computation and its kind, and whether it stands in a loop; what a wrapper begins is one."""
    computation = hlo.computations[name or hlo.entry]
    for instruction in computation.instructions:
        if kind := _kind(hlo, instruction):
            yield computation, instruction, kind, in_loop
        elif instruction.opcode in CALLERS:
            for called in instruction.called.values():
                yield from _found(hlo, called, in_loop or instruction.opcode == "while")


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
