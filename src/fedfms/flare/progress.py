"""How far a job is, from the records that its server writes."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

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

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, for a coordinator on another machine; without the text."""
        return {
            "phase": self.phase,
            "round": self.round,
            "rounds": self.rounds,
            "answered": list(self.answered),
            "sites": list(self.sites),
            "finished": [list(dataclasses.astuple(one)) for one in self.finished],
            "seconds_left": self.seconds_left,
            "missed": list(self.missed),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Event:
        """The other way round.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        if values["phase"] not in get_args(Phase):
            raise ValueError(values["phase"])
        left = values["seconds_left"]
        return cls(
            phase=values["phase"],
            round=None if values["round"] is None else int(values["round"]),
            rounds=int(values["rounds"]),
            answered=tuple(map(str, values["answered"])),
            sites=tuple(map(str, values["sites"])),
            finished=tuple(
                FinishedRound(
                    int(number),
                    int(answered),
                    None if dice is None else float(dice),
                    bool(scored),
                    int(told),
                    int(training),
                    tuple((str(name), float(mean), int(over)) for name, mean, over in by_class),
                )
                for number, answered, dice, scored, told, training, by_class in values["finished"]
            ),
            seconds_left=None if left is None else float(left),
            missed=tuple(map(str, values["missed"])),
        )


@dataclass(slots=True)
class RecordReader:
    """Reads a growing records.jsonl; what is not a whole line yet is read next time."""

    path: Path
    rounds: int
    records: list[dict[str, Any]] = field(default_factory=list)
    _offset: int = 0

    def read_new(self) -> list[dict[str, Any]]:
        """Records since the last call."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        new = [json.loads(line) for line in whole.splitlines() if line.strip()]
        self.records += new
        return new

    def trouble(self) -> list[str]:
        """Why sites did not contribute to the last round, one sentence each."""
        last = max((r["round"] for r in self.records if r["record"] == "round_started"), default=0)
        return [
            f"{record['site']} in round {last}: {record['reason']}"
            for record in self.records
            if record["record"] == "contribution"
            and record["round"] == last
            and not record["accepted"]
        ]

    def event(self, text: str = "", now: float | None = None) -> Event:
        """The state after the records so far."""
        now = time.time() if now is None else now
        sites: tuple[str, ...] = ()
        number: int | None = None
        answers: dict[str, dict[str, float]] = {}
        scored = False
        holdouts: set[str] = set()
        evaluated: set[str] = set()
        started = now
        ends: list[float] = []
        finished: list[FinishedRound] = []
        missed: list[str] = []
        phase: Phase = "train"
        for record in self.records:
            kind = record["record"]
            if kind == "job":
                sites = tuple(record["sites"])
            elif kind == "round_started":
                number, answers, scored = record["round"], {}, False
                started = started if ends else record["time"]
            elif kind == "contribution" and record["accepted"] and record["round"] == number:
                answers[record["site"]] = _dice(record["contribution"])
                if (record["contribution"] or {}).get("role") == "holdout":
                    holdouts.add(record["site"])
                scored = scored or _evaluated(record["contribution"])
            elif kind == "round_done":
                ends.append(record["time"])
                training = len(set(sites) - holdouts)
                finished.append(_finished(record["round"], answers, scored, training))
                missed += [
                    f"{site} missed round {record['round']}: {reason}"
                    for site, reason in sorted(record.get("missed", {}).items())
                ]
            elif kind == "evaluation":
                phase = "evaluate"
                evaluated.add(record["site"])
                if record.get("reason"):
                    missed.append(f"{record['site']} did not evaluate: {record['reason']}")
            elif kind == "job_done":
                phase = "done"
        if phase == "train" and ends and len(ends) == self.rounds:
            phase = "evaluate"
        return Event(
            phase=phase,
            text=text,
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


def _evaluated(contribution: dict[str, Any] | None) -> bool:
    """Whether a site scored any case in a round."""
    return contribution is not None and contribution["evaluated_cases"] > 0


def _finished(
    number: int, answers: Mapping[str, Mapping[str, float]], scored: bool, training: int
) -> FinishedRound:
    """The round, with a mean over classes only where all sites scored the same ones."""
    telling = [dice for dice in answers.values() if dice]
    by_class: dict[str, list[float]] = {}
    for dice in telling:
        for name, value in dice.items():
            by_class.setdefault(name, []).append(value)
    means = {name: sum(values) / len(values) for name, values in by_class.items()}
    if len({frozenset(dice) for dice in telling}) <= 1:
        mean = sum(means.values()) / len(means) if means else None
        return FinishedRound(number, len(answers), mean, scored, len(telling), training)
    told = tuple((name, mean, len(by_class[name])) for name, mean in sorted(means.items()))
    return FinishedRound(number, len(answers), None, scored, len(telling), training, told)


def _dice(contribution: dict[str, Any] | None) -> dict[str, float]:
    """Mean Dice of each class of one training site's answer."""
    if contribution is None or contribution["role"] != "train":
        return {}
    return {
        m["class_name"]: m["mean"]
        for m in contribution["metrics"]
        if m["metric"] == "dice" and m["mean"] is not None
    }
