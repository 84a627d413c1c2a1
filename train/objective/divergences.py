"""What one position learns from: cross-entropy to the next token, and divergences from a teacher's distribution."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

Divergence = Literal["forward_kl", "reverse_kl", "tvd"]

# The least probability of the rest of a distribution, because the rest, one minus a sum, may round to 0.
_TINY = 1e-7


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """`-log softmax(logits)[target]` in nats; f32 `[..., W]`.

    Args:
        logits: f32 `[..., W, U]`.
        targets: int32 `[W]` or with more of the leading axes, in [0, U).
    """
    targets = jnp.broadcast_to(targets, logits.shape[:-1])[..., None]
    target_logit = jnp.take_along_axis(logits, targets, axis=-1, mode="clip")[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - target_logit


def divergence(kind: Divergence, log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """How far the draft's q is from the teacher's p, over the same outcomes; f32 `[...]`.

    - forward_kl: `sum p (log p - log q)`, in nats (Hinton et al. 2015 without its temperature; DistillSpec, Zhou et al. 2023,
      arXiv 2310.08461, table 1).
    - reverse_kl: `sum q (log q - log p)`, in nats (ibid.).
    - tvd: `1/2 sum |p - q|`; a drafted token is accepted with probability 1 - tvd (Leviathan et al. 2022, arXiv 2211.17192,
      theorem 3.5).

    Args:
        log_p, log_q: f32 `[..., outcomes]` log-probabilities; -inf is probability 0.
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if kind == "tvd":
        return 0.5 * jnp.sum(jnp.abs(p - q), axis=-1)
    # The log is finite where p or q is 0, so that neither 0 * inf nor its gradient occurs.
    log_p, log_q = (jnp.maximum(x, jnp.log(jnp.float32(1e-30))) for x in (log_p, log_q))
    weight = p if kind == "forward_kl" else q
    return jnp.sum(weight * (log_p - log_q if kind == "forward_kl" else log_q - log_p), axis=-1)


def with_rest(log_probs: jax.Array) -> jax.Array:
    """Adds one outcome that stands for all other tokens: `[..., k]` -> `[..., k + 1]`.

    Lumping outcomes together never increases an f-divergence, so divergences over the top k and the rest are lower bounds of
    those over the whole vocabulary (the data-processing inequality; Csiszar 1967).
    """
    total = jnp.sum(jnp.exp(log_probs), axis=-1, keepdims=True)
    rest = jnp.log(jnp.maximum(1.0 - total, _TINY))
    return jnp.concatenate([log_probs, rest], axis=-1)


def at_tokens(log_q: jax.Array, ids: jax.Array) -> jax.Array:
    """`log q` at the listed ids `[..., k]`."""
    return jnp.take_along_axis(log_q, ids, axis=-1, mode="clip")


def restricted(log_probs: jax.Array, known: jax.Array) -> jax.Array:
    """Top-k log-probabilities and their rest, normalised again without the tokens that the draft's list lacks.

    Args:
        log_probs: f32 `[..., k + 1]`; the last entry is the rest.
        known: bool `[..., k]`, True where the draft's list has the token.
    """
    kept = jnp.where(known, log_probs[..., :-1], -jnp.inf)
    kept = jnp.concatenate([kept, log_probs[..., -1:]], axis=-1)
    return kept - jax.nn.logsumexp(kept, axis=-1, keepdims=True)
