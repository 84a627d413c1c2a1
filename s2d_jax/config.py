"""Frozen configurations that refuse bad values at construction, with the value and the remedy."""

from __future__ import annotations

import dataclasses
from typing import Literal

from s2d_jax.errors import UserError as UserError
from s2d_jax.errors import require
from s2d_jax.round_costs import RoundCosts
from s2d_jax.tree_shape import TreeShape

FAMILIES = ("llama", "qwen2")
LENGTH_RULES = ("fixed", "heuristic", "confidence", "expected_gain")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3's frequency scaling of RoPE (`rope_type: llama3` in a Hugging Face config).

    Wavelengths above `original_max_position / low_freq_factor` are stretched by `factor`,
    those shorter than `original_max_position / high_freq_factor` are kept, those between are blended.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder-only transformer of the Llama or Qwen2 family.

    Raises:
        UserError: if a value is impossible, naming it and the remedy.
    """

    family: str
    vocab_size: int
    embed_dim: int
    ffw_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    max_context: int
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    tie_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        require(
            self.family in FAMILIES,
            f"family={self.family!r} is not supported; use one of {', '.join(FAMILIES)}",
        )
        for name in (
            *("vocab_size", "embed_dim", "ffw_dim", "num_layers", "num_heads"),
            *("num_kv_heads", "head_dim", "max_context"),
        ):
            value = getattr(self, name)
            require(value >= 1, f"{name}={value} must be at least 1; check the model's config.json")
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
            "check the model's config.json",
        )
        require(
            self.head_dim % 2 == 0,
            f"head_dim={self.head_dim} must be even for RoPE; check the model's config.json",
        )


@dataclasses.dataclass(frozen=True)
class ExitParts:
    """What single exits have of their own beside the shared norm and head; exits are named by their layer counts.

    Attributes:
        heads: exits that are read through a head of their own.
        adapters: exits whose state passes a residual low-rank adapter before the shared norm.
        adapter_rank: of every adapter; 0 where there are none.
    """

    heads: tuple[int, ...] = ()
    adapters: tuple[int, ...] = ()
    adapter_rank: int = 0

    def __post_init__(self):
        for name, exits in (("heads", self.heads), ("adapters", self.adapters)):
            require(
                list(exits) == sorted(set(exits)) and min(exits, default=1) >= 1,
                f"{name}={exits} of the exit parts must be ascending positive layer counts; for example 6, 9",
            )
        fits = self.adapter_rank >= 1 if self.adapters else self.adapter_rank == 0
        rank = f"adapter_rank={self.adapter_rank} with adapters={self.adapters}"
        require(fits, f"{rank}; give at least 1 with adapters, else 0")

    @property
    def exits(self) -> tuple[int, ...]:
        """All exits with a part, ascending."""
        return tuple(sorted({*self.heads, *self.adapters}))


NO_PARTS = ExitParts()


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """Where a sorted draft can be left, its default thresholds, and what single exits have of their own.

    Attributes:
        exit_layers: layer counts after which the shared norm and head may read the state, ascending.
        exit_thresholds: confidence above which a token leaves, one per exit; the last always accepts, so its threshold is 0.
        parts: own heads and adapters of some of these exits.

    Raises:
        UserError: for unsorted exits, a wrong number of thresholds, values outside [0, 1], or parts of other exits.
    """

    exit_layers: tuple[int, ...]
    exit_thresholds: tuple[float, ...] = ()
    parts: ExitParts = NO_PARTS

    def __post_init__(self):
        exits = self.exit_layers
        require(
            len(exits) > 0 and min(exits) >= 1 and list(exits) == sorted(set(exits)),
            f"exit_layers={exits} must be ascending positive layer counts; for example 6, 9, 12",
        )
        if not self.exit_thresholds:
            defaults = (0.5,) * (len(exits) - 1) + (0.0,)
            object.__setattr__(self, "exit_thresholds", defaults)
        check_thresholds(exits, self.exit_thresholds)
        missing = sorted(set(self.parts.exits) - set(exits))
        require(not missing, f"exit parts at {missing}, but exit_layers={exits}; add those exits")

    def check_depth(self, num_layers: int) -> None:
        """Raises UserError if an exit lies deeper than the draft's `num_layers`."""
        require(
            self.exit_layers[-1] <= num_layers,
            f"exit_layers={self.exit_layers} exceeds num_layers={num_layers}; drop the deepest exit",
        )


