"""What is old goes, and nothing that a run needs or that nobody fetched yet."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from job_store import Engine
from nvflare.apis.job_def import JobMetaKey, RunStatus, new_job_id
from nvflare.apis.storage import WORKSPACE

from fedfms.flare.cleaning import bound_log, clean_folders
from fedfms.flare.keeper import JobKeeper

DAY = 86400.0


def written_before(folder: Path, days: float) -> None:
    at = time.time() - days * DAY
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (at, at))


@pytest.fixture
def keeper(tmp_path: Path) -> JobKeeper:
    keeper = JobKeeper()
    keeper._engine, keeper._workspace, keeper._works = Engine(tmp_path), tmp_path, True
    return keeper


def job(keeper: JobKeeper, status: RunStatus, days: float, *, fetched: bool = False) -> str:
    """A job in FLARE's store, with its folders at the server."""
    engine = keeper._engine
    job_id = new_job_id()
    with engine.new_context() as fl_ctx:
        engine.manager.create({JobMetaKey.JOB_ID.value: job_id, "name": "one"}, b"job", fl_ctx)
        engine.manager.set_status(job_id, status, fl_ctx)
        if fetched:
            target = keeper._workspace / "transfer"
            target.mkdir(exist_ok=True)
            engine.manager.get_storage_for_download(
                job_id, str(target), WORKSPACE, WORKSPACE, fl_ctx
            )
    store = Path(engine.manager.job_uri(job_id))
    for folder in (
        keeper._workspace / job_id,
        keeper._workspace / "runs" / job_id,
        keeper._workspace / "answers" / job_id,
    ):
        folder.mkdir(parents=True)
        (folder / "file").write_text("x")
        written_before(folder, days)
    written_before(store, days)
    return job_id


def test_old_jobs_go_but_not_those_that_nobody_fetched_or_that_are_not_over(
    keeper: JobKeeper,
) -> None:
    done = RunStatus.FINISHED_COMPLETED
    old = {
        "fetched": job(keeper, done, 100, fetched=True),
        "not fetched": job(keeper, done, 100),
        "failed": job(keeper, RunStatus.FINISHED_EXECUTION_EXCEPTION, 100),
        "runs": job(keeper, RunStatus.RUNNING, 100),
        "waits": job(keeper, RunStatus.SUBMITTED, 100),
        "young": job(keeper, done, 1, fetched=True),
    }
    broken_off, goes_on = (keeper._workspace / "transfer" / new_job_id() for _ in range(2))
    for folder, days in ((broken_off, 2), (goes_on, 0.1)):
        folder.mkdir(parents=True)
        (folder / "workspace").write_text("x")
        written_before(folder, days)
    keeper.clean(90 * DAY)
    assert not broken_off.exists() and goes_on.exists()
    store, workspace = Path(keeper._engine.manager.uri_root), keeper._workspace

    def left(folder: Path) -> set[str]:
        return {what for what, job_id in old.items() if (folder / job_id).exists()}

    assert left(store) == {"not fetched", "runs", "waits", "young"}
    assert left(workspace / "answers") == left(store)  # as long as the result that they are of
    assert left(workspace / "runs") == left(workspace) == {"runs", "waits", "young"}


def test_folders_of_a_site_go_where_nothing_was_written_for_long(tmp_path: Path) -> None:
    old, running, young = (new_job_id() for _ in range(3))
    for name in (old, running, young, "startup"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.txt").write_text("x")
        written_before(tmp_path / name, 100)
    (tmp_path / young / "log.txt").write_text("y")
    assert clean_folders(tmp_path, 90 * DAY, [running]) == [old]
    assert {path.name for path in tmp_path.iterdir()} == {running, young, "startup"}


def test_a_log_that_another_process_writes_is_bounded_and_loses_no_line(tmp_path: Path) -> None:
    file = tmp_path / "audit.log"
    with file.open("a") as writer:
        for number in range(30):
            writer.write(f"{number}\n")
            writer.flush()
            bound_log(file, largest=20)
    parts = [file.with_name("audit.log.2"), file.with_name("audit.log.1"), file]
    lines = "".join(path.read_text() for path in parts).split()
    assert lines == [str(number) for number in range(30)][-len(lines) :]
    assert len(lines) > 14 and file.stat().st_size <= 24
    assert len(list(tmp_path.iterdir())) == 3
