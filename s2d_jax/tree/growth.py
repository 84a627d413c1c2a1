"""How a tree grows, level by level, from the draft's logits at the nodes that it expands. Arrays in, arrays out, no model.

The children that a level produces are *candidates*; X counts all candidates of a tree. Some candidates of each level, the
*beam*, are expanded on the next level. At the end M - 1 candidates become nodes of the tree.

Deterministic children are the most probable tokens. A dynamic tree (EAGLE-2, Li et al. 2024) ranks candidates by their
cumulative log-probability: the best `top_k` of a level are its beam, the best M - 1 of all are verified. A child never ranks
above its parent, so what is verified is a tree.

Children that are drawn (without replacement) must not be selected by what was drawn: dropping one for its own low probability
would bias the output. So the number of children of each node is fixed before any is drawn, from the nodes' q vectors and the
nodes' own probabilities: the r-th child ranks as the r-th most probable token would. All children that are drawn are verified.

A static tree takes candidates by their ranks alone. With drawn children, a node keeps as many as it has paths, the first ones
drawn: a later one was drawn from what the earlier ones left, so none may be skipped.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from s2d_jax.config.tree import TreeShape
from s2d_jax.draft.logits import token_ids
from s2d_jax.draft.request import Request
from s2d_jax.sampling import draw, probabilities, top_k
from s2d_jax.tree.nodes import Tree


class Children(flax.struct.PyTreeNode):
    """What a level produces: J expanded nodes with k candidates each.

    Attributes:
        tokens_BJk: int32.
        priority_BJk: f32, by which candidates are ranked; -inf where there is none.
        score_BJk: f32, log of the probability of the path to the candidate.
        probs_BJU: f32, the q that children were drawn from; None if they are the most probable tokens.
    """

    tokens_BJk: jax.Array
    priority_BJk: jax.Array
    score_BJk: jax.Array
    probs_BJU: jax.Array | None


class Candidates(flax.struct.PyTreeNode):
    """All candidates of a tree, level by level.

    Attributes:
        tokens_BX, priority_BX, score_BX: as in `Children`.
        parent_BX: int32, the candidate that is the parent; -1 for the root.
        slot_BX: int32, where the draft keeps a candidate that was expanded, from 1; else -1.
        exit_BX: int32, index of the exit that proposed it.
        beams_BYJ: int32, the beam of each level.
    """

    tokens_BX: jax.Array
    priority_BX: jax.Array
    score_BX: jax.Array
    parent_BX: jax.Array
    slot_BX: jax.Array
    exit_BX: jax.Array
    beams_BYJ: jax.Array


@dataclasses.dataclass(frozen=True)
class Growth:
    """The static side of growing: sizes, and which rule selects.

    Attributes:
        shape: what was asked for.
        sampled: children are drawn.
    """

    shape: TreeShape
    sampled: bool

    def __post_init__(self):
        if self.sampled and self.shape.paths:
            object.__setattr__(self, "shape", self.shape.without_gaps())

    @property
    def depth(self) -> int:
        return self.shape.depth

    @property
    def width(self) -> int:
        """J, the most nodes of a level that are expanded."""
        if self.shape.paths:
            return max(len(beam) for beam in self._static_beams)
        if self.sampled:
            return min(self.shape.top_k, (self.shape.nodes - 1) // self.depth)
        return self.shape.top_k

    @property
    def nodes(self) -> int:
        """M, the root included."""
        drawn = self.sampled and not self.shape.paths
        return 1 + self.width * self.depth if drawn else self.shape.nodes

    @property
    def num_slots(self) -> int:
        """L, how many nodes beside the root the draft runs."""
        return self.width * (self.depth - 1)

    @property
    def _first_Y(self) -> np.ndarray:
        """The number of the first candidate of each level."""
        sizes = [self.shape.top_k * (1 if level == 1 else self.width) for level in self._levels]
        return np.cumsum([0, *sizes[:-1]]).astype(np.int32)

    @property
    def num_candidates(self) -> int:
        """X."""
        return self.shape.top_k * (1 + self.num_slots)

    @property
    def _depth_X(self) -> np.ndarray:
        sizes = np.diff([*self._first_Y, self.num_candidates])
        return np.repeat(np.array(self._levels, np.int32), sizes)

    @property
    def _levels(self) -> range:
        return range(1, self.depth + 1)

    @property
    def _static_beams(self) -> list[list[tuple[int, ...]]]:
        """For each level, the paths that have children."""
        inner = {path[:-1] for path in self.shape.paths}
        return [
            [path for path in self.shape.paths if len(path) == level and path in inner]
            for level in self._levels
        ]

    def _static_candidate(self, path: tuple[int, ...]) -> int:
        """The number of the candidate that a path names."""
        level = len(path)
        parent = 0 if level == 1 else self._static_beams[level - 2].index(path[:-1])
        return int(self._first_Y[level - 1]) + parent * self.shape.top_k + path[-1]

    def start(self, batch: int) -> Candidates:
        """No candidates."""
        B, X = batch, self.num_candidates
        nothing_BX = jnp.full((B, X), -jnp.inf, jnp.float32)
        zeros_BX, none_BX = jnp.zeros((B, X), jnp.int32), jnp.full((B, X), -1, jnp.int32)
        beams_YJ = jnp.asarray(self._first_Y[:, None] + np.arange(self.width, dtype=np.int32))
        return Candidates(
            tokens_BX=zeros_BX,
            priority_BX=nothing_BX,
            score_BX=nothing_BX,
            parent_BX=none_BX,
            slot_BX=none_BX,
            exit_BX=zeros_BX,
            beams_BYJ=jnp.broadcast_to(beams_YJ, (B, *beams_YJ.shape)),
        )

    def children(
        self,
        logits_BJU: Float[Array, "B J U"],
        score_BJ: Float[Array, "B J"],
        live_BJ: Bool[Array, "B J"],
        key_B: Key[Array, "B"],
        request: Request,
    ) -> Children:
        """The candidates that J nodes produce.

        Args:
            logits_BJU: f32, the draft's logits at each node.
            score_BJ: f32, log of the probability of the path to each node.
            live_BJ: bool; nodes that are not live have no children.
            key_B: one random key per row.
            request: how tokens are sampled, and which ids the draft's entries are.
        """
        if self.sampled:
            probs_BJU = probabilities(logits_BJU, request.sampling)
            best_BJk = jnp.log(top_k(probs_BJU, self.shape.top_k)[0])
            index_BJk = draw(probs_BJU, key_B, self.shape.top_k)
            own_BJk = jnp.log(jnp.take_along_axis(probs_BJU, index_BJk, axis=2))
        else:
            probs_BJU = None
            best_BJk, index_BJk = top_k(logits_BJU, self.shape.top_k)
            best_BJk -= jax.nn.logsumexp(logits_BJU, axis=-1, keepdims=True)
            own_BJk = best_BJk
        priority_BJk = jnp.where(live_BJ[:, :, None], score_BJ[:, :, None] + best_BJk, -jnp.inf)
        return Children(
            tokens_BJk=token_ids(index_BJk.astype(jnp.int32), request),
            priority_BJk=priority_BJk,
            score_BJk=score_BJ[:, :, None] + own_BJk,
            probs_BJU=probs_BJU,
        )

    def add(
        self,
        found: Candidates,
        level: int | Int[Array, ""],
        children: Children,
        parent_BJ: Int[Array, "B J"],
        exit_BJ: Int[Array, "B J"],
    ) -> Candidates:
        """Enters the candidates of `level`, and selects its beam.

        Args:
            found: the candidates of earlier levels.
            level: from 1.
            children: the children of the nodes that were expanded.
            parent_BJ: int32, those nodes, the beam of the level before; -1 for the root.
            exit_BJ: int32, the exits that they left at.
        """
        first = jnp.asarray(self._first_Y)[level - 1]

        def put(all_BX, new_BJk):
            flat = new_BJk.reshape(new_BJk.shape[0], -1).astype(all_BX.dtype)
            return jax.lax.dynamic_update_slice_in_dim(all_BX, flat, first, 1)

        def of_each(value_BJ):
            return jnp.broadcast_to(value_BJ[:, :, None], children.tokens_BJk.shape)

        beam_BJ = first + self._select(level, children.priority_BJk)
        is_level_Y = jnp.arange(self.depth, dtype=jnp.int32) == level - 1
        beams_BYJ = jnp.where(is_level_Y[None, :, None], beam_BJ[:, None], found.beams_BYJ)
        return found.replace(
            tokens_BX=put(found.tokens_BX, children.tokens_BJk),
            priority_BX=put(found.priority_BX, children.priority_BJk),
            score_BX=put(found.score_BX, children.score_BJk),
            parent_BX=put(found.parent_BX, of_each(parent_BJ)),
            exit_BX=put(found.exit_BX, of_each(exit_BJ)),
            beams_BYJ=beams_BYJ,
        )

    def _select(self, level, priority_BJk) -> jax.Array:
        """int32 `[B, J]`, ascending: which candidates of a level are its beam, counted from the level's first."""
        B = priority_BJk.shape[0]
        if not self.shape.paths:
            _, index_BJ = jax.lax.top_k(priority_BJk.reshape(B, -1), self.width)
            return jnp.sort(index_BJ.astype(jnp.int32), axis=1)
        beams_YJ = np.zeros((self.depth, self.width), np.int32)
        for of_level, beam in zip(beams_YJ, self._static_beams, strict=True):
            for i, path in enumerate(beam):
                of_level[i] = self._static_candidate(path) - self._first_Y[len(path) - 1]
        return jnp.broadcast_to(jnp.asarray(beams_YJ)[level - 1], (B, self.width))

    def in_use(self, level: Int[Array, ""]) -> Bool[Array, "J"]:
        """Which places of the beam of `level` are used: those that a static tree fills; all in a dynamic tree."""
        if not self.shape.paths:
            return jnp.ones(self.width, bool)
        filled_Y = jnp.asarray([len(beam) for beam in self._static_beams])
        return jnp.arange(self.width) < filled_Y[level - 1]

    def finish(
        self, found: Candidates, root_token_B: Int[Array, "B"], limit_B: Int[Array, "B"]
    ) -> Tree:
        """The tree that is verified.

        Args:
            found: all candidates.
            root_token_B: int32, the last emitted token.
            limit_B: int32, levels that each row may have.
        """
        chosen_BM = self._chosen(found)
        B, M1 = chosen_BM.shape
        take = lambda values_BX: jnp.take_along_axis(values_BX, chosen_BM, axis=1)  # noqa: E731
        number_1M = jnp.arange(1, M1 + 1, dtype=jnp.int32)[None, :]
        rows_B1 = jnp.arange(B)[:, None]
        node_of_BX = (
            jnp.zeros(found.tokens_BX.shape, jnp.int32).at[rows_B1, chosen_BM].set(number_1M)
        )
        parent_BM = take(found.parent_BX)
        node_BM = jnp.take_along_axis(node_of_BX, jnp.maximum(parent_BM, 0), axis=1)
        depth_BM = jnp.asarray(self._depth_X, jnp.int32)[chosen_BM]
        priority_BM = take(found.priority_BX)

        def with_root(root, values_BM):
            root_B1 = jnp.broadcast_to(jnp.asarray(root, values_BM.dtype), (B,))[:, None]
            return jnp.concatenate([root_B1, values_BM], axis=1)

        return Tree(
            tokens_BM=with_root(root_token_B, take(found.tokens_BX)),
            parent_BM=with_root(0, jnp.where(parent_BM < 0, 0, node_BM)),
            depth_BM=with_root(0, depth_BM),
            valid_BM=with_root(True, (priority_BM > -jnp.inf) & (depth_BM <= limit_B[:, None])),
            slot_BM=with_root(0, take(found.slot_BX)),
            score_BM=with_root(0.0, take(found.score_BX)),
            exit_BM=with_root(0, take(found.exit_BX)),
        )

    def _chosen(self, found: Candidates) -> jax.Array:
        """int32 `[B, M - 1]`, ascending: the candidates that are verified."""
        B = found.tokens_BX.shape[0]
        if self.shape.paths:
            chosen = sorted(self._static_candidate(path) for path in self.shape.paths)
            return jnp.broadcast_to(jnp.asarray(chosen, jnp.int32), (B, len(chosen)))
        if self.sampled:
            return found.beams_BYJ.reshape(B, -1)
        # Ties go to the lower number, which is the shallower candidate: a parent before its child.
        _, chosen_BM = jax.lax.top_k(found.priority_BX, self.nodes - 1)
        return jnp.sort(chosen_BM.astype(jnp.int32), axis=1)
