"""`sorted_draft.json`: a draft's exits and their parts, its draft vocabulary, and the base that its trunk comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from s2d_jax.config.draft import NO_PARTS, DraftConfig, ExitParts
from s2d_jax.config.model import ModelConfig
from s2d_jax.errors import UserError
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
    raw = read_json(file)
    if raw.get("format") != FORMAT:
        raise UserError(
            f"{file}: format {raw.get('format')!r} is unknown, {FORMAT} is expected; export the draft again"
        )
    if "exit_layers" not in raw:
        raise UserError(f"{file} lacks exit_layers; export the draft again")
    exits, thresholds = raw["exit_layers"], raw.get("exit_thresholds", [])
    for name, values, kind in (
        ("exit_layers", exits, int),
        ("exit_thresholds", thresholds, int | float),
    ):
        if not (isinstance(values, list) and all(isinstance(value, kind) for value in values)):
            raise UserError(
                f"{file}: {name}={values!r} must be a list of numbers, such as [6, 9, 12] exits; export the draft again"
            )
    subset = raw.get("vocabulary_subset")
    vocabulary = None if subset is None else DraftVocabulary.from_json(subset, file)
    parts = parts_from_json(raw.get("exit_parts"), file)
    draft_config = DraftConfig(tuple(exits), tuple(thresholds), parts)
    return SortedDraft(draft_config, vocabulary, _base_from_json(raw.get("base"), file))


def parts_from_json(raw: Any, where: Path) -> ExitParts:
    """The parts in the JSON value `raw`, which `dataclasses.asdict` made; `where` is its file. None means no parts.

    Raises:
        UserError: if `raw` is something else.
    """
    if raw is None:
        return NO_PARTS
    try:
        heads, adapters = tuple(raw["heads"]), tuple(raw["adapters"])
        return ExitParts(heads, adapters, raw["adapter_rank"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{where}: exit_parts={raw!r} is unreadable ({error}); heads, adapters and adapter_rank are expected"
        ) from None


def _base_from_json(raw: Any, file: Path) -> Base | None:
    if raw is None:
        return None
    try:
        path, layers, fingerprint, lora = (raw[field.name] for field in dataclasses.fields(Base))
        base = Base(path, None if layers is None else tuple(layers), fingerprint, bool(lora))
    except (KeyError, TypeError):
        base = None
    if (
        base is None
        or not all(isinstance(value, str) for value in (base.path, base.fingerprint))
        or not all(isinstance(i, int) for i in base.layers or ())
    ):
        raise UserError(
            f"{file}: base={raw!r} is unreadable; path, layers, fingerprint and lora are expected; export the draft again"
        )
    return base
