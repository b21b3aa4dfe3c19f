"""FLARE's store of jobs on a full disk: whoever writes there waits, and no job is lost by it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from job_store import Engine
from nvflare.apis.job_def import JobMetaKey, RunStatus, new_job_id

from fedfms.flare.keeper import JobKeeper
from fedfms.flare.notes import NoteReader
from fedfms.flare.run_about import About
from small_disk import small_disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "60m") as folder:
        yield folder


@pytest.fixture
def engine(disk: Path) -> Engine:
    return Engine(disk)


def job(engine: Engine, status: RunStatus) -> str:
    job_id = new_job_id()
    with engine.new_context() as fl_ctx:
        engine.manager.create({JobMetaKey.JOB_ID.value: job_id, "name": "one"}, b"job", fl_ctx)
        engine.manager.set_status(job_id, status, fl_ctx)
    return job_id


def status(engine: Engine, job_id: str) -> str:
    with engine.new_context() as fl_ctx:
        return str(engine.manager.get_job(job_id, fl_ctx).meta[JobMetaKey.STATUS.value])


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
        while file.write(b"\0" * 4096):
            pass
    return filler


def in_the_background(engine: Engine, write: Any) -> threading.Thread:
    def work() -> None:
        with engine.new_context() as fl_ctx:
            write(fl_ctx)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("what", ["status", "meta"])
def test_what_is_known_of_a_job_is_written_when_there_is_room(
    engine: Engine, disk: Path, what: str
) -> None:
    job_id = job(engine, RunStatus.DISPATCHED)
    filler = fill(disk)
    write = {
        "status": lambda ctx: engine.manager.set_status(job_id, RunStatus.RUNNING, ctx),
        "meta": lambda ctx: engine.manager.update_meta(job_id, {"status": "RUNNING"}, ctx),
    }[what]
    thread = in_the_background(engine, write)
    thread.join(1.5)
    assert thread.is_alive()
    assert status(engine, job_id) == "DISPATCHED"
    filler.unlink()
    thread.join(10)
    assert status(engine, job_id) == "RUNNING"


def test_who_stops_a_job_is_told_at_once(engine: Engine, disk: Path) -> None:
    job_id = job(engine, RunStatus.SUBMITTED)
    fill(disk)
    with pytest.raises(Exception, match="No space left"), engine.new_context() as fl_ctx:
        engine.manager.set_status(job_id, RunStatus.FINISHED_ABORTED, fl_ctx)


def test_another_failure_of_the_store_is_no_full_disk(engine: Engine) -> None:
    with pytest.raises(Exception, match="nowhere"), engine.new_context() as fl_ctx:
        engine.manager.set_status("nowhere", RunStatus.RUNNING, fl_ctx)


def test_a_job_that_could_not_start_for_want_of_room_is_scheduled_again(
    engine: Engine, disk: Path
) -> None:
    job_id = job(engine, RunStatus.SUBMITTED)
    with engine.new_context() as fl_ctx:
        [found] = engine.manager.get_jobs_to_schedule(fl_ctx)
        assert found.job_id == job_id
        engine.manager.set_status(job_id, RunStatus.DISPATCHED, fl_ctx)
        assert engine.manager.get_jobs_to_schedule(fl_ctx) == []
    filler = fill(disk)
    thread = in_the_background(
        engine, lambda ctx: engine.manager.set_status(job_id, RunStatus.FAILED_TO_RUN, ctx)
    )
    thread.join(1.5)
    filler.unlink()
    thread.join(10)
    with engine.new_context() as fl_ctx:
        [found] = engine.manager.get_jobs_to_schedule(fl_ctx)
    assert found.job_id == job_id


def test_a_job_that_could_not_start_for_another_reason_has_failed(engine: Engine) -> None:
    job_id = job(engine, RunStatus.DISPATCHED)
    with engine.new_context() as fl_ctx:
        engine.manager.set_status(job_id, RunStatus.FAILED_TO_RUN, fl_ctx)
    assert status(engine, job_id) == RunStatus.FAILED_TO_RUN.value


def test_a_server_that_starts_on_a_full_disk_takes_up_its_runs_when_there_is_room(
    engine: Engine, disk: Path
) -> None:
    job_id, over = job(engine, RunStatus.RUNNING), job(engine, RunStatus.RUNNING)
    keeper = JobKeeper()
    keeper._engine, keeper._workspace, keeper._works = engine, disk, True
    kept = keeper._folder(job_id)
    About(["site-1"], 1, [0]).write(kept)
    filler = fill(disk)
    thread = threading.Thread(target=keeper._take_up, args=([job_id, over], []), daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while keeper.waits(job_id) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "the server's disk" in keeper.waits(job_id)[0]
    assert status(engine, job_id) == status(engine, over) == "RUNNING"
    filler.unlink()
    thread.join(20)
    assert status(engine, job_id) == "SUBMITTED"  # and waits for its site
    assert status(engine, over) == RunStatus.ABANDONED.value
    assert [note.kind for note in NoteReader(kept).read_notes()] == ["waits", "goes_on"]
