"""What is known of runs, in the words and numbers that the page shows."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fedfms.contracts.announcement import Announcement
from fedfms.contracts.codes import CODES
from fedfms.contracts.now import PHASE_WORDS, WORST_FIRST, SiteNow
from fedfms.flare.progress import WENT_ON, Event
from fedfms.flare.sentences import end, failure
from fedfms.flare.session import JobState
from fedfms.kits.certificates import RENEW_DAYS
from fedfms.records.history import History
from fedfms.records.schema import (
    ContributionRecord,
    EvaluationRecord,
    JobDone,
    Note,
    NoteKind,
    Record,
    Resumed,
    RoundDone,
    RoundStarted,
)
from fedfms.records.scores import mean
from fedfms.report import words
from fedfms.watch.figures import Curves, draw
from fedfms.watch.known import Known, RunNow

Tone = Literal["bad", "warn", "busy", "well", "rest"]

ALL_SITES = 24  # shown at once; of more, those with which something is wrong and
FIRST_SITES = 12  # so many, and the others behind a click
FIRST_NEWS = 12
NAMED = 3  # sites in one sentence; of others their number
SILENT_SECONDS = 60.0  # a sign of life that is older is worth a word

_UNITS = {"prepare": "cases", "evaluate": "slices", "train": "steps"}
_SINCE = {  # state, how long
    "failed": "{0} {1} ago",
    **dict.fromkeys(("gone", "paused", "waits", "start", "download"), "{0}, for {1}"),
}
_KINDS = {
    "waits": "waiting for a task",
    "download": "receiving the model",
    "start": "waiting for the trainer",
    "prepare": "preparing",
    "evaluate": "evaluating",
    "train": "training",
    "upload": "sending",
    "answered": "answered",
    "failed": "failed",
    "paused": "paused",
    "gone": "gone",
}
_TONES: Mapping[str, Tone] = {
    "failed": "bad",
    "gone": "bad",
    "paused": "warn",
    "waits": "rest",
    "answered": "well",
}
_NOTE_TONES: Mapping[NoteKind, Tone] = {
    "site_died": "warn",
    "site_gone": "bad",
    "guarded": "bad",
    "waits": "warn",
    "ends": "bad",
}
_STATES: Mapping[str, tuple[str, Tone]] = {
    "RUNNING": ("runs", "busy"),
    "DISPATCHED": ("starts", "busy"),
    "SUBMITTED": ("waits to be started", "rest"),
    "APPROVED": ("waits to be started", "rest"),
    "FINISHED:COMPLETED": ("complete", "well"),
    "FINISHED:ABORTED": ("stopped on request", "rest"),
}


@dataclass(frozen=True, slots=True)
class Moment:
    """A time: for a reader without JavaScript in UTC, with it in the reader's own zone."""

    unix: float
    now: float

    @property
    def iso(self) -> str:
        """As HTML has it."""
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.unix))

    @property
    def text(self) -> str:
        """Hour and minute, the day where it is not today's."""
        today = time.strftime("%Y-%m-%d", time.gmtime(self.now))
        day = time.strftime("%Y-%m-%d", time.gmtime(self.unix))
        clock = time.strftime("%H:%M UTC", time.gmtime(self.unix))
        return clock if day == today else f"{day} {clock}"


@dataclass(frozen=True, slots=True)
class News:
    """Something that happened."""

    text: str
    tone: Tone = "rest"
    at: Moment | None = None


@dataclass(frozen=True, slots=True)
class Tile:
    """A number of the summary."""

    label: str
    value: str
    caption: str
    share: float | None = None  # of a bar below it, in [0, 1]
    times: tuple[Moment, ...] = ()  # behind the caption: a time, or from when to when


@dataclass(frozen=True, slots=True)
class SiteLine:
    """One site as the page shows it."""

    name: str
    tone: Tone
    state: str
    kind: str = ""  # in a word, to count those alike
    unseen: bool = False
    remark: str = ""
    advice: str = ""  # what to do about it
    share: int | None = None  # percent of its phase
    counted: str = ""  # the same in numbers
    seen: str = words.NONE  # its last sign of life
    late: bool = False  # that is long ago
    dice: str = words.NONE
    loss: str = words.NONE
    pace: str = words.NONE
    pace_parts: str = ""
    down: str = words.NONE
    up: str = words.NONE
    memory: str = words.NONE
    gpu: str = words.NONE
    missed: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """One run in the list of runs."""

    id: str
    name: str
    state: str
    tone: Tone
    submitted: str
    rounds: str
    left: str


