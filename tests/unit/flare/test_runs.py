"""Runs as people speak of them: states, and what may be stopped, resumed and forgotten."""

from __future__ import annotations

import dataclasses
import io
import json
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.apis.fl_constant import SystemComponents
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.job_def_manager import SimpleJobDefManager
from nvflare.apis.job_def import RunStatus
from nvflare.app_common.storages.filesystem_storage import FilesystemStorage

from fedfms.contracts.recipe import Recipe
from fedfms.errors import FederationError
from fedfms.files import file_sha256
from fedfms.flare.internals import rejoin
from fedfms.flare.internals.commands import Asked
from fedfms.flare.notes import NoteReader
from fedfms.flare.run_about import About
from fedfms.flare.run_state import RunState
from fedfms.flare.runs import FORGOTTEN, RunCommands, RunInfo
from fedfms.records.layout import GLOBAL_MODEL, RECIPE, RECORDS
from fedfms.records.schema import JobDone, JobRecord, Record, RoundDone, RoundStarted
from fedfms.records.write import RecordWriter
from fedfms.shipped import JOBS

RECIPE_THERE = Recipe.from_json(JOBS / "fedmsa/app/config/recipe.json")


class Server:
    """A server's store and workspace, without its processes."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.workspace = root / "workspace"
        self.store = FilesystemStorage(root_dir=str(root / "store"))
        self.manager = SimpleJobDefManager(uri_root="/jobs")
        monkeypatch.setattr(self.manager, "_get_job_store", lambda fl_ctx: self.store)
        self.went_on: list[str] = []
        self.waiting: dict[str, tuple[str, float]] = {}
        self.stopped: list[str] = []
        self.commands = RunCommands(self, self.workspace, self)
        monkeypatch.setattr(rejoin, "delete_at_sites", lambda *_: {"site-1": "forgotten"})
        self.job_runner = SimpleNamespace(stop_run=lambda job, ctx: self.stopped.append(job) or "")

    # what FLARE's engine has
    def get_component(self, name: str) -> Any:
        return {SystemComponents.JOB_MANAGER: self.manager}[name]

    def new_context(self) -> FLContext:
        context = FLContext()
        context.set_prop("__engine__", self, private=True, sticky=False)
        return context

    # what the keeper has
    def waits(self, job_id: str) -> tuple[str, float] | None:
        return self.waiting.get(job_id)

    def go_on(self, job_id: str) -> None:
        self.went_on.append(job_id)

    def job(self, status: RunStatus, recipe: Recipe = RECIPE_THERE) -> str:
        """A job in the store."""
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as file:
            file.writestr(f"fedmsa/app/config/{RECIPE}", recipe.to_json())
        meta = {
            "name": "fedmsa",
            "submitter_name": "bob",
            "deploy_map": {"app": ["@ALL"]},
            "job_folder_name": "fedmsa",
        }
        job_id = str(self.manager.create(meta, data.getvalue(), FLContext())["job_id"])
        self.manager.set_status(job_id, status, FLContext())
        return job_id

    def folder(self, job_id: str) -> Path:
        return self.workspace / "runs" / job_id

    def kept(self, job_id: str, rounds: int, *more: Record, stopped_by: str | None = None) -> None:
        """What a run leaves at the server."""
        folder = self.folder(job_id)
        about = About(["site-1", "site-2"], 2, [0])
        if stopped_by:
            about.stop(stopped_by)
        about.write(folder)
        (folder / RECIPE).write_text(RECIPE_THERE.to_json())
        writer = RecordWriter(folder / RECORDS)
        writer.write(JobRecord(sites=("site-1", "site-2")))
        for number in range(rounds):
            writer.write(RoundStarted(round=number))
            writer.write(RoundDone(round=number, sites=("site-1", "site-2")))
        for record in more:
            writer.write(record)
        if rounds:
            place = folder / f"round-{rounds:04d}"
            place.mkdir()
            (place / GLOBAL_MODEL).write_bytes(b"a model")
            state = RunState(rounds, RECIPE_THERE.sha256)
            (place / "state.json").write_text(json.dumps(dataclasses.asdict(state)))

    def info(self, job_id: str) -> RunInfo:
        told = self.commands._list(Asked("ann"))["runs"]
        return next(RunInfo.from_dict(one) for one in told if one["job_id"] == job_id)

    def ask(self, what: str, job_id: str) -> dict[str, Any]:
        return getattr(self.commands, f"_{what}")(Asked("ann", job_id, "bob"))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(tmp_path, monkeypatch)


def refused(server: Server, what: str, job_id: str) -> FederationError:
    with pytest.raises(FederationError) as raised:
        server.ask(what, job_id)
    return raised.value


ABORTED, FAILED = JobDone(status="aborted"), JobDone(status="failed", reason="no site answered")
DONE = JobDone(status="completed")


@pytest.mark.parametrize(
    ("status", "more", "state"),
    [
        (RunStatus.SUBMITTED, (), "returning"),
        (RunStatus.DISPATCHED, (), "starting"),
        (RunStatus.RUNNING, (), "running"),
        (RunStatus.FINISHED_ABORTED, (ABORTED,), "stopped"),  # in FLARE's console
        (RunStatus.FINISHED_EXECUTION_EXCEPTION, (FAILED,), "failed"),
        (RunStatus.FINISHED_EXECUTION_EXCEPTION, (), "given up"),
        (RunStatus.ABANDONED, (), "given up"),
        (RunStatus.FINISHED_COMPLETED, (DONE,), "completed"),
    ],
)
def test_each_state_has_a_plain_word(
    server: Server, status: RunStatus, more: tuple[Record, ...], state: str
) -> None:
    job_id = server.job(status)
    server.kept(job_id, 2, *more)
    info = server.info(job_id)
    assert info.state == state
    assert (info.round, info.rounds, info.starts) == (2, RECIPE_THERE.rounds, 1)
    assert (info.submitter, info.sites) == ("bob", ("site-1", "site-2"))


def test_a_run_that_waits_says_for_whom_and_since_when(server: Server) -> None:
    job_id = server.job(RunStatus.RUNNING)
    server.kept(job_id, 1)
    server.waiting[job_id] = ("it needs 2 sites, and site-2 is gone", 1000.0)
    info = server.info(job_id)
    assert (info.state, info.since) == ("waiting", 1000.0) and "site-2 is gone" in info.why


def test_one_that_nobody_has_started_is_queued(server: Server) -> None:
    assert server.info(server.job(RunStatus.SUBMITTED)).state == "queued"


def test_a_completed_run_is_known_after_its_folder_has_gone(server: Server) -> None:
    job_id = server.job(RunStatus.FINISHED_COMPLETED)
    server.kept(job_id, 3, DONE)
    before = server.info(job_id)
    server.commands.keep_summary(job_id)
    for path in sorted(server.folder(job_id).rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert dataclasses.replace(server.info(job_id), since=None) == dataclasses.replace(
        before, since=None, is_kept=False
    )


def test_a_run_is_stopped_before_its_processes_are(server: Server) -> None:
    job_id = server.job(RunStatus.RUNNING)
    server.kept(job_id, 2)
    notes = NoteReader(server.folder(job_id))
    assert server.ask("stop", job_id) == {"kept_rounds": 2}
    assert server.stopped == [job_id]
    about = About.read(server.folder(job_id))
    assert about is not None and about.stopped_by == "ann"
    assert [note.kind for note in notes.read_notes()] == ["stopped"]
    assert server.info(job_id).state == "stopping"
    assert refused(server, "stop", job_id).code == "not-running"
    assert refused(server, "resume", job_id).code == "still-running"
    server.manager.set_status(job_id, RunStatus.FINISHED_ABORTED, FLContext())
    info = server.info(job_id)
    assert (info.state, info.why, info.is_kept) == ("stopped", "by ann", True)
    assert info.since is not None and abs(info.since - time.time()) < 60


def test_a_job_in_the_queue_is_stopped_too(server: Server) -> None:
    job_id = server.job(RunStatus.SUBMITTED)
    server.ask("stop", job_id)
    assert server.info(job_id).state == "stopped"
    assert refused(server, "resume", job_id).code == "nothing-kept"


@pytest.mark.parametrize(
    ("status", "more"),
    [
        (RunStatus.FINISHED_ABORTED, (ABORTED,)),
        (RunStatus.FINISHED_EXECUTION_EXCEPTION, (FAILED,)),
        (RunStatus.FINISHED_EXECUTION_EXCEPTION, ()),
    ],
)
def test_what_ended_before_it_was_done_is_resumed_with_all_of_its_budget(
    server: Server, status: RunStatus, more: tuple[Record, ...]
) -> None:
    job_id = server.job(status)
    server.kept(job_id, 2, *more, stopped_by="bob")
    assert server.ask("resume", job_id) == {"kept_rounds": 2}
    assert server.went_on == [job_id]
    about = About.read(server.folder(job_id))
    assert about is not None
    assert (about.is_stopped, about.starts, about.all_starts) == (False, [], 1)
    info = server.info(job_id)
    assert (info.state, info.starts) == ("returning", 1)
    last = (server.folder(job_id) / RECORDS).read_text().splitlines()[-1]
    assert "ann lets the run go on" in json.loads(last)["text"]  # and no end any more
    assert refused(server, "resume", job_id).code == "still-running"
    assert refused(server, "forget", job_id).code == "still-running"


def test_what_cannot_go_on_is_refused_in_one_sentence(server: Server) -> None:
    running, early = server.job(RunStatus.RUNNING), server.job(RunStatus.FINISHED_ABORTED)
    done, foreign = server.job(RunStatus.FINISHED_COMPLETED), server.job(RunStatus.FINISHED_ABORTED)
    other = server.job(
        RunStatus.FINISHED_ABORTED, dataclasses.replace(RECIPE_THERE, learning_rate=0.5)
    )
    server.kept(running, 2)
    server.kept(early, 0, ABORTED)
    server.kept(other, 2, ABORTED)
    codes = {
        running: "still-running",
        early: "nothing-kept",
        foreign: "nothing-kept",
        done: "not-resumable",
        other: "other-recipe",
    }
    assert {job: refused(server, "resume", job).code for job in codes} == codes
    assert server.went_on == []


def test_a_forgotten_run_leaves_one_small_file_with_its_hashes(server: Server) -> None:
    job_id = server.job(RunStatus.FINISHED_ABORTED)
    server.kept(job_id, 2, ABORTED)
    folder = server.folder(job_id)
    records = file_sha256(folder / RECORDS)
    model = file_sha256(folder / "round-0002" / GLOBAL_MODEL)
    done = server.ask("forget", job_id)
    assert done["sites"] == {"site-1": "forgotten"} and done["not_connected"] == ["site-2"]
    assert not folder.exists()
    assert server.manager.get_job(job_id, FLContext()) is None
    (stays,) = (server.workspace / FORGOTTEN).iterdir()
    told = json.loads(stays.read_text())
    assert told["sha256"] == {
        RECORDS: records,
        f"round-0002/{GLOBAL_MODEL}": model,
        RECIPE: file_sha256_of(RECIPE_THERE.to_json()),
    }
    assert (told["submitter"], told["forgotten_by"], told["round"]) == ("bob", "ann", 2)
    assert stays.stat().st_size < 10_000


def file_sha256_of(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()
