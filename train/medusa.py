"""Medusa-1 (Cai et al. 2024, arXiv 2401.10774): heads on a frozen target, whose memory is compared with SoFT's.

A sorted draft is trained without its target; Medusa's heads read the target's last state, so every step runs the whole
target. Head k of Y predicts the token k + 1 steps ahead (section 2.1.1):

    p_k = softmax(W_k (h + SiLU(U_k h)))

with h the target's state after its final norm, U_k `[D, D]` starting at 0 and W_k `[V, D]` starting as the target's own head,
so that before training every head predicts what the target does. Both are trained, by `sum_k decay^k CE_k` (equation 1).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from s2d_jax.config.model import ModelConfig
from s2d_jax.errors import UserError
from s2d_jax.model.params import Params, abstract_params, logical_axes
from s2d_jax.model.transformer import Transformer, apply_model
from s2d_jax.sharding import (
    RULES,
    batch_sharding,
    optimizer_sharding,
    params_sharding,
    partition_spec,
    replicated,
)
from train.config.sections import OptimSection
from train.data.batch import Batch
from train.step.for_mesh import for_mesh
from train.step.optimizer import learning_rate, make_optimizer

# Logical axes of the heads' parameters; heads are stacked on the first, which is not split.
_HEAD_AXES = {"residual": ("head", "ffw", "embed"), "lm_head": ("head", "vocab", "embed")}
_HEAD_RULES = {**RULES, "head": None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MedusaConfig:
    """Training of Medusa heads. The defaults are those of the paper and its public recipe.

    Attributes:
        num_heads: Y; the paper finds that five suffice.
        decay: head k's loss weighs `decay ** k`.
        target_dtype: dtype of the frozen weights.
        compute_dtype: dtype of activations and products; the heads' master weights, losses and moments are f32.
        batch_size: packed rows per step, over all devices.
        accumulate: each step is computed in this many equal parts.
        loss_chunk: positions per row whose logits are held at once, for one head at a time.
        optim: AdamW on the heads.

    Raises:
        UserError: for an impossible value.
    """

    num_heads: int = 5
    decay: float = 0.8
    target_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    batch_size: int = 128
    accumulate: int = 1
    loss_chunk: int = 256
    optim: OptimSection = OptimSection(learning_rate=1e-3, warmup_fraction=0.1)

    def __post_init__(self):
        for name in ("num_heads", "batch_size", "accumulate", "loss_chunk"):
            value, most = getattr(self, name), 64 if name == "num_heads" else 2**31 - 1
            if not 1 <= value <= most:
                raise UserError(f"{name}={value} must be 1 to {most}")
        if self.decay <= 0:
            raise UserError(f"decay={self.decay} must be above 0; the paper has 0.8")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"batch_size={self.batch_size} does not divide into accumulate={self.accumulate} parts; choose a divisor"
            )

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """One weight per head."""
        return tuple(self.decay**k for k in range(1, self.num_heads + 1))


class MedusaState(flax.struct.PyTreeNode):
    """What a step changes.

    Attributes:
        heads: f32, `residual` `[Y, D, D]` and `lm_head` `[Y, V, D]`.
        opt_state: the optimizer's moments of the heads.
    """

    heads: Params
    opt_state: Any


class HeadSums(flax.struct.PyTreeNode):
    """Sums over the counted tokens, one per head; divide by their number for means.

    Attributes:
        loss_Y: f32, cross-entropy in nats.
        correct_Y: f32, how often the argmax is the token.
    """

    loss_Y: jax.Array
    correct_Y: jax.Array


def head_targets(batch: Batch, num_heads: int) -> tuple[jax.Array, jax.Array]:
    """What each head must predict at each position, and where that counts.

    Head k at position t predicts token t + k + 1. It counts if that token is an assistant's and in the document of t.

    Args:
        batch: whose targets and weights are those of the next token.
        num_heads: Y.

    Returns:
        Targets int32 `[Y, B, T]`, weights f32 `[Y, B, T]`.
    """
    targets, weights = [], []
    for k in range(1, num_heads + 1):
        same_document = _ahead(batch.segment_ids_BT, k) == batch.segment_ids_BT
        targets.append(_ahead(batch.targets_BT, k))
        weights.append(_ahead(batch.weights_BT, k) * same_document.astype(jnp.float32))
    return jnp.stack(targets), jnp.stack(weights)


def _ahead(x_BT: jax.Array, k: int) -> jax.Array:
    """`x[:, t + k]` at t; 0 beyond the end of the row."""
    return jnp.pad(x_BT[:, k:], ((0, 0), (0, min(k, x_BT.shape[1]))))


def head_logits(head: Params, h: jax.Array) -> jax.Array:
    """One head: `residual` `[D, D]`, `lm_head` `[V, D]` and the target's normed state `[..., D]` to f32 logits `[..., V]`."""
    inner = jnp.einsum("...I,OI->...O", h, head["residual"])
    state = h + jax.nn.silu(inner)
    return jnp.einsum("...D,VD->...V", state, head["lm_head"], preferred_element_type=jnp.float32)


