"""Numbers and reasons as a reader sees them. Everything shown is rounded here and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timezone

from fedfms import errors
from fedfms.contracts.codes import CODES
from fedfms.models.methods import find_method
from fedfms.records.history import NOTHING_RECORDED
from fedfms.report.summary import Summary

NONE = "–"  # where there is no value
MINUS = "−"

BACKBONES = {"vit_demo": "demo ViT", "vit_b": "ViT-B", "vit_l": "ViT-L", "vit_h": "ViT-H"}

_BEGINNINGS = {  # by class of the error
    "TrainerError": "The site's training process failed",
    "SiteDataError": "The site's images or labels could not be used",
    "CheckpointError": "The site's SAM checkpoint could not be used",
    "ConfigError": "The site's configuration could not be used",
    "TrainingError": "Training at the site could not go on",
    "DoorClosed": "The site's own policy did not let its contribution leave",
    "TaskAborted": "The round was stopped on request",
    "ContributionRefused": "The server refused what the site sent",
}
_CODED = re.compile(r"\b([A-Z]\w+) \(([a-z0-9-]+)[,)]")


def method(name: str) -> tuple[str, str]:
    """A method's title and what it does; of one that is not installed here its name alone."""
    try:
        known = find_method(name)
    except errors.ConfigError:
        return name or "Federated training", ""
    return known.title, known.sentence


def plain_reason(reason: str | None) -> str:
    """Why a site missed a round, as a sentence; an unknown reason stays as it is.

    Args:
        reason: as recorded: a public error such as `TrainerError (died); …`, a code of the
            server's guard such as `non-finite`, or free text.
    """
    if not reason or reason == NOTHING_RECORDED:
        return "No answer from this site was recorded."
    if reason.strip() in CODES:
        return f"{_BEGINNINGS['ContributionRefused']}: {CODES[reason.strip()]}."
    coded = _CODED.search(reason)
    if coded is None or coded[1] not in _BEGINNINGS:
        return reason
    kind = getattr(errors, coded[1])
    means = None if coded[2] == kind.default_code else CODES.get(coded[2])
    return f"{_BEGINNINGS[coded[1]]}{f': {means}' if means else ''}."


def score(value: float | None) -> str:
    """A score in [0, 1] with three decimals."""
    return NONE if value is None else f"{value:.3f}"


def distance(value: float | None) -> str:
    """A distance in millimetres or pixels with two decimals, without the unit."""
    return NONE if value is None else f"{value:.2f}"


def with_spread(value: float | None, spread: float | None, metric: str, unit: str = "") -> str:
    """`mean ± standard deviation unit`, or the mean alone."""
    show = distance if metric == "hd95" else score
    both = show(value) if value is None or spread is None else f"{show(value)} ± {show(spread)}"
    return f"{both} {unit}" if unit and value is not None else both


def change(value: float | None) -> str:
    """A difference of scores with its sign and three decimals."""
    return NONE if value is None else f"{value:+.3f}".replace("-", MINUS)


def count(value: int | None) -> str:
    """A whole number, thousands apart by a narrow space."""
    return NONE if value is None else f"{value:,}".replace(",", "\u202f")


def size(value: float | None) -> str:
    """Bytes with a decimal unit: 1 MB is 1 000 000 bytes."""
    if value is None:
        return NONE
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= 0.9995 * scale:
            number = value / scale
            return f"{number:.2f} {unit}" if number < 9.995 else f"{number:.1f} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float | None) -> str:
    """Seconds as `8.3 s`, `4 min 12 s` or `2 h 05 min`."""
    if seconds is None:
        return NONE
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{count(hours)} h {minutes:02d} min"


def moment(unix: float | None) -> str:
    """A point in time as date and time in UTC."""
    if unix is None:
        return NONE
    return datetime.fromtimestamp(unix, tz=timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def listing(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def numerals(number: int, one: str) -> str:
    """`1 site`, `3 sites`."""
    return f"{count(number)} {one if number == 1 else one + 's'}"


def class_names(names: Sequence[str]) -> str:
    """`optic disc and optic cup`."""
    return listing([str(name).replace("_", " ") for name in names])


def silent_sites(summary: Summary) -> list[str]:
    """Training sites of which no answer to a round came into the model."""
    if not summary.rounds.done:
        return []
    return [
        site
        for site, values in summary.sites.items()
        if values.role == "train" and not values.rounds_accepted
    ]


def missed_evaluations(summary: Summary) -> dict[str, str]:
    """Site to the models that it should have evaluated and did not, in words."""
    missed: dict[str, list[str]] = {}
    for entry in summary.missed_evaluations:
        missed.setdefault(entry.site, []).append(f"the {entry.model} model")
    return {site: listing(models) for site, models in missed.items()}
