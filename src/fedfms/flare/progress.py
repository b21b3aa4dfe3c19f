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
    dice: float | None  # of the model that the sites received; mean over those that let it out
    evaluated: bool  # whether any of them scored it; the recipe's evaluate_every


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
                    int(number), int(answered), None if dice is None else float(dice), bool(scored)
                )
                for number, answered, dice, scored in values["finished"]
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
        answers: dict[str, float | None] = {}
        scored = False
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
                scored = scored or _evaluated(record["contribution"])
            elif kind == "round_done":
                ends.append(record["time"])
                dice = [value for value in answers.values() if value is not None]
                mean = sum(dice) / len(dice) if dice else None
                finished.append(FinishedRound(record["round"], len(answers), mean, scored))
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


def _dice(contribution: dict[str, Any] | None) -> float | None:
    """Mean over classes of the mean Dice of one training site's answer."""
    if contribution is None or contribution["role"] != "train":
        return None
    metrics = contribution["metrics"]
    values = [m["mean"] for m in metrics if m["metric"] == "dice" and m["mean"] is not None]
    return sum(values) / len(values) if values else None
