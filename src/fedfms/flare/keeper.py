"""Keeps a run going at the server, whatever process of it dies.

As FLARE 2.9 ships, the end of one site's job process ends the job of all sites; a site that comes
back has no part in running jobs, and everybody waits for it; and a job is over when the server's
process or the job's own process at the server is. Here

- a job process that died at a site is started there again, and a site that logs in again gets its
  part of running jobs: it answers the round that is open;
- a job waits, instead of ending, while fewer than its minimum of sites take part;
- a job whose process died at the server is put back into FLARE's queue under the same id, as it was
  submitted and signed, once its sites are there again; its process finds what was kept of the run
  (run_state.py) and goes on with the round that was open.

Each of these has a budget, so that what fails each time comes to an end and says why. What FLARE
does not offer for it stands behind the wall (internals/rejoin.py).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.job_def_manager import SimpleJobDefManager
from nvflare.apis.job_def import JobMetaKey, RunStatus

from fedfms.files import write_whole
from fedfms.flare.internals import rejoin
from fedfms.flare.internals.server import give_up_unfinished_jobs
from fedfms.flare.internals.version import broken_assumptions, changed
from fedfms.flare.notes import write_note
from fedfms.flare.run_state import rounds_kept, runs_folder
from fedfms.records.layout import RECIPE, RECORDS
from fedfms.records.read import read_last
from fedfms.records.schema import JobDone, NoteKind

log = logging.getLogger(__name__)

# waits before one start at a site after another; then the site is given up for this job
SITE_WAITS = (1.0, 2.0, 5.0, 15.0, 60.0)
NEVER_BEGAN = 2  # ends of a job process before it began to work, after which the site is given up
SITE_STEADY_SECONDS = 600.0  # a process that lived for so long starts again without a long wait
# starts of a job without a new round in between; then the job is given up
JOB_WAITS = (0.0, 0.0, 10.0, 60.0, 300.0, 600.0)
ALL_SITES_SECONDS = 30.0  # a job that is to go on waits so long for all of its sites, not only min
END_AT_SITES_SECONDS = 30.0  # for what sites still run of a job that is to start again
PATROL_SECONDS = 10.0  # between two looks at which sites run a job that they should run
LEAVE_SECONDS = 20.0  # a site that is gone for so long is no part of the next round

_ABOUT = "job.json"  # in the run's folder


@dataclass(slots=True)
class _About:
    """What is known of a run outside its job's process; kept in its folder."""

    sites: list[str]
    min_sites: int
    starts: list[int] = field(default_factory=list)  # rounds done at each start

    @classmethod
    def read(cls, folder: Path) -> _About | None:
        try:
            values = json.loads((folder / _ABOUT).read_text())
            starts = [int(number) for number in values["starts"]]
            return cls([str(site) for site in values["sites"]], int(values["min_sites"]), starts)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / _ABOUT, json.dumps(dataclasses.asdict(self)))

    def starts_in_vain(self, rounds: int) -> int:
        """How often the job was started since it last finished a round."""
        return sum(1 for done in self.starts if done >= rounds)


@dataclass(slots=True)
class _Site:
    """A site's part in a running job."""

    starts: list[float] = field(default_factory=list)  # when its job process was started again
    absent: int = 0  # looks in a row at which it was connected and did not run the job
    never_began: int = 0  # how often in a row it ended before it began to work
    is_given_up: bool = False  # until its FLARE client is started again
    gone: float | None = None  # since when
    is_held: bool = False  # gone, and the job waits for it
    is_starting: bool = False

    def recent_starts(self) -> int:
        """How often it was started of late; those of before are forgotten."""
        now = time.monotonic()
        self.starts = [at for at in self.starts if now - at < SITE_STEADY_SECONDS]
        return len(self.starts)


