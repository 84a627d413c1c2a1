"""How the objective reads exits and teachers at some positions: heads, lists of tokens, distributions."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from s2d_jax.config.draft import ExitParts
from s2d_jax.config.model import ModelConfig
from s2d_jax.formats.names import EXIT_ADAPTERS, EXIT_HEADS, get_weight, shared_head
from s2d_jax.model.params import Params
from s2d_jax.model.remat import RematPolicy
from s2d_jax.model.transformer import Transformer, apply_model
from s2d_jax.weights.vocabulary import TRIMMED, TRIMMED_HEAD
from train.config.sections import ObjectiveSection
from train.data.batch import TopK
from train.objective.divergences import at_tokens, cross_entropy, divergence, restricted, with_rest
from train.objective.labels import Labels, TokenValues
from train.objective.trainable import join_params

_OWN = (EXIT_HEADS, EXIT_ADAPTERS)


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """Reads the draft's exits, and the teachers, for the objective.

    Attributes:
        model: the draft's shape.
        dtype: of the draft's products.
        exit_layers, parts: where the draft is read, and the parts that belong to single exits.
        objective: what the exits learn.
        teachers: shapes of the teachers that run in every step.
        vocabulary_U: int32, the list of tokens that heads are read over; None for all.
    """

    model: ModelConfig
    dtype: Any
    exit_layers: tuple[int, ...]
    parts: ExitParts = ExitParts()
    objective: ObjectiveSection = ObjectiveSection()
    teachers: tuple[ModelConfig, ...] = ()
    vocabulary_U: np.ndarray | None = None

    @classmethod
    def of(cls, model: ModelConfig, dtype: Any = jnp.float32) -> Reading:
        """Reads the last layer of any model through its head."""
        return cls(model, dtype, (model.num_layers,))

    @property
    def transformer(self) -> Transformer:
        """The draft; its head is over the list of tokens, if there is one."""
        size = None if self.vocabulary_U is None else len(self.vocabulary_U)
        return Transformer(self.model, self.dtype, trimmed_head_size=size, parts=self.parts)

    def head_params(self, params: Params) -> Params:
        """The part of the draft's parameters that `logits` needs; if there is a list, with the listed rows of the heads."""
        table = shared_head(self.model).ours[0]
        own = {name: value for name, value in params.items() if name.startswith(_OWN)}
        if self.vocabulary_U is None:
            return {"final_norm": params["final_norm"], table: params[table], **own}
        heads = {TRIMMED_HEAD: get_weight(params, shared_head(self.model))}
        for name in [name for name in own if name.startswith(EXIT_HEADS)]:
            heads[TRIMMED + name] = own.pop(name)["kernel"]
        ids_U = jnp.asarray(self.vocabulary_U)
        rows = {
            name: {"kernel": jnp.take(head_VD, ids_U, axis=0, mode="clip")}
            for name, head_VD in heads.items()
        }
        return {"final_norm": params["final_norm"], **own, **rows}

    def exit_hiddens(
        self, params: Params, batch, *, remat: RematPolicy = "none"
    ) -> tuple[jax.Array, ...]:
        """The states `[B, T, D]` at the exits, for a `train.data.batch.Batch`."""
        return apply_model(
            self.transformer,
            params,
            "exit_hiddens",
            batch.tokens_BT,
            exit_layers=self.exit_layers,
            positions_BT=batch.positions_BT,
            segment_ids_BT=batch.segment_ids_BT,
            remat=remat,
        )

    def teacher(self, index: int) -> Reading:
        """Reads a running teacher."""
        return Reading.of(self.teachers[index], jnp.dtype(self.objective.teacher_dtype))

    def losses(self, learned, fixed, h_EBWD: jax.Array, labels: Labels) -> TokenValues:
        """The `TokenFunction` of training: `loss`, `ce`, `correct`, and with teachers `divergence`, each `[E, B, W]`.

        Args:
            learned, fixed: the two halves of the head parameters; fixed also holds the teachers' heads.
        """
        objective = self.objective
        head = join_params(learned, fixed["head"])
        targets_BW, listed_BW = self._indices(labels.targets_BT)
        read = zip(labels.teachers, fixed["teachers"], strict=True)
        teachers = [self._distribution(i, *pair) for i, pair in enumerate(read)]
        logits_BEWU = self._exit_logits(head, h_EBWD)
        total_BEW = jax.nn.logsumexp(logits_BEWU, axis=-1)
        ce_BEW = cross_entropy(logits_BEWU, targets_BW[:, None, :])
        # True if no token has a smaller cross-entropy. On XLA's CPU backend an argmax takes ten times as long as a maximum.
        best_BEW = ce_BEW <= total_BEW - jnp.max(logits_BEWU, axis=-1)
        ce_BEW = jnp.where(listed_BW[:, None, :], ce_BEW, 0.0)
        correct_BEW = (listed_BW[:, None, :] & best_BEW).astype(jnp.float32)
        values: dict[str, Any] = {
            "loss": objective.ce_weight * ce_BEW,
            "ce": ce_BEW,
            "correct": correct_BEW,
        }
        if teachers:
            log_q_BEWU = logits_BEWU - total_BEW[..., None]
            apart_BEW = sum(self._apart(of, log_q_BEWU) for of in teachers) / len(teachers)
            values["divergence"] = apart_BEW
            values["loss"] = values["loss"] + objective.distill_weight * apart_BEW
        return {name: jnp.swapaxes(value_BEW, 0, 1) for name, value_BEW in values.items()}

    def _apart(self, teacher, log_q_BEWU: jax.Array) -> jax.Array:
        """How far each exit is from a teacher, f32 `[B, E, W]`."""
        exits = [
            divergence(self.objective.divergence, *teacher(log_q_BEWU[:, e]))
            for e in range(len(self.exit_layers))
        ]
        return jnp.stack(exits, axis=1)

    def watched(self, learned, fixed, h_EBWD: jax.Array, labels: Labels) -> TokenValues:
        """The `TokenFunction` of evaluation, `[E, B, W]`: `ce`, `confidence`, and `best`, the token drafted (int32)."""
        values: dict[str, list[jax.Array]] = {"ce": [], "confidence": [], "best": []}
        targets_BW, listed_BW = self._indices(labels.targets_BT)
        for exit_layer, h_BWD in zip(self.exit_layers, h_EBWD, strict=True):
            logits_BWU = self.logits(learned, h_BWD, exit_layer)
            log_q_BWU = jax.nn.log_softmax(logits_BWU, axis=-1)
            best_BW = jnp.argmax(logits_BWU, axis=-1).astype(jnp.int32)
            if self.vocabulary_U is not None:
                best_BW = jnp.asarray(self.vocabulary_U)[best_BW]
            values["ce"].append(jnp.where(listed_BW, cross_entropy(logits_BWU, targets_BW), 0.0))
            values["confidence"].append(jnp.exp(jnp.max(log_q_BWU, axis=-1)))
            values["best"].append(best_BW)
        return {name: jnp.stack(value) for name, value in values.items()}

    def logits(self, head: Params, h_BWD: jax.Array, exit_layer: int) -> jax.Array:
        """f32 logits `[B, W, U]` of an exit."""
        return apply_model(self.transformer, head, "logits", h_BWD, exit_layer=exit_layer)

    def _exit_logits(self, head: Params, h_EBWD: jax.Array) -> jax.Array:
        """f32 logits `[B, E, W, U]`. Exits that share a head are multiplied at once, because larger products are faster.

        The batch axis comes first: it is split over devices, and stays split when all axes but the last are merged.
        """
        if not self.parts.exits:
            return self.logits(head, jnp.swapaxes(h_EBWD, 0, 1), self.exit_layers[-1])
        each = zip(self.exit_layers, h_EBWD, strict=True)
        return jnp.stack([self.logits(head, h_BWD, exit_layer) for exit_layer, h_BWD in each], 1)

    def _indices(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The entries of the head for these tokens, and whether the head has them."""
        if self.vocabulary_U is None:
            return ids, jnp.ones_like(ids, dtype=bool)
        index_V = np.full(self.model.vocab_size, -1, np.int32)
        index_V[self.vocabulary_U] = np.arange(len(self.vocabulary_U), dtype=np.int32)
        found = jnp.take(jnp.asarray(index_V), ids, mode="fill", fill_value=-1)
        return jnp.maximum(found, 0), found >= 0

    def _distribution(self, index: int, values: Any, head: Params):
        """A function from the draft's `log_q_BWU` to `(log_p, log_q)` over the same outcomes."""
        if isinstance(values, TopK):
            return self._of_top_k(values)
        teacher = self.teacher(index)
        logits_BWU = teacher.logits(head, values, teacher.exit_layers[0])
        if self.vocabulary_U is not None:
            logits_BWU = jnp.take(logits_BWU, jnp.asarray(self.vocabulary_U), axis=-1, mode="clip")

        def both(log_q_BWU):
            # Models of one tokenizer pad their tables differently; the entries that both have are the tokens.
            common = min(logits_BWU.shape[-1], log_q_BWU.shape[-1])
            cut = (jax.nn.log_softmax(x[..., :common], axis=-1) for x in (logits_BWU, log_q_BWU))
            return tuple(cut)

        return both

    def _of_top_k(self, stored: TopK):
        index_BWk, known_BWk = self._indices(stored.ids_BTk)
        log_p_BWk = with_rest(stored.log_probs_BTk)
        if self.vocabulary_U is not None:
            log_p_BWk = restricted(log_p_BWk, known_BWk)

        def both(log_q_BWU):
            log_q_BWk = jnp.where(known_BWk, at_tokens(log_q_BWU, index_BWk), -jnp.inf)
            return log_p_BWk, with_rest(log_q_BWk)

        return both
