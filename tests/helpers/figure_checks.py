"""What is wrong with a figure, asked of its renderer: texts that are cut or overlap, legends that cover data."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text
from matplotlib.transforms import Bbox

_TOLERANCE = 1.0  # pixels; letters have some room around them


def faults(figure: Figure) -> list[str]:
    """A line for each text outside the figure, each pair of texts that overlap, and each legend over data."""
    canvas = FigureCanvasAgg(figure)
    with (
        warnings.catch_warnings()
    ):  # a layout that does not fit is an error, as all warnings in tests; a box is not
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        canvas.draw()
    boxes = [(text.get_text(), text.get_window_extent()) for text in _texts(figure)]
    found = [f"{name!r} is cut" for name, box in boxes if not _inside(box, figure.bbox)]
    for (name, box), (other, other_box) in itertools.combinations(boxes, 2):
        if _overlap(box, other_box):
            found.append(f"{name!r} and {other!r} overlap")
    data = [box for axes in figure.axes for box in _data(axes)]
    for legend in figure.findobj(Legend):
        box = legend.get_window_extent()
        if any(_overlap(box, other) for other in data):
            found.append("a legend covers data")
    return found


def points_in_texts(axes: Axes) -> list[str]:
    """Texts of the axes that cover the end of a line, or touch a marker."""
    points = axes.transData.transform(np.concatenate([line.get_xydata() for line in axes.lines]))
    covering = []
    for text in axes.texts:
        box = text.get_window_extent().padded(3)
        above, below = points > (box.x0, box.y0), points < (box.x1, box.y1)
        if (above & below).all(1).any():
            covering.append(text.get_text())
    return covering


def _texts(figure: Figure) -> list[Text]:
    """All texts that are drawn."""
    outside_view = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            slack = 1e-9 * (high - low)
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not axes.axison or not low - slack <= tick.get_loc() <= high + slack:
                    outside_view |= {tick.label1, tick.label2}
        if not axes.axison:
            outside_view |= {axes.xaxis.label, axes.yaxis.label}
    texts = figure.findobj(lambda artist: isinstance(artist, Text))
    return [
        text
        for text in dict.fromkeys(texts)
        if text.get_visible() and text.get_text().strip() and text not in outside_view
    ]


def _data(axes: Axes) -> list[Bbox]:
    artists = (*axes.patches, *axes.lines, *axes.collections)
    return [artist.get_window_extent() for artist in artists]


def _inside(box: Bbox, outer: Bbox) -> bool:
    return (
        box.x0 >= outer.x0 - _TOLERANCE
        and box.y0 >= outer.y0 - _TOLERANCE
        and box.x1 <= outer.x1 + _TOLERANCE
        and box.y1 <= outer.y1 + _TOLERANCE
    )


def _overlap(one: Bbox, other: Bbox) -> bool:
    shared = Bbox.intersection(one, other)
    return shared is not None and shared.width > _TOLERANCE and shared.height > _TOLERANCE