def medusa_gradient(
    heads: Params,
    hidden_BTD: jax.Array,
    targets_YBT: jax.Array,
    weights_YBT: jax.Array,
    scale_Y: jax.Array,
    *,
    chunk: int,
    mesh: Mesh | None = None,
) -> tuple[HeadSums, Params]:
    """Sums of every head, and the gradient of `sum_k scale_k loss_k` by the heads' parameters.

    The heads are computed one after the other, each over `chunk` positions of a row at a time, and the gradient is taken with
    the loss. So of `[Y, B, T, V]` logits, only those of one chunk of one head exist at a time.

    Args:
        heads: stacked on the first axis.
        hidden_BTD: the frozen target's states after its final norm.
        targets_YBT, weights_YBT: from `head_targets`.
        scale_Y: f32, weight of each head's summed loss.
        chunk: positions per row whose logits are held at once.
        mesh: the mesh that the heads are split over; None if they are not.
    """

    def chunk_loss(head, scale, h_BWD, targets_BW, weights_BW):
        logits_BWV = head_logits(head, h_BWD)
        with jax.numpy_dtype_promotion("standard"):  # optax counts on implicit promotion
            losses_BW = optax.softmax_cross_entropy_with_integer_labels(logits_BWV, targets_BW)
        correct_BW = (jnp.argmax(logits_BWV, axis=-1) == targets_BW).astype(jnp.float32)
        loss = jnp.sum(losses_BW * weights_BW)
        return scale * loss, (loss, jnp.sum(correct_BW * weights_BW))

    hiddens = _cut(hidden_BTD, chunk)

    def of_one_head(of_head):
        head, targets_BT, weights_BT, scale = of_head
        gathered = {name: w.astype(hidden_BTD.dtype) for name, w in head.items()}
        gathered = _placed(gathered, mesh, {**_HEAD_RULES, "embed": None})

        def add_chunk(total, piece):
            grads, sums = jax.grad(chunk_loss, has_aux=True)(gathered, scale, *piece)
            grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
            added, sums = jax.tree.map(jnp.add, total, (grads, sums))
            return (_placed(added, mesh, _HEAD_RULES), sums), None

        start = (jax.tree.map(jnp.zeros_like, head), (jnp.zeros(()), jnp.zeros(())))
        pieces = (hiddens, _cut(targets_BT, chunk), _cut(weights_BT, chunk))
        return jax.lax.scan(add_chunk, start, pieces)[0]

    grads, (loss_Y, correct_Y) = jax.lax.map(
        of_one_head, (heads, targets_YBT, weights_YBT, scale_Y)
    )
    return HeadSums(loss_Y, correct_Y), grads


def _placed(head: Params, mesh: Mesh | None, rules: dict[str, Any]) -> Params:
    """One head's arrays, split by `rules`.

    Without this, XLA's partitioner (jaxlib 0.10.2) computes wrong gradients of `residual` on a mesh of three axes. So weights
    are gathered over fsdp before they are used, once for all chunks.
    """
    if mesh is None:
        return head
    shardings = {
        name: NamedSharding(mesh, partition_spec(axes[1:], rules))
        for name, axes in _HEAD_AXES.items()
    }
    return jax.lax.with_sharding_constraint(head, shardings)


