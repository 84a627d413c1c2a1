"""The steps whose memory is compared."""

from __future__ import annotations

from train.medusa import MedusaTrainer
from train.plan.step_memory import StepToCompile, _placed, shapes_of_batch
from train.step.trainer import Trainer


def soft_step(trainer: Trainer) -> StepToCompile:
    """Sorted Fine-Tuning of a draft, without any target."""
    state, config = trainer.abstract_state(), trainer.config
    placed = _placed(state, trainer.state_sharding)
    batch = shapes_of_batch(config.train.batch_size, config.data.max_length)
    return StepToCompile(
        system="SoFT draft",
        target=None,
        num_layers=trainer.model_config.num_layers,
        frozen=(),
        trained=placed.params,
        optimizer=placed.opt_state,
        compile=lambda: trainer.compile_step(state, batch),
    )


def medusa_step(trainer: MedusaTrainer, target: str, length: int) -> StepToCompile:
    """Heads on the frozen target named `target`, which runs in every step."""
    state, trunk = trainer.abstract_state(), trainer.abstract_trunk()
    placed = _placed(state, trainer.state_sharding)
    batch = shapes_of_batch(trainer.config.batch_size, length)
    return StepToCompile(
        system="Medusa",
        target=target,
        num_layers=trainer.model_config.num_layers,
        frozen=_placed(trunk, trainer.trunk_sharding),
        trained=placed.heads,
        optimizer=placed.opt_state,
        compile=lambda: trainer.compile_step(state, trunk, batch),
    )
