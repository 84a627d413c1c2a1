"""Drafted trees on the screen, as text, as data, and as pictures."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

if TYPE_CHECKING:
    from infer.generate.rounds import Node, Round

TICK, ARROW = "✓", "→"
# Longer tokens are cut: a line has to hold them beside the branches.
_LONGEST = 24
_COLOURS = ("tab:blue", "tab:orange", "tab:purple", "tab:brown", "tab:pink", "tab:cyan")


def quoted(text: str, longest: int = _LONGEST) -> str:
    """The token in quotes, so that spaces and line ends are seen."""
    return repr(text if len(text) <= longest else text[: longest - 1] + "…")


def round_tree(round: Round) -> Tree:
    """The round as branches of text: accepted nodes have a tick, the target's own token an arrow."""
    head = Text.assemble((round.title, "bold"), "\n", quoted(round.nodes[0].text))

    def add(branch: Tree, index: int) -> None:
        for child in round.children(index):
            add(branch.add(_label(round.nodes[child])), child)
        if index == round.last_accepted and round.own_text is not None:
            own = Text.assemble((f"{ARROW} {quoted(round.own_text)}", "bold cyan"), "  target")
            branch.add(own)

    tree = Tree(head)
    add(tree, 0)
    return tree


def _label(node: Node) -> Text:
    mark = f"{TICK} " if node.accepted else "  "
    style = "bold green" if node.accepted else "dim"
    figures = f"  {node.probability:.2f}  exit {node.exit}"
    return Text.assemble(
        (mark + quoted(node.text), style), (figures, "" if node.accepted else "dim")
    )


def rounds_text(rounds: Sequence[Round]) -> str:
    """What `round_tree` shows of all rounds, without colours."""
    file = io.StringIO()
    console = Console(file=file, width=100, color_system=None, highlight=False)
    for round in rounds:
        console.print(round_tree(round))
    return file.getvalue()


def rounds_json(rounds: Sequence[Round]) -> str:
    """All rounds for programs to read."""
    listed = [dataclasses.asdict(round) for round in rounds]
    return json.dumps(listed, indent=1, ensure_ascii=False) + "\n"


def exits_of(rounds: Sequence[Round]) -> list[int]:
    """Where nodes of these rounds left, ascending."""
    return sorted({node.exit for round in rounds for node in round.nodes if node.exit is not None})


def round_figure(round: Round, exits: Sequence[int]) -> Figure:
    """The round as a picture: levels from left to right, colours by exit, the accepted path thick.

    Args:
        exits: of all rounds that are shown, so that a colour means the same in each.
    """
    nodes, height_of = round.nodes, _heights(round)
    depths = [node.depth for node in nodes]
    own_depth = depths[round.last_accepted] + (round.own_text is not None)
    deepest = max(*depths, own_depth)
    rows = max(height_of.values()) + 1
    figure = Figure(figsize=(2.2 + 1.7 * deepest, 1.2 + 0.19 * rows), layout="constrained")
    axes = figure.subplots()
    for index, node in enumerate(nodes[1:], start=1):
        ends = (nodes[node.parent].depth, node.depth), (height_of[node.parent], height_of[index])
        _edge(axes, ends, accepted=node.accepted)
    colours = {exit: _COLOURS[i % len(_COLOURS)] for i, exit in enumerate(exits)}
    for index, node in enumerate(nodes):
        colour = "black" if node.exit is None else colours[node.exit]
        figures = "" if node.probability is None else f" {node.probability:.2f}"
        _point(
            axes,
            node.depth,
            height_of[index],
            colour,
            quoted(node.text, 12) + figures,
            node.accepted,
        )
    if round.own_text is not None:
        height = height_of[len(nodes)]
        ends = (own_depth - 1, own_depth), (height_of[round.last_accepted], height)
        _edge(axes, ends, accepted=True)
        _point(axes, own_depth, height, "tab:red", quoted(round.own_text, 12), True, marker="s")
    axes.legend(handles=_legend(colours), fontsize=7, loc="upper left")
    axes.set_title(round.title, fontsize=9)
    axes.set_xlim(-0.2, deepest + 0.7)
    axes.invert_yaxis()
    axes.set_axis_off()
    return figure


def _heights(round: Round) -> dict[int, float]:
    """A row for every leaf, inner nodes in the middle of their children; the target's own token is number `len(nodes)`."""
    heights: dict[int, float] = {}
    own, row = len(round.nodes), 0

    def place(index: int) -> None:
        nonlocal row
        below = [] if index == own else round.children(index)
        if index == round.last_accepted and round.own_text is not None:
            below.append(own)
        for child in below:
            place(child)
        if below:
            heights[index] = (heights[below[0]] + heights[below[-1]]) / 2
        else:
            heights[index], row = float(row), row + 1

    place(0)
    return heights


def _edge(axes, ends, *, accepted: bool) -> None:
    colour, width = ("tab:green", 3.0) if accepted else ("lightgrey", 0.8)
    axes.plot(*ends, color=colour, linewidth=width, zorder=2 if accepted else 1)


def _point(axes, x, y, colour, text: str, accepted: bool, *, marker: str = "o") -> None:
    axes.plot([x], [y], marker=marker, markersize=6 if accepted else 4, color=colour, zorder=3)
    axes.annotate(
        text,
        (x, y),
        xytext=(5, 0),
        textcoords="offset points",
        fontsize=7,
        weight="bold" if accepted else "normal",
        va="center",
        parse_math=False,
        zorder=4,
        bbox={
            "boxstyle": "square,pad=0.1",
            "facecolor": "white",
            "edgecolor": "none",
            "alpha": 0.7,
        },
    )


def _legend(colours: dict[int, str]) -> list[Line2D]:
    points = {f"exit {exit}": (colour, "o") for exit, colour in colours.items()}
    points["the target's own token"] = ("tab:red", "s")
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=label)
        for label, (colour, marker) in points.items()
    ]
    return [*handles, Line2D([], [], color="tab:green", linewidth=3, label="accepted")]
