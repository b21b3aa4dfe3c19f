"""The report's curves as inline SVG that takes its colours from the page, light or dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedfms.pages.svg import (
    COLOURS,
    DASHED,
    GRID,
    MARKER_PATHS,
    MARKERS,
    PAPER,
    SETTINGS,
    dice_range,
    for_page,
    plain_axes,
    stand_in,
    tenths,
)
from fedfms.records.rows import RoundRow
from fedfms.records.scores import over
from fedfms.report import words
from fedfms.report.collect import Result


@dataclass(frozen=True, slots=True)
class Style:
    """How one site is drawn in every figure: training sites solid, unseen sites dashed and open."""

    site: str
    unseen: bool
    variable: str  # the page's colour variable
    marker: str  # of matplotlib

    @property
    def path(self) -> str:
        """The marker as an SVG path."""
        return MARKER_PATHS[self.marker]


def styles(result: Result) -> list[Style]:
    """One style a site, in the order of the tables."""
    found = []
    trained = unseen = 0
    for site, values in result.summary.sites.items():
        if values.role == "train":
            marker = MARKERS[trained % len(MARKERS)]
            found.append(Style(site, False, f"--c{trained % COLOURS}", marker))
            trained += 1
        else:
            found.append(Style(site, True, "--ink", MARKERS[(unseen + 3) % len(MARKERS)]))
            unseen += 1
    return found


def dice_by_round(result: Result, part: int = 0) -> str:
    """Dice of each site's validation cases after r rounds of training; "" without a value.

    Args:
        part: which of the summary's parts, each of the same classes at every site.
    """
    curves = [(style, _dice_points(result, style.site, part)) for style in styles(result)]
    salt = f"dice-by-round{part or ''}"
    return draw_curves(curves, "Rounds of training", "Dice", salt, whole=True)


def dice_by_bytes(result: Result, part: int = 0) -> str:
    """The same against the bytes that all sites together had moved until that model existed."""
    moved: dict[int, int] = {}
    for row in result.rounds:
        moved[row.round] = moved.get(row.round, 0) + (row.bytes_down or 0) + (row.bytes_up or 0)
    total = sum(moved.values())
    if not total:
        return ""
    unit, scale = ("GB", 1e9) if total >= 2e9 else ("MB", 1e6) if total >= 2e6 else ("kB", 1e3)

    def before(rounds: float) -> float:
        return sum(size for number, size in moved.items() if number < rounds) / scale

    curves = [
        (style, [(before(x), y) for x, y in _dice_points(result, style.site, part)])
        for style in styles(result)
    ]
    salt = f"dice-by-bytes{part or ''}"
    return draw_curves(curves, f"Moved by all sites together, {unit}", "Dice", salt)


def loss_by_round(result: Result) -> str:
    """Mean training loss of each training site in round r; "" without a value."""
    curves = []
    for style in styles(result):
        own = [row for row in result.rounds if row.site == style.site]
        points = [(float(row.round), _or_nan(row.loss, row)) for row in own]
        curves.append((style, points))
    return draw_curves(curves, "Round", "Training loss", "loss-by-round", whole=True)


def evaluated_rounds(recipe: Mapping[str, Any]) -> tuple[int, int]:
    """Rounds of training before the first evaluation, and from one to the next.

    Each where an older recipe does not say: before training, and in every round.
    """
    return recipe.get("evaluate_first") or 0, recipe.get("evaluate_every") or 1


def _dice_points(result: Result, site: str, part: int) -> list[tuple[float, float]]:
    """(rounds of training, Dice) of one site; NaN where the round was missed or withheld.

    Rounds in which no site evaluates have no point, so that the line goes on over them.
    """
    first, every = evaluated_rounds(result.recipe)
    part_scores = result.summary.parts[part]
    points = [
        (float(row.round), _or_nan(over(row.class_dice, part_scores.classes), row))
        for row in result.rounds
        if row.site == site and row.round >= first and (row.round - first) % every == 0
    ]
    final = part_scores.sites[site].final
    if final is not None:
        after = [r.round for r in result.evaluation if r.site == site and r.model == "final"]
        trained = next((r for r in after if r is not None), result.summary.rounds.done)
        points.append((float(trained), final))
    return points


def _or_nan(value: float | None, row: RoundRow) -> float:
    return value if row.accepted and value is not None else math.nan


def before_and_after(result: Result, part: int = 0) -> str:
    """Dice of each site before training (open) and after (filled); "" without a value after."""
    found = result.summary.parts[part].sites
    sites = [
        (style, found[style.site].round_0, after)
        for style in reversed(styles(result))
        if (after := found[style.site].after) is not None
    ]
    if not sites:
        return ""
    with mpl.rc_context({**SETTINGS, "svg.hashsalt": f"before-and-after{part or ''}"}):
        figure = Figure(figsize=(5.4, max(3.3, 0.9 + 0.3 * len(sites))), layout="constrained")
        axes = figure.add_subplot()
        for row, (style, before, after) in enumerate(sites):
            colour = stand_in(style.variable)
            if before is not None:
                dash = DASHED if style.unseen else "-"
                axes.plot([before, after], [row, row], color=colour, linewidth=1.8, linestyle=dash)
                axes.plot(before, row, "o", markerfacecolor=PAPER, **_marker(colour))
                _label(axes, before, row, "left" if before <= after else "right")
            axes.plot(after, row, "o", markerfacecolor=colour, **_marker(colour))
            _label(axes, after, row, "left" if before is not None and after < before else "right")
        axes.set_yticks(range(len(sites)), [style.site for style, *_ in sites])
        axes.set_ylim(-0.6, len(sites) - 0.4)
        low, high = dice_range([value for _, *both in sites for value in both])
        room = 0.24 * (high - low)  # for a label beside a point at the end of the range
        axes.set_xlim(low - room, high + room)
        axes.set_xticks([tick / 10 for tick in tenths(low, high)])
        axes.set_xlabel("Dice")
        plain_axes(axes, "x")
        return for_page(figure)


def _label(axes: Any, value: float, row: int, side: str) -> None:
    offset, align = ((-9, 0), "right") if side == "left" else ((9, 0), "left")
    axes.annotate(
        words.score(value),
        (value, row),
        offset,
        textcoords="offset points",
        va="center",
        ha=align,
        annotation_clip=False,
    )


def _marker(colour: str) -> dict[str, Any]:
    return {"markeredgecolor": colour, "markersize": 7, "markeredgewidth": 1.6, "clip_on": False}


def draw_curves(
    curves: Sequence[tuple[Style, list[tuple[float, float]]]],
    x_label: str,
    y_label: str,
    salt: str,
    *,
    whole: bool = False,
    band: Sequence[tuple[float, float, float]] = (),
) -> str:
    """Curves over rounds or bytes; "" without a value.

    Args:
        curves: the points of each, NaN where there is none.
        salt: for the names inside the drawing.
        whole: whether x counts something.
        band: (x, lowest, highest) of many that are not drawn one by one.
    """
    values = [y for _, points in curves for _, y in points if math.isfinite(y)]
    values += [y for _, *both in band for y in both if math.isfinite(y)]
    if not values:
        return ""
    with mpl.rc_context({**SETTINGS, "svg.hashsalt": salt}):
        figure = Figure(figsize=(5.4, 3.3), layout="constrained")
        axes = figure.add_subplot()
        if band:
            x, low, high = zip(*band, strict=True)
            axes.fill_between(x, low, high, color=GRID, linewidth=0, zorder=1)
        for style, points in curves:
            colour = stand_in(style.variable)
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color=colour,
                linewidth=1.8,
                linestyle=DASHED if style.unseen else "-",
                marker=style.marker,
                markersize=5.5,
                markeredgewidth=1.5,
                markerfacecolor=PAPER if style.unseen else colour,
                markeredgecolor=colour,
                clip_on=False,
                zorder=4 if style.unseen else 3,
            )
        if y_label == "Dice":
            axes.set_ylim(*dice_range(values))
        else:
            axes.set_ylim(bottom=min(0.0, *values), top=max(values) * 1.06 or 1)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=whole, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        plain_axes(axes, "y")
        return for_page(figure)
