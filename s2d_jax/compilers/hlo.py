"""The text of a compiled program (HLO) as objects: computations, and their instructions."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from functools import cached_property

_COMPUTATION = re.compile(r"^(ENTRY )?%(?P<name>[\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?P<root>ROOT )?%(?P<name>[\w.\-]+) = ")
_OPCODE = re.compile(r"\s*(?P<opcode>[\w\-]+)\(")
_ARRAY = re.compile(
    r"\b(?P<type>pred|[a-z]+\d+\w*)\[(?P<dims>[\d,<=]*)\](?:\{(?P<layout>[^}]*)\})?"
)
_CALLED = re.compile(
    r"\b(?P<role>calls|to_apply|body|condition|true_computation|false_computation)=%(?P<name>[\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{(?P<names>[^}]*)\}")
_REFERENCE = re.compile(r"%([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="(?P<name>[^"]*)"')
_SPACE = re.compile(r"S\((\d+)\)")

# Instructions that compute nothing and move nothing.
BOOKKEEPING = frozenset(
    (
        *("parameter", "constant", "iota", "partition-id", "replica-id"),
        *("tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"),
        *("copy-done", "slice-done", "async-done", "async-update"),
        *("all-reduce-done", "all-gather-done", "all-to-all-done", "collective-permute-done"),
    )
)
# Instructions that run other computations one after another with the rest, unlike fusions.
CALLERS = ("while", "conditional", "call", "async-start")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array in a compiled program.

    Attributes:
        element: the type of its elements, such as "bf16".
        dims: its sizes.
        space: the memory that it lies in; 0 is the device's main memory.
    """

    element: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def num_bytes(self) -> int:
        bits = 8 if self.element == "pred" else int(re.findall(r"\d+", self.element)[0])
        return math.prod(self.dims) * bits // 8

    def __str__(self) -> str:
        return f"{self.element}[{','.join(map(str, self.dims))}]"


def shapes_in(text: str) -> tuple[Shape, ...]:
    """The arrays of a type as HLO writes it, those of tuples one after another."""
    found = []
    for match in _ARRAY.finditer(text):
        dims = tuple(int(n.lstrip("<=")) for n in match["dims"].split(",") if n)
        space = _SPACE.search(match["layout"] or "")
        found.append(Shape(match["type"], dims, int(space[1]) if space else 0))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: unique in its computation.
        shapes: the arrays of its result.
        opcode: such as "fusion".
        operands: names of the instructions that it reads.
        argument: what stands in the brackets: those names, the number of a parameter, the value of a constant.
        called: the computations that it runs, by role: "body" and "condition" of a loop, "branch0" and so on.
        text: what follows the operands.
        is_root: its value is that of the computation.
    """

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    argument: str
    called: dict[str, str]
    text: str
    is_root: bool

    @property
    def op_name(self) -> str:
        """Where the instruction comes from in the program that was traced."""
        match = _OP_NAME.search(self.text)
        return match["name"] if match else ""

    @property
    def num_bytes(self) -> int:
        """Bytes of its result."""
        return sum(shape.num_bytes for shape in self.shapes)


@dataclasses.dataclass(frozen=True)
class Computation:
    """A list of instructions with one result."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @cached_property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])


@dataclasses.dataclass(frozen=True)
class Hlo:
    """A compiled program.

    Attributes:
        computations: by name.
        entry: the name of the first.
    """

    computations: dict[str, Computation]
    entry: str

    def walk(self, name: str | None = None) -> Iterator[Instruction]:
        """The instructions of a computation (None: the entry) and of the loops, conditions and calls in it; not of fusions."""
        for instruction in self.computations[name or self.entry].instructions:
            yield instruction
            if instruction.opcode in CALLERS:
                for called in instruction.called.values():
                    yield from self.walk(called)


def parse_hlo(text: str) -> Hlo:
    """Reads `compiled.as_text()`.

    >>> program = parse_hlo('''
    ... ENTRY %main (x: f32[4]) -> f32[4] {
    ...   %x = f32[4]{0} parameter(0)
    ...   ROOT %copy.1 = f32[4]{0} copy(%x), metadata={op_name="jit(f)/copy"}
    ... }
    ... ''')
    >>> [(i.opcode, i.operands, i.op_name) for i in program.walk()]
    [('parameter', (), ''), ('copy', ('x',), 'jit(f)/copy')]
    """
    computations, entry = {}, ""
    name, instructions = None, []
    for line in text.splitlines():
        if name is None:
            if match := _COMPUTATION.match(line):
                name, instructions = match["name"], []
                entry = name if match[1] else entry
        # The description of a kernel may have lines of its own, one of which begins with "}}".
        elif line.rstrip() == "}":
            computations[name] = Computation(name, tuple(instructions))
            name = None
        elif match := _INSTRUCTION.match(line):
            instructions.append(_instruction(match, line[match.end() :]))
    return Hlo(computations, entry)


def _instruction(match: re.Match, rest: str) -> Instruction:
    end = _end_of_type(rest)
    opcode = _OPCODE.match(rest, end)
    assert opcode is not None, rest[:200]
    closing = _closing(rest, opcode.end() - 1)
    operands, text = rest[opcode.end() : closing], rest[closing + 1 :]
    called = {found["role"]: found["name"] for found in _CALLED.finditer(text)}
    if branches := _BRANCHES.search(text):
        names = _REFERENCE.findall(branches["names"])
        called |= {f"branch{i}": name for i, name in enumerate(names)}
    return Instruction(
        name=match["name"],
        shapes=shapes_in(rest[:end]),
        opcode=opcode["opcode"],
        operands=tuple(_REFERENCE.findall(operands)),
        argument=operands,
        called=called,
        text=text,
        is_root=match["root"] is not None,
    )


def _end_of_type(text: str) -> int:
    """Where the type at the beginning of `text` ends: behind a tuple's closing bracket, or at the first blank."""
    return _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")


def _closing(text: str, opening: int) -> int:
    """Where the bracket that opens at `opening` closes."""
    depth = 0
    for i in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"a bracket does not close: {text[opening : opening + 100]}")