@dataclass(frozen=True, slots=True)
class RunView:
    """One run as the page shows it."""

    id: str
    title: str
    subtitle: str
    name: str
    submitted: str
    headline: str
    state: str
    tone: Tone
    notices: Sequence[News] = ()
    tiles: Sequence[Tile] = ()
    sites: Sequence[SiteLine] = ()
    first_sites: int = FIRST_SITES
    counts: Sequence[tuple[Tone, str]] = ()
    news: Sequence[News] = ()
    curves: Curves = field(default_factory=Curves)
    recipe: Sequence[tuple[str, str]] = ()
    evaluates: bool = False
    asked: Moment | None = None

    @property
    def many(self) -> bool:
        """Whether there are so many sites that a map of them helps."""
        return len(self.sites) > 12

    @property
    def first_news(self) -> Sequence[News]:
        """What is shown at once."""
        return self.news[:FIRST_NEWS]

    @property
    def older_news(self) -> Sequence[News]:
        """The rest."""
        return self.news[FIRST_NEWS:]


def list_runs(known: Known) -> list[Entry]:
    """A line for each run, the newest first."""
    return [_entry(run) for run in known.runs]


def general_notices(known: Known, now: float) -> list[News]:
    """What holds for every run: the server that does not answer, certificates that end."""
    return [*_no_answer(known, now), *_ending(known, now)]


def _no_answer(known: Known, now: float) -> Iterator[News]:
    if known.trouble:
        since = f"; what is shown is of {_ago(now - known.asked)}" if known.asked else ""
        yield News(f"The server does not answer{since}: {known.trouble}.", "bad")


def _ending(known: Known, now: float) -> Iterator[News]:
    soon: dict[str, list[str]] = {}
    for owner, ends in sorted(known.certificates.items(), key=lambda one: one[1]):
        if (days := (ends - now) / 86400) < RENEW_DAYS:
            soon.setdefault(_days(days), []).append(owner)
    for when, owners in soon.items():
        text = f"{_names(owners)} {when}: renew with fedfms provision … --renew NAME."
        tone: Tone = "bad" if when == ENDED else "warn"
        yield News(text[0].upper() + text[1:] if text.startswith("the ") else text, tone)


def view_run(run: RunNow, known: Known, now: float) -> RunView:
    """One run, all in words.

    Args:
        run: one of `known.runs`.
        known: for what holds for every run.
        now: seconds since 1970-01-01 UTC, by the clock that `known` goes by.
    """
    history = History(run.records, run.recipe)
    event = run.event
    state, tone = _STATES.get(run.state.status, ("failed", "bad"))
    lines = _sites(run, history, known, now)
    recipe = run.recipe
    method = str(recipe.get("method", ""))
    classes = words.class_names(recipe.get("classes", ()))
    name, explained = words.method(method, recipe.get("adapter_blocks")) if method else ("", "")
    if event is not None and event.waits and run.state.status == "RUNNING":
        state, tone = "waits", "warn"
    return RunView(
        id=run.state.job_id,
        title=(f"Segment Anything learns {classes}" if classes else run.state.name or "A run"),
        subtitle=": ".join(filter(None, (name, explained))),
        name=run.state.name,
        submitted=_submitted(run.state),
        headline=_headline(run, event),
        state=state,
        tone=tone,
        notices=[*_no_answer(known, now), *_notices(run, lines, known), *_ending(known, now)],
        tiles=tuple(_tiles(run, history, lines, now)) if event is not None else (),
        sites=lines,
        first_sites=ALL_SITES
        if len(lines) <= ALL_SITES
        else max(FIRST_SITES, sum(one.tone in ("bad", "warn") for one in lines)),
        counts=_counts(lines),
        news=_news(run.records, event, now),
        curves=draw(history),
        recipe=_recipe(recipe),
        evaluates=not history.begun and bool(history.evaluations),
        asked=Moment(known.asked, now) if known.asked else None,
    )


