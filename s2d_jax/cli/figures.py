"""Figures as files."""

from __future__ import annotations

import warnings
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from s2d_jax.files import written_whole


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    FigureCanvasAgg(figure)
    with written_whole(path) as partial, warnings.catch_warnings():
        # Tokens and labels may hold any character, fonts do not; a box is drawn instead.
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from font", category=UserWarning
        )
        figure.savefig(partial, format="png", dpi=150)
