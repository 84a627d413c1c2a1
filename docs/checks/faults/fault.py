"""The faults that `planted_faults.py` plants: wrong rules that run, each with the tests that must notice.

`old` stands exactly once in `file`. `tests` is a file of `tests/`, with `-k` where a few of its tests say it sooner, and
`--all` where `make test-all` alone runs them. What tests plant themselves (a rule, a gradient,
a damaged file, a disk that refuses) has its counterpart here.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Fault:
    """One change of the source.

    Attributes:
        name: for the command line.
        what: what is then done wrong.
        file: from the root of the project.
        old, new: what is replaced, by what.
        tests: which must fail.
    """

    name: str
    what: str
    file: str
    old: str
    new: str
    tests: str
