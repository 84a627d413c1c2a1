"""The arithmetic of products, counted in the forms that compilers give them."""

from __future__ import annotations

import doctest

import jax
import jax.numpy as jnp
import pytest

from s2d_jax.compilers import products
from s2d_jax.compilers.hlo import parse_hlo
from s2d_jax.compilers.products import product_flops


def test_the_example_in_the_documentation_is_right():
    failed, tried = doctest.testmod(products)
    assert (failed, tried) == (0, 2)


def test_a_batched_product_in_a_fusion_of_a_loop_counts_once():
    hlo = parse_hlo("""
%fused (p0: bf16[3,2,16], p1: bf16[3,16,5]) -> f32[3,2,5] {
  %p0 = bf16[3,2,16]{2,1,0} parameter(0)
  %p1 = bf16[3,16,5]{2,1,0} parameter(1)
  ROOT %d = f32[3,2,5] dot(%p0, %p1), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}
}

%body (c: (bf16[3,2,16], bf16[3,16,5])) -> (bf16[3,2,16], bf16[3,16,5]) {
  %c = (bf16[3,2,16]{2,1,0}, bf16[3,16,5]{2,1,0}) parameter(0)
  %x = bf16[3,2,16]{2,1,0} get-tuple-element(%c), index=0
  %w = bf16[3,16,5]{2,1,0} get-tuple-element(%c), index=1
  %y = f32[3,2,5]{2,1,0} fusion(%x, %w), kind=kCustom, calls=%fused
  ROOT %t = (bf16[3,2,16]{2,1,0}, bf16[3,16,5]{2,1,0}) tuple(%x, %w)
}

%condition (d: (bf16[3,2,16], bf16[3,16,5])) -> pred[] {
  %d = (bf16[3,2,16]{2,1,0}, bf16[3,16,5]{2,1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (z: (bf16[3,2,16], bf16[3,16,5])) -> (bf16[3,2,16], bf16[3,16,5]) {
  %z = (bf16[3,2,16]{2,1,0}, bf16[3,16,5]{2,1,0}) parameter(0)
  ROOT %loop = (bf16[3,2,16]{2,1,0}, bf16[3,16,5]{2,1,0}) while(%z), condition=%condition, body=%body
}
""")
    assert product_flops(hlo) == product_flops(hlo, "body") == 2 * 3 * 2 * 16 * 5


@pytest.mark.parametrize(
    ("written", "shapes", "flops"),
    [
        # A plain product.
        ("dim_labels=bf_oi->bf", ("4,64", "16,64", "4,16"), 2 * 4 * 64 * 16),
        # Six products: the window moves over an operand that is spread, and always meets one element of it.
        (
            "window={size=6 stride=5 lhs_dilate=6}, dim_labels=0bf_0oi->0bf",
            ("6,4,64", "6,16,64", "6,4,16"),
            2 * 6 * 4 * 64 * 16,
        ),
        (
            "window={size=4x2 stride=3x1 lhs_dilate=4x2}, dim_labels=01bf_01io->01bf",
            ("4,2,6,64", "4,2,64,16", "4,2,6,16"),
            2 * 8 * 6 * 64 * 16,
        ),
        # A convolution that meets nothing at one end of the padded operand: 2 + 3 + 3 + 3 + 2 elements.
        (
            "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
            ("1,5,8", "3,8,4", "1,5,4"),
            2 * 13 * 8 * 4,
        ),
    ],
)
def test_convolutions(written, shapes, flops):
    left, right, out = shapes
    hlo = parse_hlo(f"""
ENTRY %main (x: bf16[{left}], w: bf16[{right}]) -> f32[{out}] {{
  %x = bf16[{left}]{{0}} parameter(0)
  %w = bf16[{right}]{{0}} parameter(1)
  ROOT %y = f32[{out}]{{0}} convolution(%x, %w), {written}
}}
""")
    assert product_flops(hlo) == flops


def test_a_sum_that_was_a_product_counts_and_a_sum_of_partial_products_does_not():
    hlo = parse_hlo("""
ENTRY %main (x: bf16[64], w: bf16[16,64], parts: f32[4,16]) -> (f32[16], f32[16], f32[16]) {
  %x = bf16[64]{0} parameter(0)
  %w = bf16[16,64]{1,0} parameter(1)
  %parts = f32[4,16]{1,0} parameter(2)
  %zero = f32[] constant(0)
  %spread = bf16[16,64]{1,0} broadcast(%x), dimensions={1}
  %m = bf16[16,64]{1,0} multiply(%w, %spread)
  %wide = f32[16,64]{1,0} convert(%m)
  %y = f32[16]{0} reduce(%wide, %zero), dimensions={1}, to_apply=%add, metadata={op_name="jit(f)/q_proj/dot_general"}
  %s = f32[16]{0} reduce(%parts, %zero), dimensions={0}, to_apply=%add, metadata={op_name="jit(f)/q_proj/dot_general"}
  %n = f32[16]{0} reduce(%wide, %zero), dimensions={1}, to_apply=%add, metadata={op_name="jit(f)/norm/reduce_sum"}
  ROOT %t = (f32[16]{0}, f32[16]{0}, f32[16]{0}) tuple(%y, %s, %n)
}
""")
    assert product_flops(hlo) == 2 * 16 * 64


def test_a_program_that_is_compiled_here():
    shapes = (jax.ShapeDtypeStruct(dims, jnp.float32) for dims in ((3, 24, 64), (3, 64, 16)))
    compiled = jax.jit(jnp.matmul).lower(*shapes).compile().as_text()
    assert compiled is not None
    assert product_flops(parse_hlo(compiled)) == 2 * 3 * 24 * 64 * 16