def _cut(x: jax.Array, chunk: int) -> jax.Array:
    """`[B, T, ...]` to `[chunks, B, W, ...]`; T is zero-padded to whole chunks."""
    B, T = x.shape[:2]
    size = min(chunk, T)
    padded = jnp.pad(x, [(0, 0), (0, -T % size), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(padded.reshape(B, -1, size, *x.shape[2:]), 1, 0)


@dataclasses.dataclass(frozen=True)
class MedusaTrainer:
    """The compiled step of one run.

    Attributes:
        config: how the heads are trained.
        model_config: the target's shape.
        mesh: with axes data, fsdp, tensor; rows are split over the first two.

    Raises:
        UserError: if the target does not divide over the mesh.
    """

    config: MedusaConfig
    model_config: ModelConfig
    mesh: Mesh

    def __post_init__(self):
        width, tensor = self.model_config.embed_dim, self.mesh.shape["tensor"]
        if width % tensor:
            raise UserError(
                f"embed_dim={width} does not divide by mesh axis tensor={tensor}; choose a divisor of it"
            )
        rows = self.config.batch_size // self.config.accumulate
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        if rows % shards:
            raise UserError(
                f"batch_size / accumulate = {rows} rows do not divide over data x fsdp = {shards}; choose a multiple"
            )

    @property
    def batch_sharding(self) -> NamedSharding:
        """Rows over data and fsdp."""
        return batch_sharding(self.mesh)

    @property
    def trunk_sharding(self) -> Params:
        """The frozen weights are split as a trained model's are."""
        axes = logical_axes(self.model_config)
        return self._trunk(params_sharding(self.model_config, axes, self.mesh))

    @property
    def state_sharding(self) -> MedusaState:
        """Moments are split as their heads are."""
        heads = {
            name: NamedSharding(self.mesh, partition_spec(axes, _HEAD_RULES))
            for name, axes in _HEAD_AXES.items()
        }
        optimizer = make_optimizer(self.config.optim)
        abstract = self.abstract_state().opt_state
        opt_state = optimizer_sharding(optimizer, abstract, heads, self.mesh)
        return MedusaState(heads, opt_state)

    def abstract_trunk(self) -> Params:
        """Shapes and dtypes of the frozen weights; nothing is computed."""
        return self._trunk(abstract_params(self.model_config, jnp.dtype(self.config.target_dtype)))

    def abstract_state(self) -> MedusaState:
        """Shapes and dtypes of the state; nothing is computed."""
        shape = (self.model_config.vocab_size, self.model_config.embed_dim)
        return jax.eval_shape(self._start, jax.ShapeDtypeStruct(shape, jnp.float32))

    def place_trunk(self, params: Params) -> Params:
        """The weights of the target that a step reads, in `target_dtype`, on the mesh: all but a head that is not tied."""
        dtype = jnp.dtype(self.config.target_dtype)

        def cast(trunk):
            return jax.tree.map(lambda x: x.astype(dtype), trunk)

        return jax.jit(cast, out_shardings=self.trunk_sharding)(self._trunk(params))

    def init_state(self, params: Params) -> MedusaState:
        """Heads that predict what the target with these `params` predicts, and a new optimizer."""
        start = jax.jit(self._start, out_shardings=self.state_sharding)
        return start(self._own_head(params))

    def compile_step(self, state: MedusaState, trunk: Params, batch: Batch):
        """`(state, trunk, batch, progress) -> (state, metrics)`, compiled; the state is donated, the trunk only read.

        `metrics` holds f32: `loss`, `loss_Y`, `accuracy_Y`, `grad_norm`, `learning_rate`, and `tokens` (without padding).
        """
        sharding, whole = self.state_sharding, replicated(self.mesh)
        step = jax.jit(
            for_mesh(self._train_step, self.mesh),
            in_shardings=(sharding, self.trunk_sharding, self.batch_sharding, whole),
            out_shardings=(sharding, whole),
            donate_argnums=0,
        )
        with jax.set_mesh(self.mesh):  # for `over_rows`
            return step.lower(state, trunk, batch, np.float32(0)).compile()

    def _trunk(self, tree: Any) -> Any:
        """The part of a tree of the target's parameters, or of their shardings, that a step reads."""
        return {name: value for name, value in tree.items() if name != "lm_head"}

    def _own_head(self, params: Params) -> Any:
        tied = self.model_config.tie_embeddings
        return params["embed"]["embedding"] if tied else params["lm_head"]["kernel"]

    def _start(self, own_VD: jax.Array) -> MedusaState:
        num_heads, width = self.config.num_heads, self.model_config.embed_dim
        heads = {
            "residual": jnp.zeros((num_heads, width, width), jnp.float32),
            "lm_head": jnp.broadcast_to(
                own_VD.astype(jnp.float32)[None], (num_heads, *own_VD.shape)
            ),
        }
        return MedusaState(heads, make_optimizer(self.config.optim).init(heads))

    def _hidden(self, trunk: Params, batch: Batch) -> jax.Array:
        """The target's states `[B, T, D]` after its final norm. No gradient flows into them."""
        model = Transformer(self.model_config, dtype=jnp.dtype(self.config.compute_dtype))
        (hidden_BTD,) = apply_model(
            model,
            trunk,
            "exit_hiddens",
            batch.tokens_BT,
            exit_layers=(self.model_config.num_layers,),
            positions_BT=batch.positions_BT,
            segment_ids_BT=batch.segment_ids_BT,
        )
        return apply_model(model, trunk, "normed", hidden_BTD)

    def _gradient(self, heads: Params, trunk: Params, batch: Batch, scale_Y: jax.Array):
        """Sums and gradient of a batch, in `accumulate` parts."""
        parts, num_heads = self.config.accumulate, self.config.num_heads

        def gradient(part: Batch):
            targets_YBT, weights_YBT = head_targets(part, num_heads)
            hidden_BTD = self._hidden(trunk, part)
            return medusa_gradient(
                heads,
                hidden_BTD,
                targets_YBT,
                weights_YBT,
                scale_Y,
                chunk=self.config.loss_chunk,
                mesh=self.mesh,
            )

        if parts == 1:
            return gradient(batch)

        def split(x):
            # Every part takes rows of every device: part p is rows p, p + parts, ...
            x = jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)
            rows = PartitionSpec(None, *batch_sharding(self.mesh).spec)
            return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, rows))

        def add_part(total, part):
            return jax.tree.map(jnp.add, total, gradient(part)), None

        shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[::parts], batch))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add_part, zeros, jax.tree.map(split, batch))[0]

    def _train_step(self, state: MedusaState, trunk: Params, batch: Batch, progress: jax.Array):
        _, weights_YBT = head_targets(batch, self.config.num_heads)
        counted_Y = jnp.maximum(jnp.sum(weights_YBT, axis=(1, 2)), 1.0)
        share_Y = jnp.asarray(self.config.loss_weights, jnp.float32)
        sums, grads = self._gradient(state.heads, trunk, batch, share_Y / counted_Y)
        with jax.numpy_dtype_promotion("standard"):  # optax counts on implicit promotion
            updates, opt_state = make_optimizer(self.config.optim).update(
                grads, state.opt_state, state.heads
            )
        rate = learning_rate(progress, self.config.optim)
        heads = jax.tree.map(lambda p, u: p - rate * u, state.heads, updates)
        metrics = {
            "loss": jnp.sum(share_Y * sums.loss_Y / counted_Y),
            "loss_Y": sums.loss_Y / counted_Y,
            "accuracy_Y": sums.correct_Y / counted_Y,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": rate,
            "tokens": jnp.sum((batch.segment_ids_BT > 0).astype(jnp.float32)),
        }
        return MedusaState(heads, opt_state), metrics
