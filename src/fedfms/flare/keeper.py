"""Keeps a run going at the server, whatever process of it dies.

As FLARE 2.9 ships, the end of one site's job process ends the job of all sites; a site that comes
back has no part in running jobs, and everybody waits for it; and a job is over when the server's
process or the job's own process at the server is. Here

- a job process that died at a site is started there again, and a site that logs in again gets its
  part of running jobs: it answers the round that is open;
- a job waits, instead of ending, while fewer than its minimum of sites take part;
- a site that pauses itself (pausing.py) takes no part meanwhile, and is started again after it;
- a job whose process died at the server is put back into FLARE's queue under the same id, as it was
  submitted and signed, once its sites are there again; its process finds what was kept of the run
  (run_state.py) and goes on with the round that was open.

Each of these has a budget, so that what fails each time comes to an end and says why. What people
ask for (stop, resume, forget) is in runs.py, and somebody may be told of what befalls a run
(FEDFMS_NOTIFY). What FLARE does not offer stands behind the wall (internals/rejoin.py).
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, SystemComponents
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.job_def_manager import SimpleJobDefManager
from nvflare.apis.job_def import JobMetaKey, RunStatus
from nvflare.apis.storage import WORKSPACE

from fedfms.contracts.machine import Machine
from fedfms.contracts.pause import Pause, pause_of
from fedfms.contracts.recipe import Recipe
from fedfms.data.memory import free_bytes
from fedfms.errors import FedfmsError
from fedfms.flare.cleaning import (
    AUDIT,
    bound_log,
    clean_every_hour,
    clean_folders,
    last_written,
)
from fedfms.flare.internals import commands, rejoin
from fedfms.flare.internals.audit import let_audit_wait
from fedfms.flare.internals.server import (
    give_up_unfinished_jobs,
    hear_signs_of_life,
    set_scheduler,
)
from fedfms.flare.internals.streams import forget_in_one_thread
from fedfms.flare.internals.version import FlareChanged, broken_assumptions, changed
from fedfms.flare.notes import NoteWriter
from fedfms.flare.pausing import PROPERTY as PAUSE
from fedfms.flare.room import LOOK_SECONDS, MARGIN_BYTES, full_disk
from fedfms.flare.run_about import About, end_of
from fedfms.flare.run_state import RUNS, rounds_kept, runs_folder
from fedfms.flare.runs import RunCommands
from fedfms.notify import Notifier
from fedfms.records.layout import ANSWERS, RECIPE, answers_folder
from fedfms.records.schema import NoteKind

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
TRANSFER = "transfer"  # FLARE's folder of what people fetch
DOWNLOAD_SECONDS = 86400.0  # nobody fetches one job for so long
STATUS_BYTES = (
    2**20
)  # with so much free it is not the disk that keeps a job's state from being written
LEAVE_SECONDS = 20.0  # a site that is gone for so long is no part of the next round


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
        self._runs: RunCommands | None = None
        self._notifier: Notifier | None = None
        self._waits: dict[str, tuple[str, float]] = {}  # job -> why it waits, since when
        self._paused: dict[str, Pause] = {}  # site
        self._notes: dict[str, NoteWriter] = {}  # job

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Follow the server, its sites and its jobs."""
        if event_type == EventType.SYSTEM_BOOTSTRAP:
            forget_in_one_thread()
            self._begin(fl_ctx)
        elif event_type == EventType.SYSTEM_START and self._works:
            let_audit_wait()
            server = fl_ctx.get_prop(FLContextKey.SITE_OBJ)
            self._tell_gone = rejoin.hold_deaths(server, self._holds_death)
            rejoin.hear_failures(server, self._job_process_ended)
            self._listen(server)
            threading.Thread(target=self._patrol, daemon=True).start()
            clean_every_hour(self.clean)
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
        try:
            self._settings(engine)
        except FedfmsError as error:  # a server that is started in order has said so by then
            log.error("%s; fix: %s", error.problem, error.fix)
        if broken := broken_assumptions("rejoin"):
            log.error(
                "no rejoin: sites and jobs that die do not come back by themselves (%s)",
                changed(broken).problem,
            )
            give_up_unfinished_jobs(fl_ctx)
            return
        self._works = True
        before = rejoin.jobs_of_before(fl_ctx)
        waiting = rejoin.waiting_again(fl_ctx)
        if free_bytes(self._workspace) >= MARGIN_BYTES:
            self._take_up(before, waiting)
        else:  # the server answers people and sites meanwhile
            threading.Thread(target=self._take_up, args=(before, waiting), daemon=True).start()

    def _take_up(self, before: list[str], waiting: list[str]) -> None:
        """Let the jobs of an earlier process of this server go on; on a full disk it waits.

        Args:
            before: jobs that ran when it ended.
            waiting: those that it had put back.
        """
        self._wait_for_room(before + waiting)
        for job_id in before:
            if self.goes_on(job_id) or self._ended_unsaved(job_id):
                rejoin.put_back(self._engine, job_id)
                waiting.append(job_id)
            else:
                rejoin.give_up(self._engine, job_id)
        for job_id in waiting:
            if (about := self._about(job_id)) is not None:
                self._go_on_later(job_id, about)

    def _wait_for_room(self, job_ids: list[str]) -> None:
        """Return when a job can be started here, as far as the disk is concerned."""
        if not job_ids or free_bytes(self._workspace) >= MARGIN_BYTES:
            return
        full = full_disk(self._workspace, MARGIN_BYTES)
        for job_id in job_ids:
            self._note(job_id, "waits", f"the run waits: {full}. It goes on when there is room")
        while free_bytes(self._workspace) < MARGIN_BYTES:
            time.sleep(LOOK_SECONDS)
        for job_id in job_ids:
            self._note(job_id, "goes_on", "the server's disk has room again; the run goes on")

    def _settings(self, engine: Any) -> None:
        """What the operator of this server set."""
        machine = Machine.from_environment()
        set_scheduler(engine, machine.max_runs)
        if machine.notify is not None:
            self._notifier = Notifier(machine.notify)

    def _listen(self, server: Any) -> None:
        """What people and sites say to this server, as far as this FLARE lets it be heard."""
        self._runs = RunCommands(self._engine, self._workspace, self)
        try:
            commands.add_commands(server, self._runs.commands())
            hear_signs_of_life(server, PAUSE, self._heard)
        except FlareChanged as error:
            log.error("%s", error.problem)

    # ------------------------------------------------------------------------ life of a job

    def _job_started(self, job_id: str) -> None:
        recipe = self._app_config(job_id) / RECIPE
        if not recipe.is_file():
            return  # none of ours: FLARE does with it what FLARE does
        folder, sites = self._folder(job_id), rejoin.sites_of(self._engine, job_id)
        about = self._about(job_id) or About([], rejoin.min_sites_of(self._engine, job_id))
        about.sites = sorted({*about.sites, *sites})
        about.starts.append(rounds_kept(folder))
        with contextlib.suppress(FedfmsError):  # its own process says what is wrong with it
            about.is_canary = Recipe.from_json(recipe).canary
        self._keep(job_id, about)
        with self._lock:
            self._sites[job_id] = {site: _Site() for site in about.sites}

    def _job_ended(self, job_id: str) -> None:
        with self._lock:
            self._sites.pop(job_id, None)
            self._waits.pop(job_id, None)
        about = self._about(job_id)
        if about is None:
            return
        if rejoin.status_of(self._engine, job_id) == RunStatus.SUBMITTED.value:
            log.warning("job %s: its process at this server ended; it is to go on", job_id)
            self._go_on_later(job_id, about)
            return
        with self._lock:
            self._notes.pop(job_id, None)
        if about.is_canary:  # nobody waits for it but who started it, and nothing of it is kept
            shutil.rmtree(self._folder(job_id), ignore_errors=True)
            return
        self._tell(job_id, self._end_in_words(job_id, about))
        if _end_of(self._folder(job_id)) == "completed" and not about.is_stopped:
            if self._runs is not None:
                self._runs.keep_summary(job_id)
            shutil.rmtree(self._folder(job_id), ignore_errors=True)  # FLARE's store has all of it

    def _end_in_words(self, job_id: str, about: About) -> str:
        folder = self._folder(job_id)
        end, done = end_of(folder), rounds_kept(folder)
        if about.is_stopped:
            return f"{about.stopped_by} stopped it after {done} rounds"
        if end is None:
            return f"it was given up after {done} rounds; see fedfms runs"
        if end.status == "completed":
            return f"it is completed: fedfms fetch {job_id[:8]}"
        return f"it ended ({end.status}) after {done} rounds: {end.reason or 'no reason given'}"

    def status_after(self, job_id: str, status: RunStatus) -> RunStatus:
        """What a job is whose process at the server FLARE takes as failed.

        ABORTED if somebody stopped it. SUBMITTED if it is to go on. COMPLETED if it wrote down that
        all of it was done: FLARE counts it as failed, too, when a late answer was on its way as its
        process ended.
        """
        if (about := self._about(job_id)) is not None and about.is_stopped:
            return RunStatus.FINISHED_ABORTED
        if status == RunStatus.ABANDONED:
            return status
        if self.goes_on(job_id):
            return RunStatus.SUBMITTED
        if self._works and _end_of(self._folder(job_id)) == "completed":
            return RunStatus.FINISHED_COMPLETED
        return status

    def goes_on(self, job_id: str) -> bool:
        """Whether a job is to be started again whose process at the server just ended.

        It is not where somebody stopped it, where the process came to its end in order, which it
        recorded with the reason, nor where it was started again and again without finishing a
        round.
        """
        about = self._about(job_id) if self._works else None
        if about is None or about.is_stopped:
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

    def _ended_unsaved(self, job_id: str) -> bool:
        """Whether a job was done as the server died, before its result was in FLARE's store.

        It is to be started again for that: its process finds all rounds done, and evaluates.
        """
        folder = self._folder(job_id)
        about = self._about(job_id)
        return (
            about is not None
            and not about.is_stopped
            and _end_of(folder) == "completed"
            and about.starts_in_vain(rounds_kept(folder)) < len(JOB_WAITS)
        )

    def waits(self, job_id: str) -> tuple[str, float] | None:
        """Why a job waits, as a sentence, and since when."""
        with self._lock:
            return self._waits.get(job_id)

    def go_on(self, job_id: str) -> None:
        """Let a job that was put back be started, as soon as its sites are there."""
        if (about := self._about(job_id)) is not None:
            self._tell(job_id, "somebody lets it go on")
            self._go_on_later(job_id, about)

    def _go_on_later(self, job_id: str, about: About) -> None:
        threading.Thread(target=self._go_on, args=(job_id, about), daemon=True).start()

    def _go_on(self, job_id: str, about: About) -> None:
        """Wait for the job's sites, end what they still run of it, and let it be scheduled."""
        engine = self._engine
        try:
            in_vain = about.starts_in_vain(rounds_kept(self._folder(job_id)))
            time.sleep(JOB_WAITS[min(max(in_vain - 1, 0), len(JOB_WAITS) - 1)])
            began = time.monotonic()
            told = False
            while True:
                there = set(about.sites) & set(rejoin.connected_sites(engine)) - set(self._paused)
                waited = time.monotonic() - began
                if there == set(about.sites):
                    break
                if len(there) >= about.min_sites and waited > ALL_SITES_SECONDS:
                    break
                if waited > ALL_SITES_SECONDS and not told:
                    told = True
                    absent = sorted(set(about.sites) - there)
                    self._note(job_id, "waits", self._why_waits(absent, about.min_sites))
                if rejoin.status_of(engine, job_id) != RunStatus.SUBMITTED.value:
                    with self._lock:
                        self._waits.pop(job_id, None)
                    return  # somebody ended it
                time.sleep(0.5)
            if still := rejoin.end_at_sites(engine, job_id, there, END_AT_SITES_SECONDS):
                log.warning("job %s: %s still run a process of before", job_id, ", ".join(still))
            if told:
                self._note(job_id, "goes_on", "enough sites are there again; the run goes on")
            if rejoin.let_go(engine, job_id):
                log.info("job %s: goes on with %s", job_id, ", ".join(sorted(there)))
        except Exception:
            log.exception("job %s could not be let go on", job_id)

    # ------------------------------------------------------------------------ sites of a job

    def _job_process_ended(self, job_id: str, site: str, code: int, reason: str) -> bool:
        job = rejoin.running_job(self._engine, job_id)
        if job is None or job.aborted or self._about(job_id) is None:
            return False
        if site in self._paused:
            self._tell_gone(job_id, site)
            return True
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
            f"FLARE client is started again; fix: the FLARE client's log at {site} says why",
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
        if site not in rejoin.connected_sites(self._engine) or site in self._paused:
            return  # the former: an admin
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
                with self._lock:
                    for notes in self._notes.values():
                        notes.write_held()
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
            busy |= set(self._paused)
        asked = [
            site
            for site in rejoin.connected_sites(self._engine)
            if site not in busy and rejoin.is_meant_for(self._engine, job.job_id, site)
        ]
        for site, runs in rejoin.asked_sites(self._engine, job.job_id, asked).items():
            with self._lock:
                part = parts.setdefault(site, _Site())
                part.absent = 0 if runs and site in job.sites else part.absent + 1
                is_absent = part.absent >= 2  # one look may fall between two processes
                part.absent = 0 if is_absent else part.absent
            if not is_absent:
                continue
            if runs:  # it was left out as its line was cut, and nobody hears its process any more
                rejoin.end_at_sites(self._engine, job.job_id, [site], END_AT_SITES_SECONDS)
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
            self._note(job_id, "waits", self._why_waits(absent, job.min_sites))
        else:
            self._let_leave(job_id, site)
        return part.is_held

    def _let_leave(self, job_id: str, site: str) -> None:
        """The job goes on without a site: soon, or at once where it says itself that it leaves."""
        if (pause := self._paused.get(site)) is not None:
            text = f"{site} paused itself {pause.words}; the run goes on without it"
            self._note(job_id, "site_paused", text, site)
            rejoin.leave_out(self._engine, job_id, site)
            rejoin.give_up_outcome(self._engine, job_id, site)
        else:
            threading.Timer(LEAVE_SECONDS, self._leave_out, (job_id, site)).start()

    def _leave_out(self, job_id: str, site: str) -> None:
        with self._lock:
            part = self._sites.get(job_id, {}).get(site)
            if part is None or part.gone is None or part.is_held or part.is_starting:
                return
        if rejoin.asked_sites(self._engine, job_id, [site]).get(site):
            part.gone = None  # its line was cut, and its process goes on
            return
        self._tell_gone(job_id, site)  # again: it may have been heard for a moment
        rejoin.leave_out(self._engine, job_id, site)
        rejoin.give_up_outcome(self._engine, job_id, site)
        goes_on = "the run waits" if self.waits(job_id) else "the run goes on without it"
        self._note(
            job_id,
            "site_gone",
            f"{site} is gone; {goes_on}, and it takes part again when it is back; fix: ask "
            f"{site} whether its containers run (docker compose ps)",
            site,
        )

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
        job = rejoin.running_job(self._engine, job_id)
        with self._lock:
            parts = self._sites.get(job_id, {})
            waited = any(one.is_held for one in parts.values())
            if site in parts:
                parts[site].gone, parts[site].is_held = None, False
            left = [s for s in (job.sites if job else ()) if not self._is_gone(job_id, s)]
            enough = job is not None and len(left) >= job.min_sites
            held = sorted(s for s, one in parts.items() if one.is_held)
        self._note(job_id, "site_back", f"{site} takes part again", site)
        if not waited or not enough:
            return
        without = f" without {', '.join(held)}" if held else ""
        self._note(job_id, "goes_on", f"enough sites are there again; the run goes on{without}")
        for other in held:  # nobody waits for these any more
            self._let_leave(job_id, other)
            self._tell_gone(job_id, other)

    # --------------------------------------------------------------------- sites that pause

    def _heard(self, site: str, said: Any) -> None:
        """What a site says of its pause with a sign of life."""
        pause = pause_of(said)
        with self._lock:
            before = self._paused.pop(site, None)
            if pause is not None:
                self._paused[site] = pause
        if pause is not None and before is None:
            threading.Thread(target=self._pauses, args=(site,), daemon=True).start()
        elif pause is None and before is not None:
            threading.Thread(target=self._is_back, args=(site,), daemon=True).start()

    def _pauses(self, site: str) -> None:
        """Take a site out of what runs; its trainer has given the task up by itself."""
        log.warning("%s paused itself %s", site, self._paused[site].words)
        for job in rejoin.running_jobs(self._engine):
            if self._about(job.job_id) is None or site not in job.sites:
                continue
            try:
                rejoin.end_at_site(self._engine, job.job_id, site)
                self._tell_gone(job.job_id, site)
            except Exception:
                log.exception("%s could not be taken out of job %s", site, job.job_id)

    def _is_back(self, site: str) -> None:
        log.warning("%s pauses no more", site)
        for job in rejoin.running_jobs(self._engine):
            if self._about(job.job_id) is not None and not job.aborted:
                with contextlib.suppress(Exception):
                    if rejoin.is_meant_for(self._engine, job.job_id, site):
                        self._start_soon(job.job_id, site)

    def _why_waits(self, absent: list[str], minimum: int) -> str:
        with self._lock:
            paused = {site: self._paused[site].words for site in absent if site in self._paused}
        gone = [site for site in absent if site not in paused]
        why = [f"{', '.join(gone)} {'is' if len(gone) == 1 else 'are'} gone"] if gone else []
        why += [f"{site} paused itself {words}" for site, words in paused.items()]
        return (
            f"the run waits: it needs {minimum} sites, and {'; '.join(why)}. "
            "It goes on by itself when they are back"
        )

    # -------------------------------------------------------------------------------- what is old

    def clean(self, age: float) -> None:
        """Remove jobs that ended so many seconds ago, and what is left of them."""
        bound_log(self._workspace / AUDIT)
        manager = self._engine.get_component(SystemComponents.JOB_MANAGER)
        with self._engine.new_context() as fl_ctx:
            jobs = {job.job_id: job for job in manager.get_all_jobs(fl_ctx)}
            over = {job_id for job_id, job in jobs.items() if _is_over(job)}
            for job_id in sorted(over):
                folder = Path(manager.job_uri(job_id))
                if time.time() - last_written(folder) <= age:
                    continue
                completed = _status_of(jobs[job_id]) == RunStatus.FINISHED_COMPLETED.value
                if completed and not (folder / FETCHED).exists():
                    log.info("job %s is old and was never fetched: it stays", job_id)
                    continue
                manager.delete(job_id, fl_ctx)
                for kept in (self._folder(job_id), answers_folder(self._workspace, job_id)):
                    shutil.rmtree(kept, ignore_errors=True)
                log.info("job %s ended long ago: removed", job_id)
            clean_folders(self._workspace, age, jobs.keys() - over)
            runs = self._workspace / RUNS
            if runs.is_dir():
                clean_folders(runs, age, jobs.keys() - over)
            answers = self._workspace / ANSWERS
            if answers.is_dir():  # they stay as long as their job's result
                clean_folders(answers, age, jobs.keys())
        transfer = self._workspace / TRANSFER
        if transfer.is_dir():  # what a download that was broken off left, under a number of its own
            clean_folders(transfer, min(age, DOWNLOAD_SECONDS), ())

    # ------------------------------------------------------------------------------- its files

    def _folder(self, job_id: str) -> Path:
        return runs_folder(self._workspace, job_id)

    def _about(self, job_id: str) -> About | None:
        return About.read(self._folder(job_id))

    def _keep(self, job_id: str, about: About) -> None:
        try:
            self._wait_for_room([job_id])
            about.write(self._folder(job_id))
        except OSError as error:
            log.error("job %s would not outlive this server: %s", job_id, error.strerror)

    def _note(self, job_id: str, kind: NoteKind, text: str, site: str | None = None) -> None:
        log.warning("job %s: %s", job_id, text)
        with self._lock:
            if kind == "waits":
                self._waits[job_id] = (text, time.time())
            elif kind == "goes_on":
                self._waits.pop(job_id, None)
            notes = self._notes.setdefault(job_id, NoteWriter(self._folder(job_id)))
            try:
                notes.write(kind, text, site)
            except OSError as error:
                log.error("this is not in the run's records: %s", error.strerror)
        if kind in ("waits", "goes_on", "ends"):
            self._tell(job_id, text)

    def _tell(self, job_id: str, text: str) -> None:
        """Tell somebody, where the operator named a command for it."""
        if self._notifier is not None:
            self._notifier.tell(f"run {job_id[:8]}: {text}")

    def _app_config(self, job_id: str) -> Path:
        with self._engine.new_context() as ctx:
            return Path(ctx.get_workspace().get_app_config_dir(job_id))


