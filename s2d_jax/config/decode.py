"""The configuration of decoding; it refuses bad values at construction, with the value and the remedy."""

from __future__ import annotations

import dataclasses
from typing import Literal

from s2d_jax.config.costs import RoundCosts
from s2d_jax.config.draft import DraftConfig
from s2d_jax.config.plain import plain_fields
from s2d_jax.config.tree import TreeShape
from s2d_jax.errors import UserError as UserError
from s2d_jax.errors import require

MOST_DRAFTED = 1024
"""The most tokens that a round may draft; memory and compiling grow with it, and no draft is right for so long."""
LENGTH_RULES = ("fixed", "heuristic", "confidence", "expected_gain")
_HEURISTIC_CAP = 10
_COUNTS = (
    "num_draft_tokens", "max_draft_tokens", "catch_up_width", "prefill_chunk", "initial_room", "verify_width",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """What is compiled into a decoder, and the defaults of what is not.

    Attributes:
        exits: the draft's exits to use. One exit k is the fixed-exit policy ("SoFT Lk + SD"), several are threshold exits
            ("S2D"). None takes all exits of the draft.
        exit_thresholds: one per used exit; None takes the draft's own. Not compiled in.
        num_draft_tokens: tokens drafted per round: always ("fixed"), at the start ("heuristic"), or at most (the others).
        draft_length_rule: per row. "fixed"; "heuristic": +2 when all drafted tokens were accepted, else -1, at least 1
            (Hugging Face's schedule of that name); "confidence": the first token of low confidence is the last of its round;
            "expected_gain": drafts on while another token pays at the measured costs (`s2d_jax.draft.length`).
        max_draft_tokens: the most tokens that a round may draft; the verified width is one more. Compiled in; shorter
            lengths and other rules compile nothing anew. None is 10 for the heuristic, else `num_draft_tokens`.
        min_confidence: where the "confidence" rule stops. Not compiled in.
        gain_rate: for "expected_gain", the tokens per plain round's time that drafting on must bring. 1 is the rate of plain
            decoding; the best value is the rate that the whole policy reaches. Not compiled in.
        costs: needed by "expected_gain" and `guard`.
        guard: watch what speculation saves in each row, and fall back to plain rounds where it does not
            (`s2d_jax.draft.guard`).
        narrow_widths: further widths, below the full one, that a target pass may have: it takes the smallest that holds the
            longest chain of the round. () always computes the full width, and then greedy output equals the width-matched
            reference bit for bit; None is (1,) with a guard or "expected_gain", else ().
        tree: draft and verify a tree of tokens instead of a chain; its depth takes the place of the draft length, which is then
            fixed: `num_draft_tokens` and `max_draft_tokens` are not read.
        draft_sampling: "sample" draws drafted tokens from the exit's own distribution q (a tree draws children without
            replacement); "argmax" drafts its most probable ones and verifies with a one-hot q. Both are lossless.
        verify_width: without a draft, how many positions one target pass computes; the width-matched reference of identity
            tests sets it to the `verify_width` of the decoder that it checks. None is 1: the fastest plain decoding.
        catch_up_width: how many waiting tokens one pass of deeper layers takes in.
        prefill_chunk: how many prompt tokens one pass takes in at most; longer prompts take several passes.
        initial_room: how many new tokens the caches have room for at first. When more are emitted, the caches are copied into
            twice the room and the loop is compiled for it. So memory and attention follow use, not `max_new_tokens`.
        policy: "auto" takes the exits, lengths, costs and guard that `infer.calibrate` found for this target on this device
            and temperature, instead of the fields above, which must then be left at their defaults.
        policy_file: where calibration wrote the policies; None is the draft's own sorted_draft.json.
    """

    exits: tuple[int, ...] | None = None
    exit_thresholds: tuple[float, ...] | None = None
    num_draft_tokens: int = 5
    draft_length_rule: Literal["fixed", "heuristic", "confidence", "expected_gain"] = "fixed"
    max_draft_tokens: int | None = None
    min_confidence: float = 0.4
    gain_rate: float = 1.0
    costs: RoundCosts | None = None
    guard: bool = False
    narrow_widths: tuple[int, ...] | None = None
    tree: TreeShape | None = None
    draft_sampling: Literal["sample", "argmax"] = "sample"
    verify_width: int | None = None
    catch_up_width: int = 4
    prefill_chunk: int = 512
    initial_room: int = 512
    policy: Literal["auto"] | None = None
    policy_file: str | None = None

    def __post_init__(self):
        plain_fields(self)
        require(
            self.draft_length_rule in LENGTH_RULES,
            f"draft_length_rule={self.draft_length_rule!r} is unknown; use one of {', '.join(LENGTH_RULES)}",
        )
        require(
            0 <= self.min_confidence <= 1,
            f"min_confidence={self.min_confidence} must lie in [0, 1]: it is a probability",
        )
        require(self.gain_rate >= 0, f"gain_rate={self.gain_rate} must be 0 or more")
        require(
            self.tree is None or self.draft_length_rule == "fixed",
            f"draft_length_rule={self.draft_length_rule!r} is for chains; with a tree leave it at fixed",
        )
        self._check_costs()
        self._check_policy()
        require(
            self.draft_sampling in ("sample", "argmax"),
            f"draft_sampling={self.draft_sampling!r} is unknown; use sample or argmax",
        )
        for name in _COUNTS:
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}={value} must be at least 1")
        for name in ("num_draft_tokens", "max_draft_tokens"):
            value = getattr(self, name)
            require(
                value is None or value <= MOST_DRAFTED,
                f"{name}={value} is more than a round can draft; give at most {MOST_DRAFTED}",
            )
        require(
            self.tree is not None or self.num_draft_tokens <= self.draft_width,
            f"num_draft_tokens={self.num_draft_tokens} exceeds max_draft_tokens={self.draft_width}; raise the cap",
        )
        if self.exits is not None:
            DraftConfig(self.exits, self.exit_thresholds or ())

    def _check_costs(self) -> None:
        needed = "guard" if self.guard else self.draft_length_rule
        require(
            self.costs is not None or needed not in ("guard", "expected_gain"),
            f"{needed} needs the costs of a round; give costs=RoundCosts(...), or policy='auto' after infer.calibrate",
        )
        known = None if self.costs is None else len(self.costs.verify)
        require(
            known is None or known == self.draft_width + 1,
            f"costs.verify has {known} values for at most {self.draft_width} drafted tokens; give {self.draft_width + 1}",
        )
        widths = self.narrow_widths or ()
        require(
            list(widths) == sorted(set(widths)) and all(1 <= w < self.full_width for w in widths),
            f"narrow_widths={widths} must ascend, within 1..{self.full_width - 1} (the full width is {self.full_width})",
        )

    def _check_policy(self) -> None:
        require(
            self.policy in (None, "auto"), f"policy={self.policy!r} is unknown; use auto or None"
        )
        require(
            self.policy_file is None or self.policy == "auto",
            f"policy_file={self.policy_file} is only read with policy='auto'; give both",
        )
        if self.policy == "auto":
            free = ("policy", "policy_file", "catch_up_width")
            fields = [field for field in dataclasses.fields(self) if field.name not in free]
            changed = [f.name for f in fields if getattr(self, f.name) != f.default]
            require(not changed, f"policy='auto' decides {', '.join(changed)} itself; leave it out")

    @property
    def draft_width(self) -> int:
        """G: the most tokens that one round may draft in a row; the depth of a tree."""
        if self.tree is not None:
            return self.tree.depth
        if self.max_draft_tokens is not None:
            return self.max_draft_tokens
        return _HEURISTIC_CAP if self.draft_length_rule == "heuristic" else self.num_draft_tokens

    @property
    def full_width(self) -> int:
        """The most positions that the target pass of a round computes."""
        return self.draft_width + 1 if self.tree is None else self.tree.nodes

    @property
    def verify_widths(self) -> tuple[int, ...]:
        """The widths that a target pass may have, ascending; the last is G + 1, or the nodes of a tree."""
        narrow = self.narrow_widths
        if narrow is None:
            narrow = (1,) if self.guard or self.draft_length_rule == "expected_gain" else ()
        return (*narrow, self.full_width)
