"""The transformer: embed, run blocks [start, stop), read logits at any depth through the shared norm and head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from s2d_jax.config.draft import NO_PARTS, ExitParts
from s2d_jax.config.model import ModelConfig
from s2d_jax.model.attention import Attention, CachePart, HeadStates, PerToken
from s2d_jax.model.attention_forms.request import Causal
from s2d_jax.model.kv_cache import KVCache
from s2d_jax.model.layers import MLP, ExitAdapter, Linear, RMSNorm, logical_param
from s2d_jax.model.place import Place
from s2d_jax.model.products.linear import linear
from s2d_jax.model.products.weight_formats import Indices, embed
from s2d_jax.model.remat import RematPolicy, recomputed
from s2d_jax.sharding import looked_up_over_rows, over_rows


class Embed(nn.Module):
    """The embedding table `[V, D]`, which a tied head reads as well."""

    config: ModelConfig

    def setup(self):
        shape = (self.config.vocab_size, self.config.embed_dim)
        init = nn.initializers.normal(0.02)
        self.embedding = logical_param(self, "embedding", init, ("vocab", "embed"), shape)

    def __call__(self, tokens: Indices) -> Float[Array, "*batch D"]:
        return embed(self.embedding, tokens)

    def attend(self, h: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """f32 logits: the tied head."""
        return linear(h, self.embedding, jnp.float32)


class Block(nn.Module):
    """One pre-norm decoder layer."""

    config: ModelConfig

    def setup(self):
        c = self.config
        self.attn_norm = RMSNorm(c.embed_dim, c.norm_eps)
        self.attn = Attention(c)
        self.mlp_norm = RMSNorm(c.embed_dim, c.norm_eps)
        self.mlp = MLP(c)

    def __call__(
        self,
        h_BTD: Float[Array, "B T D"],
        positions_BT: PerToken,
        looks: Bool[Array, "B T S"] | Causal,
        cache: CachePart | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[HeadStates, HeadStates]]:
        mixed_BTD, written = self.attn(self.attn_norm(h_BTD), positions_BT, looks, cache)
        h_BTD = h_BTD + mixed_BTD
        return h_BTD + self.mlp(self.mlp_norm(h_BTD)), written


class Transformer(nn.Module):
    """Llama or Qwen2. Weights are cast to `dtype` on use, so f32 masters can compute in bf16.

    `Transformer(config).apply({"params": params}, ..., method="run_blocks")`

    With `trimmed_head_size` U, logits are read through the U rows of each head that `weights.model.with_trimmed_head` gathered.
    `parts` says which exits have a head or an adapter of their own.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    trimmed_head_size: int | None = None
    parts: ExitParts = NO_PARTS

    def setup(self):
        c = self.config
        self.embed_table = Embed(c, name="embed")
        self.layers = [Block(c) for _ in range(c.num_layers)]
        self.final_norm = RMSNorm(c.embed_dim, c.norm_eps)
        size = c.vocab_size if self.trimmed_head_size is None else self.trimmed_head_size

        def new_head():
            return Linear(c.embed_dim, size, ("vocab", "embed"), out_dtype=jnp.float32)

        # Keys are strings for Linen, which names the parameters `exit_heads_6` and the like.
        own_heads = {str(exit): new_head() for exit in self.parts.heads}
        if self.trimmed_head_size is not None:
            self.trimmed_head, self.trimmed_exit_heads = new_head(), own_heads
        else:
            self.exit_heads = own_heads
            if not c.tie_embeddings:
                self.lm_head = new_head()
        self.exit_adapters = {
            str(exit): ExitAdapter(c.embed_dim, self.parts.adapter_rank, c.norm_eps)
            for exit in self.parts.adapters
        }

    def no_states(self, batch: int) -> Float[Array, "{batch} D"]:
        """Zeros in the compute dtype, a placeholder for states that are not computed yet."""
        return jnp.zeros((batch, self.config.embed_dim), self.dtype)

    def embed(self, tokens_BT: PerToken) -> Float[Array, "B T D"]:
        """Tokens (int32) as vectors in the compute dtype. Ids beyond the vocabulary read its last row."""
        return self.embed_table(tokens_BT).astype(self.dtype)

    def run_blocks(
        self,
        h_BTD: Float[Array, "B T D"],
        cache: KVCache,
        start: int,
        stop: int,
        place: Place | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Runs layers [start, stop) on the T positions that follow each row's cached length.

        Args:
            h_BTD: the state before layer `start`.
            cache: holds exactly these layers; its capacity C must hold `length_B + T`.
            place: where these positions stand; None continues the text.

        Returns:
            The state after layer `stop - 1`, and the cache with the window written but its length unchanged.
        """
        if place is None:
            place = Place.of_text(cache.length_B, h_BTD.shape[1], cache.capacity)
        keys, values = [], []
        for layer, k, v in zip(self.layers[start:stop], cache.keys, cache.values, strict=True):
            h_BTD, (k, v) = layer(h_BTD, place.positions_BT, place.mask_BTS, (k, v, cache.length_B))
            keys.append(k)
            values.append(v)
        return h_BTD, cache.replace(keys=tuple(keys), values=tuple(values))

    def normed(self, h: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """The state after the last layer, after the final norm."""
        return self.final_norm(h)

    def logits(
        self, h: Float[Array, "*batch D"], exit_layer: int | None = None
    ) -> Float[Array, "*batch V"]:
        """f32 logits over the vocabulary (over the U listed ids with a trimmed head), through the final norm and a head.

        Args:
            h: the state after layer `exit_layer`.
            exit_layer: if `parts` names this exit, its adapter comes before the norm and its own head replaces the shared one.
                None, or an exit without parts, uses what all exits share.
        """
        if exit_layer in self.parts.adapters:
            h = self.exit_adapters[str(exit_layer)](h)
        return self._head(exit_layer)(self.final_norm(h))

    def _head(self, exit_layer: int | None) -> Callable[[jax.Array], jax.Array]:
        whole = self.trimmed_head_size is None
        if exit_layer in self.parts.heads:
            return (self.exit_heads if whole else self.trimmed_exit_heads)[str(exit_layer)]
        if not whole:
            return self.trimmed_head
        return self.embed_table.attend if self.config.tie_embeddings else self.lm_head

    def exit_hiddens(
        self,
        tokens_BT: PerToken,
        *,
        exit_layers: Sequence[int],
        positions_BT: PerToken | None = None,
        segment_ids_BT: PerToken | None = None,
        remat: RematPolicy = "none",
    ) -> tuple[Float[Array, "B T D"], ...]:
        """The states after each of `exit_layers` (ascending), without a cache.

        Args:
            tokens_BT: int32.
            positions_BT: int32; 0..T-1 when absent.
            segment_ids_BT: int32; a token attends to earlier tokens of its own segment only.
            remat: what of each block the backward pass computes again.
        """
        B, T = tokens_BT.shape
        if positions_BT is None:
            steps = jnp.arange(T, dtype=jnp.int32)
            positions_BT = jnp.broadcast_to(steps[None], (B, T))
        looks = Causal(segment_ids_BT)

        def run(layer, h):
            return over_rows(layer(h, positions_BT, looks)[0])

        h_BTD, exits = looked_up_over_rows(self.embed(tokens_BT)), {}
        run = recomputed(run, remat)
        for depth, layer in enumerate(self.layers[: max(exit_layers)], start=1):
            h_BTD = run(layer, h_BTD)
            exits[depth] = h_BTD
        return tuple(exits[depth] for depth in exit_layers)

    def __call__(
        self,
        tokens_BT: PerToken,
        *,
        positions_BT: PerToken | None = None,
        segment_ids_BT: PerToken | None = None,
    ) -> Float[Array, "B T V"]:
        """f32 logits of the full depth, without a cache."""
        (h_BTD,) = self.exit_hiddens(
            tokens_BT,
            exit_layers=(self.config.num_layers,),
            positions_BT=positions_BT,
            segment_ids_BT=segment_ids_BT,
        )
        if self.is_initializing():  # Linen creates only the parts that are used
            for exit in self.parts.exits:
                self.logits(h_BTD, exit)
        return self.logits(h_BTD)


def apply_model(model: Transformer, params: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    """What `method` of the model returns with `params` (Linen's `apply`, without the variables that it may also return)."""
    return model.apply({"params": params}, *args, method=method, **kwargs)
