"""The arithmetic of a compiled program's products of matrices, whatever form the compiler gave them."""

from __future__ import annotations

import itertools
import math
import re

from s2d_jax.compilers.hlo import CALLERS, Computation, Hlo, Instruction

_PRODUCT = "/dot_general"
_SAME_VALUES = ("bitcast", "convert", "copy")


def product_flops(hlo: Hlo, name: str | None = None) -> int:
    """Multiplications and additions of products in a computation (None: the entry) and all that it runs.

    A product is a `dot`, a `convolution` (which a TPU makes of it), or a sum over products of elements that was a dot before
    (what both chips may make of a single row). The body of a loop counts once, and so does every branch of a condition.
    Kernels of libraries (custom calls) do not count.

    >>> from s2d_jax.compilers.hlo import parse_hlo
    >>> product_flops(parse_hlo('''
    ... ENTRY %main (x: bf16[8,64], w: bf16[64,16]) -> f32[8,16] {
    ...   %x = bf16[8,64]{1,0} parameter(0)
    ...   %w = bf16[64,16]{1,0} parameter(1)
    ...   ROOT %y = f32[8,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    ... }
    ... '''))
    16384
    """
    computation = hlo.computations[name or hlo.entry]
    flops = 0
    for instruction in computation.instructions:
        if instruction.opcode in (*CALLERS, "fusion"):
            flops += sum(product_flops(hlo, called) for called in instruction.called.values())
        else:
            flops += 2 * _multiplications(computation, instruction)
    return flops


def _multiplications(computation: Computation, instruction: Instruction) -> int:
    if instruction.opcode == "dot":
        left = _dims(computation, instruction.operands[0])
        summed = _numbers(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
        return math.prod(instruction.shapes[0].dims) * math.prod(left[axis] for axis in summed)
    if instruction.opcode == "convolution":
        return _of_convolution(computation, instruction)
    if instruction.opcode == "reduce" and instruction.op_name.endswith(_PRODUCT):
        return _of_sum(computation, instruction)
    return 0


def _of_sum(computation: Computation, instruction: Instruction) -> int:
    """Of a sum over products of elements; none where partial sums of a dot are added."""
    source = computation.by_name[instruction.operands[0]]
    while source.opcode in _SAME_VALUES:
        source = computation.by_name[source.operands[0]]
    return math.prod(source.shapes[0].dims) if source.opcode == "multiply" else 0


def _of_convolution(computation: Computation, instruction: Instruction) -> int:
    """Of a convolution: each output feature of each position is a sum over input features and over what the window meets."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
    assert labels is not None, instruction.text[:200]
    left, right, out = (
        dict(zip(letters, dims, strict=True))
        for letters, dims in zip(
            labels.groups(),
            (
                *(_dims(computation, name) for name in instruction.operands),
                instruction.shapes[0].dims,
            ),
            strict=True,
        )
    )
    window = re.search(r"window=\{([^}]*)\}", instruction.text)
    settings = dict(item.split("=") for item in window[1].split()) if window else {}
    spatial = sorted(letter for letter in out if letter.isdigit())
    met = (
        _met(left[axis], right[axis], out[axis], _window(settings, number))
        for number, axis in enumerate(spatial)
    )
    return out["b"] * out["f"] * right["i"] * math.prod(met)


def _window(settings: dict[str, str], number: int) -> dict[str, int]:
    """Stride, padding in front and dilations along one axis; what is not written is 1, or no padding."""
    one = {name: text.split("x")[number] for name, text in settings.items()}
    assert not one.keys() - {"size", "stride", "pad", "lhs_dilate", "rhs_dilate", "rhs_reversal"}
    return {
        "stride": int(one.get("stride", 1)),
        "pad": int(one.get("pad", "0_0").split("_")[0]),
        "left": int(one.get("lhs_dilate", 1)),
        "right": int(one.get("rhs_dilate", 1)),
    }


def _met(left: int, right: int, out: int, window: dict[str, int]) -> int:
    """How many elements of the left operand the window meets along one axis, over all of its positions.

    A product of many matrices is a convolution whose left operand is spread so far that every position meets one element.
    """
    found = 0
    for position, step in itertools.product(range(out), range(right)):
        at = position * window["stride"] + step * window["right"] - window["pad"]
        found += at % window["left"] == 0 and 0 <= at // window["left"] < left
    return found


def _dims(computation: Computation, name: str) -> tuple[int, ...]:
    return computation.by_name[name].shapes[0].dims


def _numbers(pattern: str, text: str) -> list[int]:
    match = re.search(pattern, text)
    return [int(number) for number in match[1].split(",") if number] if match else []
