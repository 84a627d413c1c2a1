"""Which path of a drafted tree is accepted, and what is emitted after it. Arrays in, arrays out, no model.

All functions return the deepest accepted node of each row (0, the root, if nothing is accepted) and the token that follows it.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from s2d_jax.draft.logits import over_all_ids
from s2d_jax.sampling import SamplingArrays, fold_in, probabilities, sample, split, uniform
from s2d_jax.tree.nodes import Tree


def accept_greedy(
    tree: Tree, logits_BMV: Float[Array, "B M V"]
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Accepts the longest path on which every token is the target's argmax after its parent.

    Args:
        tree: siblings have different tokens.
        logits_BMV: f32, of the target at each node.

    Returns:
        `node_B` and `next_token_B`, the target's argmax at that node; int32 `[B]`.
    """

    def mode(node_B):
        return jnp.argmax(_row(logits_BMV, node_B), axis=-1).astype(jnp.int32)

    return _follow(tree, mode)


def accept_target_only(
    tree: Tree,
    logits_BMV: Float[Array, "B M V"],
    sampling: SamplingArrays,
    key_B: Key[Array, "B"],
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Acceptance of children that are certain given the text: draws from the target, and follows the tree as far as it goes.

    At each node a token is drawn from p. If a child has this token, the child is accepted; else the token is emitted. This
    equals trying the children in turn, each with probability p(x) and a residual without x (q is one-hot), but one draw
    decides about all of them.

    Args:
        tree: siblings have different tokens.
        logits_BMV: f32, of the target at each node.
        sampling: temperature and filters.
        key_B: one random key per row.
    """

    def draw(node_B):
        probs_BV = probabilities(_row(logits_BMV, node_B)[:, None], sampling)[:, 0]
        return sample(probs_BV, fold_in(key_B, node_B))

    return _follow(tree, draw)


def _follow(tree: Tree, choose: Callable[[jax.Array], jax.Array]):
    """Goes down from the root to the child that has the chosen token, until there is none.

    It reads only the logits on the path: over all nodes even an argmax costs more than a millisecond.
    """

    def down(carry):
        node_B, token_B, done_B = carry
        chosen_B = choose(node_B)
        child_BM = _children(tree, node_B) & (tree.tokens_BM == chosen_B[:, None])
        child_B = jnp.argmax(child_BM, axis=1).astype(jnp.int32)
        goes_on_B = jnp.any(child_BM, axis=1) & ~done_B
        token_B = jnp.where(done_B, token_B, chosen_B)
        return jnp.where(goes_on_B, child_B, node_B), token_B, ~goes_on_B

    zeros_B = jnp.zeros(tree.tokens_BM.shape[0], jnp.int32)
    start = zeros_B, zeros_B, zeros_B > 0
    node_B, next_token_B, _ = jax.lax.while_loop(lambda carry: ~jnp.all(carry[2]), down, start)
    return node_B, next_token_B


class _Walk(flax.struct.PyTreeNode):
    """Every row on its way down its tree.

    Attributes:
        node_B: int32, the deepest node accepted so far.
        tried_B: int32, its last child that was refused, or `node_B` itself.
        target_probs_BV: f32, p at that node after the refusals.
        draft_probs_BV: f32, q at that node after the refusals.
        done_B: bool.
    """

    node_B: jax.Array
    tried_B: jax.Array
    target_probs_BV: jax.Array
    draft_probs_BV: jax.Array
    done_B: jax.Array

    @property
    def is_new_B(self) -> jax.Array:
        """bool: nothing was refused at this node yet."""
        return self.tried_B == self.node_B

    def arrived(self, p_BV: Float[Array, "B V"], q_BV: Float[Array, "B V"]) -> _Walk:
        """Takes these p and q in the rows whose node is new."""
        return self.replace(
            target_probs_BV=_where(self.is_new_B, p_BV, self.target_probs_BV),
            draft_probs_BV=_where(self.is_new_B, q_BV, self.draft_probs_BV),
        )


def accept_without_replacement(
    tree: Tree,
    draft_probs_BLU: Float[Array, "B L U"],
    logits_BMV: Float[Array, "B M V"],
    sampling: SamplingArrays,
    key_B: Key[Array, "B"],
    vocabulary_U: Int[Array, "U"] | None = None,
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Acceptance of children that were drawn without replacement from q (recursive rejection sampling; Jeon et al. 2024).

    The children x of a node are tried in the order drawn, each accepted with probability `min(1, p(x) / q(x))`. After a refusal
    p becomes `norm(max(p - q, 0))`, and q loses x and is normalised again, as it was when the next child was drawn. When no
    child is left, a token is drawn from the p that remains.

    Args:
        tree: siblings have different tokens, in the order drawn.
        draft_probs_BLU: f32, q at the node in each slot, over the entries of the draft's logits.
        logits_BMV: f32, of the target at each node.
        sampling: temperature and filters.
        key_B: one random key per row.
        vocabulary_U: int32, ids of the draft's entries; None for all ids.
    """
    (B, M), V = tree.tokens_BM.shape, logits_BMV.shape[-1]
    test_key_B, next_key_B = split(key_B, 2)

    def arrive(walk: _Walk) -> _Walk:
        p_BV = probabilities(_row(logits_BMV, walk.node_B)[:, None], sampling)[:, 0]
        slot_B = jnp.maximum(_row(tree.slot_BM, walk.node_B), 0)
        return walk.arrived(p_BV, over_all_ids(_row(draft_probs_BLU, slot_B), vocabulary_U, V))

    def try_child(walk: _Walk) -> _Walk:
        walk = jax.lax.cond(jnp.any(walk.is_new_B), arrive, lambda walk: walk, walk)
        p_BV, q_BV = walk.target_probs_BV, walk.draft_probs_BV
        later_BM = jnp.arange(M, dtype=jnp.int32)[None, :] > walk.tried_B[:, None]
        child_BM = _children(tree, walk.node_B) & later_BM
        child_B = jnp.argmax(child_BM, axis=1).astype(jnp.int32)
        exists_B = jnp.any(child_BM, axis=1) & ~walk.done_B
        token_B = _row(tree.tokens_BM, child_B)
        u_B = uniform(fold_in(test_key_B, child_B), 1)[:, 0]
        accept_B = exists_B & (u_B * _row(q_BV, token_B) < _row(p_BV, token_B))
        refuse_B = exists_B & ~accept_B
        without_BV = jnp.where(jnp.arange(V)[None, :] == token_B[:, None], 0.0, q_BV)
        return walk.replace(
            node_B=jnp.where(accept_B, child_B, walk.node_B),
            tried_B=jnp.where(exists_B, child_B, walk.tried_B),
            target_probs_BV=_where(refuse_B, _norm(jnp.maximum(p_BV - q_BV, 0.0), p_BV), p_BV),
            draft_probs_BV=_where(refuse_B, _norm(without_BV, without_BV), q_BV),
            done_B=~exists_B,
        )

    zeros_B = jnp.zeros(B, jnp.int32)
    nothing_BV = jnp.zeros((B, V), jnp.float32)
    walk = _Walk(zeros_B, zeros_B, nothing_BV, nothing_BV, zeros_B > 0)
    walk = jax.lax.while_loop(lambda walk: ~jnp.all(walk.done_B), try_child, walk)
    return walk.node_B, sample(walk.target_probs_BV, next_key_B)


def _children(tree: Tree, node_B) -> jax.Array:
    """bool `[B, M]`: the valid children of a node of each row."""
    node_M = jnp.arange(tree.tokens_BM.shape[1], dtype=jnp.int32)
    return tree.valid_BM & (tree.parent_BM == node_B[:, None]) & (node_M > 0)[None, :]


def _row(values: jax.Array, index_B: jax.Array) -> jax.Array:
    """`values[b, index[b]]` for every row b."""
    index = index_B.reshape((-1,) + (1,) * (values.ndim - 1))
    return jnp.take_along_axis(values, index, axis=1)[:, 0]


def _where(condition_B, then_BV, otherwise_BV):
    return jnp.where(condition_B[:, None], then_BV, otherwise_BV)


def _norm(weights_BV, otherwise_BV) -> jax.Array:
    """Weights that sum to 1; `otherwise_BV` where nothing is left, which happens by rounding only."""
    total_B1 = jnp.sum(weights_BV, axis=-1, keepdims=True)
    return jnp.where(
        total_B1 > 0.0, weights_BV / jnp.where(total_B1 > 0.0, total_B1, 1.0), otherwise_BV
    )
