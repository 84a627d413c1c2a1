"""What the compilers of chips make of the kernels of attention: no cache is copied, no square of a row's length is kept."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from chips_elsewhere import chips
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from s2d_jax.backends import compiling_for, forms_of
from s2d_jax.compilers.hlo import parse_hlo
from s2d_jax.model.attention_forms import attend, flash_gpu, used_blocks
from s2d_jax.model.attention_forms.request import Causal, Request
from s2d_jax.model.kv_cache import write_caches
from s2d_jax.sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.usefixtures("compiled_anew")


def shapes(sharding, *sizes, dtype=jnp.bfloat16):
    return [jax.ShapeDtypeStruct(size, dtype, sharding=sharding) for size in sizes]


@pytest.mark.parametrize(
    ("topology", "name"), [("v5p:2x2x2", "used_blocks"), ("h100:1", "used_splits")]
)
def test_kernels_read_caches_where_they_lie(monkeypatch, topology, name):
    """Inside a loop that writes them first, as a round does."""
    B, T, N, K, H, C = 2, 5, 8, 2, 128, 1024
    device = chips(topology)[0]
    on_chip, platform = SingleDeviceSharding(device), device.platform
    selected = dataclasses.replace(forms_of(platform), cached_attention=(name,))
    monkeypatch.setattr(attend, "forms", lambda: selected)

    def run(q_BTNH, k_BKSH, v_BKSH, start_B):
        def step(carry):
            k_BKSH, v_BKSH, q_BTNH, start_B = carry
            new = jnp.swapaxes(q_BTNH[:, :, :K], 1, 2)
            k_BKSH, v_BKSH = write_caches((k_BKSH, v_BKSH), (new, new), start_B, axis=2)
            at_BT = start_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
            seen_BTS = jnp.arange(C, dtype=jnp.int32)[None, None] <= at_BT[:, :, None]
            mixed = attend.attention(q_BTNH, k_BKSH, v_BKSH, seen_BTS, used_B=start_B + T)
            return k_BKSH, v_BKSH, mixed.reshape(q_BTNH.shape), start_B + T

        with compiling_for(platform):
            carry = (k_BKSH, v_BKSH, q_BTNH, start_B)
            return jax.lax.while_loop(lambda carry: jnp.all(carry[3] < C - T), step, carry)

    inputs = shapes(on_chip, (B, T, N, H), (B, K, C, H), (B, K, C, H))
    inputs += shapes(on_chip, (B,), dtype=jnp.int32)
    text = jax.jit(run, donate_argnums=(1, 2)).lower(*inputs).compile().as_text()
    assert f"attention_over_{name}" in text
    copies = [
        instruction.name
        for instruction in parse_hlo(text).walk()
        if instruction.opcode in ("copy", "copy-start", "transpose")
        and any(shape.dims == (B, K, C, H) for shape in instruction.shapes)
    ]
    assert not copies


@pytest.mark.exhaustive("only a change of the kernel's sizes can break it")
def test_the_largest_pass_that_the_kernel_takes_fits():
    T, N, K, H = 64, 32, 16, 256
    on_chip = SingleDeviceSharding(chips("v5p:2x2x2")[0])

    def run(q_BTNH, k_BKSH, v_BKSH, mask_BTS):
        request = Request(q_BTNH, k_BKSH, v_BKSH, mask_BTS, soft_cap=5.0)
        assert used_blocks.takes(request)
        wider = jnp.concatenate([q_BTNH, q_BTNH], axis=1)
        assert not used_blocks.takes(dataclasses.replace(request, q_BTNH=wider))
        return used_blocks.attend(request)

    inputs = shapes(on_chip, (1, T, N, H), (1, K, 320, H), (1, K, 320, H))
    jax.jit(run).lower(*inputs, *shapes(on_chip, (1, T, 320), dtype=jnp.bool_)).compile()


def squares(text: str, T: int) -> set[str]:
    """The shapes in a compiled program with two axes of T."""
    found = re.findall(r"\w+\[([\d,]+)\]", text)
    return {dims for dims in found if dims.split(",").count(str(T)) > 1}


def test_squares_are_found():
    assert squares("pred[2,640,640]{2,1,0} f32[640,64]{1,0} f32[1,6400]", 640) == {"2,640,640"}


def gradient_of(platform: str, T: int):
    """The gradient of attention over packed rows as `platform` computes it, by queries, keys and values."""

    def total(q_BTNH, k_BKSH, v_BKSH, ids_BT):
        with compiling_for(platform):
            mixed = attend.attention(q_BTNH, k_BKSH, v_BKSH, Causal(ids_BT))
        return jnp.sum(mixed.astype(jnp.float32) ** 2)

    return jax.jit(jax.grad(total, (0, 1, 2)))


@pytest.mark.exhaustive(
    "compiles for eight chips, ten seconds; tracing shows the same without a mesh"
)
def test_rows_of_8k_have_no_square_on_a_tpu():
    """On a mesh, too: each chip runs the kernel on its own rows and heads, and nothing is gathered."""
    T, mesh = 8192, make_mesh(MeshConfig(data=4, tensor=2), chips("v5p:2x2x2"))
    q_axes = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    k_axes = NamedSharding(mesh, PartitionSpec("data", "tensor"))
    inputs = shapes(q_axes, (4, T, 4, 64)) + shapes(k_axes, (4, 2, T, 64), (4, 2, T, 64))
    inputs += shapes(NamedSharding(mesh, PartitionSpec("data")), (4, T), dtype=jnp.int32)
    with jax.set_mesh(mesh):
        text = gradient_of("tpu", T).lower(*inputs).compile().as_text()
    assert text.count("splash_mha") > 0
    assert not squares(text, T)
    assert "all-gather" not in text


def test_long_rows_have_no_square_on_a_gpu():
    T = flash_gpu.LEAST_LENGTH
    on_chip = SingleDeviceSharding(chips("h100:1")[0])
    inputs = shapes(on_chip, (1, T, 4, 64), (1, 2, T, 64), (1, 2, T, 64))
    inputs += shapes(on_chip, (1, T), dtype=jnp.int32)
    text = gradient_of("gpu", T).lower(*inputs).compile().as_text()
    assert text.count("triton") > 0
    assert not squares(text, T)
