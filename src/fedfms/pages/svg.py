"""Drawings with matplotlib as inline SVG that takes its colours and font from the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

COLOURS = 8  # --c0 … --c7 in the page's style sheet
MARKERS = ("o", "s", "^", "D", "v")

# matplotlib wants colours; these stand for the page's variables and are replaced in the SVG.
INK, MUTED, GRID, PAPER = "#010203", "#010204", "#010205", "#010206"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", PAPER: "--paper"}
_VARIABLES |= {f"#0101{i:02x}": f"--c{i}" for i in range(COLOURS)}

DASHED = (0, (4, 2.5))
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.linewidth": 1.0,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
}

# The same markers as small paths for the legend, centred on 0, 0.
MARKER_PATHS = {
    "o": "M-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0 -6.4 0z",
    "s": "M-3-3h6v6h-6z",
    "^": "M0-3.6 3.6 3H-3.6z",
    "D": "M0-3.9 3.9 0 0 3.9-3.9 0z",
    "v": "M0 3.6 3.6-3H-3.6z",
}


def stand_in(variable: str) -> str:
    """The colour to give matplotlib for one of the page's variables, such as --c0."""
    return next(colour for colour, name in _VARIABLES.items() if name == variable)


def dice_range(values: Sequence[float | None]) -> tuple[float, float]:
    """Axis limits in tenths around the values, within [0, 1]."""
    present = [value for value in values if value is not None]
    low, high = min(present) * 10, max(present) * 10
    return max(0.0, math.floor(low - 0.3) / 10), min(1.0, math.ceil(high + 0.3) / 10)


def tenths(low: float, high: float) -> range:
    """Ticks of a Dice axis between two limits, in tenths."""
    first, last = round(low * 10), round(high * 10)
    return range(first, last + 1, 1 if last - first <= 5 else 2)


def plain_axes(axes: Any, grid: str) -> None:
    """A quiet frame: grid lines along one axis (x or y), no box, no tick marks."""
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=6)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def for_page(figure: Figure) -> str:
    """The <svg> element alone, sized by the page, with the page's font and colours."""
    text = io.StringIO()
    nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
    figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would rule the whole page
    svg = re.sub(r'<g id="[^"]*"/>', "", svg)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.replace("<svg ", '<svg aria-hidden="true" ', 1).strip()
