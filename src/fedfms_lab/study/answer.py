"""What a study asks, and what its answer holds: the rows of its tables, no page yet."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedfms.contracts.decode import validate
from fedfms.errors import FederationError
from fedfms_lab.study.analysis.statistics import Interval
from fedfms_lab.study.record import FORMAT, STUDY_FILE, UNREADABLE, Regime, Run, why

Role = Literal["train", "unseen"]
SavedUnit = Literal["B", "s", "rounds"]
Against = Regime | Literal["local-best", "strategy", "method"]
Place = tuple[str, str, str | None, tuple[str, ...]]  # method, way, holdout, sites that train
Metric = Literal["dice", "iou", "hd95", "dice_slice", "iou_slice"]
ROLES: tuple[Role, ...] = ("train", "unseen")
# what is tested, once for each role: federated training against what sites have without it, or, in
# a study without that, against training on pooled images. The first of these that it has
PRIMARY: Mapping[Role, tuple[Against, ...]] = {
    "train": ("local", "central-matched", "central"),
    "unseen": ("ensemble", "local", "central-matched", "central"),
}
SLICE_METRICS: tuple[Metric, ...] = ("dice_slice", "iou_slice")
METRICS: tuple[Metric, ...] = ("dice", "iou", "hd95", *SLICE_METRICS)

FAILS_BELOW = 0.10  # Dice; a local model this far below federated training fails at that site
FEWEST_PATIENTS = 5  # for the interval of a single site; over all sites each needs 2
TARGET_SHARE = 0.95  # of what central training reached, where the study names no target

ALL = ""  # in place of a site, class or method: over all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """study.json: what was asked."""

    name: str
    title: str
    sites: tuple[str, ...]
    methods: tuple[str, ...]
    regimes: tuple[str, ...]  # ways to train; federated ones by their strategy, too
    holdouts: tuple[str | None, ...]
    seeds: tuple[int, ...]
    engine: str | None  # of federated runs
    target_dice: float | None  # None: TARGET_SHARE of what central training reached
    planned: tuple[str, ...]  # names of runs that answer
    tries: tuple[str, ...] = ()  # names of runs that try a learning rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Mean over folds (for local models at other sites: over these models), then over seeds."""

    value: float  # Dice and IoU in [0, 1]; HD95 in the line's unit
    by_seed: tuple[float, ...]
    runs: tuple[str, ...]

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        return len(self.by_seed)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over seeds; None for fewer than three, which are listed."""
        return statistics.stdev(self.by_seed) if self.seeds > 2 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreLine:
    """One way to train, scored at every site in one role.

    A site's score in a run is the mean over its cases with a value, then over the classes that all
    sites scored.
    """

    method: str
    regime: str
    role: Role
    metric: Metric
    unit: str  # mm or px for hd95; distances of different units are different lines
    class_name: str  # ALL: mean over the classes in `Answer.common`
    best: bool  # local models at a site they did not train at: the best one alone
    sites: Mapping[str, Score]
    mean: Score  # over `sites`, each once; its spread over the seeds that have all of them
    worst: str | None  # site; None where there is a single one


@dataclass(frozen=True, slots=True, kw_only=True)
class FalseAlarms:
    """Of the cases of a site in which nothing is drawn, the share in which something was found.

    A case counts once for each of its classes of which nothing is drawn.
    """

    method: str
    regime: str
    role: Role
    site: str
    cases: int  # in which nothing of a class is drawn
    share: Score  # in [0, 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Dice of federated training minus that of something else, over the same cases."""

    method: str
    strategy: str  # "": the job's own
    against: Against
    other: str  # the other method, where against is "method"
    primary: bool  # asked beforehand, and tested
    role: Role  # of the sites in the federated runs
    site: str  # ALL: mean over sites, each once
    difference: float  # above 0: federated training is better
    interval: Interval | None  # over patients and seeds; None: too few of either
    p: float | None  # two-sided; only where it is primary, over all sites, and of enough seeds
    p_holm: float | None
    seeds: int  # that have all of these sites' runs, and are behind the difference
    cases: int
    patients: int
    sites: int
    runs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalCell:
    """A model trained at one site alone, scored at one site."""

    method: str
    trained_at: str
    scored_at: str
    dice: Score
    behind: float | None  # Dice of federated training minus this model's, on the same cases
    behind_role: Role | None  # of the site in those federated runs
    behind_cases: int
    behind_runs: tuple[str, ...]

    @property
    def fails(self) -> bool:
        """Whether federated training is better by more than FAILS_BELOW at this other site."""
        away = self.trained_at != self.scored_at
        return away and self.behind is not None and self.behind > FAILS_BELOW


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and range of a quantity over n values."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Communication:
    """What federated training of one method moves."""

    method: str
    down: Spread | None  # bytes to a training site in a round
    up: Spread | None  # bytes from a training site in a round
    total_down: Spread  # bytes of a run, all sites and rounds
    total_up: Spread
    rounds: Spread | None  # of a run
    target: Spread | None  # mean validation Dice of the training sites; over runs
    target_runs: tuple[str, ...]  # where it comes from: central runs; none: the study names it
    reached: tuple[str, ...]  # runs that reached their target
    rounds_to_target: Spread | None  # over the runs that reached it
    bytes_to_target: Spread | None
    runs: tuple[str, ...]

    @property
    def both_ways(self) -> float:
        """Mean bytes of a run, to and from all sites."""
        return self.total_down.mean + self.total_up.mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What one way to train costs a run."""

    method: str
    regime: str
    seconds: Mapping[str, Spread]  # by phase, summed over the run's processes; over runs
    peak_memory_bytes: Mapping[str, int]  # by phase; the largest of any run
    wall_seconds: Spread
    runs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """What one method needs less of than another, in federated runs."""

    method: str  # the one that moves less in a round
    other: str
    what: str
    unit: SavedUnit
    needs: float
    other_needs: float
    runs: tuple[str, ...]

    @property
    def share(self) -> float | None:
        """Share of what the other needs that is saved; below 0: it needs more."""
        return 1 - self.needs / self.other_needs if self.other_needs else None


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """Mean validation Dice of the training sites after some rounds of training."""

    round: int
    dice: Spread  # over folds and seeds
    bytes_moved: float | None  # tensor bytes until that model existed, mean over runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One way to train, round by round."""

    method: str
    regime: str
    points: tuple[CurvePoint, ...]
    runs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One way to train in one fold: the mean validation Dice of each rate that was tried."""

    method: str
    way: str
    holdout: str | None
    trained_on: tuple[str, ...]
    dice: dict[float, float]  # by rate, the smallest first
    runs: tuple[str, ...]

    @property
    def where(self) -> Place:
        """As `tuning.where` of its runs."""
        return self.method, self.way, self.holdout, self.trained_on

    @property
    def rate(self) -> float:
        """The one with the highest Dice; of equal ones the smallest."""
        return max(self.dice, key=lambda rate: (self.dice[rate], -rate))


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteCases:
    """What stands behind the scores of a site in one role."""

    site: str
    role: Role
    cases: int
    patients: int
    without_value: int  # cases without a Dice: nothing is drawn there
    runs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """All tables of a study."""

    study: Asked
    runs: tuple[Run, ...]  # planned and finished
    missing: tuple[str, ...]  # planned and not finished
    strangers: tuple[str, ...]  # finished and not planned; they count nowhere
    classes: tuple[str, ...]
    common: tuple[str, ...]  # of these those that all sites scored: ALL is the mean over them
    not_annotated: Mapping[str, tuple[str, ...]]  # site to the classes that it does not draw
    cases: tuple[SiteCases, ...]
    scores: tuple[ScoreLine, ...]
    false_alarms: tuple[FalseAlarms, ...]
    choices: tuple[Choice, ...]  # of learning rates
    gaps: tuple[Gap, ...]
    local: tuple[LocalCell, ...]
    communication: tuple[Communication, ...]
    training: tuple[Training, ...]
    savings: tuple[Saving, ...]
    curves: tuple[Curve, ...]

    def away(self, method: str) -> list[LocalCell]:
        """Models of one site at other sites, where federated training scored the same cases."""
        return [
            cell
            for cell in self.local
            if (cell.method, cell.trained_at == cell.scored_at) == (method, False)
            and cell.behind is not None
        ]

    def primary(self, method: str, role: Role) -> Gap | None:
        """What is tested of a method at these sites, over all of them."""
        wanted = (method, role, ALL)
        for gap in self.gaps:
            if gap.primary and (gap.method, gap.role, gap.site) == wanted:
                return gap
        return None

    def line(
        self,
        method: str,
        regime: str,
        role: Role,
        metric: Metric = "dice",
        *,
        class_name: str = ALL,
        best: bool = False,
    ) -> ScoreLine | None:
        """The line of these, the first unit for HD95; None where no run has a value."""
        wanted = (method, regime, role, metric, class_name, best)
        for line in self.scores:
            found = (line.method, line.regime, line.role, line.metric, line.class_name, line.best)
            if found == wanted:
                return line
        return None


def read_study(folder: Path) -> Asked:
    """What a study asks.

    Raises:
        FederationError: there is no study.json, or it is damaged ("no-study").
    """
    path = folder / STUDY_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise ValueError(f"{STUDY_FILE} is of another version of fedfms")
        # "asked" is for who goes on with the study, and for verify
        return validate(Asked, values, unknown="ignore")
    except UNREADABLE as error:
        raise FederationError(
            f"{folder} is no study: {why(error)}",
            f"name the folder of a study, which holds {STUDY_FILE}; if that file was damaged, "
            "start the study again, which keeps its finished runs",
            code="no-study",
        ) from None