# ------------------------------------------------------------------------------- the whole run


def _headline(run: RunNow, event: Event | None) -> str:
    status, short = run.state.status, run.state.job_id[:8]
    if status == "FINISHED:COMPLETED":
        return f"The run is complete. Its model and its report come with: fedfms fetch {short}"
    if status == "FINISHED:ABORTED":
        return f"The run was stopped on request. What there is of it: fedfms fetch {short}"
    if run.state.is_finished:
        return f"The run failed. fedfms fetch {short} says why and brings what there is of it."
    if run.state.is_waiting:
        detail = f": {run.state.detail}" if run.state.detail else ""
        again = "goes on soon with a new process at the server" if event else "has not begun yet"
        return f"The run {again}{detail}."
    if event is None:
        return "The run begins; there is nothing to show yet."
    if event.waits:
        return "The run waits; nothing is lost."
    answered, sites = len(event.answered), len(event.sites)
    if event.phase == "evaluate":
        return (
            f"Training is done. {answered} of {words.numerals(sites, 'site')} "
            "have scored the finished model."
        )
    if event.round is None:
        return "The run begins; the first round has not started yet."
    return (
        f"Round {event.round + 1} of {event.rounds} runs: {answered} of "
        f"{words.numerals(sites, 'site')} have answered."
    )


def _notices(run: RunNow, lines: Sequence[SiteLine], known: Known) -> Iterator[News]:
    event = run.event
    running = run.state.status == "RUNNING"
    if event is not None and event.waits and running:
        yield News(_sentence(event.waits), "warn")
    if run.state.detail and not run.state.is_waiting:
        yield News(f"FLARE says: {run.state.detail}", "warn")
    if not running:
        return
    if lost := [one.name for one in lines if "lost" in one.gpu]:
        yield News(
            f"{_names(lost)} lost the GPU: the trainer cannot reach it any more. At the site: "
            "docker compose restart, and if that does not help, the driver (nvidia-smi).",
            "bad",
        )
    if not known.records_told:
        yield News(
            "The server's kit does not let you read the records of a run, so curves and history "
            "are missing. Its next kit from fedfms provision does.",
            "warn",
        )


def _tiles(run: RunNow, history: History, lines: Sequence[SiteLine], now: float) -> Iterator[Tile]:
    event = run.event
    assert event is not None  # who calls this looked
    done = len(event.finished)
    lag = now - run.event_at if run.event_at is not None else 0.0
    caption = "the finished model is scored" if done == event.rounds else ""
    if event.phase == "train" and event.began is not None and event.time is not None:
        caption = f"round {(event.round or 0) + 1} runs for {_span(event.time - event.began + lag)}"
    if event.rounds and not _only_evaluates(history, event):
        yield Tile("Rounds done", f"{done} of {event.rounds}", caption, done / event.rounds)
    if run.state.is_finished:
        took = (history.ended or 0) - (history.started or 0)
        if history.started and took > 0:
            yield Tile("Took", _span(took), "from the first round's start to the last answer")
    elif event.waits:
        yield Tile("Time left", words.NONE, "not counted while the run waits")
    elif event.left is None:
        when = "known when the first round is over" if not done else "only the last scores to come"
        yield Tile("Time left", words.NONE, when)
    else:
        low, high = (max(0.0, part - lag) for part in event.left)
        ends = (low, high) if high - low > 90 else (high,)
        yield Tile(
            "Time left",
            span_between(low, high),
            "ends about",
            times=tuple(Moment(now + one, now) for one in ends),
        )
    yield from _dice_tile(event, history)
    well = sum(one.tone not in ("bad", "warn") for one in lines)
    if lines and not run.state.is_finished:
        yield Tile("Sites", f"{well} of {len(lines)}", "are there and take part", well / len(lines))
    moved = [(a.bytes_down or 0) + (a.bytes_up or 0) for a in history.answers.values()]
    if moved:
        yield Tile(
            "Moved", words.size(sum(moved)), "models and answers, to and from all sites; no image"
        )