def check_thresholds(exits: tuple[int, ...], thresholds: tuple[float, ...]) -> None:
    """Raises UserError unless there is one threshold in [0, 1] per exit and the last one is 0."""
    require(
        len(thresholds) == len(exits),
        f"exit_thresholds={thresholds} has {len(thresholds)} values for {len(exits)} exits {exits}; give one per exit",
    )
    require(
        all(0.0 <= t <= 1.0 for t in thresholds),
        f"exit_thresholds={thresholds} must lie in [0, 1]: they are probabilities",
    )
    require(
        thresholds[-1] == 0.0,
        f"exit_thresholds={thresholds}: the last exit always accepts; set its threshold to 0",
    )


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. `temperature=0` is greedy.

    Filters act in this order, as in Hugging Face generation: temperature, top-k, top-p, min-p.

    Attributes:
        temperature: >= 0; 0 takes the argmax.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set whose probability reaches it; 1 keeps all.
        min_p: drop tokens below `min_p` times the largest probability; 0 keeps all.
        max_new_tokens: at most this many tokens are emitted.
        seed: the request's own random seed.
        stop_token_ids: further ids that end the request, beside the model's own.
        ignore_eos: go on after the model's own end-of-sequence tokens (for measurements).
        stop: strings that end the request. The text ends before the first of them, the token ids with the one completing it.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 128
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        require(
            isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop),
            f"stop={self.stop!r} must be a tuple of texts that are not empty, such as ('\\n\\n',)",
        )
        require(
            self.temperature >= 0, f"temperature={self.temperature} must be 0 or more; 0 is greedy"
        )
        require(self.top_k >= 0, f"top_k={self.top_k} must be 0 (off) or more")
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must be in (0, 1]; 1 is off")
        require(0 <= self.min_p < 1, f"min_p={self.min_p} must be in [0, 1); 0 is off")
        require(
            self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens} must be at least 1"
        )
        require(0 <= self.seed < 2**31, f"seed={self.seed} must be in [0, 2**31)")


_HEURISTIC_CAP = 10


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
            "expected_gain": on while another token pays at the measured costs (`s2d_jax.draft_length`).
        max_draft_tokens: the most tokens that a round may draft; the verified width is one more. Compiled in: with it set,
            other lengths and rules below it compile nothing anew. None is 10 for the heuristic, else `num_draft_tokens`.
        min_confidence: where the "confidence" rule stops. Not compiled in.
        gain_rate: tokens that a plain round's time must bring, for "expected_gain". 1 is plain decoding's own rate; the rate
            that the whole policy reaches is the right value. Not compiled in.
        costs: needed by "expected_gain" and `guard`.
        guard: watch what speculation saves in each row, and fall back to plain rounds where it does not (`s2d_jax.guard`).
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
        initial_room: how many new tokens the caches have room for at first. When more are emitted, they are copied into twice
            the room, which compiles a loop for it; so memory and attention cost what is used, not what `max_new_tokens` allows.
        policy: "auto" takes the exits, lengths, costs and guard that `infer.calibrate` found for this target on this device
            and temperature, instead of those above; they must then be left at their defaults.
        policy_file: where calibration wrote them; None is the draft's own sorted_draft.json.
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
        for name in (
            *("num_draft_tokens", "max_draft_tokens", "catch_up_width"),
            *("prefill_chunk", "initial_room", "verify_width"),
        ):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}={value} must be at least 1")
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
        """Positions that the target pass of a round has at most."""
        return self.draft_width + 1 if self.tree is None else self.tree.nodes

    @property
    def verify_widths(self) -> tuple[int, ...]:
        """The widths that a target pass may have, ascending; the last is G + 1, or the nodes of a tree."""
        narrow = self.narrow_widths
        if narrow is None:
            narrow = (1,) if self.guard or self.draft_length_rule == "expected_gain" else ()
        return (*narrow, self.full_width)
