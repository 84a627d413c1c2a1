"""Flags that `infer.generate` and `infer.bench` share, as dataclasses for tyro."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from s2d_jax.config import DecodeConfig, RoundCosts, SamplingParams, UserError


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen."""

    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this."""
    min_p: float = 0.0
    """Drop tokens below this fraction of the largest probability."""
    seed: int = 0
    """Prompt number i is sampled with seed + i, whichever batch it is in."""
    max_new_tokens: int = 256
    """At most this many tokens per answer."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End an answer before this text; may be repeated."""

    def params(self, index: int = 0) -> SamplingParams:
        """The sampling parameters of prompt number `index`. Raises UserError for a bad value."""
        values = dataclasses.asdict(self)
        return SamplingParams(**{**values, "seed": self.seed + index})


@dataclasses.dataclass(frozen=True)
class DraftingOptions:
    """How tokens are drafted."""

    exits: str | None = None
    """The draft's exits to use, such as 6,9,12; one exit is the fixed-exit policy. Default: all."""
    exit_thresholds: str | None = None
    """Confidence above which a token leaves, one per exit, the last 0, such as .5,.5,0."""
    num_draft_tokens: int = 5
    """Tokens drafted per round (at the start, with the heuristic rule)."""
    draft_length_rule: Literal["fixed", "heuristic", "confidence", "expected_gain"] = "fixed"
    """heuristic: +2 after a round that accepted everything, else -1. confidence: a token of low
    confidence is the last of its round. expected_gain: on while another token pays (needs costs)."""
    max_draft_tokens: int | None = None
    """The most that a round may draft. Default: 10 for the heuristic, else num-draft-tokens."""
    min_confidence: float = 0.4
    """Where the confidence rule stops."""
    gain_rate: float = 1.0
    """Tokens that a plain round's time must bring, for expected_gain; 1 is plain decoding's rate."""
    draft_step_costs: str | None = None
    """Cost of drafting a token, per exit in use, in plain rounds, such as .2,.3,.4."""
    verify_costs: str | None = None
    """Cost of a round beside drafting, after 0, 1, 2, ... drafted tokens, such as 1,1.1,1.3."""
    guard: bool = False
    """Fall back to plain rounds where drafting does not pay (needs costs)."""
    narrow_widths: str | None = None
    """Further widths of a target pass for rounds with short chains, such as 1,3."""
    policy: Literal["auto"] | None = None
    """auto: as infer.calibrate found for this target, device and temperature."""
    policy_file: str | None = None
    """Where infer.calibrate --out wrote the policy; default: the draft's sorted_draft.json."""
    draft_sampling: Literal["sample", "argmax"] = "sample"
    """At temperatures above 0: draft a sample of the exit's distribution, or its mode."""

    def config(self, **changes) -> DecodeConfig:
        """The decode configuration; `changes` replaces fields. Raises UserError for a bad value."""
        values = dataclasses.asdict(self)
        values["exits"] = parse_numbers("exits", self.exits, int)
        values["exit_thresholds"] = parse_numbers("exit-thresholds", self.exit_thresholds, float)
        values["narrow_widths"] = parse_numbers("narrow-widths", self.narrow_widths, int)
        steps = parse_numbers("draft-step-costs", values.pop("draft_step_costs"), float)
        verify = parse_numbers("verify-costs", values.pop("verify_costs"), float)
        if (steps is None) != (verify is None):
            raise UserError("--draft-step-costs and --verify-costs go together; give both")
        values["costs"] = None if steps is None else RoundCosts(steps, verify)
        return DecodeConfig(**{**values, **changes})


@dataclasses.dataclass(frozen=True)
class ComputeOptions:
    """How the numbers of the weights are kept."""

    target_format: Literal["f32", "bf16", "int8"] = "f32"
    """Of the target's weights; int8 takes a quarter of the memory of f32, and changes the target a little."""
    draft_format: Literal["f32", "bf16", "int8"] = "f32"
    """Of the draft's weights; the output stays the target's whatever it is."""
    compile_cache: Path | None = None
    """Keep compiled programs here, so that the next start is quick. Default: $JAX_COMPILATION_CACHE_DIR, if set."""


@dataclasses.dataclass(frozen=True)
class DraftOptions:
    """How the draft is read."""

    draft_vocabulary: str | None = None
    """List of tokens that any draft's head is read over, from infer.trim; full: all tokens.
    Default: the list in the draft's sorted_draft.json, if there is one."""


def parse_numbers(flag: str, text: str | None, number: type) -> tuple | None:
    """Parses "6,9,12" into a tuple of `number`; None stays None. Raises UserError."""
    if text is None:
        return None
    try:
        return tuple(number(part) for part in text.split(","))
    except ValueError:
        example = "6,9,12" if number is int else "0.5,0.5,0"
        raise UserError(
            f"--{flag} {text!r} is not a list of numbers; write it like {example}"
        ) from None


def require_targets(targets: tuple[str, ...]) -> None:
    """Raises UserError unless at least one target was given."""
    if not targets:
        raise UserError("no --target was given; give a model directory or a .gguf file")