def _dice_tile(event: Event, history: History) -> Iterator[Tile]:
    """The mean of the training sites, of the finished model where that is scored."""
    scored = [one for one in event.finished if one.dice is not None]
    first = scored[0] if scored else None
    final = [
        dice
        for (site, model), one in history.evaluations.items()
        if model == "final" and history.role(site) == "train" and one.said is not None
        if (dice := _dice(one.said)) is not None
    ]
    if final:
        value, sites, what = mean(final), len(final), "the finished model"
    elif scored:
        last = scored[-1]
        value, sites = last.dice, last.told
        what = f"the model after {words.numerals(last.number, 'round')}"
    else:
        return
    since = _minus(value, first.dice) if first is not None else None
    change = f", {words.change(since)} since the first" if since and len(scored) > 1 else ""
    sites_said = words.numerals(sites, "training site")
    yield Tile("Dice", words.score(value), f"mean of {sites_said}, {what}{change}")


def _only_evaluates(history: History, event: Event) -> bool:
    return event.round is None and bool(history.evaluations)


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _recipe(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Its main numbers; the report has all of them."""
    named = {
        "method": "method",
        "backbone": "backbone",
        "classes": "classes",
        "image_size": "image size, pixels",
        "rounds": "rounds",
        "local_epochs": "epochs a round",
        "batch_size": "slices a step",
        "learning_rate": "learning rate",
        "strategy": "averaging",
        "transfer_precision": "precision on the wire",
        "holdout": "unseen sites",
        "seed": "seed",
    }
    found = []
    for key, title in named.items():
        value = recipe.get(key)
        if value is None or value == []:
            continue
        shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        found.append((title, words.BACKBONES.get(shown, shown) if key == "backbone" else shown))
    return found


def _entry(run: RunNow) -> Entry:
    state, tone = _STATES.get(run.state.status, ("failed", "bad"))
    event = run.event
    rounds = f"{len(event.finished)} of {event.rounds}" if event is not None else words.NONE
    left = words.NONE
    if run.state.status == "RUNNING" and event is not None:
        if event.waits:
            state, tone = "waits", "warn"
        elif event.left is not None:
            left = span_between(*event.left)
    return Entry(run.state.job_id, run.state.name, state, tone, _submitted(run.state), rounds, left)


def _submitted(state: JobState) -> str:
    day, _, clock = state.submitted[:16].partition("T")
    by = f" by {state.submitter}" if state.submitter else ""
    return f"{day} {clock}".strip() + by


# ------------------------------------------------------------------------------------ its sites


def _sites(run: RunNow, history: History, known: Known, now: float) -> list[SiteLine]:
    """Each site, the worst first; the order is steady while a phase goes on."""
    event = run.event
    if event is None:
        return []
    at_work = run.state.status == "RUNNING"
    lag = now - run.event_at if run.event_at is not None else 0.0
    told = {one.name: one for one in event.now} or _from_records(event, history)
    answers: dict[str, list[ContributionRecord]] = {}
    for (_, name), one in history.answers.items():
        answers.setdefault(name, []).append(one)
    there = known.sites or {}
    lines = [
        (site, _line(site, event, history, answers.get(name, ()), there.get(name), lag, at_work))
        for name, site in told.items()
    ]
    if known.sites is not None and at_work and not event.now:
        lines = [
            (site, line if site.name in known.sites else _absent(line)) for site, line in lines
        ]
    place: dict[str, int] = {phase: number for number, phase in enumerate(WORST_FIRST)}
    rank = ("bad", "warn", "busy", "rest", "well")
    lines.sort(key=lambda one: (rank.index(one[1].tone), place[one[0].phase], one[1].name))
    return [line for _, line in lines]


def _from_records(event: Event, history: History) -> dict[str, SiteNow]:
    """What can be said of sites by a server that does not tell what they do now."""
    return {
        name: SiteNow(
            name=name,
            phase="answered" if name in event.answered else "waits",
            role="holdout" if history.role(name) == "holdout" else "train",
        )
        for name in event.sites
    }


def _absent(line: SiteLine) -> SiteLine:
    return dataclasses.replace(line, tone="bad", state="is not connected")


def _line(
    site: SiteNow,
    event: Event,
    history: History,
    answers: Sequence[ContributionRecord],
    announced: Announcement | None,
    lag: float,
    at_work: bool,
) -> SiteLine:
    rows = [one.said for one in answers if one.said is not None]
    gpu = _gpu(site, announced)
    tone: Tone = _TONES.get(site.phase, "busy")
    state, remark, advice = PHASE_WORDS[site.phase], "", ""
    silent = None
    if site.heard is not None and event.time is not None:
        silent = max(0.0, event.time - site.heard) + (lag if at_work else 0.0)
    if site.failure:
        tone = "warn" if site.phase == "paused" else "bad"
        remark, _, advice = site.failure.partition("; fix: ")
        remark, advice = (_capital(_sentence(text)) for text in (remark, advice))
    if not at_work:
        state, tone = "took part" if rows else "gave no answer", "rest"
        remark = advice = ""
    elif "lost" in gpu:
        tone = "bad"
    elif not site.connected and tone not in ("bad",):
        tone, remark = "warn", remark or "The server has no connection to it at the moment."
    elif announced is not None and announced.fault and tone != "bad":
        tone = "warn"
        remark = remark or _sentence(
            f"it is not ready: {CODES.get(announced.fault, announced.fault)}"
        )
    kind = _KINDS.get(site.phase, state) if at_work else state
    kind = "GPU lost" if "lost" in gpu and at_work and not site.failure else kind
    if at_work and site.since is not None and event.time is not None:
        state = _SINCE.get(site.phase, "{}").format(state, _span(event.time - site.since + lag))
    dice = site.dice
    if dice is None:
        dice = next((d for one in reversed(rows) if (d := _dice(one)) is not None), None)
    loss = site.loss
    if loss is None:
        loss = next((one.loss for one in reversed(rows) if one.loss is not None), None)
    down, up = (
        sum(getattr(one, key) or 0 for one in answers) for key in ("bytes_down", "bytes_up")
    )
    memory = site.peak_memory
    if memory is None and rows and rows[-1].peak_memory_bytes:
        memory = max(rows[-1].peak_memory_bytes.values())
    pace = dict(site.pace) or (dict(rows[-1].seconds) if rows else {})
    whole = pace.pop("round", None) or sum(pace.values()) or None
    percent = None if site.share is None or not at_work else round(100 * site.share)
    missed = site.missed or sum(site.name in one.missed for one in history.done.values())
    return SiteLine(
        name=site.name,
        tone=tone,
        state=state,
        kind=kind,
        unseen=site.role == "holdout",
        remark=remark,
        advice=advice,
        share=percent if site.phase in _UNITS else None,
        counted=(
            f"{words.count(site.done)} of {words.count(site.total)} {_UNITS[site.phase]}"
            if percent is not None and site.phase in _UNITS
            else ""
        ),
        seen=words.NONE if silent is None else _ago(silent),
        late=at_work and silent is not None and silent > SILENT_SECONDS,
        dice=words.score(dice),
        loss=words.NONE if loss is None else f"{loss:#.3g}".rstrip("."),
        pace=words.NONE if whole is None else _span(whole),
        pace_parts=", ".join(
            f"{phase} {_span(seconds)}" for phase, seconds in pace.items() if seconds >= 0.5
        ),
        down=words.size(down or site.bytes_down or None),
        up=words.size(up or site.bytes_up or None),
        memory=words.size(memory),
        gpu=gpu,
        missed=missed,
    )


def _dice(said: Any) -> float | None:
    return mean(one.mean for one in said.metrics if one.metric == "dice")


def _gpu(site: SiteNow, announced: Announcement | None) -> str:
    told = announced.gpu if announced is not None else None
    state = "lost" if "lost" in (site.gpu, told) else site.gpu or told
    if state is not None:
        return {"present": "GPU", "lost": "GPU lost", "none": "no GPU"}[state]
    if announced is not None and announced.device is not None:
        return "GPU" if announced.device == "cuda" else "no GPU"
    return words.NONE


def _counts(lines: Sequence[SiteLine]) -> list[tuple[Tone, str]]:
    """How many sites do what, the worst first."""
    found: dict[tuple[Tone, str], int] = {}
    for one in lines:
        found[one.tone, one.kind] = found.get((one.tone, one.kind), 0) + 1
    return [(tone, f"{number} {kind}") for (tone, kind), number in found.items()]


# --------------------------------------------------------------------------------- what happened


def _news(records: Iterable[Record], event: Event | None, now: float) -> list[News]:
    """What a person wants to know, the newest first."""
    found: list[News] = []
    number: int | None = None
    for record in records:
        at = Moment(record.time, now) if record.time is not None else None
        match record:
            case RoundStarted():
                number = record.round
            case Note():
                found.append(News(_note(record, number), _NOTE_TONES.get(record.kind, "rest"), at))
            case Resumed():
                found.append(News(_sentence(WENT_ON), "warn", at))
            case RoundDone() if record.missed:
                for reason, sites in _by_reason(record.missed).items():
                    text = f"{_names(sites)} missed round {record.round + 1}: {reason}"
                    found.append(News(_sentence(text), "warn", at))
            case EvaluationRecord() if record.reason:
                reason = failure(record.reason, record.site).partition("; fix: ")[0]
                text = f"{record.site} did not score the {record.model} model: {reason}"
                found.append(News(_sentence(text), "warn", at))
            case JobDone() if record.reason:
                problem, fix = end(record.reason)
                found.append(
                    News(f"{_capital(_sentence(problem))} {_capital(_sentence(fix))}", "bad", at)
                )
    if not found and event is not None:  # of a server that does not tell records
        found = [News(_sentence(text)) for text in (*event.missed, *event.notes)]
    return found[::-1]


def _note(note: Note, number: int | None) -> str:
    if note.kind in ("site_back", "guarded") and number is not None:
        return _sentence(f"{note.text.rstrip('.')}, in round {number + 1}")
    return _sentence(note.text)


def _by_reason(missed: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for site, reason in sorted(missed.items()):
        found.setdefault(failure(reason, site).partition("; fix: ")[0], []).append(site)
    return found


# ----------------------------------------------------------------------------------------- words


def _names(sites: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b, c and 4 others`."""
    if len(sites) <= NAMED + 1:
        return words.listing(sites)
    return f"{', '.join(sites[:NAMED])} and {len(sites) - NAMED} others"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sentence(text: str) -> str:
    """With a full stop, and a capital where it begins with a word of ours."""
    text = text.strip()
    if text.startswith(("the ", "it ", "enough ", "no ")):
        text = text[0].upper() + text[1:]
    return text if not text or text.endswith((".", "!", "?")) else f"{text}."


ENDED = "has ended"


def _days(days: float) -> str:
    if days < 0:
        return ENDED
    if days < 1:
        return "ends today"
    return f"ends in {words.numerals(int(days), 'day')}"


def _span(seconds: float) -> str:
    """`8 s`, `4 min`, `2 h 05 min`: for what is looked at while it goes on."""
    seconds = max(0.0, seconds)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 5970:
        return f"{seconds / 60:.0f} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{words.count(hours)} h {minutes:02d} min"


def _ago(seconds: float) -> str:
    return "now" if seconds < 2.5 else f"{_span(seconds)} ago"


_SCALES = ((99.5, "s", 1), (5970.0, "min", 60), (math.inf, "h", 3600))


def span_between(low: float, high: float) -> str:
    """A range of time: `40 to 60 s`, `12 to 18 min`, `1.5 to 2.5 h`, or `about 12 min`."""
    unit, size = next((unit, size) for until, unit, size in _SCALES if high < until)
    digits = 1 if unit == "h" else 0
    first, last = (f"{value / size:.{digits}f}" for value in (low, high))
    if unit == "s":  # to five seconds: it is no stopwatch
        first, last = (str(5 * round(value / 5)) for value in (low, high))
    if first == last:
        return "a moment" if float(last) == 0 else f"about {last} {unit}"
    return f"{first} to {last} {unit}"
