"""Figures as files, and what they share: colours of exits and lines, legends that cover no data, names that fit."""

from __future__ import annotations

import functools
import math
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager, get_font
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from s2d_jax.files import written_whole

Style = dict[str, Any]  # what `plot` and `Line2D` take
# The colour-blind can tell them apart, and neighbours differ in grey too: Paul Tol's high-contrast set, then others.
COLOURS = ("#004488", "#ddaa33", "#bb5566", "#66ccee", "#117733", "#999999")
# For what is compared with: the baseline, the target's own token.
MARKED = "#d55e00"
# Without the star, which marks what is not an exit: S2D, the target's own token.
_MARKERS = "os^DvPX<>phd"
_DASHES = ("-", "--", ":", "-.")
_LINE_INCHES, _LETTER_INCHES = 0.17, 0.066  # sizes of a legend's text
# Some of these are on most machines with a desktop; the first two come with matplotlib.
_FONTS = (
    *("DejaVu Sans Mono", "DejaVu Sans", "Noto Sans Mono CJK SC", "Noto Sans CJK SC"),
    *("Noto Sans CJK JP", "Noto Sans SC", "WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC"),
    *("Hiragino Sans", "Apple SD Gothic Neo", "Noto Emoji", "Segoe UI Symbol", "Apple Symbols"),
)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG, whole or not at all. Dollar signs in names are drawn as they are, they begin no formulas."""
    FigureCanvasAgg(figure)
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    plain = matplotlib.rc_context({"text.parse_math": False})  # for labels that are made now
    with written_whole(path) as partial, warnings.catch_warnings(), plain:
        # Labels may hold any character, but fonts do not have all; a box is drawn instead.
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from font", category=UserWarning
        )
        figure.savefig(partial, format="png", dpi=150)


def exit_styles(exits: Iterable[int]) -> dict[int, Style]:
    """Colour and marker of each exit, the same in every figure about these exits: dark is shallow, light is deep.

    Args:
        exits: all exits of the draft, ascending, also those that are not in the figure.
    """
    layers = list(dict.fromkeys(exits))
    shades = matplotlib.colormaps["viridis"]
    last = max(len(layers) - 1, 1)
    return {
        layer: {"color": shades(0.82 * i / last), "marker": _MARKERS[i % len(_MARKERS)]}
        for i, layer in enumerate(layers)
    }


def line_styles(names: Iterable[str]) -> dict[str, Style]:
    """Colour, marker and dashes of each line; of 12 lines, no two share two of these."""
    return {
        name: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "linestyle": _DASHES[(i // len(COLOURS) + i) % len(_DASHES)],
        }
        for i, name in enumerate(names)
    }


def legend_below(figure: Figure, handles: Sequence[Artist]) -> None:
    """A legend below the axes; the figure grows in height for it."""
    labels = [
        wrapped(handle.get_label(), figure.get_figwidth() / _LETTER_INCHES - 8)
        for handle in handles
    ]
    lines = [label.splitlines() for label in labels]
    widest = max(len(line) for label in lines for line in label)
    columns = max(int(figure.get_figwidth() / (_LETTER_INCHES * widest + 0.6)), 1)
    rows = math.ceil(len(labels) / columns)
    columns = math.ceil(len(labels) / rows)
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )
    height = rows * max(map(len, lines)) * _LINE_INCHES
    figure.set_figheight(figure.get_figheight() + height + 0.1)


def wrapped(name: Any, width: float) -> str:
    """The name in lines of `width` characters; long words, as in model names, are broken at hyphens, or else anywhere."""
    return textwrap.fill(str(name), max(int(width), 8))


def ratio_scale(values: Iterable[float]) -> str:
    """ "log" where the largest value would hide the smallest on a linear axis."""
    known = [value for value in values if value > 0]
    return "log" if known and max(known) > 10 * min(known) else "linear"


def log_ticks(axis: Axis) -> None:
    """Plain numbers, such as 0.5, 1 and 2, on an axis that is logarithmic. Call it after everything is drawn."""
    if axis.get_scale() == "log":
        low, high = sorted(axis.get_view_interval())
        digits = (1, 2, 5) if high < 1000 * low else (1,)
        steps = [digit * 10.0**power for power in range(-9, 10) for digit in digits]
        shown = [step for step in steps if low <= step <= high]
        axis.set_major_locator(FixedLocator(shown) if len(shown) > 1 else MaxNLocator(4))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")


def fonts() -> list[str]:
    """A monospaced font, and this machine's fonts for the characters that it lacks."""
    installed = {font.name for font in fontManager.ttflist}
    return [name for name in _FONTS if name in installed]


def drawable(text: str) -> str:
    """The text with escapes for the characters that none of `fonts` has."""
    return "".join(
        c if ord(c) in _known() else c.encode("ascii", "backslashreplace").decode() for c in text
    )


@functools.cache
def _known() -> frozenset[int]:
    return frozenset().union(*(get_font(findfont(name)).get_charmap() for name in fonts()))
