"""The sorted loss: the loss of every exit, at the positions that count, without ever holding all logits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from s2d_jax.sharding import axes_that_split_rows
from train.objective.counted_positions import _Walk
from train.objective.labels import Labels, TokenFunction, TokenValues


def sorted_loss(
    token_values: TokenFunction,
    learned: Any,
    fixed: Any,
    exit_hiddens: tuple[jax.Array, ...],
    labels: Labels,
    *,
    exit_weights: tuple[float, ...],
    chunk: int,
    through_hiddens: bool = True,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The SoFT objective: the weighted mean over exits of the summed loss of the tokens that count.

        loss = sum_e w_e * sum_t loss(head(norm(h_e,t))) / sum_e w_e

    With cross-entropy and equal weights this is the unweighted mean of Sorted Fine-Tuning (Valipour et al. 2023, arXiv
    2309.08968), as S2D trains its draft (arXiv 2407.01955). Only positions that count are read: they are gathered
    in each row and taken `chunk` at a time, so logits exist for only that many positions of each row. Their gradient is
    computed right away, in the forward pass, so that no logits are stored or computed twice.

    Args:
        token_values: computes the loss at some positions, and other values to sum up. It must not look across positions.
        learned: the parameters that `token_values` is differentiated by.
        fixed: its other parameters.
        exit_hiddens: one `[B, T, D]` state per exit.
        labels: the labels of all positions.
        exit_weights: one per exit, not all 0.
        chunk: positions per row whose logits are held at once.
        through_hiddens: the states depend on something learned. If false, their gradient is not computed.

    Returns:
        The f32 loss, summed over counted tokens, and the sums f32 `[E]` of all values, which carry no gradient.
    """
    shares = tuple(weight / sum(exit_weights) for weight in exit_weights)

    def chunk_loss(learned, h_EBWD, fixed, labels):
        values = token_values(learned, fixed, h_EBWD, labels)
        sums = {
            name: jnp.sum(value_EBW * labels.weights_BT[None], axis=(1, 2))
            for name, value_EBW in values.items()
        }
        return jnp.sum(sums["loss"] * jnp.asarray(shares, jnp.float32)), sums

    def forward(learned, hiddens, fixed, labels):
        return _value_and_gradients(
            chunk_loss, learned, hiddens, fixed, labels, chunk, through_hiddens=through_hiddens
        )

    @jax.custom_vjp
    def loss(learned, hiddens, fixed, labels):
        return forward(learned, hiddens, fixed, labels)[0]

    def backward(gradients, cotangents):
        scale = cotangents[0]
        scaled = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
        return (*scaled, None, None)

    loss.defvjp(forward, backward)
    return loss(learned, exit_hiddens, fixed, labels)


def _value_and_gradients(
    chunk_loss, learned, hiddens, fixed, labels: Labels, chunk: int, *, through_hiddens: bool
):
    """`(loss, sums)` over all chunks, and the gradients of the loss by `learned` and the states (None if not asked for).

    On a mesh each group of devices walks over its own rows, with the heads gathered before the first chunk. What the groups
    found is added up after the last one: inside of the walk, XLA would gather heads and add up gradients for every chunk.
    """
    groups = axes_that_split_rows()

    def of_rows(learned, hiddens, fixed, labels):
        walk = _Walk.over(labels.weights_BT, chunk)
        walk = walk.replace(chunks=jax.lax.pmax(walk.chunks, groups))
        summed, hidden_grad = _sum_over_chunks(
            chunk_loss, learned, hiddens, fixed, labels, walk, through_hiddens=through_hiddens
        )
        return jax.lax.psum(summed, groups), hidden_grad

    if groups:
        whole, rows = PartitionSpec(), PartitionSpec(groups)
        of_rows = jax.shard_map(
            of_rows,
            in_specs=(whole, rows, whole, rows),
            out_specs=(whole, rows),
            axis_names=set(groups),
            check_vma=False,
        )
    (total, sums, learned_grad), hidden_grad = of_rows(learned, hiddens, fixed, labels)
    return (total, sums), (learned_grad, hidden_grad)


def _sum_over_chunks(
    chunk_loss, learned, hiddens, fixed, labels: Labels, walk: _Walk, *, through_hiddens: bool
):
    """`((loss, sums, gradient by learned), gradient by the states)`, for these rows."""
    argnums = (0, 1) if through_hiddens else (0,)
    gradient = jax.value_and_grad(chunk_loss, argnums=argnums, has_aux=True)

    def of_chunk(i):
        (value, found), grads = gradient(
            learned, walk.take(i, hiddens), fixed, walk.labels(i, labels)
        )
        return (value, found, grads[0]), grads[1:]

    def step(i, carry):
        summed, hidden_grad_EBCD = carry
        found, by_hiddens = of_chunk(i)
        if through_hiddens:
            hidden_grad_EBCD = walk.put(i, hidden_grad_EBCD, by_hiddens[0])
        return jax.tree.map(jnp.add, summed, found), hidden_grad_EBCD

    shapes = jax.eval_shape(of_chunk, 0)[0]
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    hidden_grad = walk.empty(hiddens) if through_hiddens else None
    summed, hidden_grad = jax.lax.fori_loop(0, walk.chunks, step, (start, hidden_grad))
    if through_hiddens:
        hidden_grad = walk.put_back(hidden_grad, len(hiddens))
    return summed, hidden_grad


def values_of_positions(
    token_values: TokenFunction,
    params: Any,
    exit_hiddens: tuple[jax.Array, ...],
    labels: Labels,
    *,
    chunk: int,
) -> TokenValues:
    """The values of every position that counts, `[E, B, T, ...]`; 0 at the others."""
    walk = _Walk.over(labels.weights_BT, chunk)

    def piece_of(i):
        return token_values(params, None, walk.take(i, exit_hiddens), walk.labels(i, labels))

    def step(i, found):
        return jax.tree.map(lambda all_, new: walk.put(i, all_, new), found, piece_of(i))

    def empty(x):
        E, B, _, *rest = x.shape
        return jnp.zeros((E, B, walk.padded_length, *rest), x.dtype)

    start = jax.tree.map(empty, jax.eval_shape(piece_of, 0))
    found = jax.lax.fori_loop(0, walk.chunks, step, start)
    return jax.tree.map(lambda x: jnp.stack(walk.put_back(x, len(x))), found)