class RunJobManager(SimpleJobDefManager):  # type: ignore[misc]
    """FLARE's job manager, with two more things to say.

    A job that FLARE would mark as failed may go on: the keeper knows better. And a full disk is
    waited for: before a job starts, by whoever writes how it is, and when its results go into
    FLARE's store.

    Args:
        uri_root: folder for jobs, as FLARE's.
        job_store_id: component that stores them, as FLARE's.
    """

    def __init__(self, uri_root: str = "jobs", job_store_id: str = "job_store") -> None:
        super().__init__(uri_root, job_store_id)
        self._told: set[str] = set()  # jobs of which was said that they wait for room

    def set_status(self, jid: str, status: RunStatus, fl_ctx: FLContext) -> None:
        """Set a job's status; a full disk is waited for, but not by who stops a job."""
        failed = (
            RunStatus.FINISHED_EXECUTION_EXCEPTION,
            RunStatus.FINISHED_ABNORMAL,
            RunStatus.ABANDONED,
        )
        engine = fl_ctx.get_engine()
        if status in failed:
            keeper = engine.get_component(KEEPER)
            if isinstance(keeper, JobKeeper):
                status = keeper.status_after(jid, status)
        if status == RunStatus.FINISHED_ABORTED:
            super().set_status(jid, status, fl_ctx)
        elif status == RunStatus.FAILED_TO_RUN and self._may_start_again():
            self._patiently(
                jid, lambda: super(RunJobManager, self).set_status(jid, RunStatus.SUBMITTED, fl_ctx)
            )
            rejoin.let_go(engine, jid)  # it is started when there is room
        else:
            self._patiently(jid, lambda: super(RunJobManager, self).set_status(jid, status, fl_ctx))

    def update_meta(self, jid: str, meta: dict[str, Any], fl_ctx: FLContext) -> None:
        """Keep more of what is known of a job; a full disk is waited for."""
        self._patiently(jid, lambda: super(RunJobManager, self).update_meta(jid, meta, fl_ctx))

    def get_jobs_to_schedule(self, fl_ctx: FLContext) -> list[Any]:
        """Jobs that wait to be started; none while the disk is full."""
        jobs: list[Any] = super().get_jobs_to_schedule(fl_ctx)
        folder = Path(self.uri_root)
        if jobs and free_bytes(folder) < MARGIN_BYTES:
            self._wait(jobs, full_disk(folder, MARGIN_BYTES), fl_ctx)
            return []
        self._told.clear()
        return jobs

    def get_storage_for_download(
        self, jid: str, download_dir: str, component: str, download_file: str, fl_ctx: FLContext
    ) -> None:
        """Give a job's results to who fetches them; such a job may go when it is old."""
        super().get_storage_for_download(jid, download_dir, component, download_file, fl_ctx)
        if component == WORKSPACE:
            with contextlib.suppress(OSError):
                (Path(self.job_uri(jid)) / FETCHED).touch()

    def save_workspace(self, jid: str, data: Any, fl_ctx: FLContext) -> Any:
        """Put what a job left into FLARE's store, if need be when there is room."""
        folders = [Path(one) for one in data] if isinstance(data, list) else []
        needed = sum(p.stat().st_size for one in folders for p in one.rglob("*") if p.is_file())
        while True:
            try:
                return super().save_workspace(jid, data, fl_ctx)
            except Exception:
                store = Path(self.uri_root)
                if free_bytes(store) > needed:
                    raise
                if jid not in self._told:
                    self._told.add(jid)
                    log.warning("job %s ended, its results wait: %s", jid, full_disk(store, needed))
                time.sleep(LOOK_SECONDS)

    def _wait(self, jobs: list[Any], why: str, fl_ctx: FLContext) -> None:
        """Say once of each job that it waits: in the log, and to who asks for its state."""
        for job in jobs:
            if job.job_id not in self._told:
                self._told.add(job.job_id)
                log.warning("job %s waits: %s. It starts when there is room", job.job_id, why)
                said = f"{time.strftime('%Y-%m-%d %H:%M:%S')}: {why}"
                with contextlib.suppress(Exception):  # so full that not even this can be written
                    history = {JobMetaKey.SCHEDULE_HISTORY.value: [said]}
                    super().update_meta(job.job_id, history, fl_ctx)

    def _may_start_again(self) -> bool:
        """Whether what could not start may have failed for want of room, and can be let go anew."""
        return free_bytes(Path(self.uri_root)) < MARGIN_BYTES and not broken_assumptions("rejoin")

    def _patiently(self, jid: str, write: Callable[[], None]) -> None:
        """Write into FLARE's store, if need be when there is room: its callers would give up."""
        store = Path(self.uri_root)
        had_room = False
        while True:
            try:
                write()
                return
            except Exception:
                if free_bytes(store) >= STATUS_BYTES:
                    if had_room:
                        raise
                    had_room = True  # it may have come a moment ago: once more
                    continue
                had_room = False
                if jid not in self._told:
                    self._told.add(jid)
                    log.warning("the state of job %s waits: %s", jid, full_disk(store, 0))
                time.sleep(LOOK_SECONDS)


FETCHED = "fedfms_fetched"  # tag in a job's folder of FLARE's store


def _status_of(job: Any) -> str:
    return str(job.meta.get(JobMetaKey.STATUS.value))


def _is_over(job: Any) -> bool:
    return _status_of(job).startswith("FINISHED")


KEEPER = "keeper"  # id of the component in the server's kit


def _end_of(folder: Path) -> str | None:
    """How a run came to its end by its own records; None where it did not."""
    end = end_of(folder)
    return end.status if end is not None else None


def _job_of(fl_ctx: FLContext) -> str:
    return str(fl_ctx.get_prop(FLContextKey.EVENT_DATA)[JobMetaKey.JOB_ID.value])
