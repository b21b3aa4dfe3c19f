"""What the job's process at the server hears of its sites while a round runs.

It is for people who watch: nothing of the run follows from it, and nothing of it is kept. A site
says only how far it is with a task that it was given; its name is the one that FLARE gives to the
sender of a message, which a site could forge towards others' names and gain nothing but a wrong
word on a screen.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedfms.contracts.now import GpuState, SitePhase, SiteProgress

# FLARE's client gives a sign of life each 10 s; on a busy machine some come late
SILENT_SECONDS = 45.0


@dataclass(slots=True)
class LiveSite:
    """One site now; times in seconds since the epoch, by this clock."""

    kind: str = ""  # of the task it has or had last: train, evaluate
    round: int = -1  # of that task; -1 before the first
    at_work: bool = False  # it has the task, and its answer did not come yet
    phase: SitePhase = "waits"
    since: float = 0.0
    done: int = 0
    total: int = 0
    told: float | None = None  # when it said so
    asked: float = 0.0  # when the task went out
    heard: float | None = None
    gone: bool = False  # FLARE says so
    gpu: GpuState | None = None
    pace: dict[str, float] = field(default_factory=dict)  # seconds: download, upload, round

    def is_connected(self, now: float) -> bool:
        """Whether it is there, as far as is known; true where nothing was heard yet."""
        return not self.gone and (self.heard is None or now - self.heard <= SILENT_SECONDS)


class Live:
    """All sites of a job; each method may be called by any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sites: dict[str, LiveSite] = {}

    def snapshot(self) -> Mapping[str, LiveSite]:
        """All of it, for somebody who takes their time."""
        with self._lock:
            return {
                name: dataclasses.replace(site, pace=dict(site.pace))
                for name, site in self._sites.items()
            }

    def task_sent(self, name: str, kind: str, number: int, now: float) -> None:
        """A task goes out to a site, for the first time or again."""
        with self._lock:
            site = self._site(name)
            site.kind, site.round, site.at_work, site.asked = kind, number, True, now
            site.heard, site.gone = now, False  # it asked for it
            _enter(site, "download", now)

    def progress(self, name: str, told: SiteProgress, now: float) -> None:
        """A site that takes part says how far it is; of a task that it does not have: nothing."""
        with self._lock:
            site = self._sites.get(name)
            if site is None:
                return
            site.heard = now
            site.gone = False
            if told.gpu is not None:
                site.gpu = told.gpu
            if not site.at_work or site.kind != told.kind:
                return
            if told.kind == "train" and site.round != told.round:
                return
            if site.phase != told.phase:
                if site.phase == "download":
                    site.pace["download"] = now - site.since
                _enter(site, told.phase, now)
            if (site.done, site.total) != (told.done, told.total) or site.told is None:
                site.done, site.total, site.told = told.done, told.total, now

    def answer_came(self, name: str, now: float) -> None:
        """A site's answer is here, whatever it is."""
        with self._lock:
            site = self._site(name)
            site.heard = now
            if site.phase == "upload":
                site.pace["upload"] = now - site.since
            if site.at_work:
                site.pace["round" if site.kind == "train" else "evaluation"] = now - site.asked
            site.at_work = False
            _enter(site, "waits", now)

    def heart_beats(self, heard: Mapping[str, float]) -> None:
        """When the server's main process heard of each site last."""
        with self._lock:
            for name, at in heard.items():
                site = self._site(name)
                site.heard = max(site.heard or 0.0, at)

    def is_gone(self, name: str, gone: bool) -> None:
        """FLARE says that a site is gone, or that it is back."""
        with self._lock:
            self._site(name).gone = gone

    def _site(self, name: str) -> LiveSite:
        return self._sites.setdefault(name, LiveSite())


def _enter(site: LiveSite, phase: SitePhase, now: float) -> None:
    site.phase, site.since, site.done, site.total, site.told = phase, now, 0, 0, None
