"""How a tree grows, level by level, from the draft's logits at the nodes that it expands. Arrays in, arrays out, no model.

The children that a level brings forth are *candidates*; N counts all of a tree's. Of each level some candidates, the *beam*,
are expanded on the next one. At the end M - 1 candidates become nodes of the tree.

Deterministic children are the most probable tokens. A dynamic tree (EAGLE-2, Li et al. 2024) ranks candidates by their
cumulative log-probability: the best `top_k` of a level are its beam, the best M - 1 of all are verified. A child never ranks
above its parent, so what is verified is a tree.

Children that are drawn (without replacement) must not be judged by what was drawn: dropping one for its own low probability
would bias the output. So how many children each node gets is fixed before any is drawn, from the nodes' q vectors and from the
probabilities of the nodes themselves, by ranking what the r-th most probable child would bring; and all that are drawn are
verified.

A static tree takes candidates by their ranks alone. Of drawn children it takes as many as it has paths, the first ones drawn:
a later one was drawn from what the earlier ones left, so none may be passed over.
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
    """What a level brings forth: R expanded nodes with k candidates each.

    Attributes:
        tokens_BRk: int32.
        priority_BRk: f32, what candidates are ranked by; -inf for none.
        score_BRk: f32, log of the probability of the path to the candidate.
        probs_BRK: f32, the q that children were drawn from; None if they are the most probable tokens.
    """

    tokens_BRk: jax.Array
    priority_BRk: jax.Array
    score_BRk: jax.Array
    probs_BRK: jax.Array | None


class Candidates(flax.struct.PyTreeNode):
    """All candidates of a tree, level by level.

    Attributes:
        tokens_BN, priority_BN, score_BN: as in `Children`.
        parent_BN: int32, a candidate; -1 for the root.
        slot_BN: int32, where the draft keeps a candidate that was expanded, from 1; else -1.
        exit_BN: int32, index of the exit that proposed it.
        beams_BDW: int32, the beam of each level.
    """

    tokens_BN: jax.Array
    priority_BN: jax.Array
    score_BN: jax.Array
    parent_BN: jax.Array
    slot_BN: jax.Array
    exit_BN: jax.Array
    beams_BDW: jax.Array


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
        """W, how many nodes of a level are expanded at most."""
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
    def _first_D(self) -> np.ndarray:
        """The number of the first candidate of each level."""
        sizes = [self.shape.top_k * (1 if level == 1 else self.width) for level in self._levels]
        return np.cumsum([0, *sizes[:-1]]).astype(np.int32)

    @property
    def num_candidates(self) -> int:
        """N."""
        return self.shape.top_k * (1 + self.num_slots)

    @property
    def _depth_N(self) -> np.ndarray:
        sizes = np.diff([*self._first_D, self.num_candidates])
        return np.repeat(np.array(self._levels, np.int32), sizes)

    @property
    def _levels(self) -> range:
        return range(1, self.depth + 1)

    @property
    def _static_beams(self) -> list[list[tuple[int, ...]]]:
        """Of each level the paths that have children."""
        inner = {path[:-1] for path in self.shape.paths}
        return [
            [path for path in self.shape.paths if len(path) == level and path in inner]
            for level in self._levels
        ]

    def _static_candidate(self, path: tuple[int, ...]) -> int:
        """The number of the candidate that a path names."""
        level = len(path)
        parent = 0 if level == 1 else self._static_beams[level - 2].index(path[:-1])
        return int(self._first_D[level - 1]) + parent * self.shape.top_k + path[-1]

    def start(self, batch: int) -> Candidates:
        """No candidates."""
        B, N = batch, self.num_candidates
        nothing_BN = jnp.full((B, N), -jnp.inf, jnp.float32)
        zeros_BN, none_BN = jnp.zeros((B, N), jnp.int32), jnp.full((B, N), -1, jnp.int32)
        beams_DW = jnp.asarray(self._first_D[:, None] + np.arange(self.width, dtype=np.int32))
        return Candidates(
            tokens_BN=zeros_BN,
            priority_BN=nothing_BN,
            score_BN=nothing_BN,
            parent_BN=none_BN,
            slot_BN=none_BN,
            exit_BN=zeros_BN,
            beams_BDW=jnp.broadcast_to(beams_DW, (B, *beams_DW.shape)),
        )

    def children(
        self,
        logits_BRK: Float[Array, "B R K"],
        score_BR: Float[Array, "B R"],
        live_BR: Bool[Array, "B R"],
        key_B: Key[Array, "B"],
        request: Request,
    ) -> Children:
        """The candidates that R nodes bring forth.

        Args:
            logits_BRK: f32, of the draft at each node.
            score_BR: f32, log of the probability of the path to each node.
            live_BR: bool; other nodes have none.
            key_B: one random key per row.
            request: how tokens are sampled, and which ids the draft's entries are.
        """
        if self.sampled:
            probs_BRK = probabilities(logits_BRK, request.sampling)
            best_BRk = jnp.log(top_k(probs_BRK, self.shape.top_k)[0])
            index_BRk = draw(probs_BRK, key_B, self.shape.top_k)
            own_BRk = jnp.log(jnp.take_along_axis(probs_BRK, index_BRk, axis=2))
        else:
            probs_BRK = None
            best_BRk, index_BRk = top_k(logits_BRK, self.shape.top_k)
            best_BRk -= jax.nn.logsumexp(logits_BRK, axis=-1, keepdims=True)
            own_BRk = best_BRk
        priority_BRk = jnp.where(live_BR[:, :, None], score_BR[:, :, None] + best_BRk, -jnp.inf)
        return Children(
            tokens_BRk=token_ids(index_BRk.astype(jnp.int32), request),
            priority_BRk=priority_BRk,
            score_BRk=score_BR[:, :, None] + own_BRk,
            probs_BRK=probs_BRK,
        )

    def add(
        self,
        found: Candidates,
        level: int | Int[Array, ""],
        children: Children,
        beam_BR: Int[Array, "B R"],
        exit_BR: Int[Array, "B R"],
    ) -> Candidates:
        """Enters the candidates of `level`, and selects its beam.

        Args:
            found: of earlier levels.
            level: from 1.
            children: of the nodes that were expanded.
            beam_BR: int32, those nodes; -1 for the root.
            exit_BR: int32, the exits that they left at.
        """
        first = jnp.asarray(self._first_D)[level - 1]

        def put(all_BN, new_BRk):
            flat = new_BRk.reshape(new_BRk.shape[0], -1).astype(all_BN.dtype)
            return jax.lax.dynamic_update_slice_in_dim(all_BN, flat, first, 1)

        def of_each(value_BR):
            return jnp.broadcast_to(value_BR[:, :, None], children.tokens_BRk.shape)

        beam_BW = first + self._select(level, children.priority_BRk)
        beams_BDW = jax.lax.dynamic_update_slice_in_dim(
            found.beams_BDW, beam_BW[:, None], level - 1, 1
        )
        return found.replace(
            tokens_BN=put(found.tokens_BN, children.tokens_BRk),
            priority_BN=put(found.priority_BN, children.priority_BRk),
            score_BN=put(found.score_BN, children.score_BRk),
            parent_BN=put(found.parent_BN, of_each(beam_BR)),
            exit_BN=put(found.exit_BN, of_each(exit_BR)),
            beams_BDW=beams_BDW,
        )

    def _select(self, level, priority_BRk) -> jax.Array:
        """int32 `[B, W]`, ascending: which candidates of a level are its beam, counted from the level's first."""
        B = priority_BRk.shape[0]
        if not self.shape.paths:
            _, index_BW = jax.lax.top_k(priority_BRk.reshape(B, -1), self.width)
            return jnp.sort(index_BW.astype(jnp.int32), axis=1)
        beams_DW = np.zeros((self.depth, self.width), np.int32)
        for of_level, beam in zip(beams_DW, self._static_beams, strict=True):
            for i, path in enumerate(beam):
                of_level[i] = self._static_candidate(path) - self._first_D[len(path) - 1]
        return jnp.broadcast_to(jnp.asarray(beams_DW)[level - 1], (B, self.width))

    def in_use(self, level: Int[Array, ""]) -> Bool[Array, "W"]:
        """Which places of the beam of `level` a static tree fills; all of a dynamic one."""
        if not self.shape.paths:
            return jnp.ones(self.width, bool)
        filled_D = jnp.asarray([len(beam) for beam in self._static_beams])
        return jnp.arange(self.width) < filled_D[level - 1]

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
        take = lambda values_BN: jnp.take_along_axis(values_BN, chosen_BM, axis=1)  # noqa: E731
        number_1M = jnp.arange(1, M1 + 1, dtype=jnp.int32)[None, :]
        rows_B1 = jnp.arange(B)[:, None]
        node_of_BN = (
            jnp.zeros(found.tokens_BN.shape, jnp.int32).at[rows_B1, chosen_BM].set(number_1M)
        )
        parent_BM = take(found.parent_BN)
        node_BM = jnp.take_along_axis(node_of_BN, jnp.maximum(parent_BM, 0), axis=1)
        depth_BM = jnp.asarray(self._depth_N, jnp.int32)[chosen_BM]
        priority_BM = take(found.priority_BN)

        def with_root(root, values_BM):
            root_B1 = jnp.broadcast_to(jnp.asarray(root, values_BM.dtype), (B,))[:, None]
            return jnp.concatenate([root_B1, values_BM], axis=1)

        return Tree(
            tokens_BM=with_root(root_token_B, take(found.tokens_BN)),
            parent_BM=with_root(0, jnp.where(parent_BM < 0, 0, node_BM)),
            depth_BM=with_root(0, depth_BM),
            valid_BM=with_root(True, (priority_BM > -jnp.inf) & (depth_BM <= limit_B[:, None])),
            slot_BM=with_root(0, take(found.slot_BN)),
            score_BM=with_root(0.0, take(found.score_BN)),
            exit_BM=with_root(0, take(found.exit_BN)),
        )

    def _chosen(self, found: Candidates) -> jax.Array:
        """int32 `[B, M - 1]`, ascending: the candidates that are verified."""
        B = found.tokens_BN.shape[0]
        if self.shape.paths:
            chosen = sorted(self._static_candidate(path) for path in self.shape.paths)
            return jnp.broadcast_to(jnp.asarray(chosen, jnp.int32), (B, len(chosen)))
        if self.sampled:
            return found.beams_BDW.reshape(B, -1)
        # Ties go to the lower number, which is the shallower candidate: a parent before its child.
        _, chosen_BM = jax.lax.top_k(found.priority_BN, self.nodes - 1)
        return jnp.sort(chosen_BM.astype(jnp.int32), axis=1)
