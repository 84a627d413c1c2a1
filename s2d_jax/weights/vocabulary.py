"""The tokens that a draft's head is read over: how the list is kept, chosen and judged.

A draft that never proposes a token outside the list has q = 0 there, so any list leaves the target's output as it is; a list
that misses tokens which the target writes only costs acceptance.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from s2d_jax.config.model import ModelConfig
from s2d_jax.errors import UserError, shown, told_of
from s2d_jax.fields import Fields
from s2d_jax.files import expanded, read_json
from s2d_jax.formats.names import EXIT_HEADS, get_weight, shared_head
from s2d_jax.model.params import Params
from s2d_jax.model.products.weight_formats import take_rows
from s2d_jax.sharding import mesh_of, replicated
from s2d_jax.text.pairing import behaviour_hash
from s2d_jax.text.tokenizer import Tokenizer

TRIMMED_HEAD = "trimmed_head"
# An exit's own head `exit_heads_6` becomes `trimmed_exit_heads_6`.
TRIMMED = "trimmed_"
_RANGES = re.compile(r"[0-9]{1,10}(-[0-9]{1,10})?(,[0-9]{1,10}(-[0-9]{1,10})?)*")
MOST_ID = 2**31
MOST_LISTED = 2**22
"""More than any vocabulary has: a list is made before it is known which draft it is for, and must not fill the memory."""


@dataclasses.dataclass(frozen=True)
class DraftVocabulary:
    """A list of tokens for a draft's head.

    Attributes:
        ids_U: int32, ascending.
        tokens_sha256: hash of the listed tokens' strings, to refuse the list of another tokenizer; None where it is not known.
        provenance: JSON-able facts: what the list was made from, and what it covers.
        behaviour_sha256: `behaviour_hash` of the tokenizer that the list was counted with, to refuse one of the same entries
            and other rules; None in lists of earlier versions.

    Raises:
        UserError: for an empty list, ids below 0, or ids that do not ascend.
    """

    ids_U: np.ndarray
    tokens_sha256: str | None = None
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    behaviour_sha256: str | None = None

    def __post_init__(self):
        ids_U = np.asarray(self.ids_U, np.int64).reshape(-1)
        if ids_U.size == 0:
            raise UserError("the draft vocabulary is empty; list at least one token id")
        if ids_U.min() < 0 or ids_U.max() >= MOST_ID:
            wrong = ids_U.min() if ids_U.min() < 0 else ids_U.max()
            raise UserError(f"the draft vocabulary lists id {wrong}; ids are 0 to {MOST_ID - 1}")
        if (descents := np.flatnonzero(np.diff(ids_U) <= 0)).size:
            at = descents[0]
            raise UserError(
                f"the draft vocabulary lists id {ids_U[at + 1]} after {ids_U[at]}; list every id once, in ascending order"
            )
        object.__setattr__(self, "ids_U", ids_U.astype(np.int32))

    @classmethod
    def of_tokenizer(
        cls, ids: Iterable[int], tokenizer: Tokenizer, provenance: Mapping[str, Any]
    ) -> DraftVocabulary:
        """The list of these ids, bound to the tokens that they stand for."""
        listed = cls(np.array(sorted(ids), np.int64))
        tokens = _hash_of_tokens(listed.ids_U, tokenizer)
        return cls(listed.ids_U, tokens, provenance, behaviour_hash(tokenizer))

    @property
    def size(self) -> int:
        """U, the number of listed tokens."""
        return len(self.ids_U)

    def check(self, vocab_size: int, tokenizer: Tokenizer | None) -> None:
        """Raises UserError for ids that a model of `vocab_size` lacks, or for a list made for another tokenizer."""
        if (last := int(self.ids_U[-1])) >= vocab_size:
            raise UserError(
                f"the draft vocabulary lists id {last}, the draft has {vocab_size} tokens; make the list with this draft"
            )
        if self.tokens_sha256 is None or tokenizer is None:
            return
        if _hash_of_tokens(self.ids_U, tokenizer) != self.tokens_sha256:
            raise UserError(
                f"the draft vocabulary of {self.size} tokens was made for another tokenizer; make the list with this draft"
            )
        if self.behaviour_sha256 not in (None, behaviour_hash(tokenizer)):
            raise UserError(
                f"the draft vocabulary of {self.size} tokens was counted with a tokenizer that splits texts otherwise, "
                "although its tokens are the same; make the list again with this draft"
            )

    def notice(self, tokenizer: Tokenizer | None) -> str | None:
        """The line that a command says, once, where it cannot be known whether the list was counted with the right ids."""
        if self.behaviour_sha256 is not None or tokenizer is None or tokenizer.rebuilt_as is None:
            return None
        return (
            f"the draft vocabulary of {self.size} tokens was made by an earlier version, which read this tokenizer as a "
            f"{tokenizer.rebuilt_as} and perhaps counted other ids; the output is exact all the same, and infer.trim makes the "
            "list again"
        )

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads. Ids are written as ranges, at most seven bytes each below a million."""
        return {
            "size": self.size,
            "ids": _to_ranges(self.ids_U),
            "tokens_sha256": self.tokens_sha256,
            "behaviour_sha256": self.behaviour_sha256,
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, raw: Any, where: str | Path) -> DraftVocabulary:
        """The list in the JSON value `raw`, which was found in the file `where`.

        Raises:
            UserError: if it is not one.
        """
        remedy = "make it with python -m infer.trim"
        fields = Fields(raw, f"{where}: the draft vocabulary", remedy)
        ids, size = fields.text("ids"), fields.integer("size", 1, MOST_LISTED)
        hash_of_tokens = fields.text("tokens_sha256", None)
        provenance = fields.fields("provenance", None)
        behaviour = fields.text("behaviour_sha256", None)
        with told_of(where):
            told = {} if provenance is None else provenance.raw
            return cls(_from_ranges(ids, size), hash_of_tokens, told, behaviour)


