"""Collectives of a compiled program: counted once, where they stand, and whether anything is computed meanwhile."""

from __future__ import annotations

import doctest

from s2d_jax.compilers import collectives
from s2d_jax.compilers.collectives import Collectives, count_collectives
from s2d_jax.compilers.hlo import parse_hlo

# One gather in a loop and one that a product hides; a sum that nothing hides; and one that a wrapper begins.
TEXT = """
%scattered (s: f32[8]) -> f32[4] {
  %s = f32[8]{0} parameter(0)
  ROOT %rs = f32[4]{0} reduce-scatter(%s), dimensions={0}, to_apply=%add
}

%body (c: (s32[], bf16[1,4])) -> (s32[], bf16[1,4]) {
  %c = (s32[], bf16[1,4]{1,0}) parameter(0)
  %b = bf16[1,4]{1,0} get-tuple-element(%c), index=1
  %g = bf16[8,4]{1,0} all-gather(%b), dimensions={0}
  ROOT %t = (s32[], bf16[1,4]{1,0}) tuple(%c, %g)
}

%condition (d: (s32[], bf16[1,4])) -> pred[] {
  %d = (s32[], bf16[1,4]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (x: f32[4], y: f32[8], z: (s32[], bf16[1,4])) -> f32[2,3] {
  %x = f32[4]{0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %z = (s32[], bf16[1,4]{1,0}) parameter(2)
  %begun = (f32[4]{0}, f32[32]{0}) all-gather-start(%x), dimensions={0}
  %w = ((f32[8]{0}), f32[4]{0}) async-start(%y), calls=%scattered
  %same = f32[4]{0} bitcast(%x)
  %product = f32[4]{0} multiply(%x, %same)
  %ended = f32[32]{0} all-gather-done(%begun)
  %done = f32[4]{0} async-done(%w)
  %v = (f32[4]{0}, f32[32]{0}) all-gather-start(%x), dimensions={0}
  %u = f32[32]{0} all-gather-done(%v)
  %loop = (s32[], bf16[1,4]{1,0}) while(%z), condition=%condition, body=%body
  ROOT %r = (f32[2,3]{1,0}, /*index=1*/f32[]) all-reduce(%product, %done), to_apply=%add
}
"""


def test_the_example_in_the_documentation_is_right():
    failed, tried = doctest.testmod(collectives)
    assert (failed, tried) == (0, 2)


def test_a_collective_in_pieces_of_products_is_one():
    found = count_collectives(
        parse_hlo("""
%first (x: f32[4]) -> (f32[4], f32[8]) {
  %x = f32[4]{0} parameter(0)
  %g = f32[8]{0} all-gather(%x), dimensions={0}
  ROOT %t = (f32[4]{0}, f32[8]{0}) tuple(%x, %g)
}

%last (y: f32[8]) -> f32[8] {
  %y = f32[8]{0} parameter(0)
  ROOT %h = f32[8]{0} all-gather(%y), dimensions={0}
}

ENTRY %main (a: f32[4]) -> f32[8] {
  %a = f32[4]{0} parameter(0)
  %async-collective-start.1 = (f32[4]{0}, f32[8]{0}) fusion(%a), kind=kCustom, calls=%first
  %piece = f32[8]{0} get-tuple-element(%async-collective-start.1), index=1
  %product = f32[4]{0} multiply(%a, %a)
  ROOT %async-collective-done.1 = f32[8]{0} fusion(%piece), kind=kCustom, calls=%last
}
""")
    )
    assert found == {"all-gather": Collectives(1, 32, overlapped=1)}


def test_collectives_are_counted_once_each_with_their_results():
    assert count_collectives(parse_hlo(TEXT)) == {
        "all-gather": Collectives(3, 128 + 128 + 64, in_loops=1, overlapped=1),
        "all-reduce": Collectives(1, 24 + 4),
        "reduce-scatter": Collectives(1, 32, overlapped=1),
    }
