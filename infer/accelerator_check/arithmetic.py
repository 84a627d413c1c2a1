"""Operations and bytes that decoding and training need, whatever a program spends on them."""

from __future__ import annotations

from s2d_jax.config.model import ModelConfig


def layer_weights(config: ModelConfig) -> int:
    """Weights in the matrices of one layer: q, k, v and o, and the three of the gated feed-forward network."""
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    return config.embed_dim * (2 * queries + 2 * keys + 3 * config.ffw_dim)


def head_weights(config: ModelConfig) -> int:
    """Weights of the head."""
    return config.vocab_size * config.embed_dim


def decode_bytes(config: ModelConfig, length: int, itemsize: int = 2) -> int:
    """Bytes that a round of plain decoding must read: matrices of all layers and the head once, and the keys and values
    of `length` positions."""
    weights = config.num_layers * layer_weights(config) + head_weights(config)
    cached = 2 * config.num_layers * config.num_kv_heads * config.head_dim * length
    return (weights + cached) * itemsize


def attention_flops(config: ModelConfig, length: int) -> float:
    """Operations of attention per token, forward: `4 L N H (T + 1) / 2`, since position i attends to i positions."""
    return 2 * config.num_layers * config.num_heads * config.head_dim * (length + 1)


def prefill_flops(config: ModelConfig, length: int) -> float:
    """Operations of a prompt of `length` tokens: `2 N` per token and attention; the head reads the last position only."""
    per_token = 2 * config.num_layers * layer_weights(config) + attention_flops(config, length)
    return length * per_token + 2 * head_weights(config)


def training_flops(config: ModelConfig, num_exits: int, length: int) -> float:
    """Operations of a training step per token: `6 N + 3 A`, forward and twice as much backward.

    N counts the matrices of all layers, and the head once for each exit; A is `attention_flops`. Chowdhery et al. 2022 (PaLM),
    appendix B, with half their attention, since it is causal. Layers that are computed again count once.
    """
    used = config.num_layers * layer_weights(config) + num_exits * head_weights(config)
    return 6 * used + 3 * attention_flops(config, length)


def tokens_per_round(acceptance: float, drafted: int) -> float:
    """Expected tokens of a round: `(1 - a^(G + 1)) / (1 - a)` (Leviathan et al. 2022, equation 1)."""
    if acceptance == 1.0:
        return drafted + 1.0
    return (1 - acceptance ** (drafted + 1)) / (1 - acceptance)