class JobKeeper(FLComponent):  # type: ignore[misc]
    """The server's component for all of this; jobs cannot name it, and it takes no arguments."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.RLock()
        self._sites: dict[str, dict[str, _Site]] = {}  # job -> site
        self._tell_gone: Any = None
        self._engine: Any = None
        self._workspace = Path()
        self._works = False

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Follow the server, its sites and its jobs."""
        if event_type == EventType.SYSTEM_BOOTSTRAP:
            self._begin(fl_ctx)
        elif event_type == EventType.SYSTEM_START and self._works:
            server = fl_ctx.get_prop(FLContextKey.SITE_OBJ)
            self._tell_gone = rejoin.hold_deaths(server, self._holds_death)
            rejoin.hear_failures(server, self._job_process_ended)
            threading.Thread(target=self._patrol, daemon=True).start()
        elif event_type == EventType.CLIENT_REGISTER_PROCESSED and self._works:
            self._registered(fl_ctx.get_peer_context().get_identity_name())
        elif event_type == EventType.JOB_STARTED and self._works:
            self._job_started(_job_of(fl_ctx))
        elif event_type == EventType.JOB_COMPLETED and self._works:
            self._job_ended(_job_of(fl_ctx))

    # ------------------------------------------------------------------- start of the server

    def _begin(self, fl_ctx: FLContext) -> None:
        engine = fl_ctx.get_engine()
        if getattr(engine, "job_runner", None) is None:
            return  # a site's engine
        self._engine = engine
        self._workspace = Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_root_dir())
        if broken := broken_assumptions("rejoin"):
            log.error(
                "no rejoin: sites and jobs that die do not come back by themselves (%s)",
                changed(broken).problem,
            )
            give_up_unfinished_jobs(fl_ctx)
            return
        self._works = True
        again = [job for job in rejoin.jobs_of_before(fl_ctx) if self.goes_on(job)]
        for job_id in again:  # before the others are given up
            rejoin.put_back(engine, job_id)
        give_up_unfinished_jobs(fl_ctx)
        for job_id in rejoin.waiting_again(fl_ctx):
            if (about := self._about(job_id)) is not None:
                self._go_on_later(job_id, about)

    # ------------------------------------------------------------------------ life of a job

    def _job_started(self, job_id: str) -> None:
        if not (self._app_config(job_id) / RECIPE).is_file():
            return  # none of ours: FLARE does with it what FLARE does
        folder, sites = self._folder(job_id), rejoin.sites_of(self._engine, job_id)
        about = self._about(job_id) or _About([], rejoin.min_sites_of(self._engine, job_id))
        about.sites = sorted({*about.sites, *sites})
        about.starts.append(rounds_kept(folder))
        self._keep(job_id, about)
        with self._lock:
            self._sites[job_id] = {site: _Site() for site in about.sites}

    def _job_ended(self, job_id: str) -> None:
        with self._lock:
            self._sites.pop(job_id, None)
        about = self._about(job_id)
        if about is None:
            return
        if rejoin.status_of(self._engine, job_id) == RunStatus.SUBMITTED.value:
            log.warning("job %s: its process at this server ended; it is to go on", job_id)
            self._go_on_later(job_id, about)
        elif _end_of(self._folder(job_id)) == "completed":  # all of it is in FLARE's store now
            shutil.rmtree(self._folder(job_id), ignore_errors=True)

    def status_after(self, job_id: str, status: RunStatus) -> RunStatus:
        """What a job is whose process at the server FLARE takes as failed.

        SUBMITTED if it is to go on. COMPLETED if it wrote down that all of it was done: FLARE
        counts it as failed, too, when a late answer was on its way as its process ended.
        """
        if self.goes_on(job_id):
            return RunStatus.SUBMITTED
        if self._works and _end_of(self._folder(job_id)) == "completed":
            return RunStatus.FINISHED_COMPLETED
        return status

    def goes_on(self, job_id: str) -> bool:
        """Whether a job is to be started again whose process at the server just ended.

        It is not where the process came to its end in order, which it recorded with the reason,
        nor where it was started again and again without finishing a round.
        """
        about = self._about(job_id) if self._works else None
        if about is None:
            return False
        folder = self._folder(job_id)
        if _end_of(folder) is not None:
            return False
        if about.starts_in_vain(rounds_kept(folder)) >= len(JOB_WAITS):
            log.error(
                "job %s: its process at this server ended %d times in one round; given up. "
                "What there is of the run lies in %s",
                job_id,
                len(JOB_WAITS),
                folder,
            )
            return False
        return True

    def _go_on_later(self, job_id: str, about: _About) -> None:
        threading.Thread(target=self._go_on, args=(job_id, about), daemon=True).start()

    def _go_on(self, job_id: str, about: _About) -> None:
        """Wait for the job's sites, end what they still run of it, and let it be scheduled."""
        engine = self._engine
        try:
            in_vain = about.starts_in_vain(rounds_kept(self._folder(job_id)))
            time.sleep(JOB_WAITS[min(max(in_vain - 1, 0), len(JOB_WAITS) - 1)])
            began = time.monotonic()
            told = False
            while True:
                there = set(about.sites) & set(rejoin.connected_sites(engine))
                waited = time.monotonic() - began
                if there == set(about.sites):
                    break
                if len(there) >= about.min_sites and waited > ALL_SITES_SECONDS:
                    break
                if waited > ALL_SITES_SECONDS and not told:
                    told = True
                    absent = sorted(set(about.sites) - there)
                    self._note(job_id, "waits", _waits(absent, about.min_sites))
                if rejoin.status_of(engine, job_id) != RunStatus.SUBMITTED.value:
                    return  # somebody ended it
                time.sleep(0.5)
            if still := rejoin.end_at_sites(engine, job_id, there, END_AT_SITES_SECONDS):
                log.warning("job %s: %s still run a process of before", job_id, ", ".join(still))
            if rejoin.let_go(engine, job_id):
                log.info("job %s: goes on with %s", job_id, ", ".join(sorted(there)))
        except Exception:
            log.exception("job %s could not be let go on", job_id)

    # ------------------------------------------------------------------------ sites of a job

    def _job_process_ended(self, job_id: str, site: str, code: int, reason: str) -> bool:
        job = rejoin.running_job(self._engine, job_id)
        if job is None or job.aborted or self._about(job_id) is None:
            return False
        ended = f"{site}'s FLARE job process ended (exit code {code}, {reason})"
        if self._may_start(job_id, site, code):
            self._note(job_id, "site_died", f"{ended}; it is started again", site)
            self._tell_gone(job_id, site)
            self._start_soon(job_id, site)
            return True
        with self._lock:
            given_up = {s for s, one in self._sites[job_id].items() if one.is_given_up}
        if len(job.sites - given_up) < job.min_sites:
            self._note(
                job_id,
                "ends",
                f"{ended} each time that it was started, and without it fewer than "
                f"{job.min_sites} sites are left; fix: the FLARE client's log at {site} says why",
                site,
            )
            return False  # FLARE ends the job
        self._note(
            job_id,
            "site_gone",
            f"{ended} each time that it was started; the run goes on without {site} until its "
            "FLARE client is started again",
            site,
        )
        self._tell_gone(job_id, site)
        return True

    def _may_start(self, job_id: str, site: str, code: int) -> bool:
        """Whether the budget has another start at a site, whose job process just ended."""
        with self._lock:
            part = self._sites.setdefault(job_id, {}).setdefault(site, _Site())
            part.never_began = part.never_began + 1 if code == rejoin.NEVER_BEGAN else 0
            part.is_given_up = part.never_began >= NEVER_BEGAN or part.recent_starts() >= len(
                SITE_WAITS
            )
            return not part.is_given_up

    def _registered(self, site: str) -> None:
        if site not in rejoin.connected_sites(self._engine):
            return  # an admin
        for job in rejoin.running_jobs(self._engine):
            if self._about(job.job_id) is None or job.aborted:
                continue
            if rejoin.is_meant_for(self._engine, job.job_id, site):
                with self._lock:  # whatever was wrong there may have been mended
                    part = self._sites.setdefault(job.job_id, {}).setdefault(site, _Site())
                    part.never_began, part.is_given_up = 0, False
                self._start_soon(job.job_id, site)

    def _patrol(self) -> None:
        """Look again and again for sites that are connected and do not run what they should.

        Not every way out of a job is reported: a connection that comes back without a login, a
        process of before that was still there when the job was started anew.
        """
        while True:
            time.sleep(PATROL_SECONDS)
            try:
                for job in rejoin.running_jobs(self._engine):
                    self._look_for_absent(job)
            except Exception:
                log.exception("could not look for sites that are absent")

    def _look_for_absent(self, job: rejoin.RunningJob) -> None:
        if job.aborted or self._about(job.job_id) is None or _end_of(self._folder(job.job_id)):
            return
        with self._lock:
            parts = self._sites.setdefault(job.job_id, {})
            busy = {s for s, one in parts.items() if one.is_starting or one.is_given_up}
        asked = [
            site
            for site in rejoin.connected_sites(self._engine)
            if site not in busy and rejoin.is_meant_for(self._engine, job.job_id, site)
        ]
        for site, runs in rejoin.asked_sites(self._engine, job.job_id, asked).items():
            with self._lock:
                part = parts.setdefault(site, _Site())
                part.absent = 0 if runs else part.absent + 1
                is_absent = part.absent >= 2  # one look may fall between two processes
                part.absent = 0 if is_absent else part.absent
            if is_absent:
                self._start_soon(job.job_id, site)

    def _holds_death(self, job_id: str, site: str, reason: str) -> bool:
        """Whether the job's process is not told of a site's death: it would end for too few."""
        job = rejoin.running_job(self._engine, job_id)
        if job is None or self._about(job_id) is None:
            return False
        with self._lock:
            parts = self._sites.setdefault(job_id, {})
            part = parts.setdefault(site, _Site())
            was_known, part.gone = part.gone is not None, part.gone or time.monotonic()
            left = [s for s in job.sites if s != site and not self._is_gone(job_id, s)]
            part.is_held = len(left) < job.min_sites
            absent = sorted(s for s, one in parts.items() if one.gone is not None)
        if was_known:
            return part.is_held
        if part.is_held:
            self._note(job_id, "waits", _waits(absent, job.min_sites))
        else:
            threading.Timer(LEAVE_SECONDS, self._leave_out, (job_id, site)).start()
        return part.is_held

    def _leave_out(self, job_id: str, site: str) -> None:
        with self._lock:
            part = self._sites.get(job_id, {}).get(site)
            if part is None or part.gone is None or part.is_held or part.is_starting:
                return
        rejoin.leave_out(self._engine, job_id, site)
        rejoin.give_up_outcome(self._engine, job_id, site)
        self._note(job_id, "site_gone", f"{site} is gone; the run goes on without it", site)

    def _is_gone(self, job_id: str, site: str) -> bool:
        part = self._sites.get(job_id, {}).get(site)
        return part is not None and part.gone is not None

    def _start_soon(self, job_id: str, site: str) -> None:
        with self._lock:
            part = self._sites.setdefault(job_id, {}).setdefault(site, _Site())
            if part.is_starting:
                return
            wait = SITE_WAITS[min(part.recent_starts(), len(SITE_WAITS) - 1)]
            part.starts.append(time.monotonic())
            part.is_starting = True
        threading.Thread(target=self._start, args=(job_id, site, wait), daemon=True).start()

    def _start(self, job_id: str, site: str, wait: float) -> None:
        time.sleep(wait)
        try:
            rejoin.start_at_site(self._engine, job_id, site)
        except rejoin.StartFailed as error:
            log.warning("job %s could not be started at %s: %s", job_id, site, error)
            return
        except Exception:
            log.exception("job %s could not be started at %s", job_id, site)
            return
        finally:
            with self._lock:
                part = self._sites.get(job_id, {}).get(site)
                if part is not None:
                    part.is_starting = False
        with self._lock:
            parts = self._sites.get(job_id, {})
            waited = any(one.is_held for one in parts.values())
            if site in parts:
                parts[site].gone, parts[site].is_held = None, False
            waits = any(one.is_held for one in parts.values())
        self._note(job_id, "site_back", f"{site} takes part again", site)
        if waited and not waits:
            self._note(job_id, "goes_on", "enough sites are there again; the run goes on")

    # ------------------------------------------------------------------------------- its files

    def _folder(self, job_id: str) -> Path:
        return runs_folder(self._workspace, job_id)

    def _about(self, job_id: str) -> _About | None:
        return _About.read(self._folder(job_id))

    def _keep(self, job_id: str, about: _About) -> None:
        try:
            about.write(self._folder(job_id))
        except OSError as error:
            log.error("job %s would not outlive this server: %s", job_id, error.strerror)

    def _note(self, job_id: str, kind: NoteKind, text: str, site: str | None = None) -> None:
        log.warning("job %s: %s", job_id, text)
        try:
            write_note(self._folder(job_id), kind, text, site)
        except OSError as error:
            log.error("this is not in the run's records: %s", error.strerror)

    def _app_config(self, job_id: str) -> Path:
        with self._engine.new_context() as ctx:
            return Path(ctx.get_workspace().get_app_config_dir(job_id))


