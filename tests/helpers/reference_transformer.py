"""A slow, obvious Llama in NumPy: one sequence, no cache, every depth. Shares no code with the product."""

from __future__ import annotations

import numpy as np


def _norm(x, scale, eps):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * scale


def _rotate(x_TNH, theta):
    T, _, H = x_TNH.shape
    angle = np.arange(T)[:, None, None] * theta ** (-2 * np.arange(H // 2) / H)
    a, b = x_TNH[..., : H // 2], x_TNH[..., H // 2 :]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _attend(q_TNH, k_TKH, v_TKH):
    T, N, H = q_TNH.shape
    group = N // k_TKH.shape[1]
    out = np.zeros_like(q_TNH)
    for n in range(N):
        scores = q_TNH[:, n] @ k_TKH[:, n // group].T / np.sqrt(H)
        scores[np.triu_indices(T, 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[:, n] = weights / weights.sum(axis=-1, keepdims=True) @ v_TKH[:, n // group]
    return out.reshape(T, N * H)


def all_depths(config, params, tokens):
    """The states after 0, 1, ... layers of `tokens`, and each layer's rotated keys and its values, in f64."""
    T, c = len(tokens), config
    h = np.asarray(params["embed"]["embedding"], np.float64)[np.asarray(tokens)]
    states, keys, values = [h], [], []
    for i in range(c.num_layers):
        layer = params[f"layers_{i}"]

        def product(x, *names, layer=layer):
            leaf = layer
            for name in names:
                leaf = leaf[name]
            return x @ np.asarray(leaf["kernel"], np.float64).T

        x = _norm(h, np.asarray(layer["attn_norm"]["scale"], np.float64), c.norm_eps)
        q = _rotate(product(x, "attn", "q_proj").reshape(T, c.num_heads, -1), c.rope_theta)
        k = _rotate(product(x, "attn", "k_proj").reshape(T, c.num_kv_heads, -1), c.rope_theta)
        v = product(x, "attn", "v_proj").reshape(T, c.num_kv_heads, -1)
        h = h + product(_attend(q, k, v), "attn", "o_proj")
        x = _norm(h, np.asarray(layer["mlp_norm"]["scale"], np.float64), c.norm_eps)
        gate = product(x, "mlp", "gate_proj")
        h = h + product(
            gate / (1 + np.exp(-gate)) * product(x, "mlp", "up_proj"), "mlp", "down_proj"
        )
        states.append(h)
        keys.append(k)
        values.append(v)
    return states, keys, values


def logits(config, params, state):
    """The shared norm and head on any state."""
    head = params["embed"]["embedding"] if config.tie_embeddings else params["lm_head"]["kernel"]
    normed = _norm(state, np.asarray(params["final_norm"]["scale"], np.float64), config.norm_eps)
    return normed @ np.asarray(head, np.float64).T
