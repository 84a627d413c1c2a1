"""The pieces of a Llama/Qwen2 decoder block: RMSNorm, rotary positions, grouped-query attention, gated MLP."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from s2d_jax.config import ModelConfig, RopeScaling
from s2d_jax.kv_cache import write_window
from s2d_jax.linear import linear

_kernel_init = nn.initializers.normal(0.02)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * scale`, in f32 (Zhang & Sennrich 2019, eq. 4)."""

    embed_dim: int
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale_D = self.param("scale", init, (self.embed_dim,))
        x_f32 = x.astype(jnp.float32)
        mean_square = jnp.mean(x_f32 * x_f32, axis=-1, keepdims=True)
        normed = (x_f32 * jax.lax.rsqrt(mean_square + self.eps)).astype(x.dtype)
        return normed * jnp.expand_dims(scale_D.astype(x.dtype), tuple(range(x.ndim - 1)))


class Linear(nn.Module):
    """A weight `[out, in]`, with a bias where asked for; the result has the dtype of the input unless `out_dtype` is given.

    Where the parameters hold low-rank factors beside the kernel (`s2d_jax.lora` puts them there, never `init`), their product
    is added to it.
    """

    in_dim: int
    out_dim: int
    axes: tuple[str, str]
    use_bias: bool = False
    out_dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(_kernel_init, self.axes)
        kernel_OI = self.param("kernel", init, (self.out_dim, self.in_dim))
        out = linear(x, kernel_OI, self.out_dtype)
        if self.has_variable("params", "lora_a"):
            a_RI, b_OR = (self.get_variable("params", name) for name in ("lora_a", "lora_b"))
            out = out + linear(linear(x, a_RI), b_OR, self.out_dtype)
        if self.use_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[:1])
            bias_O = self.param("bias", zeros, (self.out_dim,)).astype(x.dtype)
            out = out + jnp.expand_dims(bias_O, tuple(range(x.ndim - 1)))
        return out


class ExitAdapter(nn.Module):
    """`h + up(silu(down(h / |h|))) * |h|`, a residual that scales with the state: `|h|` is its root mean square."""

    embed_dim: int
    rank: int
    eps: float

    def setup(self):
        self.down = Linear(self.embed_dim, self.rank, ("rank", "embed"))
        self.up = Linear(self.rank, self.embed_dim, ("embed", "rank"))

    def __call__(self, h: jax.Array) -> jax.Array:
        h_f32 = h.astype(jnp.float32)
        size = jnp.sqrt(jnp.mean(h_f32 * h_f32, axis=-1, keepdims=True) + self.eps)
        change = self.up(jax.nn.silu(self.down((h_f32 / size).astype(h.dtype))))
        return h + change * size.astype(h.dtype)


