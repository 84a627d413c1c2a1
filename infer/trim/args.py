"""The flags of `infer.trim`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from s2d_jax.cli.flags import flag


@dataclasses.dataclass(frozen=True)
class Args:
    """List the tokens that a draft's head is read over, chosen from answers of its targets.

    The targets' output stays exact.
    """

    draft: Annotated[str, flag("MODEL")]
    """Exported sorted draft, whose sorted_draft.json receives the list; or, with --out, any model."""
    answers: Annotated[tyro.conf.UseAppendAction[tuple[Path, ...]], flag("FILE")] = ()
    """JSONL that infer.generate --out wrote; give the answers of every target in use."""
    text: Annotated[tyro.conf.UseAppendAction[tuple[Path, ...]], flag("FILE")] = ()
    """Further UTF-8 text, such as prompts or code; its tokens rank after those of the answers, and do not count as coverage."""
    size: int = 32_000
    """Tokens in the list."""
    out: Annotated[Path | None, flag("FILE", "the draft's sorted_draft.json")] = None
    """Write the list to this .json, for --draft-vocabulary, and leave the draft as it is."""
