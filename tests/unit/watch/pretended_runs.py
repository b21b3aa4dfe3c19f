"""What a coordinator's page may know: of runs that go well, that do not, of a hundred sites."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

from fedfms.contracts.announcement import Announcement
from fedfms.contracts.contribution import Contribution, Metric
from fedfms.contracts.now import SiteNow
from fedfms.contracts.recipe import BACKBONES, Recipe
from fedfms.flare.progress import Event, FinishedRound
from fedfms.flare.sentences import GONE, failure
from fedfms.flare.session import JobState
from fedfms.records.schema import (
    ContributionRecord,
    JobDone,
    JobRecord,
    Note,
    Record,
    RoundDone,
    RoundStarted,
)
from fedfms.watch.known import Known, RunNow

NOW = 1_795_752_000.0  # 2026-11-27 04:00 UTC
JOB_ID = "7c9e6679-7425-40de-944b-e07fc1f90ae7"
ROUND_SECONDS = 182.0

RECIPE = Recipe(
    method="fedmsa",
    backbone="vit_b",
    backbone_sha256=BACKBONES["vit_b"].sha256,
    classes=("optic_disc", "optic_cup"),
    rounds=12,
    image_size=1024,
    holdout=("site-4",),
)


def dice_at(number: int, place: int) -> float:
    return 0.9 - 0.02 * place - 0.5 * math.exp(-0.55 * number)


def contribution(site: str, number: int, place: int, role: str = "train") -> Contribution:
    metrics = tuple(
        Metric(
            class_name=name,
            metric="dice",
            mean=dice_at(number, place) - 0.06 * at,
            std=0.05,
            cases=14,
            empty=0,
        )
        for at, name in enumerate(RECIPE.classes)
    )
    trains = role == "train"
    return Contribution(
        site=site,
        kind="train",
        role="train" if trains else "holdout",
        round=number,
        model="round",
        recipe_sha256=RECIPE.sha256,
        backbone_sha256=RECIPE.backbone_sha256,
        package_version="0.1.0",
        training_slices=400 if trains else 0,
        training_cases=40 if trains else 0,
        evaluated_cases=14,
        metrics=metrics,
        loss=0.8 * math.exp(-0.3 * number) + 0.02 * place if trains else None,
        seconds={"evaluate": 21.0, "train": 118.0 + 9 * place} if trains else {"evaluate": 25.0},
        peak_memory_bytes={"train": 9_400_000_000 + place * 1_300_000_000} if trains else {},
    )


def records(
    sites: Sequence[str], done: int, missed: dict[tuple[int, str], str], notes: Sequence[Note] = ()
) -> Iterator[Record]:
    """A run's records: `done` rounds that are over, one that is open."""
    began = NOW - done * ROUND_SECONDS - 60
    yield JobRecord(job_id=JOB_ID, name="fedmsa", started=began, sites=tuple(sites), time=began)
    for number in range(done + 1):
        at = began + number * ROUND_SECONDS
        yield RoundStarted(round=number, time=at)
        for note in notes:
            if note.time is not None and at <= note.time < at + ROUND_SECONDS:
                yield note
        if number == done:
            return
        for place, site in enumerate(sites):
            if (number, site) not in missed:
                yield ContributionRecord(
                    round=number,
                    site=site,
                    accepted=True,
                    bytes_down=42_428_928,
                    bytes_up=0 if site in RECIPE.holdout else 42_428_928,
                    contribution=contribution(
                        site, number, place, "holdout" if site in RECIPE.holdout else "train"
                    ),
                    time=at + 150 + 3 * place,
                )
        of_round = {site: why for (which, site), why in missed.items() if which == number}
        yield RoundDone(
            round=number,
            sites=tuple(site for site in sites if site not in of_round),
            missed=of_round,
            time=at + ROUND_SECONDS,
        )


def finished(sites: Sequence[str], done: int) -> tuple[FinishedRound, ...]:
    training = [site for site in sites if site not in RECIPE.holdout]
    return tuple(
        FinishedRound(
            number=number,
            answered=len(sites),
            dice=sum(dice_at(number, place) - 0.03 for place in range(len(training)))
            / len(training),
            evaluated=True,
            told=len(training),
            training=len(training),
        )
        for number in range(done)
    )


def site_now(name: str, phase: str, place: int = 0, **more: Any) -> SiteNow:
    holdout = name in RECIPE.holdout
    values: dict[str, Any] = {
        "since": NOW - 40,
        "heard": NOW - 2,
        "role": "holdout" if holdout else "train",
        "pace": {"round": 171.0 + 9 * place, "train": 118.0 + 9 * place, "evaluate": 21.0},
        "dice": dice_at(4, place),
        "loss": None if holdout else 0.24 + 0.02 * place,
        "gpu": "present",
        "peak_memory": None if holdout else 9_400_000_000 + place * 1_300_000_000,
    }
    return SiteNow(name=name, phase=phase, **(values | more))  # type: ignore[arg-type]


def state(status: str = "RUNNING", **more: str) -> JobState:
    values = {"job_id": JOB_ID, "name": "fedmsa", "submitted": "2026-11-27T03:42:11"}
    return JobState(
        status=status, detail="", **{**values, "submitter": "ada@hospital.example", **more}
    )


def announced(sites: Sequence[str]) -> dict[str, Announcement]:
    return {
        site: Announcement(site, "0.1.0", device="cuda", certificate_ends=NOW + 300 * 86400)
        for site in sites
    }


SITES = ("site-1", "site-2", "site-3", "site-4")
AUTHORITY = {"the certificate of the federation's authority": NOW + 86400 * 3000}


