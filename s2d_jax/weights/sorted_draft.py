"""`sorted_draft.json`: a draft's exits and their parts, its draft vocabulary, and the base that its trunk comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from s2d_jax.config.draft import NO_PARTS, DraftConfig, ExitParts
from s2d_jax.config.model import MOST_SIZE, ModelConfig
from s2d_jax.errors import UserError, told_of
from s2d_jax.fields import Fields
from s2d_jax.files import read_json
from s2d_jax.model.select_layers import check_layers
from s2d_jax.weights.fingerprint import Fingerprint
from s2d_jax.weights.vocabulary import DraftVocabulary

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Base:
    """The model that a draft without weights of its own takes its trunk from.

    Attributes:
        path: a directory, hub id or `.gguf` file.
        layers: which of its layers the draft consists of; None is all.
        fingerprint: hash of these layers as they are stored (`base_fingerprint`).
        lora: low-rank adapters on the trunk lie beside the draft, as PEFT writes them.
    """

    path: str
    layers: tuple[int, ...] | None
    fingerprint: str
    lora: bool

    def checked_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers taken from a base of `num_layers` layers. Raises UserError for layers that it lacks."""
        layers = tuple(range(num_layers)) if self.layers is None else self.layers
        check_layers(layers, num_layers)
        return layers


@dataclasses.dataclass(frozen=True)
class SortedDraft:
    """What `sorted_draft.json` says, apart from policies and provenance."""

    draft_config: DraftConfig
    vocabulary: DraftVocabulary | None
    base: Base | None = None

    def to_json(self, provenance: Mapping[str, Any]) -> dict[str, Any]:
        """What `read_sorted_draft` reads."""
        config, vocabulary = self.draft_config, self.vocabulary
        parts = config.parts
        return {
            "format": FORMAT,
            "exit_layers": config.exit_layers,
            "exit_thresholds": config.exit_thresholds,
            "exit_parts": dataclasses.asdict(parts) if parts.exits else None,
            "vocabulary_subset": None if vocabulary is None else vocabulary.to_json(),
            "base": None if self.base is None else dataclasses.asdict(self.base),
            "provenance": dict(provenance),
        }


def base_fingerprint(config: ModelConfig) -> Fingerprint:
    """Starts the fingerprint of a base's chosen layers, to which their tensors are added under our dotted names.

    The ids that begin and end a sequence do not count.
    """
    return Fingerprint(dataclasses.replace(config, bos_token_id=None, eos_token_ids=()))


def read_sorted_draft(file: Path) -> SortedDraft:
    """What a `sorted_draft.json` says.

    Raises:
        UserError: if it is damaged, or of another format.
    """
    remedy = "export the draft again"
    fields = Fields(read_json(file, remedy), file, remedy)
    if (format := fields.integer("format")) != FORMAT:
        raise UserError(f"{file}: format {format} is unknown, {FORMAT} is expected; {remedy}")
    exits, thresholds = fields.integers("exit_layers"), fields.numbers("exit_thresholds", ())
    subset = fields.raw.get("vocabulary_subset")
    vocabulary = None if subset is None else DraftVocabulary.from_json(subset, file)
    parts = parts_from_json(fields, "exit_parts")
    with told_of(file):
        draft_config = DraftConfig(exits, thresholds, parts)
    return SortedDraft(draft_config, vocabulary, _base_from_json(fields))


def parts_from_json(fields: Fields, name: str) -> ExitParts:
    """The parts that `dataclasses.asdict` made a field of. An absent field or null means no parts.

    Raises:
        UserError: if the field is something else.
    """
    described = fields.fields(name, None)
    if described is None:
        return NO_PARTS
    heads, adapters = described.integers("heads"), described.integers("adapters")
    rank = described.integer("adapter_rank", 0, MOST_SIZE)
    with told_of(described.where):
        return ExitParts(heads, adapters, rank)


def _base_from_json(fields: Fields) -> Base | None:
    described = fields.fields("base", None)
    if described is None:
        return None
    return Base(
        described.text("path"),
        described.integers("layers", default=None),
        described.text("fingerprint"),
        described.flag("lora"),
    )
