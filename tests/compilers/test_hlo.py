"""Compiled text as objects, and the bytes that it reads, on small programs whose answers are known."""

from __future__ import annotations

import doctest

import jax
import jax.numpy as jnp
import pytest

from s2d_jax.compilers import hlo as hlo_module
from s2d_jax.compilers.chips import CHIPS, chip_named, chip_of
from s2d_jax.compilers.hlo import Shape, parse_hlo, shapes_in
from s2d_jax.compilers.program import read_program
from s2d_jax.compilers.reads import bytes_read

# A loop that copies a table, takes a slice of it through a fusion, and multiplies with it from a faster memory.
TEXT = """
%sliced (p0: f32[8,4], p1: s32[]) -> f32[1,4] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %ds = f32[1,4]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,4}
}

%same (q0: f32[8,4]) -> f32[4,8] {
  %q0 = f32[8,4]{1,0} parameter(0)
  ROOT %b = f32[4,8]{0,1} bitcast(%q0)
}

%outer (r0: f32[8,4]) -> f32[4] {
  %r0 = f32[8,4]{1,0} parameter(0)
  %turned = f32[4,8]{0,1} fusion(%r0), kind=kLoop, calls=%same
  ROOT %sum = f32[4]{0} reduce(%turned), dimensions={1}
}

%body (c: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %c = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %table = f32[8,4]{1,0} get-tuple-element(%c), index=1
  %row = f32[1,4]{1,0} fusion(%table, %i), kind=kLoop, calls=%sliced
  %total = f32[4]{0} fusion(%table), kind=kLoop, calls=%outer, metadata={op_name="jit(f)/while/body/add"}
  %near = (f32[8,4]{1,0:S(1)}, f32[8,4]{1,0}, u32[]{:S(2)}) copy-start(%table)
  %there = f32[8,4]{1,0:S(1)} copy-done(%near)
  %product = f32[1,8]{1,0} dot(%row, %there), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %copied = f32[8,4]{1,0} copy(%table)
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%i, %copied)
}

%condition (d: (s32[], f32[8,4])) -> pred[] {
  %d = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (x: s32[], y: f32[8,4]) -> (s32[], f32[8,4]) {
  %x = s32[] parameter(0)
  %y = f32[8,4]{1,0} parameter(1)
  %start = (s32[], f32[8,4]{1,0}) tuple(%x, %y)
  ROOT %loop = (s32[], f32[8,4]{1,0}) while(%start), condition=%condition, body=%body, metadata={op_name="jit(f)/while"}
}
"""


def test_the_example_in_the_documentation_is_right():
    failed, tried = doctest.testmod(hlo_module)
    assert (failed, tried) == (0, 2)


def test_types_of_arrays_and_tuples():
    found = shapes_in("(bf16[1,32,<=384]{2,1,0:T(8,128)(2,1)S(1)}, pred[]{:T(512)}, s4[3]{0})")
    assert found == (Shape("bf16", (1, 32, 384), 1), Shape("pred", ()), Shape("s4", (3,)))
    assert [shape.num_bytes for shape in found] == [1 * 32 * 384 * 2, 1, 1]


def test_a_program_is_walked_through_its_loops():
    program = parse_hlo(TEXT)
    assert program.entry == "main"
    loop = program.computations["main"].root
    assert (loop.opcode, loop.op_name) == ("while", "jit(f)/while")
    assert loop.called == {"condition": "condition", "body": "body"}
    opcodes = [instruction.opcode for instruction in program.walk()]
    assert opcodes.count("copy") == 1
    assert "dynamic-slice" not in opcodes  # inside of a fusion


def test_a_kernels_description_over_several_lines_ends_no_computation():
    """Pallas kernels carry theirs in a string with line breaks, behind which the instruction goes on."""
    program = parse_hlo("""
ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %k = f32[4]{0} custom-call(%x), custom_call_target="t", frontend_attributes={metadata={
"block": 512
}}, metadata={op_name="jit(f)/kernel"}
  ROOT %n = f32[4]{0} negate(%k)
}
""")
    assert [instruction.opcode for instruction in program.walk()][1:] == ["custom-call", "negate"]


@pytest.mark.parametrize("trips", [1, 5])
def test_bytes_that_are_read(trips):
    program = parse_hlo(TEXT)
    row, index, table = 16, 4, 128
    # The slice, all of the table behind a bitcast, the move to the faster memory, a row, and the copy.
    once = (row + index) + table + table + row + table
    assert bytes_read(program, "main", lambda instruction: trips) == trips * once


def test_a_loop_that_runs_here_reads_its_weight_in_every_trip():
    def run(x, w):
        return jax.lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, x)
        )

    x, w = jax.ShapeDtypeStruct((2, 64), jnp.float32), jax.ShapeDtypeStruct((64, 64), jnp.float32)
    program = read_program(jax.jit(run).lower(x, w), "cpu")
    assert program.loops == 1
    read = bytes_read(program.hlo, program.loop.called["body"], lambda instruction: 1)
    assert 64 * 64 * 4 <= read <= 1.2 * 64 * 64 * 4


def test_chips_are_known_by_the_names_that_jax_gives_them():
    assert chip_of("NVIDIA H100 80GB HBM3").name == "h100"
    assert (chip_of("TPU v5 lite").name, chip_of("TPU v5").name) == ("v5e", "v5p")
    assert chip_of("cpu") is chip_named("b0") is None
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)
    chip = chip_named("v5p")
    assert chip.seconds(chip.flops, 0) == chip.seconds(0, chip.bandwidth) == 1.0
