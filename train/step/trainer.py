"""One training step and one evaluation step, compiled for a mesh."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from s2d_jax.config.model import ModelConfig
from s2d_jax.model.lora import LoraConfig, with_lora
from s2d_jax.model.params import Params, abstract_params, logical_axes
from s2d_jax.sharding import batch_sharding, optimizer_sharding, params_sharding, replicated
from train.config.sections import Config
from train.data.batch import Batch
from train.objective.exit_reader import Reading
from train.objective.labels import Labels, TokenValues
from train.objective.sorted_loss import sorted_loss, values_of_positions
from train.objective.trainable import join_params, split_params
from train.step.for_mesh import for_mesh
from train.step.optimizer import learning_rate, make_optimizer


class TrainState(flax.struct.PyTreeNode):
    """What a step changes.

    Attributes:
        params: f32 master weights, frozen ones included.
        opt_state: the optimizer's moments of the weights that learn.
    """

    params: Params
    opt_state: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
    """The compiled steps of one run.

    Attributes:
        config: the run.
        model_config: the draft's shape.
        mesh: with axes data, fsdp, tensor; rows are split over the first two.
        teachers: shapes of the targets that run in every step.
        vocabulary_U: int32, the list of tokens that the draft's heads are read over; None for all.
    """

    config: Config
    model_config: ModelConfig
    mesh: Mesh
    teachers: tuple[ModelConfig, ...] = ()
    vocabulary_U: np.ndarray | None = None

    @cached_property
    def reading(self) -> Reading:
        """How exits and teachers are read."""
        config = self.config
        return Reading(
            model=self.model_config,
            dtype=jnp.dtype(config.model.compute_dtype),
            exit_layers=config.draft.exit_layers,
            parts=config.draft.parts,
            objective=config.objective,
            teachers=self.teachers,
            vocabulary_U=self.vocabulary_U,
        )

    @property
    def batch_sharding(self) -> NamedSharding:
        """Rows over data and fsdp."""
        return batch_sharding(self.mesh)

    @property
    def state_sharding(self) -> TrainState:
        """Moments are split as their parameters are."""
        axes = with_lora(logical_axes(self.model_config, self.config.draft.parts), self._lora)
        params = params_sharding(self.model_config, axes, self.mesh)
        optimizer = make_optimizer(self.config.optim)
        abstract = self.abstract_state().opt_state
        learned, _ = self._split(params)
        opt_state = optimizer_sharding(optimizer, abstract, learned, self.mesh)
        return TrainState(params, opt_state)

    @property
    def teacher_sharding(self) -> tuple[Any, ...]:
        """Teachers are split as the draft is."""
        return tuple(
            params_sharding(teacher, logical_axes(teacher), self.mesh) for teacher in self.teachers
        )

    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of the state; nothing is computed."""
        params = abstract_params(self.model_config, jnp.float32, self.config.draft.parts)
        params = with_lora(params, self._lora)
        learned, _ = self._split(params)
        return TrainState(params, jax.eval_shape(make_optimizer(self.config.optim).init, learned))

    def init_state(self, params: Params) -> TrainState:
        """Places f32 `params` on the mesh and starts the optimizer. The first step donates them: do not use them again."""
        sharding = self.state_sharding
        params = jax.device_put(params, sharding.params)
        optimizer = make_optimizer(self.config.optim)
        init = jax.jit(optimizer.init, out_shardings=sharding.opt_state)
        return TrainState(params, init(self._split(params)[0]))

    def compile_step(self, state: TrainState, batch: Batch, teachers: tuple[Params, ...] = ()):
        """`(state, teachers, batch, progress, update) -> (state, metrics)`, compiled; the state given is donated.

        If `update` is false the state comes back unchanged, so that parameters can be checked without a second program or copy.
        `metrics` holds f32: `loss`; by exit `loss_E` (cross-entropy), `accuracy_E` and with teachers `divergence_E`;
        `grad_norm`, `param_norm` (of all parameters given), `learning_rate`, and `tokens` (without padding).
        """
        sharding, whole = self.state_sharding, replicated(self.mesh)
        step = jax.jit(
            for_mesh(self._train_step, self.mesh),
            in_shardings=(sharding, self.teacher_sharding, self.batch_sharding, whole, whole),
            out_shardings=(sharding, whole),
            donate_argnums=0,
        )
        with jax.set_mesh(self.mesh):  # for `over_rows`
            return step.lower(state, teachers, batch, np.float32(0), np.bool_(True)).compile()

    def compile_eval(self, params: Params, batch: Batch):
        """`(params, batch) -> TokenValues` of `Reading.watched` at every position, `[E, B, T]`, compiled."""
        step = jax.jit(
            for_mesh(self._eval_step, self.mesh),
            in_shardings=(self.state_sharding.params, self.batch_sharding),
            out_shardings=replicated(self.mesh),
        )
        with jax.set_mesh(self.mesh):  # for `over_rows`
            return step.lower(params, batch).compile()

    @property
    def _lora(self) -> LoraConfig | None:
        rank = self.config.model.lora_rank
        return LoraConfig(rank) if rank else None

    def _split(self, params: Params) -> tuple[Params, Params]:
        return split_params(params, self.config.learned_parts)

    def _teacher_values(self, teachers: tuple[Params, ...], batch: Batch):
        """For each teacher, what its distributions are read from, and the head that reads them."""
        if batch.top_k:
            return batch.top_k, tuple({} for _ in batch.top_k)
        read = [(self.reading.teacher(i), params) for i, params in enumerate(teachers)]
        # No gradient flows into a teacher.
        values = tuple(
            jax.lax.stop_gradient(teacher.exit_hiddens(params, batch)[0])
            for teacher, params in read
        )
        return values, tuple(teacher.head_params(params) for teacher, params in read)

    def _loss(
        self,
        learned: Params,
        frozen: Params,
        teachers: tuple[Params, ...],
        batch: Batch,
        scale: jax.Array,
    ):
        """The loss of these rows, times `scale`, which is one over the tokens counted in the whole step."""
        trunk_learns = not {"trunk", "lora"}.isdisjoint(self.config.learned_parts)
        params = join_params(learned, frozen)
        hiddens = self.reading.exit_hiddens(
            params, batch, remat=self.config.model.remat if trunk_learns else "none"
        )
        values, teacher_heads = self._teacher_values(teachers, batch)
        head_learned, head_frozen = self._split(self.reading.head_params(params))
        loss, sums = sorted_loss(
            self.reading.losses,
            head_learned,
            {"head": head_frozen, "teachers": teacher_heads},
            hiddens,
            Labels(batch.targets_BT, batch.weights_BT, values),
            exit_weights=self.config.draft.loss_weights,
            chunk=self.config.train.loss_chunk,
            through_hiddens=trunk_learns,
        )
        return loss * scale, sums

    def _gradient(self, learned, frozen, teachers, batch: Batch, scale: jax.Array):
        """Loss, sums and gradient of a batch, in `train.accumulate` parts."""
        gradient = jax.value_and_grad(self._loss, has_aux=True)
        parts = self.config.train.accumulate
        if parts == 1:
            return gradient(learned, frozen, teachers, batch, scale)

        def split_rows(x):
            # Every part takes rows of every device: part p is rows p, p + parts, ...
            x = jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)
            rows = PartitionSpec(None, *batch_sharding(self.mesh).spec)
            return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, rows))

        def add_part(total, part):
            found = gradient(learned, frozen, teachers, part, scale)
            return jax.tree.map(jnp.add, total, found), None

        split_batch = jax.tree.map(split_rows, batch)
        part = jax.tree.map(lambda x: x[0], split_batch)
        shapes = jax.eval_shape(gradient, learned, frozen, teachers, part, scale)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add_part, zeros, split_batch)[0]

    def _train_step(self, state: TrainState, teachers, batch: Batch, progress, update):
        counted = jnp.sum(batch.weights_BT)
        scale = 1.0 / jnp.maximum(counted, 1.0)
        learned, frozen = self._split(state.params)
        (loss, sums), grads = self._gradient(learned, frozen, teachers, batch, scale)
        optimizer = make_optimizer(self.config.optim)
        with jax.numpy_dtype_promotion("standard"):  # optax counts on implicit promotion
            updates, opt_state = optimizer.update(grads, state.opt_state, learned)
        rate = learning_rate(progress, self.config.optim)
        metrics = {
            "loss": loss,
            "loss_E": sums["ce"] * scale,
            "accuracy_E": sums["correct"] * scale,
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(state.params),
            "learning_rate": rate,
            "tokens": jnp.sum((batch.segment_ids_BT > 0).astype(jnp.float32)),
        }
        if "divergence" in sums:
            metrics["divergence_E"] = sums["divergence"] * scale
        moved = jax.tree.map(lambda p, u: p - rate * u, learned, updates)
        moved, opt_state = jax.tree.map(
            lambda new, old: jnp.where(update, new, old),
            (moved, opt_state),
            (learned, state.opt_state),
        )
        return TrainState(join_params(moved, frozen), opt_state), metrics

    def _eval_step(self, params: Params, batch: Batch) -> TokenValues:
        return values_of_positions(
            self.reading.watched,
            self.reading.head_params(params),
            self.reading.exit_hiddens(params, batch),
            Labels(batch.targets_BT, batch.weights_BT),
            chunk=self.config.train.loss_chunk,
        )
