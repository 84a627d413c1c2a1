"""Rounds as `--explain` shows them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Node:
    """A drafted token.

    Attributes:
        parent: index of the parent among the nodes of its round, smaller than the node's own; the root is its own parent.
        depth: 0 for the root, the last token of the text so far.
        token_id, text: the token's.
        probability: the draft's probability of it after its parent; None for the root.
        exit: the draft's layer that proposed it; None for the root.
        accepted: whether the round emitted it; True for the root.
    """

    parent: int
    depth: int
    token_id: int
    text: str
    probability: float | None
    exit: int | None
    accepted: bool


@dataclasses.dataclass(frozen=True)
class Round:
    """One round of decoding one prompt.

    Attributes:
        number: from 1.
        nodes: the root first, parents before children, siblings in the order in which they were tried.
        own_token_id, own_text: what the target itself emitted after the accepted nodes; None if the answer ended before.
    """

    number: int
    nodes: tuple[Node, ...]
    own_token_id: int | None
    own_text: str | None

    @property
    def last_accepted(self) -> int:
        """The deepest accepted node."""
        return max(i for i, node in enumerate(self.nodes) if node.accepted)

    def children(self, parent: int) -> list[int]:
        """The children of `parent`, in the order in which they were tried."""
        return [i for i, node in enumerate(self.nodes) if i > 0 and node.parent == parent]

    @property
    def title(self) -> str:
        """A line about the round."""
        drafted, accepted = len(self.nodes) - 1, sum(node.accepted for node in self.nodes) - 1
        emitted = accepted + (self.own_token_id is not None)
        return f"round {self.number}: {drafted} drafted, {accepted} accepted, {emitted} emitted"
