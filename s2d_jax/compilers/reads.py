"""How many bytes of main memory a compiled program reads, counted instruction by instruction."""

from __future__ import annotations

from collections.abc import Callable

from s2d_jax.compilers.hlo import BOOKKEEPING, Computation, Hlo, Instruction

# For a loop, how often its body runs; for a condition, the number of the branch that is taken (0: it does not hold).
Taken = Callable[[Instruction], int]

# They read what they return of their first operand, and the rest of their operands is small.
_READS_ITS_RESULT = ("dynamic-slice", "slice", "gather")
# They overwrite a part of their first operand where it lies.
_WRITES_IN_PLACE = ("dynamic-update-slice", "scatter")
_BRANCHES = ("false_computation", "true_computation")


def bytes_read(hlo: Hlo, computation: str, taken: Taken) -> int:
    """Bytes that a computation reads from the device's main memory, inner loops times their trips.

    What lies in a faster memory costs nothing; what is moved there is read once. Of an array that an instruction takes a slice
    of, the slice counts.

    Args:
        hlo: the program.
        computation: the name of the computation, such as a loop's body.
        taken: says how often each inner loop runs, and which branch of a condition.
    """
    found = hlo.computations[computation]
    return sum(_bytes_of(hlo, found, instruction, taken) for instruction in found.instructions)


def _bytes_of(hlo: Hlo, computation: Computation, instruction: Instruction, taken: Taken) -> int:
    called = instruction.called
    if instruction.opcode == "while":
        once = sum(bytes_read(hlo, called[role], taken) for role in ("condition", "body"))
        return taken(instruction) * once
    if instruction.opcode == "conditional":
        branch = taken(instruction)
        name = called.get(f"branch{branch}") or called[_BRANCHES[branch]]
        return bytes_read(hlo, name, taken)
    if instruction.opcode == "call":
        return bytes_read(hlo, called["to_apply"], taken)
    if instruction.opcode in BOOKKEEPING:
        return 0
    return sum(
        _bytes_of_operand(hlo, instruction, number, computation.by_name[name])
        for number, name in enumerate(instruction.operands)
        if name in computation.by_name
    )


def _bytes_of_operand(hlo: Hlo, user: Instruction, number: int, operand: Instruction) -> int:
    """What `user` reads of its operand of this number."""
    whole = sum(shape.num_bytes for shape in operand.shapes if shape.space == 0)
    if user.opcode in ("fusion", "async-start") and "calls" in user.called:
        if not whole:
            return 0
        return min(whole, _bytes_of_parameter(hlo, user.called["calls"], number)[0])
    if number == 0 and whole:
        if user.opcode in _READS_ITS_RESULT:
            return min(whole, user.num_bytes)
        if user.opcode in _WRITES_IN_PLACE:
            return 0
    return whole


def _bytes_of_parameter(hlo: Hlo, computation: str, number: int) -> tuple[int, bool]:
    """What a fused computation reads of its parameter of this number, and whether it hands the parameter on as it is."""
    found = hlo.computations[computation]
    parameter = next(
        i for i in found.instructions if i.opcode == "parameter" and _number_of(i) == number
    )
    return _bytes_used(hlo, found, parameter)


def _bytes_used(hlo: Hlo, computation: Computation, value: Instruction) -> tuple[int, bool]:
    """The same for any value of a fused computation; slices and updates in place tell which part is read."""
    read, handed_on = 0, value is computation.root
    for user in computation.instructions:
        for number, name in enumerate(user.operands):
            if name != value.name:
                continue
            same = user.opcode == "bitcast"
            if user.opcode == "fusion":
                inside, same = _bytes_of_parameter(hlo, user.called["calls"], number)
                read += inside
            elif number == 0 and user.opcode in _READS_ITS_RESULT:
                read += user.num_bytes
            elif not same and not (number == 0 and user.opcode in _WRITES_IN_PLACE):
                read += 0 if user.opcode == "tuple" else value.num_bytes
            if same:
                further, handed = _bytes_used(hlo, computation, user)
                read, handed_on = read + further, handed_on or handed
    return read, handed_on


def _number_of(parameter: Instruction) -> int:
    return int(parameter.argument)
