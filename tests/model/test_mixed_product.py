"""bf16 products over f32 master weights, and their gradients, against NumPy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from s2d_jax import MeshConfig, make_mesh
from s2d_jax.model.products.forms import plain
from s2d_jax.model.products.linear import linear
from s2d_jax.model.products.mixed import mixed_product


def rounded(x) -> np.ndarray:
    """To bf16 and back, in float64."""
    return np.asarray(jnp.asarray(x, jnp.float32).astype(jnp.bfloat16).astype(jnp.float32), float)


@pytest.fixture
def problem(request):
    """Activations and a gradient whose numbers bf16 holds, and a weight whose numbers it does not; float64."""
    rows, rng = request.param, np.random.default_rng(0)
    x, w, dy = rng.normal(size=(rows, 24)), rng.normal(size=(40, 24)), rng.normal(size=(rows, 40))
    return rounded(x), w.astype(np.float32).astype(float), rounded(dy)


@pytest.mark.parametrize("problem", [1, 15, 16, 33, 64], indirect=True, ids=str)
def test_product_and_gradients_equal_numpy(problem):
    """Only the weight is rounded; its gradient is not."""
    x, w, dy = problem
    x_AI, dy_AO = jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.float32)
    out_AO, pull = jax.vjp(mixed_product, x_AI, jnp.asarray(w, jnp.float32))
    dx_AI, dw_OI = jax.jit(pull)(dy_AO)
    assert (out_AO.dtype, dx_AI.dtype, dw_OI.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(out_AO, x @ rounded(w).T, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(dw_OI, dy.T @ x, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(np.asarray(dx_AI, float), dy @ rounded(w), rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("out_dtype", [None, jnp.float32])
def test_linear_over_masters_is_this_product(out_dtype):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=(6, 8)), jnp.float32)
    out = linear(x, w, out_dtype)
    assert out.dtype == (out_dtype or jnp.bfloat16)
    expected = mixed_product(x.reshape(10, 8), w).astype(out.dtype).reshape(2, 5, 6)
    np.testing.assert_array_equal(out, expected)
    gradient = jax.grad(lambda w: linear(x, w, jnp.float32).sum())(w)
    np.testing.assert_allclose(
        gradient, np.asarray(x, float).sum((0, 1))[None].repeat(6, 0), rtol=1e-5
    )


def test_rows_and_weights_may_be_split_over_devices():
    rng = np.random.default_rng(2)
    x, w, dy = (rng.normal(size=shape) for shape in ((48, 16), (32, 16), (48, 32)))
    inputs = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.float32), jnp.asarray(dy, jnp.float32)

    @jax.jit
    def gradients(x_AI, w_OI, dy_AO):
        out_AO, pull = jax.vjp(mixed_product, x_AI, w_OI)
        return out_AO, *pull(dy_AO)

    mesh = make_mesh(MeshConfig(data=4, fsdp=1, tensor=2))
    specs = PartitionSpec("data"), PartitionSpec("tensor"), PartitionSpec("data", "tensor")
    split = [
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in zip(inputs, specs, strict=True)
    ]
    for whole, found in zip(gradients(*inputs), gradients(*split), strict=True):
        whole, found = (np.asarray(array, float) for array in (whole, found))
        np.testing.assert_allclose(found, whole, rtol=2**-7, atol=1e-4)


def products_and_widened(function, *inputs) -> tuple[int, list[str]]:
    """How many products there are in the compiled program, and those of them with an f32 operand."""
    text = jax.jit(function).lower(*inputs).compile().as_text()
    products = [line for line in text.splitlines() if " dot(" in line]

    def is_narrow(operand):
        return f"%{operand} = bf16[" in text or f"{operand}: bf16[" in text

    def operands(line):
        return line.split(" dot(")[1].split(")")[0].replace("%", "").split(", ")

    return len(products), [line for line in products if not all(map(is_narrow, operands(line)))]


def test_no_operand_of_a_training_product_is_widened_on_a_cpu():
    """Products of f32 copies would be right, and half as fast."""

    def gradients(product, x_AI, w_OI, dy_AO):
        out_AO, pull = jax.vjp(product, x_AI, w_OI)
        return out_AO, pull(dy_AO)

    def plainly(x_AI, w_OI):
        return plain(x_AI, w_OI.astype(x_AI.dtype))

    shapes = ((64, 96), jnp.bfloat16), ((128, 96), jnp.float32), ((64, 128), jnp.float32)
    inputs = [jnp.ones(*shape) for shape in shapes]
    if products_and_widened(plainly, *inputs[:2])[1]:
        pytest.skip("XLA has no bf16 products for this processor")
    assert products_and_widened(functools.partial(gradients, mixed_product), *inputs) == (3, [])
    # What the test is for: differentiating the plain product widens.
    assert products_and_widened(functools.partial(gradients, plainly), *inputs)[1]
