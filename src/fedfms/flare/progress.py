"""How far a job is, from the records that its server writes."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pydantic import TypeAdapter

from fedfms.contracts.contribution import Contribution
from fedfms.contracts.now import WORST_FIRST, SiteNow, SitePhase
from fedfms.flare.live import LiveSite
from fedfms.flare.sentences import failure
from fedfms.flare.time_left import RoundTimes, time_left
from fedfms.records.read import RecordReader
from fedfms.records.schema import (
    ContributionRecord,
    EvaluationRecord,
    JobDone,
    JobRecord,
    Note,
    Record,
    Resumed,
    RoundDone,
    RoundStarted,
)
from fedfms.records.scores import class_dice, mean

ALARMS = ("waits", "goes_on", "ends")  # kinds of notes that somebody wants to be told of
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
    missed: tuple[str, ...] = ()  # all rounds and evaluations that a site missed, and why
    notes: tuple[str, ...] = ()  # what happened to sites and to the run, each with its time
    # Of a job that runs; empty or None before it starts. Times as in `SiteNow`.
    now: tuple[SiteNow, ...] = ()  # each site once, by name; `worst_first` orders them
    time: float | None = None  # when this was so, by the server's clock
    began: float | None = None  # when this round, or the final evaluation, began
    # Seconds until the end of the run, at `time`: it ends between the two, as a rule. The range
    # narrows. None where nothing can be said yet (no round is over) or where the run `waits`.
    left: tuple[float, float] | None = None
    waits: str | None = None  # why the run stands still and for whom, one sentence

    @property
    def worst_first(self) -> tuple[SiteNow, ...]:
        """The sites in the order in which somebody should look at them.

        Those with a failure, then those that are gone, then who is furthest behind.
        """
        place = {phase: number for number, phase in enumerate(WORST_FIRST)}
        return tuple(
            sorted(
                self.now,
                key=lambda one: (
                    one.failure is None,
                    one.gpu != "lost",
                    place[one.phase],
                    one.share if one.share is not None else 0.0,
                    one.name,
                ),
            )
        )

    alarms: tuple[str, ...] = ()  # of these: that the run waits, goes on, or ends

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
        known = {one.name for one in dataclasses.fields(cls)} - {"text"}
        if not isinstance(values, Mapping) or set(values) != known:
            raise ValueError("other entries than an event of this version has")
        return _EVENT.validate_python(values)


_EVENT = TypeAdapter(Event)


class JobProgress(RecordReader):
    """How far a job is, from its growing records.jsonl.

    Args:
        path: records.jsonl.
        rounds: of the recipe.
        evaluates: whether the model is scored in the round of a number; `Recipe.evaluates`.
    """

    def __init__(
        self, path: Path, rounds: int, evaluates: Callable[[int], bool] = lambda number: True
    ) -> None:
        super().__init__(path)
        self._evaluates = evaluates
        self._story, self._told = _Story(rounds), 0  # and how many of the records it has read

    def trouble(self) -> list[str]:
        """Why sites did not contribute to the last round, one sentence each."""
        last = max((r.round for r in self.records if isinstance(r, RoundStarted)), default=0)
        return [
            f"{record.site} in round {last}: {failure(record.reason, record.site)}"
            for record in self.records
            if isinstance(record, ContributionRecord)
            and record.round == last
            and not record.accepted
        ]

    def event(
        self,
        text: str = "",
        now: float | None = None,
        live: Mapping[str, LiveSite] = MappingProxyType({}),
        held: Sequence[Record] = (),
    ) -> Event:
        """The state after the records so far.

        Args:
            text: a sentence for the event.
            now: seconds since 1970-01-01 UTC; the clock of here by default.
            live: what the job's process hears of its sites, where it is at hand.
            held: records that are not in the file yet.
        """
        story = self._story
        for record in self.records[self._told :]:
            story.read(record)
        self._told = len(self.records)
        if held:
            story = copy.deepcopy(story)
            for record in held:
                story.read(record)
        if story.ended is not None:
            now = story.ended
        now = story.now = time.time() if now is None else now
        sites = tuple(story.site_now(name, live.get(name)) for name in story.everybody(live))
        left = None
        if story.phase in ("train", "evaluate") and story.waits is None:
            left = time_left(
                story.times,
                rounds=story.rounds,
                evaluates=self._evaluates,
                sites=sites,
                models={site: len(models) for site, models in story.evaluated.items()},
                in_evaluation=story.phase == "evaluate",
                began=story.began,
                now=now,
            )
        return Event(
            phase=story.phase,
            text=text,
            notes=tuple(story.notes),
            alarms=tuple(story.alarms),
            round=story.round,
            rounds=story.rounds,
            answered=tuple(sorted(story.evaluated if story.phase == "evaluate" else story.taken)),
            sites=story.sites,
            finished=tuple(story.finished),
            missed=story.missed(),
            now=sites,
            time=now,
            began=story.began,
            left=left,
            waits=story.waits,
        )


@dataclass(slots=True)
class _SiteStory:
    """What the records say of one site so far."""

    answer: str | None = None  # of this round: accepted, refused
    answered_at: float | None = None
    away: float | None = None  # since when it is gone, as the keeper noted
    paused: float | None = None  # since when its own people paused it
    failure: str | None = None
    said: Contribution | None = None  # its last report of training or of a holdout's round
    scored: Contribution | None = None  # its last report with a score
    bytes_down: int | None = None
    bytes_up: int | None = None


class _Story:
    """Reads records one after the other."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds  # of the recipe, or with which it stopped
        self.now = time.time()  # when it is told
        self.ended: float | None = None
        self.phase: Phase = "train"
        self.sites: tuple[str, ...] = ()
        self.round: int | None = None
        self.began: float | None = None  # this round, or the evaluation
        self.taken: dict[str, Contribution | None] = {}  # answers to this round that were accepted
        self.evaluated: dict[str, set[str]] = {}  # site -> models
        self.times: list[RoundTimes] = []  # of finished rounds, and of the one that runs
        self.finished: list[FinishedRound] = []
        # round -> (site, sentence); the rounds that are over
        self._missed: dict[int, list[tuple[str, str]]] = {}
        self._not_evaluated: list[str] = []
        self.refused: dict[str, str] = {}  # of this round
        self.notes: list[str] = []
        self.alarms: list[str] = []
        self._was_stopped = False  # by somebody, who let it go on later
        self.waits: str | None = None
        self._stories: dict[str, _SiteStory] = {}

    def site(self, name: str) -> _SiteStory:
        return self._stories.setdefault(name, _SiteStory())

    def everybody(self, live: Mapping[str, LiveSite]) -> list[str]:
        """Names of all sites that are known to take part."""
        with_task = {name for name, site in live.items() if site.kind}
        return sorted({*self.sites, *self._stories, *with_task})

    def read(self, record: Record) -> None:
        """The next record."""
        at = self.now if record.time is None else record.time
        match record:
            case JobRecord():
                self.sites = record.sites
            case RoundStarted():
                self._round_started(record.round, at)
            case ContributionRecord():
                self._contribution(record, at)
            case RoundDone():
                self._round_done(record, at)
            case Resumed():
                self._resumed(record, at)
            case Note():
                self._note(record, at)
            case EvaluationRecord():
                self._evaluation(record, at)
            case JobDone():
                self.phase, self.waits, self.ended = "done", None, at
                self._was_stopped = True

    def _round_started(self, number: int, at: float) -> None:
        self.phase, self.round, self.began = "train", number, at
        self.taken, self.refused = {}, {}
        if self.times and self.times[-1].ended is None:
            self.times.pop()  # begun by a process that ended
        self.times.append(RoundTimes(number, at))
        for one in self._stories.values():
            one.answer, one.answered_at = None, None

    def _contribution(self, record: ContributionRecord, at: float) -> None:
        one = self.site(record.site)
        if record.accepted:
            one.failure = None
            one.bytes_down, one.bytes_up = record.bytes_down, record.bytes_up
            if (said := record.said) is not None:
                one.said = said
                one.scored = said if class_dice(said.metrics) else one.scored
        if record.round != self.round:
            return  # late
        one.answered_at = at
        if record.accepted:
            one.answer = "accepted"
            self.taken[record.site] = record.said
            self.refused.pop(record.site, None)
            if self.times:
                self.times[-1].answers[record.site] = (
                    dict(record.said.seconds) if record.said else {}
                )
        else:
            one.answer, one.failure = "refused", failure(record.reason, record.site)
            self.refused[record.site] = record.reason or ""

    def missed(self) -> tuple[str, ...]:
        """Sentences: rounds that are over, the one that runs, the evaluation."""
        over = [text for number in sorted(self._missed) for _, text in self._missed[number]]
        number = self.round or 0
        now = [_missed(site, number, why, True) for site, why in sorted(self.refused.items())]
        return (*over, *now, *self._not_evaluated)

    def _round_done(self, record: RoundDone, at: float) -> None:
        if self.times and self.times[-1].ended is None:
            self.times[-1].ended = at
        training = len(set(self.sites) - self._holdouts())
        self.finished.append(_finished(record.round, self.taken, training))
        for name, reason in sorted(record.missed.items()):
            self.site(name).failure = failure(reason, name)
        self._missed[record.round] = [
            (name, _missed(name, record.round, reason, name in self.refused))
            for name, reason in sorted(record.missed.items())
        ]
        self.refused = {}
        if len(self.finished) == self.rounds:
            self._evaluation_begins(at)

    def _evaluation_begins(self, at: float) -> None:
        self.phase, self.began, self.evaluated = "evaluate", at, {}

    def _resumed(self, record: Resumed, at: float) -> None:
        self.phase, self.round, self.taken, self.evaluated = "train", record.round, {}, {}
        self.refused, self.began, self.waits, self.ended = {}, at, None, None
        del self.finished[record.round :]
        self._missed = {n: said for n, said in self._missed.items() if n < record.round}
        self._not_evaluated = []
        self.times = [one for one in self.times if one.number < record.round and one.ended]
        if self.times:
            self.times[-1].ended_in_order = False  # the time to the next is no pause between rounds
        for one in self._stories.values():
            one.answer, one.answered_at = None, None
        if record.round == self.rounds:
            self._evaluation_begins(at)
        if not self._was_stopped:
            self.notes.append(_at(record.time) + WENT_ON)
        self._was_stopped = False

    def _note(self, note: Note, at: float) -> None:
        self.notes.append(_at(note.time) + note.text)
        if note.kind in ALARMS:
            self.alarms.append(self.notes[-1])
        if note.kind != "guarded" and self.times and self.times[-1].ended is None:
            self.times[-1].disturbed = True
        if note.kind == "stopped_early":
            self.rounds = (self.round or 0) + 1
        if note.kind == "waits":
            self.waits = note.text
        elif str(note.kind) in ("goes_on", "stopped", "ends"):
            self.waits = None
        if note.site is None:
            return
        one, kind = self.site(note.site), str(note.kind)
        if kind in ("site_died", "site_gone"):
            one.away = at if one.away is None else one.away
            one.failure = note.text
        elif kind == "site_paused":
            one.paused, one.failure = at, note.text
        elif kind == "site_back":
            one.away, one.paused, one.failure = None, None, None

    def _evaluation(self, record: EvaluationRecord, at: float) -> None:
        if self.phase != "evaluate":  # of a job that only evaluates
            self._evaluation_begins(self.began or at)
        one = self.site(record.site)
        self.evaluated.setdefault(record.site, set()).add(record.model)
        one.answered_at = at
        one.failure = failure(record.reason, record.site) if record.reason else None
        one.answer = "refused" if record.reason else "accepted"
        if record.reason:
            self._not_evaluated.append(
                f"{record.site} did not evaluate: {failure(record.reason, record.site)}"
            )
        if record.said is not None and class_dice(record.said.metrics):
            one.scored = record.said

    def _holdouts(self) -> set[str]:
        return {n for n, one in self._stories.items() if one.said and one.said.role == "holdout"}

    # ------------------------------------------------------------------------------- one site

    def site_now(self, name: str, live: LiveSite | None) -> SiteNow:
        """All that is known of one site."""
        one, live = self.site(name), live or LiveSite()
        connected = live.is_connected(self.now)
        if one.away is not None and live.at_work and live.heard and live.since > one.away:
            connected = True  # it works again, whatever the keeper has noted so far
        elif one.away is not None:
            connected = False
        phase, since = self._phase(one, live, connected)
        at_work = phase in ("download", "start", "prepare", "evaluate", "train", "upload")
        heard = [at for at in (live.heard, one.answered_at) if at is not None]
        said, scored = one.said, one.scored
        return SiteNow(
            name=name,
            phase=phase,
            since=since,
            done=live.done if at_work else 0,
            total=live.total if at_work else 0,
            told=live.told if at_work else None,
            heard=max(heard, default=None),
            connected=connected,
            failure=None if at_work else one.failure,
            role=said.role if said is not None else None,
            pace={**(said.seconds if said is not None else {}), **live.pace},
            dice=None if scored is None else mean(class_dice(scored.metrics).values()),
            loss=said.loss if said is not None else None,
            bytes_down=one.bytes_down,
            bytes_up=one.bytes_up,
            peak_memory=max(said.peak_memory_bytes.values(), default=None) if said else None,
            gpu=live.gpu,
            missed=sum(name == site for said in self._missed.values() for site, _ in said),
        )

    def _phase(
        self, one: _SiteStory, live: LiveSite, connected: bool
    ) -> tuple[SitePhase, float | None]:
        """What a site is at, and since when."""
        evaluates = self.phase == "evaluate"
        if one.paused is not None:
            return "paused", one.paused
        if not connected:
            return "gone", one.away or live.heard
        its_task = ("evaluate", 0) if evaluates or self.round is None else ("train", self.round)
        if live.at_work and (live.kind, live.round) == its_task and self.phase != "done":
            return live.phase, live.since
        if one.answer == "accepted":
            return "answered", one.answered_at
        if one.answer == "refused":
            return "failed", one.answered_at
        return "waits", self.began


def _missed(site: str, number: int, reason: str, was_told: bool) -> str:
    """A sentence; the same one for an answer that was refused and told of while the round ran."""
    return f"{site} {'failed in' if was_told else 'missed'} round {number}: {failure(reason, site)}"


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
