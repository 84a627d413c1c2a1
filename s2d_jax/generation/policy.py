"""Policies: how to decode with one target on one device, as calibration found it, and the file that keeps them.

A policy is data. It is kept in the draft's `sorted_draft.json`, or in a file of its own for a draft that has none, under
`"policies"`, and found again by the weights of target and draft, their dtypes, the device and the temperature.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from s2d_jax.config.costs import RoundCosts
from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.tree import TreeShape
from s2d_jax.errors import UserError
from s2d_jax.fields import Fields
from s2d_jax.files import expanded, local_path, read_json, write_text
from s2d_jax.formats.hub import SORTED_DRAFT
from s2d_jax.machine import device_kind
from s2d_jax.sharding import is_split, mesh_of
from s2d_jax.weights.fingerprint import Fingerprint
from s2d_jax.weights.model import Model

# The fields of DecodeConfig that a policy does not decide.
_NOT_STORED = ("policy", "policy_file", "verify_width")
_AGAIN = "calibrate the target again"


@dataclasses.dataclass(frozen=True)
class PolicyKey:
    """What a policy was measured for.

    Attributes:
        target, draft: fingerprints of the models.
        formats: dtypes of the weights, target/draft.
        device: its kind; for a CPU the model and the number of cores; and the mesh of the target, if it has one, and whether
            the draft is split over it.
        temperature: 0 is greedy.
    """

    target: str
    draft: str
    formats: str
    device: str
    temperature: float

    @classmethod
    def of(
        cls,
        target: Model,
        draft: Model,
        temperature: float,
        prints: tuple[Fingerprint, Fingerprint] | None = None,
    ) -> PolicyKey:
        """The key of these models here and now; `prints` are their fingerprints, if already known."""
        of_target, of_draft = prints or (fingerprint(target), fingerprint(draft))
        formats = f"{weight_format(target)}/{weight_format(draft)}"
        devices = _devices(target, draft)
        return cls(str(of_target), str(of_draft), formats, devices, float(temperature))

    @property
    def temperature_class(self) -> str:
        return "greedy" if self.temperature == 0 else "sampled"


@dataclasses.dataclass(frozen=True)
class Policy:
    """How to decode.

    Attributes:
        key: what it was measured for.
        config: settings of the decoder; None: do not speculate.
        evidence: what the choice rests on: costs, trace, candidates predicted and measured, environment.
    """

    key: PolicyKey
    config: DecodeConfig | None
    evidence: Mapping[str, Any]


def _devices(target: Model, draft: Model) -> str:
    """The kind of device, and how a pair lies on several: as data 8 and as tensor 8 they are different machines."""
    return ", ".join([device_kind(), *(f"{name} {n}" for name, n in _mesh(target, draft).items())])


def _mesh(target: Model, draft: Model) -> dict[str, int | str]:
    """The axes of the target's mesh that have several devices, and `"draft": "split"` if the draft is split over it."""
    mesh = mesh_of(target.params)
    if mesh is None:
        return {}
    found: dict[str, int | str] = {name: n for name, n in mesh.shape.items() if n > 1}
    if mesh_of(draft.params) == mesh and is_split(draft.params):
        found["draft"] = "split"
    return found


def fingerprint(model: Model) -> Fingerprint:
    """A hash of a model's shape and of a few weights of every tensor."""
    found = Fingerprint(model.config)
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        found.add(jax.tree_util.keystr(path), leaf)
    return found


def weight_format(model: Model) -> str:
    """The dtypes of a model's tensors, such as "float32"."""
    return "+".join(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(model.params)}))


def policy_file_of(draft: Model, given: str | Path | None) -> Path:
    """Where the policies of `draft` are: the file that was given, else its own sorted_draft.json.

    Raises:
        UserError: if there is neither.
    """
    if given is not None:
        return local_path(given, "policy_file")
    file = expanded(draft.source) / SORTED_DRAFT
    if not file.is_file():
        raise UserError(
            f"{draft.source} has no {SORTED_DRAFT} to keep policies in; name a file of its own: policy_file (--policy-file)"
        )
    return file


def read_policies(file: Path) -> list[Policy]:
    """The policies in `file`; none if it does not exist yet.

    Raises:
        UserError: for a file that is not JSON, or a policy that cannot be read.
    """
    entries = Fields(_read(file), file, _AGAIN).list("policies", [])
    return [
        _from_json(Fields(entry, f"{file}: policies[{number}]", _AGAIN))
        for number, entry in enumerate(entries)
    ]


