"""How far a job is, from the records that its server writes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from fedfms.contracts.contribution import Contribution
from fedfms.records.read import RecordReader
from fedfms.records.schema import (
    ContributionRecord,
    EvaluationRecord,
    JobDone,
    JobRecord,
    Note,
    Resumed,
    RoundDone,
    RoundStarted,
)
from fedfms.records.scores import class_dice, mean

WENT_ON = "the server's process of this job ended, and a new one goes on"

Phase = Literal["provision", "start", "submit", "train", "evaluate", "fetch", "done"]


@dataclass(frozen=True, slots=True)
class FinishedRound:
    """A round that is over."""

    number: int  # from 0
    answered: int  # sites whose answers were accepted
    # of the model that the sites received; mean over those that let it out, None where they did
    # not score the same classes
    dice: float | None
    evaluated: bool  # whether any of them scored it; the recipe's evaluate_every
    told: int = 0  # training sites that let out a Dice
    training: int = 0  # training sites, as far as they are known
    by_class: tuple[tuple[str, float, int], ...] = ()  # else: class, mean, sites that it is over


@dataclass(frozen=True, slots=True)
class Event:
    """Something to tell the person who waits."""

    phase: Phase
    text: str = ""  # one sentence, for what is out of the ordinary
    round: int | None = None  # that runs, from 0
    rounds: int = 0
    answered: tuple[str, ...] = ()  # sites, in this round or of the final model
    sites: tuple[str, ...] = ()
    finished: tuple[FinishedRound, ...] = ()  # all rounds that are over
    seconds_left: float | None = None
    missed: tuple[str, ...] = ()  # all rounds and evaluations that a site missed, and why
    notes: tuple[str, ...] = ()  # what happened to sites and to the run, each with its time

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, for a coordinator on another machine; without the text."""
        told: dict[str, Any] = _EVENT.dump_python(self, mode="json", exclude={"text"})
        return told

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Event:
        """The other way round.

        Raises:
            ValueError: it is none of this version.
        """
        if set(values) != {one.name for one in dataclasses.fields(cls)} - {"text"}:
            raise ValueError("other entries than an event of this version has")
        return _EVENT.validate_python(values)


_EVENT = TypeAdapter(Event)


class JobProgress(RecordReader):
    """How far a job is, from its growing records.jsonl."""

    def __init__(self, path: Path, rounds: int) -> None:
        super().__init__(path)
        self.rounds = rounds

    def trouble(self) -> list[str]:
        """Why sites did not contribute to the last round, one sentence each."""
        last = max((r.round for r in self.records if isinstance(r, RoundStarted)), default=0)
        return [
            f"{record.site} in round {last}: {record.reason}"
            for record in self.records
            if isinstance(record, ContributionRecord)
            and record.round == last
            and not record.accepted
        ]

    def event(self, text: str = "", now: float | None = None) -> Event:
        """The state after the records so far."""
        now = time.time() if now is None else now
        sites: tuple[str, ...] = ()
        number: int | None = None
        answers: dict[str, Contribution | None] = {}  # to this round
        evaluated: set[str] = set()
        started = now
        ends: list[float] = []
        finished: list[FinishedRound] = []
        missed: list[str] = []
        holdouts: set[str] = set()
        notes: list[str] = []
        phase: Phase = "train"
        for record in self.records:
            match record:
                case JobRecord():
                    sites = record.sites
                case RoundStarted():
                    number, answers = record.round, {}
                    started = started if ends or record.time is None else record.time
                case ContributionRecord() if record.accepted and record.round == number:
                    answers[record.site] = record.said
                    if record.said is not None and record.said.role == "holdout":
                        holdouts.add(record.site)
                case RoundDone():
                    ends.append(now if record.time is None else record.time)
                    finished.append(_finished(record.round, answers, len(set(sites) - holdouts)))
                    missed += [
                        f"{site} missed round {record.round}: {reason}"
                        for site, reason in sorted(record.missed.items())
                    ]
                case Resumed():
                    phase, number, answers, evaluated = "train", record.round, {}, set()
                    del ends[record.round :], finished[record.round :]
                    notes.append(_at(record.time) + WENT_ON)
                case Note():
                    notes.append(_at(record.time) + record.text)
                case EvaluationRecord():
                    phase = "evaluate"
                    evaluated.add(record.site)
                    if record.reason:
                        missed.append(f"{record.site} did not evaluate: {record.reason}")
                case JobDone():
                    phase = "done"
        if phase == "train" and ends and len(ends) == self.rounds:
            phase = "evaluate"
        return Event(
            phase=phase,
            text=text,
            notes=tuple(notes),
            round=number,
            rounds=self.rounds,
            answered=tuple(sorted(evaluated if phase == "evaluate" else answers)),
            sites=sites,
            finished=tuple(finished),
            missed=tuple(missed),
            seconds_left=self._seconds_left(now, started, ends) if phase == "train" else None,
        )

    def _seconds_left(self, now: float, started: float, ends: list[float]) -> float | None:
        """Rounds to come at the mean pace so far, and half a round for the last evaluation."""
        if not ends:
            return None
        pace = (ends[-1] - started) / len(ends)
        return max(0.0, (self.rounds - len(ends) + 0.5) * pace - (now - ends[-1]))


def _at(seconds: float | None) -> str:
    """The hour and minute here, before a sentence."""
    return "" if seconds is None else time.strftime("%H:%M ", time.localtime(seconds))


def _finished(
    number: int, answers: Mapping[str, Contribution | None], training: int
) -> FinishedRound:
    """The round, with a mean over classes only where all sites scored the same ones."""
    said = [one for one in answers.values() if one is not None]
    scored = any(one.evaluated_cases > 0 for one in said)
    telling = [dice for one in said if one.role == "train" and (dice := class_dice(one.metrics))]
    by_class: dict[str, list[float]] = {}
    for dice in telling:
        for name, value in dice.items():
            by_class.setdefault(name, []).append(value)
    means = {name: mean(values) for name, values in by_class.items()}
    if len({frozenset(dice) for dice in telling}) <= 1:
        over_all = mean(means.values())
        return FinishedRound(number, len(answers), over_all, scored, len(telling), training)
    told = tuple((name, value or 0.0, len(by_class[name])) for name, value in sorted(means.items()))
    return FinishedRound(number, len(answers), None, scored, len(telling), training, told)