def read_vocabulary(path: str | Path) -> DraftVocabulary:
    """The list in a file that `python -m infer.trim --out FILE.json` wrote.

    Raises:
        UserError: if there is no such file, or no list in it.
    """
    path = expanded(path)
    raw = read_json(path, "give a file that python -m infer.trim --out wrote")
    return DraftVocabulary.from_json(raw, path)


def _hash_of_tokens(ids_U: np.ndarray, tokenizer: Tokenizer) -> str:
    """A hash of the listed tokens only: the names of padding at the end of a vocabulary differ from file to file."""
    token_of = {i: token for token, i in tokenizer.vocabulary().items()}
    text = "\0".join(token_of.get(int(i), "") for i in ids_U)
    return hashlib.sha256(text.encode()).hexdigest()


def _to_ranges(ids_U: np.ndarray) -> str:
    """Ascending ids as text.

    >>> _to_ranges(np.array([0, 1, 2, 5, 7, 8]))
    '0-2,5,7-8'
    """
    starts = np.flatnonzero(np.diff(ids_U, prepend=-2) != 1)
    stops = np.append(starts[1:], len(ids_U)) - 1
    pairs = zip(ids_U[starts].tolist(), ids_U[stops].tolist(), strict=True)
    return ",".join(f"{a}-{b}" if a < b else str(a) for a, b in pairs)


def _from_ranges(text: str, size: int) -> np.ndarray:
    """Undoes `_to_ranges` for a list of `size` ids; nothing is made of a text that says something else.

    Raises:
        UserError: for another text, or another number of ids.
    """
    if not _RANGES.fullmatch(text):
        raise UserError(
            f"the draft vocabulary's ids={shown(text)} must look like 0-99,120,130-140, with ids below {MOST_ID}"
        )
    bounds = [part.partition("-") for part in text.split(",")]
    ranges = [range(int(first), int(last or first) + 1) for first, _, last in bounds]
    # Checked before the ranges are expanded: one wrong digit could fill the memory.
    if (listed := sum(map(len, ranges))) != size:
        raise UserError(
            f"the draft vocabulary lists {listed} ids, size={size} is expected; make it with python -m infer.trim"
        )
    return np.concatenate([np.arange(r.start, r.stop) for r in ranges])


def trimmed_params(
    config: ModelConfig, params: Params, vocabulary: DraftVocabulary | None
) -> Params:
    """`params` with the listed rows of every head gathered beside the whole tables; None takes such rows away.

    The shared head is the embedding where it is tied; the whole embedding still looks tokens up.
    """
    whole = {name: value for name, value in params.items() if not name.startswith(TRIMMED)}
    if vocabulary is None:
        return whole
    heads = {TRIMMED_HEAD: get_weight(params, shared_head(config))}
    own = (name for name in whole if name.startswith(EXIT_HEADS))
    heads |= {TRIMMED + name: whole[name]["kernel"] for name in own}
    mesh, ids_U, trimmed = mesh_of(params), jnp.asarray(vocabulary.ids_U), {}
    for name, head_VD in heads.items():
        head_UD = take_rows(head_VD, ids_U)
        if mesh is not None:
            # U need not be divisible by the mesh.
            head_UD = jax.device_put(head_UD, replicated(mesh))
        trimmed[name] = {"kernel": head_UD}
    return whole | trimmed
