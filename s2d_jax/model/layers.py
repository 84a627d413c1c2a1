"""The pieces of a Llama/Qwen2 decoder block: RMSNorm, rotary positions, grouped-query attention, gated MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from s2d_jax.config.model import ModelConfig
from s2d_jax.model.products.linear import linear
from s2d_jax.model.remat import as_product

_kernel_init = nn.initializers.normal(0.02)


def logical_param(
    module: nn.Module, name: str, init: Callable, axes: tuple[str, ...], shape: tuple[int, ...]
) -> Any:
    """A parameter of `module` whose axes have these logical names: an array, or an `Int8Weight`."""
    return module.param(name, nn.with_logical_partitioning(init, axes), shape)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * scale`, in f32 (Zhang & Sennrich 2019, eq. 4)."""

    embed_dim: int
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        scale_D = logical_param(self, "scale", nn.initializers.ones, ("norm",), (self.embed_dim,))
        x_f32 = x.astype(jnp.float32)
        mean_square = jnp.mean(x_f32 * x_f32, axis=-1, keepdims=True)
        normed = (x_f32 * jax.lax.rsqrt(mean_square + self.eps)).astype(x.dtype)
        return normed * jnp.expand_dims(scale_D.astype(x.dtype), tuple(range(x.ndim - 1)))


class Linear(nn.Module):
    """A weight `[out, in]`, with a bias where asked for; the result has the dtype of the input unless `out_dtype` is given.

    Where the parameters hold low-rank factors beside the kernel (`s2d_jax.model.lora` puts them there, never `init`),
    their product is added to it.
    """

    in_dim: int
    out_dim: int
    axes: tuple[str, str]
    use_bias: bool = False
    out_dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        shape = (self.out_dim, self.in_dim)
        kernel_OI = logical_param(self, "kernel", _kernel_init, self.axes, shape)
        out = linear(x, kernel_OI, self.out_dtype)
        if self.has_variable("params", "lora_a"):
            a_RI, b_OR = (self.get_variable("params", name) for name in ("lora_a", "lora_b"))
            out = out + linear(linear(x, a_RI), b_OR, self.out_dtype)
        if self.use_bias:
            zeros = nn.initializers.zeros
            bias_O = logical_param(self, "bias", zeros, self.axes[:1], (self.out_dim,))
            out = out + jnp.expand_dims(bias_O.astype(x.dtype), tuple(range(x.ndim - 1)))
        return as_product(out)


class ExitAdapter(nn.Module):
    """`h + up(silu(down(h / |h|))) * |h|`, a residual that scales with the state: `|h|` is its root mean square."""

    embed_dim: int
    rank: int
    eps: float

    def setup(self):
        self.down = Linear(self.embed_dim, self.rank, ("rank", "embed"))
        self.up = Linear(self.rank, self.embed_dim, ("embed", "rank"))

    def __call__(self, h: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        h_f32 = h.astype(jnp.float32)
        size = jnp.sqrt(jnp.mean(h_f32 * h_f32, axis=-1, keepdims=True) + self.eps)
        change = self.up(jax.nn.silu(self.down((h_f32 / size).astype(h.dtype))))
        return h + change * size.astype(h.dtype)


class MLP(nn.Module):
    """`down(silu(gate(x)) * up(x))` (SwiGLU; Shazeer 2020, eq. 6)."""

    config: ModelConfig

    def setup(self):
        c = self.config
        self.gate_proj = Linear(c.embed_dim, c.ffw_dim, ("ffw", "embed"))
        self.up_proj = Linear(c.embed_dim, c.ffw_dim, ("ffw", "embed"))
        self.down_proj = Linear(c.ffw_dim, c.embed_dim, ("embed", "ffw"))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))