def rope_frequencies(head_dim: int, *, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """f32 `[H/2]` rotation per position (Su et al. 2021, eq. 15), after Llama-3's scaling if any."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency = 1.0 / jnp.float32(theta) ** exponent
    if scaling is None:
        return frequency
    wavelength = 2 * math.pi / frequency
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = (scaling.original_max_position / wavelength - low) / (high - low)
    blend = jnp.clip(blend, 0.0, 1.0)  # 0: stretched by `factor`; 1: kept
    return (1 - blend) * frequency / scaling.factor + blend * frequency


def rope(x_BTNH: jax.Array, positions_BT: jax.Array, frequency: jax.Array) -> jax.Array:
    """Rotates pairs `(x[i], x[i + H/2])` by `position * frequency[i]` (the Hugging Face pairing)."""
    angle_BTH = positions_BT.astype(jnp.float32)[:, :, None] * frequency[None, None, :]
    cos, sin = jnp.cos(angle_BTH)[:, :, None, :], jnp.sin(angle_BTH)[:, :, None, :]
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)


def attention(q_BTNH, k_BKSH, v_BKSH, mask_BTS) -> jax.Array:
    """Grouped-query attention; softmax in f32.

    Args:
        q_BTNH: queries, N a multiple of K.
        k_BKSH, v_BKSH: keys and values.
        mask_BTS: bool, True where a query may look.

    Returns:
        `[B, T, N * H]` in the dtype of the queries.
    """
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    G = N // K
    # The queries that share a key head are the rows (M = G * T) of one product per row and key head.
    q_BKMH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    scores_BKMS = jnp.einsum(
        "BKMH,BKSH->BKMS", q_BKMH, k_BKSH, preferred_element_type=jnp.float32
    ) / math.sqrt(H)
    scores_BKGTS = scores_BKMS.reshape(B, K, G, T, S)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(q_BTNH.dtype)
    weights_BKMS = weights_BKGTS.reshape(B, K, G * T, S)
    mixed_BKMH = jnp.einsum(
        "BKMS,BKSH->BKMH", weights_BKMS, v_BKSH, preferred_element_type=jnp.float32
    )
    mixed_BTKGH = mixed_BKMH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4)
    return mixed_BTKGH.astype(q_BTNH.dtype).reshape(B, T, N * H)


class Attention(nn.Module):
    """Projections, rotary positions, grouped-query attention over the window or a cache, output projection."""

    config: ModelConfig

    def setup(self):
        c = self.config
        q_dim, kv_dim = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.q_proj = Linear(c.embed_dim, q_dim, ("heads", "embed"), c.qkv_bias)
        self.k_proj = Linear(c.embed_dim, kv_dim, ("kv_heads", "embed"), c.qkv_bias)
        self.v_proj = Linear(c.embed_dim, kv_dim, ("kv_heads", "embed"), c.qkv_bias)
        self.o_proj = Linear(q_dim, c.embed_dim, ("embed", "heads"))

    def __call__(self, x_BTD, positions_BT, mask_BTS, cache=None):
        """Attends over the window itself, or over `cache = (k, v, start_B)` once the window is written into it from there on.

        Writing first keeps the cache in place inside a loop. Returns the mixed values, and keys and values.
        """
        c = self.config
        B, T, _ = x_BTD.shape
        frequency = rope_frequencies(c.head_dim, theta=c.rope_theta, scaling=c.rope_scaling)
        q_BTNH = self.q_proj(x_BTD).reshape(B, T, c.num_heads, c.head_dim)
        k_BTKH = self.k_proj(x_BTD).reshape(B, T, c.num_kv_heads, c.head_dim)
        v_BTKH = self.v_proj(x_BTD).reshape(B, T, c.num_kv_heads, c.head_dim)
        q_BTNH = rope(q_BTNH, positions_BT, frequency)
        k = jnp.swapaxes(rope(k_BTKH, positions_BT, frequency), 1, 2)
        v = jnp.swapaxes(v_BTKH, 1, 2)
        if cache is not None:
            k_cache, v_cache, start_B = cache
            k = write_window(k_cache, k, start_B, axis=2)
            v = write_window(v_cache, v, start_B, axis=2)
        mixed = attention(q_BTNH, k.astype(x_BTD.dtype), v.astype(x_BTD.dtype), mask_BTS)
        return self.o_proj(mixed), (k, v)


class MLP(nn.Module):
    """`down(silu(gate(x)) * up(x))` (SwiGLU; Shazeer 2020, eq. 6)."""

    config: ModelConfig

    def setup(self):
        c = self.config
        self.gate_proj = Linear(c.embed_dim, c.ffw_dim, ("ffw", "embed"))
        self.up_proj = Linear(c.embed_dim, c.ffw_dim, ("ffw", "embed"))
        self.down_proj = Linear(c.ffw_dim, c.embed_dim, ("embed", "ffw"))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm decoder layer."""

    config: ModelConfig

    def setup(self):
        c = self.config
        self.attn_norm = RMSNorm(c.embed_dim, c.norm_eps)
        self.attn = Attention(c)
        self.mlp_norm = RMSNorm(c.embed_dim, c.norm_eps)
        self.mlp = MLP(c)

    def __call__(self, h_BTD, positions_BT, mask_BTS, cache=None):
        mixed_BTD, written = self.attn(self.attn_norm(h_BTD), positions_BT, mask_BTS, cache)
        h_BTD = h_BTD + mixed_BTD
        return h_BTD + self.mlp(self.mlp_norm(h_BTD)), written
