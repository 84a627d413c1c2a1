"""Collectives of a compiled program: counted once, where they stand, and whether anything is computed meanwhile."""

from __future__ import annotations

import doctest

import pytest

from s2d_jax.compilers import collectives
from s2d_jax.compilers.collectives import Collectives, collectives_by_axis, count_collectives
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
    assert (failed, tried) == (0, 4)


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


MESH = {"data": 2, "tensor": 4}


@pytest.mark.parametrize(
    ("written", "axes"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", {"tensor"}),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", {"data"}),
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", {"tensor"}),  # a part of the axis
        ("replica_groups={{0,1,2},{3,4},{5,6,7}}", {"data", "tensor"}),
        ("replica_groups={}", {"data", "tensor"}),  # all devices
        ("replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}", set()),
        ("replica_groups=[2,4]<=[8]", {"tensor"}),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", {"data"}),
        ("replica_groups=[1,8]<=[8]", {"data", "tensor"}),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", {"tensor"}),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", {"data"}),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_1','axis_2'}", {"tensor"}),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}", {"data", "tensor"}),
        ("source_target_pairs={{0,1},{1,0}}", {"tensor"}),
        ("source_target_pairs={{3,7}}", {"data"}),
    ],
)
def test_a_collective_sends_over_the_axes_along_which_a_group_differs(written, axes):
    found = collectives_by_axis(_with_one(written), MESH)
    assert {axis for axis, kinds in found.items() if kinds} == axes
    assert all(kinds == {"all-reduce": 1} for kinds in found.values() if kinds)


@pytest.mark.parametrize(
    "written",
    [
        "channel_id=1",
        "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}",
        "replica_groups=mesh['a'=8] {'a':(2)4}",
    ],
)
def test_what_cannot_be_read_is_refused(written):
    with pytest.raises(ValueError, match="which devices does this collective send to"):
        collectives_by_axis(_with_one(written), MESH)


def _with_one(written: str):
    return parse_hlo(f"""
ENTRY %main (y: f32[4]) -> f32[4] {{
  %y = f32[4]{{0}} parameter(0)
  ROOT %x = f32[4]{{0}} all-reduce(%y), {written}, use_global_device_ids=true, to_apply=%add
}}
""")


def test_the_end_of_a_collective_and_its_wrapper_are_not_counted_again():
    hlo = parse_hlo("""
%wrapped (s: f32[8]) -> f32[4] {
  %s = f32[8]{0} parameter(0)
  ROOT %rs = f32[4]{0} reduce-scatter(%s), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}

ENTRY %main (x: f32[4], y: f32[8]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %begun = (f32[4]{0}, f32[4]{0}) collective-permute-start(%x), source_target_pairs={{0,4},{4,0}}
  %w = ((f32[8]{0}), f32[4]{0}) async-start(%y), calls=%wrapped
  %ended = f32[4]{0} collective-permute-done(%begun)
  ROOT %done = f32[4]{0} async-done(%w)
}
""")
    found = collectives_by_axis(hlo, MESH)
    assert found == {"data": {"collective-permute": 1}, "tensor": {"reduce-scatter": 1}}
