"""What came out of a job, in numbers: summary.json, which the report and the terminal show."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from fedfms.bounded import json_object
from fedfms.records.layout import SUMMARY
from fedfms.records.scores import mean

FORMAT = 3  # of summary.json; a reader of another number refuses the folder

Status = Literal["completed", "aborted", "failed", "interrupted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFacts:
    """What ran, when, and how it ended; None is not known."""

    id: str | None  # FLARE's
    name: str | None
    status: Status
    started: float | None  # seconds since 1970-01-01 UTC
    ended: float | None  # time of the last record
    seconds: float | None
    fedfms_version: str | None  # of the server
    nvflare_version: str | None
    recipe_sha256: str | None
    backbone_sha256: str | None
    fedfms_revision: str | None = None  # commit
    image: str | None = None  # digest of the server's container image


@dataclass(frozen=True, slots=True)
class Rounds:
    """How far the job came."""

    planned: int | None  # None: there is no recipe
    done: int


@dataclass(frozen=True, slots=True)
class Mean:
    """Dice over sites, each counted once."""

    mean: float | None
    sites: Sequence[str]  # that it is over


@dataclass(frozen=True, slots=True)
class Gain:
    """Before and after over the same training sites: those with both values."""

    before: float | None
    after: float | None
    change: float | None
    sites: Sequence[str]


@dataclass(frozen=True, slots=True)
class BestAgainstFinal:
    """The two models over the same training sites: those with both values."""

    final: float | None
    best: float | None
    sites: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dice:
    """Means over training sites."""

    round_0: Mean
    final: Mean
    best: Mean
    after: Mean
    gain: Gain
    best_against_final: BestAgainstFinal


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteDice:
    """One site's Dice in [0, 1], over the classes of a part; None: no value is known."""

    round_0: float | None = None  # before training
    final: float | None = None
    best: float | None = None
    after: float | None = None  # final, or for want of it of the last round with a value
    after_is: str | None = None  # "final" or "round N"
    note: str = ""  # why there is no final value


@dataclass(frozen=True, slots=True)
class WorstSite:
    """The lowest of at least two sites that can be compared."""

    site: str
    dice: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Scores that may be compared with each other: all are of the same classes."""

    classes: Sequence[str]
    after_is: str | None  # of what is compared; a site may have another
    dice: Dice
    worst_site: WorstSite | None
    sites: Mapping[str, SiteDice]


@dataclass(frozen=True, slots=True)
class MissedRound:
    """A round without a site's contribution."""

    round: int
    reason: str | None


@dataclass(frozen=True, slots=True)
class MissedEvaluation:
    """A finished model without a site's scores."""

    site: str
    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class Bytes:
    """Tensor bytes of all sites and rounds."""

    down: int
    up: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteFacts:
    """What a site did, whatever its scores."""

    role: str  # train, holdout
    cases: int | None  # validation cases of the last evaluation
    not_annotated: Sequence[str]
    evaluated: bool
    reported: bool  # whether it ever answered a round with a report
    rounds_accepted: int
    missed: Sequence[MissedRound]
    bytes_down: int
    bytes_up: int
    seconds: Mapping[str, float]  # by phase
    peak_memory_bytes: Mapping[str, int]  # by phase
    training_slices: int | None
    training_cases: int | None
    micro_batch: int | None
    left_out: int = 0  # cases that cannot be used there; 0 also where they are too few to be told
    left_out_by_reason: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PictureFile:
    """An overlay in the results folder."""

    site: str
    model: str
    file: str  # relative


@dataclass(frozen=True, slots=True)
class FileFacts:
    """A file that was copied into the results folder."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """summary.json, without what is there a second time for whoever reads the file itself."""

    measure: str
    job: JobFacts
    rounds: Rounds
    parts: Sequence[Part]  # one of all classes, or one of each class where sites differ in them
    missed_evaluations: Sequence[MissedEvaluation]
    bytes: Bytes
    sites: Mapping[str, SiteFacts]  # training sites first
    unreadable_records: int
    pictures: Sequence[PictureFile] = ()
    files: Mapping[str, FileFacts] = field(default_factory=dict)

    @property
    def training(self) -> list[str]:
        """The sites that train."""
        return [site for site, facts in self.sites.items() if facts.role == "train"]

    @property
    def missed(self) -> dict[str, Sequence[MissedRound]]:
        """Rounds that a site missed, of the sites that missed any."""
        return {site: facts.missed for site, facts in self.sites.items() if facts.missed}

    def to_dict(self) -> dict[str, Any]:
        """The file's content as JSON types. Scores of one part stand beside its sites as well."""
        # null stands for NaN, which JSON has not
        values = json_object(_ADAPTER.dump_json(self), SUMMARY, max_bytes=MAX_SUMMARY_BYTES)
        alone = values["parts"][0] if len(self.parts) == 1 else None
        scores = alone["sites"] if alone else {}
        nothing = dataclasses.asdict(SiteDice())
        sites = {site: facts | scores.get(site, nothing) for site, facts in values["sites"].items()}
        return {
            "format": FORMAT,
            **values,
            "sites": sites,
            "dice": alone["dice"] if alone else dataclasses.asdict(dice_of({})),
            "unseen": {site: v for site, v in sites.items() if v["role"] != "train"},
            "worst_site": alone["worst_site"] if alone else None,
            "missed": {site: v["missed"] for site, v in sites.items() if v["missed"]},
        }

    @classmethod
    def from_dict(cls, values: Any) -> Summary:
        """The other way round.

        Raises:
            ValueError: it is of another version, or damaged.
        """
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(f"{SUMMARY} is of another version of fedfms")
        try:
            return _ADAPTER.validate_python(values)
        except ValidationError as error:
            where = ".".join(str(part) for part in error.errors()[0]["loc"])
            raise ValueError(f"{where} of {SUMMARY} is missing or damaged") from None


MAX_SUMMARY_BYTES = 64 << 20  # a line for each round that a site missed
_ADAPTER = TypeAdapter(Summary)


def dice_of(training: Mapping[str, SiteDice]) -> Dice:
    """Means over training sites, each with its sites; what is compared is over the same sites."""
    found = {
        key: {
            site: value
            for site, one in training.items()
            if (value := getattr(one, key)) is not None
        }
        for key in ("round_0", "final", "best", "after")
    }
    means = {key: Mean(mean(dice.values()), list(dice)) for key, dice in found.items()}
    before, after, sites = _both(found["round_0"], found["after"])
    final, best, of_both = _both(found["final"], found["best"])
    return Dice(
        **means,
        gain=Gain(before, after, change(before, after), sites),
        best_against_final=BestAgainstFinal(final, best, of_both),
    )


def change(before: float | None, after: float | None) -> float | None:
    """The difference, where both are known."""
    return None if before is None or after is None else after - before


def _both(
    one: Mapping[str, float], other: Mapping[str, float]
) -> tuple[float | None, float | None, list[str]]:
    """Two means over the same sites: those that have both, in the order of the sites."""
    sites = [site for site in one if site in other]
    return mean(one[site] for site in sites), mean(other[site] for site in sites), sites
