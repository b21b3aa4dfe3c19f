"""The records of one job to what they say together: rows of rounds and of evaluations."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from fedfms.contracts.contribution import METRICS, Metric
from fedfms.records.rows import EvaluationRow, GuardRow, RoundRow
from fedfms.records.schema import (
    ContributionRecord,
    EvaluationRecord,
    JobDone,
    JobRecord,
    Judged,
    Record,
    Resumed,
    RoundDone,
    RoundStarted,
)
from fedfms.records.scores import class_dice, over_classes
from fedfms.records.verdicts import sentence

# Notes of a row in evaluation.csv that has no mean.
WITHHELD = "withheld: fewer cases than the site lets out"
NO_VALUE = "no case has a value"
NOTHING_RECORDED = "nothing was recorded for this site"
NOT_ANNOTATED = "not annotated at this site"


class History:
    """What the records of one job say.

    Later records win over earlier ones of the same round and site, or of the same site and model.
    """

    def __init__(self, records: Sequence[Record], recipe: Mapping[str, Any]) -> None:
        self.job = JobRecord()
        self.status: Literal["completed", "aborted", "failed", "interrupted"] = "interrupted"
        self.started: float | None = None
        self.ended: float | None = None
        self.answers: dict[tuple[int, str], ContributionRecord] = {}
        self.done: dict[int, RoundDone] = {}
        self.judged: dict[int, Judged] = {}
        self.begun: set[int] = set()
        self.evaluations: dict[tuple[str, str], EvaluationRecord] = {}
        self.unreadable = 0  # contributions of another format
        self._holdout = frozenset(recipe.get("holdout") or ())
        self._asked_for = [str(name) for name in recipe.get("classes") or ()]
        self._roles: dict[str, str] = {}
        for record in records:
            self._read(record)
        seen = [site for _, site in self.answers] + [site for site, _ in self.evaluations]
        missed = [site for done in self.done.values() for site in done.missed]
        everyone = sorted({*self.job.sites, *seen, *missed})
        self.sites = [s for s in everyone if self.role(s) == "train"]
        self.sites += [s for s in everyone if self.role(s) != "train"]

    @property
    def rounds_done(self) -> int:
        """Rounds that were brought to their end."""
        return len(self.done)

    @property
    def pictures(self) -> list[tuple[str, str, str]]:
        """(site, model, path) of each overlay, in the order of the sites."""
        found = sorted(self._evaluated(), key=lambda one: self.sites.index(one[0]))
        return [(s, m, path) for s, m, record in found if record for path in record.pictures]

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
        return [
            (site, model, (record and record.reason) or NOTHING_RECORDED)
            for site, model, record in self._evaluated()
            if record is None or record.said is None
        ]

    def _evaluated(self) -> Iterator[tuple[str, str, EvaluationRecord | None]]:
        """Each model, the final one first, at each site, with what is known of it."""
        for model in self.models:
            for site in self.sites:
                yield site, model, self.evaluations.get((site, model))

    def reported(self, site: str) -> bool:
        """Whether the site ever answered a round with a report, accepted or not."""
        return any(s == site and a.said is not None for (_, s), a in self.answers.items())

    def _said(self, site: str) -> Iterator[tuple[Metric, ...]]:
        said = [answer.said for (_, s), answer in self.answers.items() if s == site]
        said += [record.said for (s, _), record in self.evaluations.items() if s == site]
        return (one.metrics for one in said if one is not None)

    def withholds(self, site: str) -> bool:
        """Whether the last answer in which the site names scores lets none of them out."""
        in_order = sorted(number for number, s in self.answers if s == site)
        said = [self.answers[number, site].said for number in in_order]
        scored = [one.metrics for one in said if one is not None and one.metrics]
        return bool(scored) and all(
            m.mean is None and _why_none(scored[-1], m) == WITHHELD for m in scored[-1]
        )

    def role(self, site: str) -> str:
        """Role of a site, from what it said or from the recipe: train or holdout."""
        return self._roles.get(site, "holdout" if site in self._holdout else "train")

    def _read(self, record: Record) -> None:
        match record:
            case JobRecord():
                self.job = record
                self.started = record.started if self.started is None else self.started
            case RoundStarted():
                self.begun.add(record.round)
            case ContributionRecord():
                self.begun.add(record.round)
                self.answers[record.round, record.site] = record
                self._hear(record)
            case Judged():
                self.judged[record.round] = record
            case RoundDone():
                self.done[record.round] = record
            case EvaluationRecord():
                self.evaluations[record.site, record.model] = record
                self._hear(record)
            case Resumed():
                self._forget(record.round)
            case JobDone():
                self.status = record.status
        if record.time is not None:
            self.ended = record.time if self.ended is None else max(self.ended, record.time)

    def _forget(self, first: int) -> None:
        """What a server process had not finished when it ended is done again."""
        self.answers = {key: value for key, value in self.answers.items() if key[0] < first}
        self.done = {number: done for number, done in self.done.items() if number < first}
        self.judged = {number: one for number, one in self.judged.items() if number < first}
        self.begun = {number for number in self.begun if number < first}
        self.evaluations = {}
        self.status = "interrupted"

    def _hear(self, record: ContributionRecord | EvaluationRecord) -> None:
        self.unreadable += record.is_unreadable
        if record.said is not None:
            self._roles.setdefault(record.site, record.said.role)

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
        missed = done.missed.get(site) if done else None
        if answer is None:
            if missed is None and (done is None or role != "train"):
                return None  # the round never ended, or a holdout that was not asked
            reason = missed or NOTHING_RECORDED
            return RoundRow(round=number, site=site, role=role, accepted=False, reason=reason)
        why = answer.reason or missed or NOTHING_RECORDED
        values: dict[str, Any] = {
            "bytes_down": answer.bytes_down,
            "bytes_up": answer.bytes_up,
            "time": answer.time,
            "reason": None if answer.accepted else why,
        }
        if (said := answer.said) is not None:
            values |= {name: over_classes(said.metrics, name) for name in METRICS}
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
        if (judged := self.judged.get(number)) is not None:  # measured, and not only said
            measured = {one.site: one.norm for one in judged.sites}
            values["update_norm"] = measured.get(site, values.get("update_norm"))
        return RoundRow(round=number, site=site, role=role, accepted=answer.accepted, **values)

    def guard_rows(self) -> list[GuardRow]:
        """A row for each site and round that the guard of a round judged."""
        return [
            GuardRow(
                round=number,
                site=one.site,
                norm=one.norm,
                usual_norm=one.usual_norm,
                cosine=one.cosine,
                slices=one.slices,
                counted_slices=one.counted_slices,
                factor=one.factor,
                findings=";".join(one.findings),
                text=sentence(one, acts=judged.acts) if one.findings else "",
            )
            for number, judged in sorted(self.judged.items())
            for one in judged.sites
        ]

    def evaluation_rows(self) -> list[EvaluationRow]:
        """A row for each score, final model first; one with a note for a site without any."""
        return [row for one in self._evaluated() for row in self._evaluation_rows(*one)]

    def _evaluation_rows(
        self, site: str, model: str, record: EvaluationRecord | None
    ) -> list[EvaluationRow]:
        said = record.said if record else None
        row = functools.partial(
            EvaluationRow,
            site=site,
            role=self.role(site),
            model=model,
            round=said.round if said else None,
        )
        if said is None or not said.metrics:
            given = (record and record.reason) or ""
            fallback = WITHHELD if said is not None else NOTHING_RECORDED
            return [row(cases=said.evaluated_cases if said else 0, note=given or fallback)]
        rows = [
            row(
                **dataclasses.asdict(metric),
                unit=said.distance_unit if metric.metric == "hd95" else "",
                note="" if metric.mean is not None else _why_none(said.metrics, metric),
            )
            for metric in said.metrics
        ]
        rows += [row(class_name=name, note=NOT_ANNOTATED) for name in self.not_annotated(site)]
        place = {name: number for number, name in enumerate(self.classes)}
        return sorted(rows, key=lambda one: place.get(one.class_name, len(place)))


def _why_none(metrics: Sequence[Metric], metric: Metric) -> str:
    """Why a score has no mean: kept at the site, or no case has a value.

    The site's door leaves the number of cases where it keeps the mean of too few, and sets all
    numbers to 0 where the site has too few cases altogether.
    """
    counted = any(m.cases or m.empty for m in metrics if m.class_name == metric.class_name)
    return NO_VALUE if counted and not metric.cases else WITHHELD