class RunJobManager(SimpleJobDefManager):  # type: ignore[misc]
    """FLARE's job manager, but for jobs that FLARE would mark as failed: the keeper knows better.

    Args:
        uri_root: folder for jobs, as FLARE's.
        job_store_id: component that stores them, as FLARE's.
    """

    def set_status(self, jid: str, status: RunStatus, fl_ctx: FLContext) -> None:
        """Set a job's status."""
        failed = (RunStatus.FINISHED_EXECUTION_EXCEPTION, RunStatus.FINISHED_ABNORMAL)
        if status in failed:
            keeper = fl_ctx.get_engine().get_component(KEEPER)
            if isinstance(keeper, JobKeeper):
                status = keeper.status_after(jid, status)
        super().set_status(jid, status, fl_ctx)


KEEPER = "keeper"  # id of the component in the server's kit


def _end_of(folder: Path) -> str | None:
    """How a run came to its end by its own records; None where it did not."""
    last = read_last(folder / RECORDS)
    return last.status if isinstance(last, JobDone) else None


def _job_of(fl_ctx: FLContext) -> str:
    return str(fl_ctx.get_prop(FLContextKey.EVENT_DATA)[JobMetaKey.JOB_ID.value])


def _waits(absent: list[str], minimum: int) -> str:
    return (
        f"the run waits: it needs {minimum} sites, and {', '.join(absent)} "
        f"{'is' if len(absent) == 1 else 'are'} gone. It goes on by itself when they are back"
    )
