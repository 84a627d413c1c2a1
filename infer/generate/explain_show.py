"""Drafted trees on the screen, as text, as data, and as pictures."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from s2d_jax.cli.figures import MARKED, Style, drawable, exit_styles, fonts, legend_below

if TYPE_CHECKING:
    from infer.generate.rounds import Node, Round

TICK, ARROW = "✓", "→"
# Longer tokens are cut, so that they fit on a line beside the branches.
_LONGEST = 24
_LONGEST_DRAWN, _FONT_POINTS, _EDGE_INCHES = 16, 7, 0.5
_ROOT: Style = {"color": "black", "marker": "o"}
_OWN: Style = {"color": MARKED, "marker": "*"}


def quoted(text: str, longest: int = _LONGEST, spelled: Callable[[str], str] = repr) -> str:
    """The token in quotes, so that spaces and line ends are visible.

    Args:
        longest: columns of the screen between the quotes; escapes count as they are spelled, wide characters twice.
        spelled: adds the quotes and the escapes.
    """
    shown = spelled(text)
    while cell_len(shown) > longest + 2:
        text = text[:-1]
        shown = spelled(text + "…")
    return shown


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


def round_figure(round: Round, exits: Sequence[int]) -> Figure:
    """The round as a picture: levels from left to right, colours and markers by exit, the accepted path thick.

    A column is as wide as its longest text, so that no text reaches the next column; lines begin behind the text.

    Args:
        exits: the draft's, so that colours are the same in every picture.
    """
    nodes, height_of = round.nodes, _heights(round)
    own = len(nodes)
    depths = [node.depth for node in nodes]
    texts = [_caption(node) for node in nodes]
    if round.own_text is not None:
        depths.append(depths[round.last_accepted] + 1)
        texts.append(_spelled(round.own_text))
    places, width = _columns(depths, texts)
    width = max(width, 4.8)
    rows = max(height_of.values()) + 1
    figure = Figure(figsize=(width, 0.5 + 0.19 * rows), layout="constrained")
    axes, styles = figure.subplots(), exit_styles(exits)
    for index, depth in enumerate(depths):
        node = nodes[index] if index < own else None
        parent = round.last_accepted if node is None else node.parent
        accepted = node is None or node.accepted
        point = places[depth], height_of[index]
        if index:
            start = places[depth - 1] + _text_inches(texts[parent])
            _edge(axes, (start, point[0]), (height_of[parent], point[1]), accepted=accepted)
        style = _OWN if node is None else _ROOT if node.exit is None else styles[node.exit]
        axes.plot(*point, **style, markersize=6 if accepted else 4, zorder=3)
        _text(axes, point, texts[index], bold=accepted)
    axes.set_title(round.title, fontsize=9)
    axes.set_xlim(-0.1, width - 0.2)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_axis_off()
    legend_below(figure, _legend(styles))
    return figure


def _columns(depths: list[int], texts: list[str]) -> tuple[list[float], float]:
    """Where each level begins, and the width of all, in inches."""
    places = [0.0]
    for depth in range(max(depths) + 1):
        own = [text for at, text in zip(depths, texts, strict=True) if at == depth]
        places.append(places[-1] + max(map(_text_inches, own)) + _EDGE_INCHES)
    return places, places[-1]


def _text_inches(text: str) -> float:
    """How far a text reaches to the right of its point. A wide character is at most as wide as two narrow ones."""
    return 0.15 + cell_len(text) * 0.61 * _FONT_POINTS / 72


def _caption(node: Node) -> str:
    figures = "" if node.probability is None else f" {node.probability:.2f}"
    return _spelled(node.text) + figures


def _spelled(text: str) -> str:
    return quoted(text, _LONGEST_DRAWN, spelled=lambda text: drawable(repr(text)))


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


def _edge(axes, x, y, *, accepted: bool) -> None:
    colour, width = ("black", 3.0) if accepted else ("darkgrey", 0.8)
    axes.plot(x, y, color=colour, linewidth=width, zorder=2 if accepted else 1)


def _text(axes, point: tuple[float, float], text: str, *, bold: bool) -> None:
    axes.annotate(
        text,
        point,
        xytext=(6, 0),
        textcoords="offset points",
        fontsize=_FONT_POINTS,
        family=fonts(),
        weight="bold" if bold else "normal",
        va="center_baseline",
        parse_math=False,
        zorder=4,
    )


def _legend(styles: dict[int, Style]) -> list[Line2D]:
    points = {f"exit {layer}": style for layer, style in styles.items()}
    points["the target's own token"] = _OWN
    handles = [
        Line2D([], [], **style, linestyle="", label=label) for label, style in points.items()
    ]
    return [*handles, Line2D([], [], color="black", linewidth=3, label="accepted")]
