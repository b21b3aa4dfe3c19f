"""Runs, as people speak of them: which there are, how each is, to stop, resume and forget one.

A run is one FLARE job with all that is kept of it. Its state follows from FLARE's store, from the
run's folder at the server (run_state.py) and from what the keeper knows. The commands are the
server's (internals/commands.py): who may do what is asked of its authorization.json, by the rights
of FLARE's own commands. To stop is to abort a job that somebody may take up again; to resume needs
the right to submit and the right to stop that run; to forget is to delete a job.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from nvflare.apis.fl_constant import SystemComponents
from nvflare.apis.job_def import Job, JobMetaKey
from nvflare.apis.storage import WORKSPACE, StorageException
from pydantic import TypeAdapter

from fedfms.bounded import decode_text, number, open_zip
from fedfms.contracts.recipe import Recipe
from fedfms.errors import ConfigError, FederationError, Undecodable
from fedfms.files import file_sha256, write_whole
from fedfms.flare.internals import commands, rejoin
from fedfms.flare.internals.commands import Asked, Command
from fedfms.flare.job import RESULT_FOLDER
from fedfms.flare.notes import write_note
from fedfms.flare.run_about import About, end_of
from fedfms.flare.run_state import kept_recipe, rounds_kept, runs_folder
from fedfms.records.layout import PICTURES, RECIPE, RECORDS, answers_folder
from fedfms.records.read import RecordReader
from fedfms.records.schema import JobDone, JobRecord, Note, Resumed, RoundDone
from fedfms.records.write import RecordWriter

log = logging.getLogger(__name__)

LIST, STOP, RESUME, FORGET = "fedfms_runs", "fedfms_stop", "fedfms_resume", "fedfms_forget"
FORGOTTEN = "forgotten"  # folder of the server's workspace: one small file for each run
LARGEST_JOB = 16 << 30  # bytes of a job's archive, and of what is in it: models of all rounds
SITES_SECONDS = 20.0  # for the sites to forget a run
SUMMARY = "fedfms_run"  # key in a job's meta: what a completed run came to

State = Literal[
    "queued",  # FLARE has not started it yet
    "starting",
    "running",
    "waiting",  # for sites; goes on by itself
    "returning",  # its process at the server ended; it is about to be started again
    "stopping",  # somebody stopped it, and its processes end
    "stopped",  # by a person; goes on when somebody resumes it
    "given up",  # it was started again and again in vain; may be resumed
    "failed",
    "completed",
]
# a run of these has processes, or will have without a person
AT_WORK: tuple[State, ...] = (
    *("queued", "starting", "running", "waiting", "returning", "stopping"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """One run, for a person."""

    job_id: str
    name: str
    submitter: str
    state: State
    why: str = ""  # a sentence, where the state alone does not say it
    round: int = 0  # rounds done
    rounds: int | None = None  # that it shall have; None: not known before it starts
    since: float | None = None  # of the state, seconds since 1970-01-01 UTC
    submitted: float | None = None
    sites: tuple[str, ...] = ()  # that ever took part
    starts: int = 0  # of its process at the server
    is_kept: bool = False  # whether it could be resumed

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        told: dict[str, Any] = _INFO.dump_python(self, mode="json")
        return told

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunInfo:
        """The other way round; entries of a later version are passed over.

        Raises:
            ValueError: it is none of this version.
        """
        if not isinstance(values, Mapping):
            raise ValueError("no run")
        known = {one.name for one in dataclasses.fields(cls)}
        return _INFO.validate_python({k: v for k, v in values.items() if k in known})


_INFO = TypeAdapter(RunInfo)


class Keeper(Protocol):
    """What is asked of the keeper."""

    def waits(self, job_id: str) -> tuple[str, float] | None:
        """Why a running job waits, as a sentence, and since when."""

    def go_on(self, job_id: str) -> None:
        """Let a job that was put back be started, as soon as its sites are there."""


class RunCommands:
    """The server's side of the commands.

    Args:
        engine: FLARE's, of the server.
        workspace: the server's.
        keeper: keeps runs going.
    """

    def __init__(self, engine: Any, workspace: Path, keeper: Keeper) -> None:
        self._engine, self._workspace, self._keeper = engine, workspace, keeper

    def commands(self) -> list[Command]:
        """For `commands.add_commands`."""
        see, stop, submit, delete = commands.SEE, commands.STOP, commands.SUBMIT, commands.DELETE
        return [
            Command(LIST, "list runs and how they are", [see], False, self._list),
            Command(STOP, "stop a run and keep its state", [stop], True, self._stop),
            Command(RESUME, "go on with a stopped run", [submit, stop], True, self._resume),
            Command(FORGET, "remove all of a run", [delete], True, self._forget),
        ]

    # ---------------------------------------------------------------------------------- which

    def _list(self, asked: Asked) -> dict[str, Any]:
        with self._engine.new_context() as ctx:
            jobs = self._manager().get_all_jobs(ctx)
        infos = sorted(map(self.info, jobs), key=lambda one: one.submitted or 0.0, reverse=True)
        return {"runs": [one.to_dict() for one in infos]}

    def info(self, job: Job) -> RunInfo:
        """How a job of FLARE's store is."""
        meta, job_id = job.meta, str(job.job_id)
        status = str(meta.get(JobMetaKey.STATUS.value, ""))
        folder = runs_folder(self._workspace, job_id)
        about = About.read(folder)
        told = meta.get(SUMMARY)
        known = _of_records(folder) if about is not None else _of_summary(told)
        state, why, since = self._state(job_id, status, about, known)
        return RunInfo(
            job_id=job_id,
            name=str(meta.get(JobMetaKey.JOB_NAME.value, "")),
            submitter=str(meta.get(JobMetaKey.SUBMITTER_NAME.value, "")),
            submitted=_number(meta.get(JobMetaKey.SUBMIT_TIME.value)),
            state=state,
            why=why,
            since=since or _number(meta.get(JobMetaKey.SUBMIT_TIME.value)),
            round=known.done,
            rounds=known.rounds,
            sites=known.sites,
            starts=about.all_starts if about is not None else known.starts,
            is_kept=about is not None and state not in AT_WORK and rounds_kept(folder) > 0,
        )

    def _state(
        self, job_id: str, status: str, about: About | None, known: _Known
    ) -> tuple[State, str, float | None]:
        """State, sentence, since when."""
        if status in ("SUBMITTED", "APPROVED"):
            if about is None:
                return "queued", "", None
            return "returning", "its process ended; it goes on when its sites are there", known.last
        if about is not None and about.is_stopped and status in ("RUNNING", "DISPATCHED"):
            return "stopping", f"by {about.stopped_by}", about.stopped_at
        if status == "DISPATCHED":
            return "starting", "", known.last
        if about is not None and about.is_stopped:
            return "stopped", f"by {about.stopped_by}", about.stopped_at
        if status == "RUNNING":
            if (waits := self._keeper.waits(job_id)) is not None:
                return "waiting", *waits
            return "running", "", known.started
        if status == "FINISHED:COMPLETED":
            return "completed", "", known.last
        if status == "FINISHED:ABORTED":
            return "stopped", "in FLARE's console", known.last
        if known.end is not None and known.end.status == "failed":
            return "failed", known.end.reason or "", known.last
        if about is not None and known.end is None:
            why = "its process at the server ended again and again, or that server died"
            return "given up", why, known.last
        return "failed", f"FLARE says {status}", known.last

    # ----------------------------------------------------------------------------------- stop

    def _stop(self, asked: Asked) -> dict[str, Any]:
        info = self._info(asked.job_id)
        if info.state not in AT_WORK or info.state == "stopping":
            raise FederationError(
                f"run {_short(info)} is not at work: it is {info.state}",
                "nothing",
                code="not-running",
            )
        folder = runs_folder(self._workspace, asked.job_id)
        about = About.read(folder)
        if about is not None:
            about.stop(asked.user)  # first: whatever dies now, it stays stopped
            try:
                about.write(folder)
            except OSError as error:
                raise _disk(error) from None
            text = f"{asked.user} stopped the run; it goes on with fedfms resume {_short(info)}"
            with contextlib.suppress(OSError):
                write_note(folder, "stopped", text)
        if (problem := rejoin.stop_job(self._engine, asked.job_id)) and info.state != "returning":
            raise FederationError(problem, "look at fedfms runs", code="not-running")
        log.warning("run %s: %s stopped it", asked.job_id, asked.user)
        return {"kept_rounds": rounds_kept(folder) if about is not None else 0}

    # --------------------------------------------------------------------------------- resume

    def _resume(self, asked: Asked) -> dict[str, Any]:
        info, folder = self._info(asked.job_id), runs_folder(self._workspace, asked.job_id)
        short = _short(info)
        if info.state in AT_WORK:
            raise FederationError(
                f"run {short} is at work: it is {info.state}",
                "wait some seconds" if info.state == "stopping" else "nothing",
                code="still-running",
            )
        if info.state == "completed":
            raise FederationError(
                f"run {short} is completed, and nothing of it is left to do",
                f"fetch it: fedfms fetch {short}; or train on: fedfms submit --model",
                code="not-resumable",
            )
        about, done = About.read(folder), rounds_kept(folder)
        if about is None or done == 0:
            raise FederationError(
                f"nothing is kept of run {short}: it ended before its first round was over, or "
                "it was forgotten",
                "submit it again",
                code="nothing-kept",
            )
        if kept_recipe(folder) != self._recipe(asked.job_id):
            raise FederationError(
                f"what is kept of run {short} was made with another recipe than its job has now",
                "submit a new run, with --model where a model of it was fetched",
                code="other-recipe",
            )
        about.let_go_on()
        text = f"{asked.user} lets the run go on, after {done} rounds"
        try:
            about.write(folder)
            RecordWriter(folder / RECORDS).write(Note(kind="goes_on", text=text))
        except OSError as error:
            raise _disk(error) from None
        rejoin.put_back(self._engine, asked.job_id)
        log.warning("run %s: %s", asked.job_id, text)
        self._keeper.go_on(asked.job_id)
        return {"kept_rounds": done}

    def _recipe(self, job_id: str) -> str | None:
        """The hash of the recipe in the job as it was submitted."""
        with self._engine.new_context() as ctx:
            job = self._manager().get_job(job_id, ctx)
            for app in job.get_deployment():
                with (
                    contextlib.suppress(ConfigError, Undecodable),
                    open_zip(
                        job.get_application(app, ctx), "the job", max_bytes=LARGEST_JOB
                    ) as files,
                ):
                    text = decode_text(files.read(f"config/{RECIPE}"), "the job's recipe")
                    return Recipe.from_text(text, "the job's recipe").sha256
        return None

    # --------------------------------------------------------------------------------- forget

    def _forget(self, asked: Asked) -> dict[str, Any]:
        info = self._info(asked.job_id)
        if info.state in AT_WORK:
            raise FederationError(
                f"run {_short(info)} is at work: it is {info.state}",
                f"stop it first, and wait some seconds: fedfms stop {_short(info)}",
                code="still-running",
            )
        place = self._workspace / FORGOTTEN / f"{asked.job_id}.json"
        stays: dict[str, Any] = {
            **info.to_dict(),
            "is_kept": False,
            "forgotten": time.time(),
            "forgotten_by": asked.user,
            "sha256": self._hashes(asked.job_id),
        }
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_whole(place, json.dumps(stays, indent=2))
        except OSError as error:
            raise _disk(error) from None
        told = rejoin.delete_at_sites(self._engine, asked.job_id, SITES_SECONDS)
        stays["sites_asked"] = told
        with contextlib.suppress(OSError):
            write_whole(place, json.dumps(stays, indent=2))
        for folder in (
            runs_folder(self._workspace, asked.job_id),
            answers_folder(self._workspace, asked.job_id),
            self._workspace / asked.job_id,
        ):
            shutil.rmtree(folder, ignore_errors=True)
        with self._engine.new_context() as ctx:
            self._manager().delete(asked.job_id, ctx)
        log.warning("run %s: %s had it forgotten", asked.job_id, asked.user)
        missing = sorted(set(info.sites) - set(told))
        return {"sites": told, "not_connected": missing, "stays": place.name}

    def _hashes(self, job_id: str) -> dict[str, str]:
        """SHA-256 of a run's records, recipe and models, by name."""
        folder = runs_folder(self._workspace, job_id)
        found = {
            str(path.relative_to(folder)): file_sha256(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and (path.name in (RECORDS, RECIPE) or path.suffix == ".safetensors")
        }
        with self._engine.new_context() as ctx, contextlib.suppress(StorageException, OSError):
            data = self._manager().get_storage_component(job_id, WORKSPACE, ctx)
            if not data:
                return found
            with (
                contextlib.suppress(Undecodable),
                open_zip(data, "the job's result", max_bytes=LARGEST_JOB) as files,
            ):
                for name in files.members:
                    _, ours, short = name.rpartition(f"{RESULT_FOLDER}/")
                    if ours and short and not short.startswith(PICTURES):
                        found[short] = _sha256(files.blocks(name))
        return found

    # ---------------------------------------------------------------------------------- store

    def _manager(self) -> Any:
        return self._engine.get_component(SystemComponents.JOB_MANAGER)

    def _info(self, job_id: str) -> RunInfo:
        with self._engine.new_context() as ctx:
            return self.info(self._manager().get_job(job_id, ctx))

    def keep_summary(self, job_id: str) -> None:
        """Keep in FLARE's store what a run came to, before its folder goes."""
        folder = runs_folder(self._workspace, job_id)
        about, known = About.read(folder), _of_records(folder)
        summary = {
            "done": known.done,
            "rounds": known.rounds,
            "sites": list(known.sites),
            "last": known.last,
            "starts": about.all_starts if about is not None else 0,
        }
        with self._engine.new_context() as ctx:
            self._manager().update_meta(job_id, {SUMMARY: summary}, ctx)


@dataclass(frozen=True, slots=True)
class _Known:
    """What records say of a run."""

    done: int = 0
    rounds: int | None = None
    sites: tuple[str, ...] = ()
    started: float | None = None  # the last time
    last: float | None = None  # time of the last record
    end: JobDone | None = None
    starts: int = 0


def _of_records(folder: Path) -> _Known:
    reader = RecordReader(folder / RECORDS)
    records = reader.read_rest()
    done = 0
    started: float | None = None
    sites: set[str] = set()
    for one in records:
        if isinstance(one, JobRecord):
            sites |= set(one.sites)
        if isinstance(one, RoundDone):
            done = one.round + 1
        if isinstance(one, Resumed):
            done = one.round
        if isinstance(one, JobRecord | Resumed):
            started = one.time
    about = About.read(folder)
    rounds = None
    with contextlib.suppress(ConfigError):
        rounds = Recipe.from_json(folder / RECIPE).rounds
    return _Known(
        done=done,
        rounds=rounds,
        sites=tuple(sorted(sites | set(about.sites if about is not None else ()))),
        started=started,
        last=records[-1].time if records else None,
        end=end_of(folder),
    )


def _of_summary(told: Any) -> _Known:
    """Of a run whose folder has gone."""
    if not isinstance(told, dict):
        return _Known()
    rounds = told.get("rounds")
    return _Known(
        done=int(told.get("done") or 0),
        rounds=int(rounds) if rounds else None,
        sites=tuple(str(site) for site in told.get("sites") or ()),
        last=_number(told.get("last")),
        starts=int(told.get("starts") or 0),
    )


def _short(info: RunInfo) -> str:
    return info.job_id[:8]


def _number(value: Any) -> float | None:
    with contextlib.suppress(Undecodable):
        return number(value, "a time") if isinstance(value, int | float) else None
    return None


def _sha256(blocks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _disk(error: OSError) -> FederationError:
    return FederationError(
        f"the server's disk does not take it: {error.strerror}",
        "make room in the server's workspace",
        code="disk-full",
    )
