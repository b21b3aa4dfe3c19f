"""Curves of a run that goes on: a line a site; of many sites their middle, range and worst."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from markupsafe import Markup

from fedfms.pages.svg import COLOURS, MARKERS
from fedfms.records.history import History
from fedfms.records.scores import over_classes
from fedfms.report.figures import Style, draw_curves

LINES = 8  # sites with a line each
WORST = 3  # of more sites, those with the lowest last Dice have a line

Points = tuple[tuple[float, float], ...]  # of one site over rounds; NaN where there is none


@dataclass(frozen=True, slots=True)
class Curves:
    """Both figures with what their lines mean; empty where there is nothing to draw yet."""

    dice: str = ""
    loss: str = ""
    legend: Sequence[Style] = ()
    sites: int = 0  # that the range is of; 0 where each site has a line


def draw(history: History) -> Curves:
    """Dice and loss by round and site, as inline SVG."""
    dice: dict[str, list[tuple[float, float]]] = {}
    loss: dict[str, list[tuple[float, float]]] = {}
    for (number, site), answer in sorted(history.answers.items()):
        said = answer.said if answer.accepted else None
        if said is None:
            continue
        if (value := over_classes(said.metrics, "dice")) is not None:
            dice.setdefault(site, []).append((float(number), value))
        if said.loss is not None:
            loss.setdefault(site, []).append((float(number), said.loss))
    roles = tuple((site, history.role(site) != "train") for site in history.sites)
    return _draw(
        roles,
        tuple((site, tuple(points)) for site, points in sorted(dice.items())),
        tuple((site, tuple(points)) for site, points in sorted(loss.items())),
    )


@functools.lru_cache(maxsize=8)  # drawn anew when a site has answered, not each time it is shown
def _draw(
    roles: tuple[tuple[str, bool], ...],
    dice: tuple[tuple[str, Points], ...],
    loss: tuple[tuple[str, Points], ...],
) -> Curves:
    many = len(roles) > LINES
    named = dict(roles)
    if many:
        last = {site: points[-1][1] for site, points in dice}
        worst = sorted(last, key=lambda site: last[site])[:WORST]
        named = {site: unseen for site, unseen in roles if site in worst}
    styles = []
    trained = 0
    for site, unseen in named.items():
        if unseen:
            styles.append(Style(site, True, "--ink", MARKERS[3]))
        else:
            styles.append(Style(site, False, f"--c{trained % COLOURS}", MARKERS[trained % 5]))
            trained += 1
    both = []
    for values, title, salt in ((dice, "Dice", "dice-now"), (loss, "Training loss", "loss-now")):
        of_site = {site: list(points) for site, points in values}
        lines = [(style, of_site[style.site]) for style in styles if style.site in of_site]
        band: list[tuple[float, float, float]] = []
        if many:
            middle, band = _middle(values)
            if middle:
                lines.append((MEDIAN, middle))
        svg = draw_curves(lines, "Rounds of training", title, salt, whole=True, band=band)
        both.append(Markup(svg))  # drawn here, of numbers
    legend = [*styles, *([MEDIAN] if many and dice else [])]
    return Curves(both[0], both[1], legend, len(roles) if many else 0)


MEDIAN = Style("median of all sites", False, "--ink", "o")


def _middle(
    values: Sequence[tuple[str, Points]],
) -> tuple[list[tuple[float, float]], list[tuple[float, float, float]]]:
    """The median of all sites by round, and their range."""
    by_round: dict[float, list[float]] = {}
    for _, points in values:
        for x, y in points:
            if math.isfinite(y):
                by_round.setdefault(x, []).append(y)
    rounds: Mapping[float, list[float]] = dict(sorted(by_round.items()))
    return (
        [(x, median(found)) for x, found in rounds.items()],
        [(x, min(found), max(found)) for x, found in rounds.items()],
    )
