"""What the chips of a mesh send each other in a compiled program."""

from __future__ import annotations

import dataclasses
import re

from s2d_jax.compilers.hlo import shapes_in

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(
    rf"^\s*(?:ROOT )?%\S+ = (?P<result>.*?) (?P<kind>{'|'.join(KINDS)})(?:-start)?\(", re.MULTILINE
)


@dataclasses.dataclass(frozen=True)
class Collectives:
    """Instructions of one kind in a compiled program; those inside a loop count once.

    Attributes:
        count: how many.
        bytes: bytes of their results on one chip, added up.
    """

    count: int
    bytes: int


def count_collectives(hlo: str) -> dict[str, Collectives]:
    """The collectives in the text of a compiled program, by kind.

    >>> count_collectives("%x = f32[8,4]{1,0} all-gather(f32[4,4] %y), dimensions={0}")
    {'all-gather': Collectives(count=1, bytes=128)}
    """
    found: dict[str, Collectives] = {}
    for match in _COLLECTIVE.finditer(hlo):
        sizes = [shape.num_bytes for shape in shapes_in(match["result"])]
        # A -start instruction also returns its operands; its result is the last and largest.
        size = max(sizes, default=0) if "-start(" in match[0] else sum(sizes)
        before = found.get(match["kind"], Collectives(0, 0))
        found[match["kind"]] = Collectives(before.count + 1, before.bytes + size)
    return dict(sorted(found.items()))
