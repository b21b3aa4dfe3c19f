"""records.jsonl, as the server's recorder wrote it, to rows of rounds and evaluations."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from fedfms.contracts.contribution import METRICS, Contribution, Metric
from fedfms.errors import ContributionRefused, FederationError
from fedfms.report.tables import EvaluationRow, RoundRow

RECORDS = "records.jsonl"

# Notes of a row in evaluation.csv that has no mean.
WITHHELD = "withheld: fewer cases than the site lets out"
NO_VALUE = "no case has a value"
NOTHING_RECORDED = "nothing was recorded for this site"
NOT_ANNOTATED = "not annotated at this site"


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """All readable records, and how many lines were not readable.

    Raises:
        FederationError: there is none (`no-records`).
    """
    records, damaged = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("record"), str):
            records.append(record)
        else:
            damaged += 1
    if not records:
        raise FederationError(
            f"{path} has no readable record",
            "look at the server's log: the job ended before its first round",
            code="no-records",
        )
    return records, damaged


class History:
    """What the records of one job say.

    Later records win over earlier ones of the same round and site, or of the same site and model.
    """

    def __init__(self, records: Sequence[dict[str, Any]], recipe: dict[str, Any]) -> None:
        self.job: dict[str, Any] = {}
        self.status: Literal["completed", "aborted", "failed", "interrupted"] = "interrupted"
        self.started: float | None = None
        self.ended: float | None = None
        self.answers: dict[tuple[int, str], dict[str, Any]] = {}
        self.done: dict[int, dict[str, Any]] = {}
        self.begun: set[int] = set()
        self.evaluations: dict[tuple[str, str], dict[str, Any]] = {}
        self.unreadable = 0  # contributions of another format
        self._holdout = frozenset(recipe.get("holdout") or ())
        self._asked_for = [str(name) for name in recipe.get("classes") or ()]
        self._roles: dict[str, str] = {}
        for record in records:
            self._read(record)
        named = [str(site) for site in self.job.get("sites") or ()]
        seen = [site for _, site in self.answers] + [site for site, _ in self.evaluations]
        missed = [site for done in self.done.values() for site in done["missed"]]
        everyone = sorted({*named, *seen, *missed})
        self.sites = [s for s in everyone if self.role(s) == "train"]
        self.sites += [s for s in everyone if self.role(s) != "train"]

    @property
    def rounds_done(self) -> int:
        """Rounds that were brought to their end."""
        return len(self.done)

    @property
    def pictures(self) -> list[tuple[str, str, str]]:
        """(site, model, path) of each overlay, in the order of the sites."""
        found = []
        for site in self.sites:
            for model in self.models:
                record = self.evaluations.get((site, model), {})
                found += [(site, model, str(path)) for path in record.get("pictures") or ()]
        return found

    @property
    def models(self) -> list[str]:
        """The evaluated models, the final one first."""
        return sorted({model for _, model in self.evaluations}, key=lambda m: (m != "final", m))

    @property
    def classes(self) -> list[str]:
        """The recipe's classes, in its order; without a recipe those that sites scored."""
        scored = (m.class_name for site in self.sites for one in self._said(site) for m in one)
        return self._asked_for or list(dict.fromkeys(scored))

    def not_annotated(self, site: str) -> list[str]:
        """Classes that the site does not draw: it names scores, and never one of these.

        A site that has not named any score yet has none.
        """
        drawn = {metric.class_name for one in self._said(site) for metric in one}
        return [name for name in self.classes if name not in drawn] if drawn else []

    def missed_evaluations(self) -> list[tuple[str, str, str]]:
        """(site, model, reason) of every evaluation of a model that a site owes."""
        found = []
        for model in self.models:
            for site in self.sites:
                record = self.evaluations.get((site, model))
                if record is None or record["parsed"] is None:
                    reason = str(record.get("reason") or "") if record else ""
                    found.append((site, model, reason or NOTHING_RECORDED))
        return found

    def reported(self, site: str) -> bool:
        """Whether the site ever answered a round with a report, accepted or not."""
        return any(s == site and a["parsed"] is not None for (_, s), a in self.answers.items())

    def _said(self, site: str) -> Iterator[tuple[Metric, ...]]:
        records = [r for (_, s), r in self.answers.items() if s == site]
        records += [r for (s, _), r in self.evaluations.items() if s == site]
        return (r["parsed"].metrics for r in records if r["parsed"] is not None)

    def withholds(self, site: str) -> bool:
        """Whether the last answer in which the site names scores lets none of them out."""
        said = [answer["parsed"] for (_, s), answer in sorted(self.answers.items()) if s == site]
        scored = [one.metrics for one in said if one is not None and one.metrics]
        return bool(scored) and all(
            m.mean is None and _why_none(scored[-1], m) == WITHHELD for m in scored[-1]
        )

    def role(self, site: str) -> str:
        """Role of a site, from what it said or from the recipe: train or holdout."""
        return self._roles.get(site, "holdout" if site in self._holdout else "train")

    def _read(self, record: dict[str, Any]) -> None:
        kind = record["record"]
        time = _unix(record.get("time"))
        if kind == "job":
            self.job.update(record)
            if self.started is None:
                self.started = _unix(record.get("started"))
        elif kind == "round_started" and isinstance(record.get("round"), int):
            self.begun.add(record["round"])
        elif kind == "contribution" and isinstance(record.get("round"), int):
            site = str(record.get("site"))
            self.begun.add(record["round"])
            self.answers[record["round"], site] = {**record, "parsed": self._parse(record, site)}
        elif kind == "round_done" and isinstance(record.get("round"), int):
            missed = record.get("missed")
            self.done[record["round"]] = {
                "missed": missed if isinstance(missed, dict) else {},
                "sites": [str(site) for site in record.get("sites") or ()],
            }
        elif kind == "evaluation":
            site, model = str(record.get("site")), str(record.get("model"))
            self.evaluations[site, model] = {**record, "parsed": self._parse(record, site)}
        elif kind == "job_done":
            status = record.get("status")
            self.status = status if status in ("completed", "aborted", "failed") else "interrupted"
        if time is not None:
            self.ended = time if self.ended is None else max(self.ended, time)

    def _parse(self, record: dict[str, Any], site: str) -> Contribution | None:
        if record.get("contribution") is None:
            return None
        try:
            contribution = Contribution.from_dict(record["contribution"])
        except ContributionRefused:
            self.unreadable += 1
            return None
        self._roles.setdefault(site, contribution.role)
        return contribution

    def round_rows(self) -> list[RoundRow]:
        """A row for each site that answered or missed a round, in order of rounds and sites."""
        rows = []
        for number in sorted({*self.begun, *self.done}):
            for site in self.sites:
                if (row := self._round_row(number, site)) is not None:
                    rows.append(row)
        return rows

    def _round_row(self, number: int, site: str) -> RoundRow | None:
        role = self.role(site)
        done = self.done.get(number)
        answer = self.answers.get((number, site))
        missed = done["missed"].get(site) if done else None
        if answer is None:
            if missed is None and (done is None or role != "train"):
                return None  # the round never ended, or a holdout that was not asked
            reason = str(missed or NOTHING_RECORDED)
            return RoundRow(round=number, site=site, role=role, accepted=False, reason=reason)
        accepted = answer.get("accepted") is True
        said_reason = str(answer.get("reason") or missed or NOTHING_RECORDED)
        values: dict[str, Any] = {
            "bytes_down": _whole(answer.get("bytes_down")),
            "bytes_up": _whole(answer.get("bytes_up")),
            "time": _unix(answer.get("time")),
            "reason": None if accepted else said_reason,
        }
        if (said := answer["parsed"]) is not None:
            values |= {name: _over_classes(said.metrics, name) for name in METRICS}
            values |= {
                "class_dice": class_dice(said.metrics),
                "loss": said.loss,
                "evaluated_cases": said.evaluated_cases,
                "training_slices": said.training_slices,
                "training_cases": said.training_cases,
                "peak_memory_bytes": dict(said.peak_memory_bytes),
                "micro_batch": said.micro_batch or None,
                "update_norm": said.update_norm,
                "seconds": dict(said.seconds),
            }
        return RoundRow(round=number, site=site, role=role, accepted=accepted, **values)

    def evaluation_rows(self) -> list[EvaluationRow]:
        """A row for each score, final model first; one with a note for a site without any."""
        rows = []
        for model in self.models:
            for site in self.sites:
                rows.extend(self._evaluation_rows(site, model))
        return rows

    def _evaluation_rows(self, site: str, model: str) -> list[EvaluationRow]:
        record = self.evaluations.get((site, model))
        said = record["parsed"] if record else None
        if said is None or not said.metrics:
            given = str(record.get("reason") or "") if record else ""
            fallback = WITHHELD if said is not None else NOTHING_RECORDED
            return [
                EvaluationRow(
                    site=site,
                    role=self.role(site),
                    model=model,
                    round=said.round if said else None,
                    class_name="",
                    metric="",
                    mean=None,
                    std=None,
                    cases=said.evaluated_cases if said else 0,
                    empty=0,
                    note=given or fallback,
                )
            ]
        rows = [
            EvaluationRow(
                site=site,
                role=self.role(site),
                model=model,
                round=said.round,
                class_name=metric.class_name,
                metric=metric.metric,
                mean=metric.mean,
                std=metric.std,
                cases=metric.cases,
                empty=metric.empty,
                unit=said.distance_unit if metric.metric == "hd95" else "",
                note="" if metric.mean is not None else _why_none(said.metrics, metric),
            )
            for metric in said.metrics
        ]
        rows += [
            EvaluationRow(
                site=site,
                role=self.role(site),
                model=model,
                round=said.round,
                class_name=name,
                metric="",
                mean=None,
                std=None,
                cases=0,
                empty=0,
                note=NOT_ANNOTATED,
            )
            for name in self.not_annotated(site)
        ]
        place = {name: number for number, name in enumerate(self.classes)}
        return sorted(rows, key=lambda row: place.get(row.class_name, len(place)))


def _why_none(metrics: Sequence[Metric], metric: Metric) -> str:
    """Why a score has no mean: kept at the site, or no case has a value.

    The site's door leaves the number of cases where it keeps the mean of too few, and sets all
    numbers to 0 where the site has too few cases altogether.
    """
    counted = any(m.cases or m.empty for m in metrics if m.class_name == metric.class_name)
    return NO_VALUE if counted and not metric.cases else WITHHELD


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are there and finite; None where there is none."""
    present = [value for value in values if value is not None and math.isfinite(value)]
    return sum(present) / len(present) if present else None


def class_dice(metrics: Iterable[Metric]) -> dict[str, float]:
    """Dice of each class that has one."""
    return {m.class_name: m.mean for m in metrics if m.metric == "dice" and m.mean is not None}


def _over_classes(metrics: Iterable[Metric], name: str) -> float | None:
    """Mean over classes of a score's means; None where no class has one."""
    return mean(m.mean for m in metrics if m.metric == name)


def _unix(value: Any) -> float | None:
    """Seconds since 1970 from a number or an ISO 8601 text; None for anything else."""
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp()
        except ValueError:
            return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
