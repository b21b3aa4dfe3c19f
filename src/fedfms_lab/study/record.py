"""A study's folder and its runs: what is written, and read back without loss.

    STUDY/
      study.json              what was asked: the study file with every default filled in
      runs/NAME/              one finished run; it appears whole or not at all
        run.json              what ran, on what, how long, and the hash of every other file
        recipe.json           the recipe with all values
        model.safetensors     the trained tensors, fp32; from scratch: the whole network
        members/SITE.safetensors  of an ensemble, which has no model of its own
        scores.csv            a row for each case that this run did not train on, and each class
        rounds.csv            a row for each site and round (records.rows.RoundRow)
        manifest.csv          a row for each case of each site, with the SHA-256 of its files
        pictures/SITE-N.png   overlays of sites whose policy lets pictures out
        job/                  federated runs: the job's own results folder with its report
      study.html, study.md, study.csv, study.tex

`scores.csv` names cases and patients as the sites do. It stays on the machine of the study; the
page and the tables hold means.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from fedfms.contracts.decode import Misfits, validate
from fedfms.errors import FederationError
from fedfms.records.layout import MODEL, PICTURES, RECIPE, ROUNDS
from fedfms.records.rows import RoundRow, read_rounds, read_rows

Regime = Literal[
    "federated", "central-matched", "central", "local", "ensemble", "zero-shot", "scratch"
]
Engine = Literal["flare", "loop"]
REGIMES: tuple[Regime, ...] = get_args(Regime)

STUDY_FILE, RUNS_FOLDER = "study.json", "runs"
RUN_FILE, RECIPE_FILE, MODEL_FILE = "run.json", RECIPE, MODEL
SCORES_FILE, ROUNDS_FILE, MANIFEST_FILE = "scores.csv", ROUNDS, "manifest.csv"
PICTURES_FOLDER, JOB_FOLDER = PICTURES, "job"
PERSONAL_FOLDER = "personal"  # of a federated run: what each training site kept for itself at last
MEMBERS_FOLDER = "members"  # of an ensemble: the model of each site that trained alone

FORMAT = 2  # of run.json and study.json; another number is refused


@dataclass(frozen=True, slots=True, kw_only=True)
class RunKey:
    """Which run of a study: the question that it answers."""

    method: str  # the study's name for it, such as fedmsa
    regime: Regime
    holdout: str | None  # the site that is unseen in this fold; None: no fold, or a local run
    trained_on: tuple[str, ...]  # sorted; a single site for a local run, none for zero-shot
    seed: int
    strategy: str = ""  # the study's name for another way of averaging; only of federated runs
    rate: float | None = None  # a run that tries this learning rate, and answers nothing else

    @property
    def way(self) -> str:
        """How it is trained, in one word for each row of a table: federated, federated prox, …"""
        return f"{self.regime} {self.strategy}".rstrip()

    @property
    def name(self) -> str:
        """Folder name, such as fedmsa-federated-without-site-4-seed-0."""
        if self.regime == "local":
            where = f"at-{self.trained_on[0]}"
        elif not self.trained_on:
            where = "everywhere"
        else:
            where = "all" if self.holdout is None else f"without-{self.holdout}"
        tried = "" if self.rate is None else f"-rate-{self.rate:g}"
        return f"{self.method}-{self.way.replace(' ', '-')}-{where}-seed-{self.seed}{tried}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteFacts:
    """One site's data as a run found it."""

    manifest_sha256: str  # over the names and SHA-256 of all image and label files (study.data)
    config_sha256: str  # of site.yml as it was read
    cases: int
    validation_cases: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What one phase of a run cost, all sites together."""

    seconds: float  # summed over the processes that did it
    peak_memory_bytes: int  # largest of one process, or of its GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """run.json."""

    study: str
    key: RunKey
    engine: Engine | None  # of a federated run
    recipe_sha256: str
    backbone_sha256: str
    versions: Mapping[str, str]  # fedfms, its commit and image, nvflare, torch, …
    machine: Mapping[str, Any]  # device, threads: of the training processes
    sites: Mapping[str, SiteFacts]  # all that the run touched, those it only scored included
    started: float  # seconds since 1970-01-01 UTC
    seconds: float  # wall clock, scoring included
    phases: Mapping[str, Phase]  # prepare, train, evaluate, exchange; and score, the last one
    bytes_down: int  # tensor bytes to all sites in all rounds; 0 where nothing travels
    bytes_up: int
    opened: Mapping[str, int]  # files below each site's folder that the training processes opened
    files: Mapping[str, str]  # relative path -> SHA-256, of everything else in the run's folder
    recipe: Mapping[str, Any] = field(default_factory=dict)  # again, to tell which value changed


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRow:
    """One class of one case, scored by the run's final model; a row of scores.csv.

    Scores are at native resolution, volumes in 3-D; None where truth and prediction are empty.
    """

    site: str
    role: Literal["train", "unseen"]  # whether this run trained at the site (on other cases)
    split: Literal["train", "validation"]  # of the case at its site; unseen sites score all cases
    case: str
    patient: str
    class_name: str
    dice: float | None  # [0, 1]
    iou: float | None  # [0, 1]
    hd95: float | None
    unit: Literal["mm", "px"]  # of hd95
    empty: bool  # no foreground in truth and prediction
    drawn: bool  # foreground in truth; where there is none, all that is found is a false alarm
    dice_slice: float | None  # mean over this case's slices with a value
    iou_slice: float | None
    slices: int  # with a value


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run's folder in memory."""

    folder: Path
    record: RunRecord
    recipe: Mapping[str, Any]
    scores: tuple[ScoreRow, ...]
    rounds: tuple[RoundRow, ...]


# --------------------------------------------------------------------------------------- reading

# what a file that is damaged or missing may raise
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, Misfits)


def why(error: BaseException) -> str:
    """What is wrong with such a file, as the end of a sentence."""
    if isinstance(error, Misfits):
        return f"{'.'.join(map(str, error.loc)) or 'its content'} is {error.kind}"
    return str(error.strerror if isinstance(error, OSError) else error)


def read_run(folder: Path) -> Run:
    """Read a finished run.

    Raises:
        FederationError: it is no run, or one of its files is damaged ("no-run").
    """
    try:
        values = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        recipe = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))
        if values.pop("format", None) != FORMAT:
            raise ValueError("run.json is of another version of fedfms")
        values.pop("seal", None)
        record = validate(RunRecord, values)
        scores = read_rows(folder / SCORES_FILE, ScoreRow)
        rounds = read_rounds(folder / ROUNDS_FILE)
    except UNREADABLE as error:
        raise FederationError(
            f"{folder} is no finished run of a study: {why(error)}",
            "name a folder below runs/ in a study's folder; if a file in it was damaged, remove "
            "the whole folder and start the study again, which repeats this run alone",
            code="no-run",
        ) from None
    return Run(folder, record, recipe, scores, rounds)


def read_runs(study: Path) -> list[Run]:
    """All finished runs of a study, by name; unfinished ones lie elsewhere."""
    return [read_run(path.parent) for path in sorted((study / RUNS_FOLDER).glob(f"*/{RUN_FILE}"))]


def record_to_dict(record: RunRecord) -> dict[str, Any]:
    """run.json's content as JSON types, with its own seal."""
    values = {"format": FORMAT, **dataclasses.asdict(record)}
    return {**values, "seal": seal_of(values)}


def seal_of(values: Mapping[str, Any]) -> str:
    """SHA-256 over run.json's other values: shows a change that nothing else would."""
    sealed = {key: value for key, value in values.items() if key != "seal"}
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()