def healthy() -> Known:
    now = (
        site_now("site-1", "train", 0, done=86, total=120, since=NOW - 31),
        site_now("site-2", "train", 1, done=40, total=120, since=NOW - 29),
        site_now("site-3", "evaluate", 2, done=210, total=260, since=NOW - 20),
        site_now("site-4", "answered", 3, since=NOW - 12),
    )
    event = Event(
        phase="train",
        round=5,
        rounds=12,
        answered=("site-4",),
        sites=SITES,
        finished=finished(SITES, 5),
        now=now,
        time=NOW - 1,
        began=NOW - 61,
        left=(1140.0, 1380.0),
    )
    run = RunNow(state(), event, NOW - 1, tuple(records(SITES, 5, {})), RECIPE.to_dict())
    return Known((run,), True, announced(SITES), AUTHORITY, NOW - 1)


def disturbed() -> Known:
    """One site gone, one without its GPU, one with an error: the run waits."""
    missed = {
        (3, "site-2"): "TrainerError (trainer-died); the site's own log has the details",
        (4, "site-3"): "the site is gone",
    }
    notes = [
        Note(
            kind="site_died",
            site="site-2",
            text="site-2's FLARE job process ended (exit code -9, killed); it is started again",
            time=NOW - 700,
        ),
        Note(kind="site_back", site="site-2", text="site-2 takes part again", time=NOW - 690),
        Note(
            kind="site_gone",
            site="site-3",
            text="site-3 is gone; the run goes on without it",
            time=NOW - 200,
        ),
        Note(
            kind="waits",
            text="the run waits: it needs 2 sites, and site-2 and site-3 are gone. It goes on by "
            "itself when they are back",
            time=NOW - 50,
        ),
    ]
    now = (
        site_now("site-1", "answered", 0, since=NOW - 30),
        site_now(
            "site-2",
            "failed",
            1,
            failure=failure("TrainingError (out-of-memory); the log says more", "site-2"),
            gpu="lost",
            missed=1,
        ),
        site_now(
            "site-3",
            "gone",
            2,
            connected=False,
            heard=NOW - 212,
            since=NOW - 200,
            failure=failure(GONE, "site-3"),
            missed=1,
            gpu=None,
        ),
        site_now("site-4", "paused", 3, since=NOW - 3600, failure="clinic hours until 18:00"),
    )
    event = Event(
        phase="train",
        round=5,
        rounds=12,
        answered=("site-1",),
        sites=SITES,
        finished=finished(SITES, 5),
        missed=("site-2 missed round 3: …",),
        now=now,
        time=NOW - 1,
        began=NOW - 61,
        waits="the run waits: it needs 2 sites, and site-2 and site-3 are gone. It goes on by "
        "itself when they are back",
    )
    run = RunNow(state(), event, NOW - 1, tuple(records(SITES, 5, missed, notes)), RECIPE.to_dict())
    there = announced(("site-1", "site-2", "site-4"))
    ends = {"site-2's certificate": NOW + 20.4 * 86400, "site-4's certificate": NOW - 3600}
    return Known((run,), True, there, AUTHORITY | ends, NOW - 1)


def hundred() -> Known:
    drawn = random.Random(7)
    sites = tuple(f"hospital-{number:03d}" for number in range(1, 101))
    missed = {(3, site): "no answer from the site in time" for site in sites[40:52]}
    now = []
    for place, site in enumerate(sites):
        phase = drawn.choices(
            ("answered", "train", "evaluate", "upload", "gone", "failed", "start", "paused"),
            (45, 38, 8, 4, 2, 1, 1, 1),
        )[0]
        more: dict[str, Any] = {"missed": int((3, site) in missed)}
        if phase in ("train", "evaluate"):
            more |= {"done": drawn.randrange(120), "total": 120}
        if phase == "gone":
            more |= {"heard": NOW - drawn.uniform(80, 900), "connected": False}
        if phase == "failed":
            more |= {"failure": failure("TrainerError (trainer-stalled); its log says more", site)}
        now.append(site_now(site, phase, place % 12, **more))
    event = Event(
        phase="train",
        round=5,
        rounds=12,
        answered=tuple(one.name for one in now if one.phase == "answered"),
        sites=sites,
        finished=finished(sites[:12], 5),
        now=tuple(now),
        time=NOW - 1,
        began=NOW - 100,
        left=(1500.0, 2600.0),
    )
    told = []
    for record in records(sites, 5, missed):
        if isinstance(record, ContributionRecord):
            place = sites.index(record.site) % 12
            said = contribution(record.site, record.round, place)
            record = record.model_copy(update={"contribution": said})
        told.append(record)
    run = RunNow(state(), event, NOW - 1, tuple(told), RECIPE.to_dict())
    return Known((run,), True, announced(sites), AUTHORITY, NOW - 1)


def complete() -> Known:
    run = healthy().runs[0]
    assert run.event is not None
    ended = JobDone(status="completed", time=NOW - 5)
    return Known(
        (
            RunNow(
                state("FINISHED:COMPLETED"), run.event, NOW - 5, (*run.records, ended), run.recipe
            ),
        ),
        True,
        announced(SITES),
        AUTHORITY,
        NOW - 1,
    )


def several() -> Known:
    """Three runs, of which one waits and one never ran while the page was open."""
    going, waiting = healthy().runs[0], disturbed().runs[0]
    other = "1b4e28ba-2fa1-41d2-883f-0016d3cca427"
    old = "6fa459ea-ee8a-4ca4-894e-db77e160355e"
    return Known(
        (
            going,
            RunNow(state(job_id=other, name="fedsam"), waiting.event, NOW - 1),
            RunNow(state("FINISHED:ABORTED", job_id=old, name="evaluate")),
        ),
        False,
        announced(SITES),
        AUTHORITY,
        NOW - 1,
    )
