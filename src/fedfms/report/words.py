"""Numbers and reasons as a reader sees them. Everything shown is rounded here and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedfms import errors
from fedfms.contracts.codes import CODES
from fedfms.contracts.recipe import adapters_in_words
from fedfms.models.methods import find_method
from fedfms.pages.numbers import NONE as NONE
from fedfms.pages.numbers import count as count
from fedfms.pages.numbers import duration as duration
from fedfms.pages.numbers import listing as listing
from fedfms.pages.numbers import moment as moment
from fedfms.pages.numbers import numerals as numerals
from fedfms.pages.numbers import size as size
from fedfms.records.history import NOTHING_RECORDED
from fedfms.report.summary import Summary

MINUS = "−"

BACKBONES = {
    "vit_demo": "demo ViT",
    "vit_t": "MobileSAM's TinyViT",
    "vit_b": "ViT-B",
    "vit_l": "ViT-L",
    "vit_h": "ViT-H",
}

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


def method(name: str, adapter_blocks: object = "all") -> tuple[str, str]:
    """A method's title and what it does; of one that is not installed here its name alone.

    Args:
        adapter_blocks: of the recipe.
    """
    try:
        known = find_method(name)
    except errors.ConfigError:
        return name or "Federated training", ""
    where = adapters_in_words(str(adapter_blocks))
    return known.title, "; ".join(filter(None, (known.sentence, where)))


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
