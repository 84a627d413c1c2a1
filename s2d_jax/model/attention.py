"""Rotary positions, and the block of attention."""

from __future__ import annotations

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from s2d_jax.config.model import ModelConfig, RopeScaling
from s2d_jax.model.attention_forms.attend import attention
from s2d_jax.model.attention_forms.request import Causal
from s2d_jax.model.kv_cache import write_caches
from s2d_jax.model.layers import Linear

# One number for each of T tokens of a row.
PerToken = Int[Array | np.ndarray, "B T"]
# Keys or values of one layer.
HeadStates = Float[Array, "B K S H"]
# Keys, values, and how many positions of each row are valid.
CachePart = tuple[HeadStates, HeadStates, Int[Array, "B"]]


def rope_frequencies(
    head_dim: int, *, theta: float, scaling: RopeScaling | None
) -> Float[Array, "{head_dim//2}"]:
    """f32 rotation per position (Su et al. 2021, eq. 15), after Llama-3's scaling if any."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency = 1.0 / jnp.float32(theta) ** exponent
    if scaling is None:
        return frequency
    wavelength = 2 * math.pi / frequency
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = (scaling.original_max_position / wavelength - low) / (high - low)
    blend = jnp.clip(blend, 0.0, 1.0)  # 0: stretched by `factor`; 1: kept
    return (1 - blend) * frequency / scaling.factor + blend * frequency


def rope(
    x_BTNH: Float[Array, "B T N H"],
    positions_BT: PerToken,
    frequency_P: Float[Array, "H//2"],
) -> Float[Array, "B T N H"]:
    """Rotates the P = H/2 pairs `(x[i], x[i + P])` by `position * frequency[i]` (the Hugging Face pairing)."""
    angle_BTP = positions_BT.astype(jnp.float32)[:, :, None] * frequency_P[None, None, :]
    cos, sin = jnp.cos(angle_BTP)[:, :, None, :], jnp.sin(angle_BTP)[:, :, None, :]
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)


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

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: PerToken,
        looks: Bool[Array, "B T S"] | Causal,
        cache: CachePart | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[HeadStates, HeadStates]]:
        """Attends over the window itself, or over `cache = (k, v, start_B)` after writing the window into it at `start_B`.

        Writing first keeps the cache in place inside a loop. `looks` is what each position looks at; behind the window it must
        be nothing. Returns the mixed values, and keys and values.
        """
        c = self.config
        B, T, _ = x_BTD.shape
        frequency_P = rope_frequencies(c.head_dim, theta=c.rope_theta, scaling=c.rope_scaling)
        q_BTNH = self.q_proj(x_BTD).reshape(B, T, c.num_heads, c.head_dim)
        k_BTKH = self.k_proj(x_BTD).reshape(B, T, c.num_kv_heads, c.head_dim)
        v_BTKH = self.v_proj(x_BTD).reshape(B, T, c.num_kv_heads, c.head_dim)
        q_BTNH = rope(q_BTNH, positions_BT, frequency_P)
        k = jnp.swapaxes(rope(k_BTKH, positions_BT, frequency_P), 1, 2)
        v = jnp.swapaxes(v_BTKH, 1, 2)
        used_B = None
        if cache is not None:
            k_cache, v_cache, start_B = cache
            k, v = write_caches((k_cache, v_cache), (k, v), start_B, axis=2)
            used_B = start_B + T
        mixed = attention(q_BTNH, k, v, looks, used_B=used_B)
        return self.o_proj(mixed), (k, v)
