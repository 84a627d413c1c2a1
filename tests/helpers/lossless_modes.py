"""The ways of drafting that test_lossless.py judges: those of every run, those that `make test-all` adds, and all of them."""

from __future__ import annotations

import dataclasses
import itertools

from s2d_jax.config.costs import RoundCosts
from s2d_jax.config.decode import DecodeConfig
from s2d_jax.config.draft import ExitParts
from s2d_jax.config.sampling import SamplingParams
from s2d_jax.config.tree import TreeShape

VOCAB, EMITTED, WIDTH = 8, 3, 2
PROMPT = (3, 1, 4, 1, 5)
LISTED = (0, 2, 3, 6, 7)  # of a trimmed head
PARTS = ExitParts(heads=(1, 3), adapters=(1, 2), adapter_rank=4)  # of exits 1, 2, 3

# Two levels, so that the third emitted token is a bonus token where both are accepted.
NARROW = TreeShape(depth=2, top_k=2, nodes=5)
BY_LEVEL = TreeShape(depth=2, top_k=3, nodes=7)
BY_NODE = dataclasses.replace(BY_LEVEL, leaving="node")
STATIC = TreeShape.static(((0, 0), (0, 1), (1, 0), (2,)))
STATIC_BY_NODE = dataclasses.replace(STATIC, leaving="node")
GAPPED = TreeShape.static(((1,), (2, 0), (2, 2)))  # without the most probable child
TREES = {
    NARROW: "narrow",
    BY_LEVEL: "tree",
    BY_NODE: "tree by node",
    STATIC: "static",
    STATIC_BY_NODE: "static by node",
    GAPPED: "gapped static",
}

PLAIN = SamplingParams(temperature=1.0)
FILTERED = SamplingParams(temperature=0.8, top_k=6, top_p=0.9, min_p=0.03)


@dataclasses.dataclass(frozen=True)
class Mode:
    policy: str  # none, independent, fixed, thresholds
    sampled: bool = True
    rule: str = "fixed"
    guarded: bool = False
    sampling: SamplingParams = PLAIN
    target_format: str = "f32"
    draft_format: str = "f32"
    trimmed: bool = False
    parts: bool = False
    tree: TreeShape | None = None

    def __str__(self):
        how = TREES[self.tree] if self.tree else self.rule
        parts = [self.policy, "sampled" if self.sampled else "argmax", how]
        parts += ["trimmed"] * self.trimmed + ["guarded"] * self.guarded + ["parts"] * self.parts
        parts += ["filtered"] * (self.sampling is FILTERED)
        formats = (self.target_format, self.draft_format)
        return "-".join([*parts, *(formats if formats != ("f32", "f32") else ())])

    @property
    def program(self) -> Mode:
        """The mode that stands for all that share its compiled program: rules and filters are arrays."""
        rule = "expected_gain" if self.watched else "fixed"
        return dataclasses.replace(self, rule=rule, sampling=PLAIN)

    @property
    def watched(self) -> bool:
        return self.rule in ("confidence", "expected_gain")

    @property
    def num_exits(self) -> int:
        return 3 if self.policy == "thresholds" else 1

    def config(self) -> DecodeConfig:
        """At these costs rounds of no, one and two tokens all occur."""
        needs_costs = self.guarded or self.rule == "expected_gain"
        costs = RoundCosts((0.25, 0.3, 0.35)[: self.num_exits], (1.0, 1.5, 1.8), 0.02)
        if self.tree is not None:
            return DecodeConfig(
                exits={"independent": (3,), "fixed": (1,), "thresholds": None}[self.policy],
                tree=self.tree,
                draft_sampling="sample" if self.sampled else "argmax",
                costs=costs if needs_costs else None,
                guard=self.guarded,
                catch_up_width=2,
            )
        return DecodeConfig(
            # A first draft of one token makes the third emitted token a bonus token.
            num_draft_tokens=1 if self.rule == "heuristic" else WIDTH,
            max_draft_tokens=WIDTH,
            draft_length_rule=self.rule,
            min_confidence=0.45,
            costs=costs if needs_costs else None,
            guard=self.guarded,
            narrow_widths=(1, 2) if needs_costs or self.rule == "confidence" else (),
        )


