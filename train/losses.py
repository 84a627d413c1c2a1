"""The sorted loss: cross-entropy at every exit through one shared norm and head, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

HeadParams = Any
# (head_params, h [..., D]) -> f32 logits [..., V]
ReadLogits = Callable[[HeadParams, jax.Array], jax.Array]


@flax.struct.dataclass
class ExitSums:
    """Sums over the counted tokens, one per exit; divide by their number for means.

    Attributes:
        loss_E: f32, cross-entropy in nats.
        correct_E: f32, how often the argmax is the next token.
    """

    loss_E: jax.Array
    correct_E: jax.Array


def exit_sums_of(logits: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> ExitSums:
    """Weighted sums over all positions of `-log softmax(logits)[target]` and of `argmax == target`.

    Args:
        logits: f32 `[E, B, T, V]`.
        targets_BT: int32, in `[0, V)`.
        weights_BT: f32; 0 leaves a position out.
    """
    targets_EBT = jnp.broadcast_to(targets_BT[None], logits.shape[:-1])
    picked = jnp.take_along_axis(logits, targets_EBT[..., None], axis=-1, mode="clip")[..., 0]
    loss_EBT = jax.nn.logsumexp(logits, axis=-1) - picked
    correct_EBT = (jnp.argmax(logits, axis=-1).astype(jnp.int32) == targets_EBT).astype(jnp.float32)
    weights_EBT = weights_BT[None]
    return ExitSums(
        loss_E=jnp.sum(loss_EBT * weights_EBT, axis=(1, 2)),
        correct_E=jnp.sum(correct_EBT * weights_EBT, axis=(1, 2)),
    )


def sorted_loss(
    read_logits: ReadLogits,
    head_params: HeadParams,
    exit_hiddens: tuple[jax.Array, ...],
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    exit_weights: tuple[float, ...],
    chunk: int,
) -> tuple[jax.Array, ExitSums]:
    """The SoFT objective: the weighted mean over exits of the summed token cross-entropy.

        loss = sum_e w_e * CE(head(norm(h_e)), targets) / sum_e w_e

    With equal weights this is the unweighted mean of Sorted Fine-Tuning (Valipour et al. 2023, arXiv 2309.08968), as S2D
    trains its draft (arXiv 2407.01955). Logits exist for `chunk` positions of each row at a time; their gradient is taken
    at once, in the forward pass, so that no logits are stored or computed twice.

    Args:
        read_logits: the shared norm and head.
        head_params: the parameters that `read_logits` takes.
        exit_hiddens: one `[B, T, D]` state per exit.
        targets_BT: int32, the next token of each position.
        weights_BT: f32, 0 where a position is not counted.
        exit_weights: one per exit, not all 0.
        chunk: positions per row whose logits are held at once.

    Returns:
        The f32 loss, summed over counted tokens, and the sums of each exit, which carry no gradient.
    """
    shares = tuple(weight / sum(exit_weights) for weight in exit_weights)
    pieces = _chunks(exit_hiddens, targets_BT, weights_BT, chunk)
    return _chunked_loss(read_logits, shares, head_params, *pieces)


def exit_sums(
    read_logits: ReadLogits,
    head_params: HeadParams,
    exit_hiddens: tuple[jax.Array, ...],
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    chunk: int,
) -> ExitSums:
    """The sums of `sorted_loss` alone, for evaluation; the same arguments."""

    def step(sums, piece):
        h, targets, weights = piece
        found = exit_sums_of(read_logits(head_params, h), targets, weights)
        return jax.tree.map(jnp.add, sums, found), None

    pieces = _chunks(exit_hiddens, targets_BT, weights_BT, chunk)
    return jax.lax.scan(step, _zero_sums(len(exit_hiddens)), pieces)[0]


def _chunks(exit_hiddens, targets_BT, weights_BT, chunk: int):
    """States `[C, E, B, chunk, D]`, targets and weights `[C, B, chunk]`.

    T is cut, zero-padded to whole chunks; the batch stays in one piece, so that its sharding does.
    """

    def cut(x: jax.Array) -> jax.Array:
        B, T = x.shape[:2]
        size = min(chunk, T)
        padded = jnp.pad(x, [(0, 0), (0, -T % size), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(padded.reshape(B, -1, size, *x.shape[2:]), 1, 0)

    return jnp.stack([cut(h) for h in exit_hiddens], axis=1), cut(targets_BT), cut(weights_BT)


def _zero_sums(num_exits: int) -> ExitSums:
    return ExitSums(jnp.zeros(num_exits), jnp.zeros(num_exits))


def _chunked_loss(read_logits, shares, head_params, hiddens, targets, weights):
    """`sorted_loss` on chunks; its gradient is computed with its value and scaled by the cotangent afterwards."""

    def chunk_loss(head_params, h, targets, weights):
        sums = exit_sums_of(read_logits(head_params, h), targets, weights)
        return jnp.sum(sums.loss_E * jnp.asarray(shares, jnp.float32)), sums

    @jax.custom_vjp
    def loss(head_params, hiddens, targets, weights):
        return forward(head_params, hiddens, targets, weights)[0]

    def forward(head_params, hiddens, targets, weights):
        def step(carry, piece):
            gradient = jax.value_and_grad(chunk_loss, argnums=(0, 1), has_aux=True)
            (value, sums), (head_grad, hidden_grad) = gradient(head_params, *piece)
            return jax.tree.map(jnp.add, carry, (value, sums, head_grad)), hidden_grad

        zeros = jax.tree.map(jnp.zeros_like, head_params)
        start = (jnp.zeros(()), _zero_sums(len(shares)), zeros)
        carry, hidden_grads = jax.lax.scan(step, start, (hiddens, targets, weights))
        total, sums, head_grad = carry
        return (total, sums), (head_grad, hidden_grads)

    def backward(gradients, cotangents):
        scale = cotangents[0]
        scaled = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
        return (*scaled, None, None)

    loss.defvjp(forward, backward)
    return loss(head_params, hiddens, targets, weights)
