"""One training step and one evaluation step, compiled for a mesh."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from s2d_jax.config import ModelConfig
from s2d_jax.model import Params, Transformer, abstract_params, logical_axes
from s2d_jax.sharding import batch_sharding, optimizer_sharding, params_sharding, replicated
from train.config import Config
from train.losses import ExitSums, exit_sums, sorted_loss
from train.optimizer import learning_rate, make_optimizer


@flax.struct.dataclass
class TrainState:
    """What a step changes: f32 master weights and the optimizer's moments."""

    params: Params
    opt_state: Any


@flax.struct.dataclass
class Batch:
    """Packed rows.

    Attributes:
        tokens_BT: int32.
        targets_BT: int32, the token that follows each position.
        weights_BT: f32, 1 where that token is an assistant's.
        positions_BT: int32, counted within each document.
        segment_ids_BT: int32, 1, 2, ... for the documents of a row, 0 for padding.
    """

    tokens_BT: jax.Array
    targets_BT: jax.Array
    weights_BT: jax.Array
    positions_BT: jax.Array
    segment_ids_BT: jax.Array


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The compiled steps of one run.

    Attributes:
        config: the run.
        model_config: the draft's shape.
        mesh: with axes data, fsdp, tensor; rows are split over the first two.
    """

    config: Config
    model_config: ModelConfig
    mesh: Mesh

    @property
    def batch_sharding(self) -> NamedSharding:
        """Rows over data and fsdp."""
        return batch_sharding(self.mesh)

    @property
    def state_sharding(self) -> TrainState:
        """Moments are split as their parameters are."""
        params = params_sharding(self.model_config, logical_axes(self.model_config), self.mesh)
        optimizer = make_optimizer(self.config.optim)
        abstract = self.abstract_state().opt_state
        opt_state = optimizer_sharding(optimizer, abstract, params, self.mesh)
        return TrainState(params, opt_state)

    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of the state; nothing is computed."""
        params = abstract_params(self.model_config, jnp.float32)
        return TrainState(params, jax.eval_shape(make_optimizer(self.config.optim).init, params))

    def init_state(self, params: Params) -> TrainState:
        """Places f32 `params` on the mesh and starts the optimizer. The first step donates them: do not use them again."""
        sharding = self.state_sharding
        params = jax.device_put(params, sharding.params)
        optimizer = make_optimizer(self.config.optim)
        opt_state = jax.jit(optimizer.init, out_shardings=sharding.opt_state)(params)
        return TrainState(params, opt_state)

    def compile_step(self, state: TrainState, batch: Batch):
        """`(state, batch, progress, update) -> (state, metrics)`, compiled; the state given is donated.

        Where `update` is false the state comes back as it was, so that parameters can be tried with no second program or copy.
        `metrics` holds f32: `loss`, `loss_E`, `accuracy_E`, `grad_norm`, `param_norm` (all of the parameters given),
        `learning_rate`, and `tokens` (padding apart).
        """
        sharding, whole = self.state_sharding, replicated(self.mesh)
        step = jax.jit(
            self._train_step,
            in_shardings=(sharding, self.batch_sharding, whole, whole),
            out_shardings=(sharding, whole),
            donate_argnums=0,
        )
        return step.lower(state, batch, jnp.float32(0), jnp.bool_(True)).compile()

    def compile_eval(self, params: Params, batch: Batch):
        """`(params, batch) -> (ExitSums, counted tokens)`, compiled."""
        whole = replicated(self.mesh)
        step = jax.jit(
            self._eval_step,
            in_shardings=(self.state_sharding.params, self.batch_sharding),
            out_shardings=whole,
        )
        return step.lower(params, batch).compile()

    def _model(self) -> Transformer:
        return Transformer(self.model_config, dtype=jnp.dtype(self.config.model.compute_dtype))

    def _head_params(self, params: Params) -> Params:
        head = "embed" if self.model_config.tie_embeddings else "lm_head"
        return {"final_norm": params["final_norm"], head: params[head]}

    def _read_logits(self, head_params: Params, h: jax.Array) -> jax.Array:
        return self._model().apply({"params": head_params}, h, method="logits")

    def _exit_hiddens(self, params: Params, batch: Batch, *, remat: bool):
        return self._model().apply(
            {"params": params},
            batch.tokens_BT,
            exit_layers=self.config.draft.exit_layers,
            positions_BT=batch.positions_BT,
            segment_ids_BT=batch.segment_ids_BT,
            remat=remat,
            method="exit_hiddens",
        )

    def _loss(self, params: Params, batch: Batch, scale: jax.Array):
        """The loss of these rows, times `scale`: one over the tokens that the whole step counts."""
        hiddens = self._exit_hiddens(params, batch, remat=self.config.model.remat)
        loss, sums = sorted_loss(
            self._read_logits,
            self._head_params(params),
            hiddens,
            batch.targets_BT,
            batch.weights_BT,
            exit_weights=self.config.draft.loss_weights,
            chunk=self.config.train.loss_chunk,
        )
        return loss * scale, sums

    def _gradient(self, params: Params, batch: Batch, scale: jax.Array):
        """Loss, sums and gradient of a batch, in `train.accumulate` parts."""
        gradient = jax.value_and_grad(self._loss, has_aux=True)
        parts = self.config.train.accumulate
        if parts == 1:
            return gradient(params, batch, scale)

        def split(x):
            # Every part takes rows of every device: part p is rows p, p + parts, ...
            x = jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)
            rows = PartitionSpec(None, *batch_sharding(self.mesh).spec)
            return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, rows))

        def add_part(total, part):
            return jax.tree.map(jnp.add, total, gradient(params, part, scale)), None

        shapes = jax.eval_shape(gradient, params, batch, scale)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add_part, zeros, jax.tree.map(split, batch))[0]

    def _train_step(self, state: TrainState, batch: Batch, progress: jax.Array, update: jax.Array):
        counted = jnp.sum(batch.weights_BT)
        scale = 1.0 / jnp.maximum(counted, 1.0)
        (loss, sums), grads = self._gradient(state.params, batch, scale)
        optimizer = make_optimizer(self.config.optim)
        with jax.numpy_dtype_promotion("standard"):  # optax counts on implicit promotion
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        rate = learning_rate(progress, self.config.optim)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        metrics = {
            "loss": loss,
            "loss_E": sums.loss_E * scale,
            "accuracy_E": sums.correct_E * scale,
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(state.params),
            "learning_rate": rate,
            "tokens": jnp.sum((batch.segment_ids_BT > 0).astype(jnp.float32)),
        }
        updated = TrainState(params, opt_state)
        return jax.tree.map(lambda new, old: jnp.where(update, new, old), updated, state), metrics

    def _eval_step(self, params: Params, batch: Batch) -> tuple[ExitSums, jax.Array]:
        sums = exit_sums(
            self._read_logits,
            self._head_params(params),
            self._exit_hiddens(params, batch, remat=False),
            batch.targets_BT,
            batch.weights_BT,
            chunk=self.config.train.loss_chunk,
        )
        return sums, jnp.sum(batch.weights_BT)