def write_policies(file: Path, new: Sequence[Policy]) -> None:
    """Adds `new` to the policies in `file`, in place of those with the same key; the rest of the file is kept.

    The file is replaced whole or not at all.
    """
    content = _read(file)
    keys = {policy.key for policy in new}
    kept = [policy for policy in read_policies(file) if policy.key not in keys]
    content["policies"] = [_to_json(policy) for policy in (*kept, *new)]
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def find_policy(policies: Sequence[Policy], key: PolicyKey) -> Policy | None:
    """The policy of this target, draft, formats and device whose temperature is of the same class (0, or above) and nearest.

    If there are several, it is the one that was written last.
    """
    fields = ("target", "draft", "formats", "device", "temperature_class")
    fitting = [
        policy
        for policy in reversed(policies)
        if all(getattr(policy.key, name) == getattr(key, name) for name in fields)
    ]
    distance = lambda policy: abs(policy.key.temperature - key.temperature)  # noqa: E731
    return min(fitting, key=distance, default=None)


def load_policy(target: Model, draft: Model, temperature: float, file: str | Path | None) -> Policy:
    """The policy to decode with.

    Args:
        target, draft, temperature: what to decode with.
        file: where to look; None is the draft's own sorted_draft.json.

    Raises:
        UserError: if nothing was calibrated for this target, draft, device and class of temperature. Nothing is guessed.
    """
    path = policy_file_of(draft, file)
    prints = fingerprint(target), fingerprint(draft)
    key = PolicyKey.of(target, draft, temperature, prints)
    found = [_renamed(policy, prints, key) for policy in read_policies(path)]
    policy = find_policy(found, key)
    if policy is None:
        mesh = "".join(f" --mesh.{name} {value}" for name, value in _mesh(target, draft).items())
        raise UserError(
            f"{path} has no policy for {target.source} ({key.formats}, {key.device}, {key.temperature_class}); run "
            f"python -m infer.calibrate --target {target.source} --draft {draft.source}{mesh}"
        )
    return policy


def _renamed(policy: Policy, prints: tuple[Fingerprint, Fingerprint], key: PolicyKey) -> Policy:
    """The policy with the fingerprints of `key`, if it is of these models but holds an earlier form of their fingerprints."""
    written = policy.key.target, policy.key.draft
    if not all(print.matches(name) for print, name in zip(prints, written, strict=True)):
        return policy
    renamed = dataclasses.replace(policy.key, target=key.target, draft=key.draft)
    return dataclasses.replace(policy, key=renamed)


def _read(file: Path) -> dict[str, Any]:
    return read_json(file, "remove it or repair it") if file.exists() else {}


def _to_json(policy: Policy) -> dict[str, Any]:
    config = None
    if policy.config is not None:
        config = dataclasses.asdict(policy.config)
        config = {name: value for name, value in config.items() if name not in _NOT_STORED}
    return {
        "key": dataclasses.asdict(policy.key),
        "speculate": policy.config is not None,
        "config": config,
        "evidence": dict(policy.evidence),
    }


def _from_json(entry: Fields) -> Policy:
    key = entry.fields("key")
    key.only([field.name for field in dataclasses.fields(PolicyKey)])
    texts = {name: key.text(name) for name in ("target", "draft", "formats", "device")}
    config = entry.fields("config", None)
    return Policy(
        PolicyKey(**texts, temperature=key.number("temperature", 0)),
        None if config is None else _config_from_json(config),
        entry.fields("evidence").raw,
    )


def _config_from_json(fields: Fields) -> DecodeConfig:
    fields.only([field.name for field in dataclasses.fields(DecodeConfig)])
    values = dict(fields.raw)
    for name, kind in (("costs", RoundCosts), ("tree", TreeShape)):
        if (part := fields.fields(name, None)) is not None:
            part.only([field.name for field in dataclasses.fields(kind)])
            with _explained(part):
                values[name] = kind(**part.raw)
    with _explained(fields):
        return DecodeConfig(**values)


@contextlib.contextmanager
def _explained(fields: Fields) -> Iterator[None]:
    """What a configuration says against its values, with the place of the values and the remedy."""
    try:
        yield
    except (UserError, TypeError) as error:  # TypeError: a field without a default is missing
        reason = " ".join(str(error).split())
        raise UserError(f"{fields.where}: {reason[:200]}; {fields.remedy}") from None
