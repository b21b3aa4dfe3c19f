"""The study's figures as inline SVG: differences with their intervals, and learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from fedfms.pages.svg import (
    COLOURS,
    INK,
    MARKERS,
    MUTED,
    SETTINGS,
    dice_range,
    for_page,
    plain_axes,
    stand_in,
)
from fedfms.report import words
from fedfms_lab.study.answer import Answer, Curve, Gap, Spread
from fedfms_lab.study.page.words import REGIMES, method

_BYTES_MOVED = "Moved by all sites together"
_LOGARITHMIC = 10  # largest over smallest number of bytes from which a log axis reads better


def forest(answer: Answer, gaps: Sequence[Gap], better: str, salt: str) -> str:
    """Differences of federated training with their 95 % intervals, one a row; "" without any.

    Args:
        better: what is better right of 0.
    """
    if not gaps:
        return ""
    with mpl.rc_context({**SETTINGS, "svg.hashsalt": salt}):
        figure = Figure(figsize=(5.4, 0.95 + 0.34 * len(gaps)), layout="constrained")
        axes = figure.add_subplot()
        for row, gap in enumerate(reversed(gaps)):
            colour = _method_colour(answer, gap.method)
            if gap.interval is not None:
                ends = [gap.interval.low, gap.interval.high]
                axes.plot(ends, [row, row], color=colour, linewidth=2.2, solid_capstyle="butt")
            axes.plot(
                gap.difference,
                row,
                marker=MARKERS[0] if gap.role == "train" else MARKERS[3],
                color=colour,
                markersize=6.5,
                clip_on=False,
            )
        axes.axvline(0, color=INK, linewidth=1.0, zorder=1)
        labels = [_label(gap) for gap in reversed(gaps)]
        axes.set_yticks(range(len(gaps)), labels)
        axes.set_ylim(-0.6, len(gaps) - 0.4)
        axes.margins(x=0.08)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, min_n_ticks=3, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(lambda value, _: _signed(value))
        axes.set_xlabel(f"Dice; right of 0: {better}")
        plain_axes(axes, "x")
        return for_page(figure)


def _label(gap: Gap) -> str:
    where = "trained" if gap.role == "train" else "unseen"
    if gap.against == "method":
        return f"{method(gap.method)} − {method(gap.other)}, {where}"
    told = {
        "local-best": "best other site",
        "local": "own site" if gap.role == "train" else "other sites",
        "central": where,
        "central-matched": f"{where}, matched",
        "strategy": f"{gap.strategy}, {where}",
    }
    return f"{method(gap.method)}, {told.get(gap.against, f'{gap.against}, {where}')}"


def _signed(value: float) -> str:
    text = f"{value:+.3f}".rstrip("0").rstrip(".")
    return "0" if text in ("+0", "-0") else text.replace("-", words.MINUS)


def _method_colour(answer: Answer, name: str) -> str:
    return stand_in(f"--c{answer.study.methods.index(name) % COLOURS}")


def dice_by_round(curves: Sequence[Curve], salt: str) -> str:
    """One method: Dice of the training sites by round of each way to train; "" without a value."""
    lines = []
    for place, (regime, label) in enumerate(REGIMES.items()):  # of one round there is no curve
        for curve in (curve for curve in curves if curve.regime == regime):
            x = [float(point.round) for point in curve.points]
            marker = MARKERS[place % len(MARKERS)]
            style = _Style(label, stand_in(f"--c{(place + 2) % COLOURS}"), marker)
            lines.append((style, x, [point.dice for point in curve.points]))
    return _draw(lines, "Rounds of training", salt)


def dice_by_bytes(answer: Answer, salt: str) -> str:
    """Federated runs of each method: the same by the bytes moved; "" where nothing moved."""
    lines = []
    for curve in (curve for curve in answer.curves if curve.regime == "federated"):
        points = [(point.bytes_moved, point.dice) for point in curve.points if point.bytes_moved]
        if points:
            marker = MARKERS[answer.study.methods.index(curve.method) % len(MARKERS)]
            colour = _method_colour(answer, curve.method)
            x, dice = zip(*points, strict=True)
            lines.append((_Style(method(curve.method), colour, marker), x, dice))
    return _draw(lines, _BYTES_MOVED, salt)


class _Style(NamedTuple):
    label: str
    colour: str
    marker: str


def _draw(
    lines: Sequence[tuple[_Style, Sequence[float], Sequence[Spread]]], x_label: str, salt: str
) -> str:
    """Lines with a band from the lowest to the highest Dice, each with its x."""
    if not lines:
        return ""
    with mpl.rc_context({**SETTINGS, "svg.hashsalt": salt}):
        figure = Figure(figsize=(5.4, 3.5), layout="constrained")
        axes = figure.add_subplot()
        for (label, colour, marker), x, dice in lines:
            axes.fill_between(
                x,
                [spread.low for spread in dice],
                [spread.high for spread in dice],
                color=colour,
                alpha=0.16,
                linewidth=0,
            )
            axes.plot(
                x,
                [spread.mean for spread in dice],
                color=colour,
                label=label,
                linewidth=1.8,
                marker=marker,
                markersize=5,
                clip_on=False,
            )
        ends = [end for _, _, dice in lines for spread in dice for end in (spread.low, spread.high)]
        axes.set_ylim(*dice_range(ends))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        if x_label == _BYTES_MOVED:
            _bytes_axis(axes, [value for _, x, _ in lines for value in x])
        else:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        axes.set_xlabel(x_label)
        axes.set_ylabel("Dice")
        plain_axes(axes, "y")
        axes.legend(loc="lower right", frameon=False, labelcolor=MUTED)
        return for_page(figure)


def _bytes_axis(axes: Any, values: Sequence[float]) -> None:
    """Bytes as the tables write them, on a logarithmic axis where they differ much."""
    low, high = min(values), max(values)
    if low > 0 and high / low >= _LOGARITHMIC:
        axes.set_xscale("log")
        steps = (1.0, 3.0) if high / low < 1000 else (1.0,)  # labels are wide
        axes.xaxis.set_major_locator(LogLocator(subs=steps, numticks=9))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: _short_size(value))


def _short_size(value: float) -> str:
    text, _, unit = words.size(value).partition(" ")
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {unit}"