# Every drafter, way of drafting, filter, list of tokens and part, a rule that watches confidences and one that does not, chains
# and all kinds of trees, in as few compiled programs as that takes: modes that differ in their rule or filter only share one.
# Formats are in tests/model/test_weight_formats.py: the tokens of int8 and bf16 targets and drafts.
MODES = [
    Mode("none", sampling=FILTERED),
    Mode("fixed", False, sampling=FILTERED, trimmed=True),
    Mode("thresholds"),
    Mode("thresholds", rule="heuristic"),
    Mode("thresholds", rule="expected_gain", guarded=True, parts=True),
    Mode("thresholds", tree=BY_LEVEL),
    Mode("thresholds", tree=BY_NODE, sampling=FILTERED, trimmed=True, guarded=True, parts=True),
    Mode("independent", tree=GAPPED),
]

# What each of these adds to those above is a pair of features that occur there apart.
_MORE = [
    Mode("none"),
    Mode("thresholds", rule="heuristic", sampling=FILTERED),
    Mode("thresholds", False, "heuristic"),
    Mode("independent", False, "expected_gain", sampling=FILTERED),
    Mode("thresholds", rule="confidence", guarded=True, sampling=FILTERED, parts=True),
    Mode("independent", False, target_format="int8", draft_format="int8", guarded=True),
    Mode("fixed", False, tree=NARROW, sampling=FILTERED),
    Mode("independent", False, tree=BY_LEVEL, guarded=True),
    *(
        Mode(policy, sampled)
        for policy in ("independent", "fixed", "thresholds")
        for sampled in (True, False)
    ),
    *(Mode("thresholds", sampled, sampling=FILTERED) for sampled in (True, False)),
    *(Mode("thresholds", sampled, "heuristic") for sampled in (True, False)),
    Mode("fixed", rule="heuristic", sampling=FILTERED),
    *(Mode("independent", sampled, "confidence") for sampled in (True, False)),
    Mode("thresholds", rule="confidence", sampling=FILTERED),
    *(Mode("thresholds", sampled, "expected_gain", parts=sampled) for sampled in (True, False)),
    Mode("independent", rule="expected_gain"),
    Mode("independent", guarded=True),
    Mode("thresholds", rule="expected_gain", guarded=True),
    Mode("thresholds", sampled=False, rule="confidence", guarded=True, sampling=FILTERED),
    Mode("thresholds", target_format="int8", draft_format="bf16"),
    Mode("thresholds", target_format="int8", draft_format="bf16", trimmed=True),
    Mode("independent", False, target_format="int8", draft_format="int8"),
    Mode("thresholds", sampling=FILTERED, draft_format="int8"),
    *(
        Mode(policy, sampled, trimmed=True)
        for policy in ("independent", "thresholds")
        for sampled in (True, False)
    ),
    Mode("thresholds", sampling=FILTERED, trimmed=True, parts=True),
    Mode("independent", tree=NARROW),
    Mode("independent", False, tree=STATIC, sampling=FILTERED),
    Mode("fixed", tree=BY_LEVEL, sampling=FILTERED),
    Mode("fixed", False, tree=NARROW),
    Mode("thresholds", tree=BY_NODE, sampling=FILTERED, trimmed=True),
    Mode("thresholds", False, tree=BY_LEVEL, trimmed=True),
    Mode("thresholds", False, tree=STATIC_BY_NODE, target_format="int8", draft_format="int8"),
    Mode("thresholds", tree=BY_NODE, guarded=True, parts=True),
    Mode("independent", tree=STATIC),
    Mode("independent", tree=GAPPED),
    Mode("independent", False, tree=BY_LEVEL, guarded=True),
]
MORE_MODES = [mode for mode in _MORE if mode not in MODES]


def all_modes() -> list[Mode]:
    """Every combination of drafter, way of drafting, rule, guard, head, filters and formats that NumPy can judge.

    A bf16 target computes in bf16, so its distribution is not that of the enumeration: `test_weight_formats.py` has its tokens.
    """
    speculative = itertools.product(
        ("independent", "fixed", "thresholds"),
        *((True, False), ("fixed", "heuristic", "confidence", "expected_gain"), (False, True)),
        *((PLAIN, FILTERED), ("f32", "int8"), ("f32", "bf16", "int8"), (False, True)),
        (False, True),
    )
    trees = itertools.product(
        *(("independent", "fixed", "thresholds"), (True, False), ("fixed",), (False, True)),
        *((PLAIN, FILTERED), ("f32", "int8"), ("f32", "int8"), (False, True), (False, True)),
        (BY_LEVEL, BY_NODE, STATIC, STATIC_BY_NODE, GAPPED),
    )
    plain = itertools.product((PLAIN, FILTERED), ("f32", "int8"))
    return [
        *(Mode("none", sampling=sampling, target_format=kept) for sampling, kept in plain),
        *(Mode(*choice) for choice in speculative),
        *(Mode(*choice) for choice in trees),
    ]
