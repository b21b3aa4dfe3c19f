"""What a coordinator's page knows: asked of the server again and again, by one thread.

FLARE's session belongs to that thread; whoever shows the page takes what was known last.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedfms.contracts.announcement import Announcement
from fedfms.errors import FederationError, FedfmsError
from fedfms.flare.feed import RemoteRecords
from fedfms.flare.progress import Event
from fedfms.flare.session import Coordinator, JobState, admin_kit, connect
from fedfms.kits.certificates import kit_certificate, read_certificate
from fedfms.records.schema import Record

log = logging.getLogger(__name__)

NEWS_SECONDS = 2.0  # between two questions about runs that go on
LIST_SECONDS = 6.0  # about which runs there are
SITES_SECONDS = 30.0  # about what sites announce: each of them asks its trainer
AGAIN_SECONDS = 3.0  # after the server did not answer
PIECES = 40  # of records, at once: others want an answer too
SHOWN = 20  # runs, the newest

Opened = Callable[[], AbstractContextManager[Coordinator]]


@dataclass(frozen=True, slots=True)
class RunNow:
    """One run, as the server told it last."""

    state: JobState
    event: Event | None = None  # None: it never ran while this page was open
    event_at: float | None = None  # when that was, by the clock of here
    records: tuple[Record, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)  # empty where it is not known


@dataclass(frozen=True, slots=True)
class Known:
    """All of it at one time; times are seconds since 1970-01-01 UTC by the clock of here."""

    runs: tuple[RunNow, ...] = ()  # the newest first
    one: bool = False  # whether the page is of one run alone
    sites: Mapping[str, Announcement] | None = None  # that are connected; None: not asked yet
    # until when which certificate is valid, as far as it can be known here
    certificates: Mapping[str, float] = field(default_factory=dict)
    asked: float | None = None  # when the server answered last
    trouble: str = ""  # why it does not, and what to do
    records_told: bool = True  # whether this admin may read records


@dataclass(slots=True)
class _Run:
    state: JobState
    event: Event | None = None
    event_at: float | None = None
    records: RemoteRecords = field(default_factory=RemoteRecords)

    def now(self) -> RunNow:
        told = self.records
        return RunNow(self.state, self.event, self.event_at, tuple(told.records), told.recipe)


class Watcher:
    """Asks the server, in a thread of its own; the run goes on whatever happens to it."""

    def __init__(self, opened: Opened, only: str | None, certificates: Mapping[str, float]) -> None:
        self._opened = opened
        self._only = only  # beginning of a job's id
        self._runs: dict[str, _Run] = {}
        self._sites: dict[str, Announcement] | None = None
        self._certificates = dict(certificates)
        self._may_read = True
        self._ended = threading.Event()
        self._known = Known(one=only is not None, certificates=certificates)

    @property
    def known(self) -> Known:
        """What is known now."""
        return self._known

    def start(self) -> None:
        """Begin to ask, in the background."""
        threading.Thread(target=self.run, name="watcher", daemon=True).start()

    def stop(self) -> None:
        """Ask no more."""
        self._ended.set()

    def run(self) -> None:
        """Ask until `stop`."""
        while not self._ended.is_set():
            try:
                with self._opened() as coordinator:
                    self._ask(coordinator)
            except FedfmsError as error:
                self._publish(f"{error.problem}; {error.fix}")
            except Exception as error:  # whatever it is, the next look may be better
                log.debug("the server could not be asked", exc_info=True)
                self._publish(f"the server could not be asked ({type(error).__name__})")
            self._ended.wait(AGAIN_SECONDS)

    def _ask(self, coordinator: Coordinator) -> None:
        """Ask in a session until it ends.

        Raises:
            FederationError: the server does not answer.
        """
        listed = announced = -1e9
        while not self._ended.is_set():
            now = time.monotonic()
            if now - listed >= LIST_SECONDS:
                self._list(coordinator)
                listed = now
            for job_id, run in self._runs.items():
                if run.state.status == "RUNNING":
                    self._follow(coordinator, job_id, run)
            self._publish("")
            if now - announced >= SITES_SECONDS:
                with contextlib.suppress(FederationError):  # not for this admin; it shows less
                    self._sites = {one.site: one for one in coordinator.announcements()}
                announced = now
                self._publish("")
            self._ended.wait(NEWS_SECONDS)

    def _list(self, coordinator: Coordinator) -> None:
        if self._only is not None:
            job_id = self._only if len(self._only) == 36 else coordinator.find_job(self._only)
            self._only = job_id
            jobs = [JobState("", "", job_id)]
        else:
            jobs = coordinator.jobs(SHOWN)
        runs: dict[str, _Run] = {}
        for job in jobs:
            run = self._runs.get(job.job_id)
            if run is None or not run.state.is_finished:
                state = coordinator.state(job.job_id)
                run = _Run(state) if run is None else run
                run.state = state
            runs[job.job_id] = run
        self._runs = runs

    def _follow(self, coordinator: Coordinator, job_id: str, run: _Run) -> None:
        event = coordinator.event(job_id)
        if event is None:
            return  # its process starts, or has ended
        run.event, run.event_at = event, time.time()
        for _ in range(PIECES if self._may_read else 0):
            try:
                piece = coordinator.records(job_id, run.records.offset)
            except FederationError as error:
                if error.code != "not-authorized":
                    raise
                self._may_read = False
                break
            if piece is None or not run.records.take(piece):
                break

    def _publish(self, trouble: str) -> None:
        known = self._known
        self._certificates |= {  # one that was told holds when its site is away, too
            f"{name}'s certificate": one.certificate_ends
            for name, one in (self._sites or {}).items()
            if one.certificate_ends is not None
        }
        self._known = Known(
            runs=tuple(run.now() for run in self._runs.values()),
            one=known.one,
            sites=self._sites,
            certificates=dict(self._certificates),
            asked=known.asked if trouble else time.time(),
            trouble=trouble,
            records_told=self._may_read,
        )


def watcher_of(kit: Path, only: str | None) -> Watcher:
    """A watcher with an admin's kit.

    Args:
        kit: as for `connect`.
        only: the beginning of one job's id; None for all of them.

    Raises:
        ConfigError: code no-admin-kit.
    """
    folder = admin_kit(kit)
    return Watcher(lambda: connect(kit), only, certificates_of(folder))


def certificates_of(kit: Path) -> dict[str, float]:
    """Until when the certificates of an admin's kit are valid."""
    found = {}
    with contextlib.suppress(FedfmsError, OSError):
        if (own := kit_certificate(kit)) is not None:
            found["the certificate of your own kit"] = own.not_valid_after_utc.timestamp()
    with contextlib.suppress(FedfmsError, OSError):
        root = read_certificate(kit / "startup" / "rootCA.pem")
        found["the certificate of the federation's authority"] = (
            root.not_valid_after_utc.timestamp()
        )
    return found
