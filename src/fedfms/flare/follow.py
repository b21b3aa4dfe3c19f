"""From a submitted job to its results folder: what a simulation and a coordinator share."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedfms.contracts.recipe import Recipe
from fedfms.errors import ConfigError, FederationError
from fedfms.flare import sentences
from fedfms.flare.progress import Event, JobProgress
from fedfms.flare.session import Coordinator, JobState
from fedfms.records.layout import RECIPE, RECORDS
from fedfms.records.schema import JobDone

STATE_SECONDS = 2.0  # between two questions to FLARE
LOST_SECONDS = 900.0  # a run of days outlasts a break of the line, and a server that starts again
NEWS_SECONDS = 2.0  # between two looks at how far the job is

OnEvent = Callable[[Event], None]
News = Callable[[], Event | None]  # how far the job is, where that has changed


@dataclass(frozen=True, slots=True)
class JobEnd:
    """How a job ended, by its own records; FLARE's word is not enough.

    FLARE calls a job abnormal in which a site was started again, whatever it came to.
    """

    completed: bool
    reason: str  # why not
    trouble: tuple[str, ...]  # why sites did not contribute to the last round
    event: Event  # everything that was worth telling
    aborted: bool = False  # somebody stopped it

    @property
    def problem(self) -> str:
        """All of it as the first part of an error."""
        if self.aborted:  # what sites answered to that is no trouble
            return "the run was stopped, with fedfms stop or in FLARE's console"
        problem, _ = sentences.end(self.reason)
        return "\n  ".join([f"the job did not come to its end: {problem}", *self.trouble])

    @property
    def fix(self) -> str:
        """What to do about it."""
        if self.aborted:
            return "nothing is broken: fedfms resume goes on with it, where a round was finished"
        return sentences.end(self.reason)[1]


def wait_for_start(
    coordinator: Coordinator,
    job_id: str,
    *,
    on_wait: Callable[[JobState], None] = lambda state: None,
    poll_seconds: float = STATE_SECONDS,
) -> JobState:
    """Wait until FLARE has started a submitted job, or ended it.

    Args:
        coordinator: an open session.
        job_id: FLARE's id.
        on_wait: told the state as long as it waits; may raise to give up.
        poll_seconds: between two questions.
    """
    while (state := coordinator.state(job_id)).is_waiting:
        on_wait(state)
        time.sleep(poll_seconds)
    return state


def follow(
    coordinator: Coordinator,
    job_id: str,
    *,
    news: News,
    tell: OnEvent,
    poll_seconds: float = NEWS_SECONDS,
    state_seconds: float = STATE_SECONDS,
) -> JobState:
    """Tell how far a job is until FLARE calls it finished; FLARE's last word.

    Args:
        coordinator: an open session.
        job_id: FLARE's id of a job that has started.
        news: see `News`.
        tell: gets the news.
        poll_seconds: between two looks.
        state_seconds: between two questions to FLARE.
    """
    next_state = 0.0
    last_answer = time.monotonic()
    while True:
        if (event := news()) is not None:
            tell(event)
        try:
            if time.monotonic() >= next_state:
                state = coordinator.state(job_id)
                if state.is_finished:
                    return state
                next_state = last_answer = time.monotonic() + state_seconds
        except FederationError as error:
            is_lost = error.code in ("no-server", "not-let-in")  # a new server knows no old session
            if not is_lost or time.monotonic() > last_answer + LOST_SECONDS:
                raise
            with contextlib.suppress(FederationError):
                coordinator.reconnect()
        time.sleep(poll_seconds)


def news_from(coordinator: Coordinator, job_id: str) -> News:
    """Asks the job's recorder at the server, for somebody on another machine."""
    before: Event | None = None

    def news() -> Event | None:
        nonlocal before
        event = None
        # the job's process ends before FLARE calls the job finished, and then nobody has news
        with contextlib.suppress(FederationError):
            event = coordinator.event(job_id)
        if event is None or event == before:
            return None
        before = event
        return event

    return news


def read_end(downloaded: Path, status: str) -> JobEnd:
    """How a fetched job ended.

    Args:
        downloaded: from `Coordinator.download`.
        status: FLARE's word, for a job that could not write its own.
    """
    try:
        rounds = Recipe.from_json(downloaded / RECIPE).rounds_to_run
    except ConfigError:  # it ended before it wrote one
        rounds = 0
    reader = JobProgress(downloaded / RECORDS, rounds)
    ends = [record for record in reader.read_new() if isinstance(record, JobDone)]
    completed = bool(ends) and ends[-1].status == "completed"
    aborted = ends[-1].status == "aborted" if ends else status == "FINISHED:ABORTED"
    reason = (ends[-1].reason if ends else None) or f"FLARE says {status}"
    return JobEnd(completed, reason, tuple(reader.trouble()), reader.event(), aborted)
