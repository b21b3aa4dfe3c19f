"""The study's figures as inline SVG: differences with their intervals, and learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

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
from fedfms_lab.study.answer import ALL, Answer, Curve, Gap
from fedfms_lab.study.page.words import REGIMES, method
from fedfms_lab.study.record import REGIMES as REGIME_ORDER

_BYTE_TICKS = 5  # at most; their labels are wide
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
    if gap.against == "local-best":
        where = "best other site"
    elif gap.against == "local":
        where = "own site" if gap.role == "train" else "other sites"
    return f"{method(gap.method)}, {where}"


def _signed(value: float) -> str:
    text = f"{value:+.3f}".rstrip("0").rstrip(".")
    return "0" if text in ("+0", "-0") else text.replace("-", words.MINUS)


def _method_colour(answer: Answer, name: str) -> str:
    if name == ALL:
        return INK
    return stand_in(f"--c{answer.study.methods.index(name) % COLOURS}")


def dice_by_round(curves: Sequence[Curve], salt: str) -> str:
    """One method: Dice of the training sites by round of each way to train; "" without a value."""
    lines = []
    for curve in sorted(curves, key=_place):
        place = _place(curve)
        x = [float(point.round) for point in curve.points]
        label = REGIMES[curve.regime]
        lines.append((curve, x, label, stand_in(f"--c{place + 2}"), MARKERS[place]))
    return _draw(lines, "Rounds of training", salt, whole=True)


def _place(curve: Curve) -> int:
    return [str(regime) for regime in REGIME_ORDER].index(curve.regime)


def dice_by_bytes(answer: Answer, salt: str) -> str:
    """Federated runs of each method: the same by the bytes moved; "" where nothing moved."""
    lines = []
    for curve in answer.curves:
        points = [point for point in curve.points if point.bytes_moved]
        if points:
            place = answer.study.methods.index(curve.method)
            moved = Curve(
                method=curve.method, regime=curve.regime, points=tuple(points), runs=curve.runs
            )
            x = [point.bytes_moved or 0.0 for point in points]
            colour = stand_in(f"--c{place % COLOURS}")
            lines.append((moved, x, method(curve.method), colour, MARKERS[place % len(MARKERS)]))
    return _draw(lines, "Moved by all sites together", salt, bytes_axis=True)


_Line = tuple[Curve, Sequence[float], str, str, str]  # curve, x, label, colour, marker


def _draw(
    lines: Sequence[_Line],
    x_label: str,
    salt: str,
    *,
    whole: bool = False,
    bytes_axis: bool = False,
) -> str:
    if not lines:
        return ""
    with mpl.rc_context({**SETTINGS, "svg.hashsalt": salt}):
        figure = Figure(figsize=(5.4, 3.5), layout="constrained")
        axes = figure.add_subplot()
        values: list[float] = []
        for curve, x, label, colour, marker in lines:
            low = [point.dice.low for point in curve.points]
            high = [point.dice.high for point in curve.points]
            values += [*low, *high]
            axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
            axes.plot(
                x,
                [point.dice.mean for point in curve.points],
                color=colour,
                label=label,
                linewidth=1.8,
                marker=marker,
                markersize=5,
                clip_on=False,
            )
        axes.set_ylim(*dice_range(values))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        if bytes_axis:
            _bytes_axis(axes, [value for _, x, *_ in lines for value in x])
        else:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=whole, min_n_ticks=2))
        axes.set_xlabel(x_label)
        axes.set_ylabel("Dice")
        plain_axes(axes, "y")
        axes.legend(loc="lower right", frameon=False, labelcolor=MUTED)
        return for_page(figure)


def _bytes_axis(axes: Any, values: Sequence[float]) -> None:
    """Bytes as the tables write them, on a logarithmic axis where they differ much."""
    low, high = min(values), max(values)
    axes.xaxis.set_minor_locator(NullLocator())
    if low > 0 and high / low >= _LOGARITHMIC:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        for steps in ((1, 2, 5), (1, 3), (1,)):
            ticks = [
                step * 10.0**power
                for power in range(15)
                for step in steps
                if low <= step * 10.0**power <= high
            ]
            if len(ticks) <= _BYTE_TICKS:
                break
        axes.xaxis.set_major_locator(FixedLocator(ticks))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(lambda value, _: _short_size(value))


def _short_size(value: float) -> str:
    text, _, unit = words.size(value).partition(" ")
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {unit}"
