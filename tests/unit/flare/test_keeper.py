"""The keeper's budgets and words; what it does to real processes is in tests/jobs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from nvflare.apis.job_def import RunStatus

from fedfms.flare import keeper
from fedfms.flare.internals import rejoin
from fedfms.flare.keeper import JOB_WAITS, JobKeeper
from fedfms.flare.notes import NoteReader, write_note
from fedfms.records.layout import RECORDS

JOB = "5b2f"


@pytest.fixture
def own(tmp_path: Path) -> JobKeeper:
    own = JobKeeper()
    own._workspace, own._works = tmp_path, True
    return own


def about(workspace: Path, starts: list[int]) -> Path:
    folder = workspace / "runs" / JOB
    folder.mkdir(parents=True)
    known = {"sites": ["site-1", "site-2"], "min_sites": 2, "starts": starts}
    (folder / "job.json").write_text(json.dumps(known))
    return folder


def test_a_job_whose_process_died_goes_on(own: JobKeeper, tmp_path: Path) -> None:
    folder = about(tmp_path, [0])
    (folder / RECORDS).write_text('{"record": "round_started", "round": 0}\n')
    assert own.goes_on(JOB)


@pytest.mark.parametrize("status", ["completed", "failed", "aborted"])
def test_one_that_came_to_its_end_with_a_reason_does_not(
    own: JobKeeper, tmp_path: Path, status: str
) -> None:
    folder = about(tmp_path, [0])
    (folder / RECORDS).write_text(json.dumps({"record": "job_done", "status": status}) + "\n")
    assert not own.goes_on(JOB)
    failed = RunStatus.FINISHED_EXECUTION_EXCEPTION
    said = RunStatus.FINISHED_COMPLETED if status == "completed" else failed
    assert own.status_after(JOB, failed) == said


def test_one_that_ends_again_and_again_in_the_same_round_is_given_up(
    own: JobKeeper, tmp_path: Path
) -> None:
    folder = about(tmp_path, [0] + [2] * len(JOB_WAITS))
    (folder / "round-0002").mkdir()
    assert not own.goes_on(JOB)
    (folder / "round-0003").mkdir()  # it has finished a round since
    assert own.goes_on(JOB)


def test_a_job_that_is_none_of_ours_is_left_to_flare(own: JobKeeper) -> None:
    assert not own.goes_on("other")


@pytest.mark.parametrize(
    ("code", "times"), [(101, len(keeper.SITE_WAITS) + 1), (rejoin.NEVER_BEGAN, 2)]
)
@pytest.mark.parametrize("min_sites", [1, 2])
def test_a_site_whose_process_ends_each_time_is_left_out_or_ends_the_job(
    own: JobKeeper,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    times: int,
    min_sites: int,
) -> None:
    notes = NoteReader(about(tmp_path, [0]))
    job = rejoin.RunningJob(JOB, min_sites, False, frozenset({"site-1", "site-2"}))
    monkeypatch.setattr(keeper, "SITE_WAITS", tuple(0.0 for _ in keeper.SITE_WAITS))
    monkeypatch.setattr(rejoin, "running_job", lambda engine, job_id: job)
    monkeypatch.setattr(rejoin, "start_at_site", lambda engine, job_id, site: None)
    own._tell_gone = lambda job_id, site: None

    def ends() -> bool:
        taken = own._job_process_ended(JOB, "site-1", code, "exception")
        wait_until(lambda: not own._sites[JOB]["site-1"].is_starting)
        return taken

    assert all(ends() for _ in range(times - 1))
    kinds = [note.kind for note in notes.read_notes()]
    assert kinds.count("site_died") == times - 1 and "site_gone" not in kinds
    assert ends() is (min_sites == 1)  # with two, FLARE ends the job
    (last,) = [note for note in notes.read_notes() if note.kind != "site_back"]
    assert last.kind == ("site_gone" if min_sites == 1 else "ends")
    assert "site-1's FLARE job process ended" in last.text


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_note_is_read_once_by_one_process_after_the_other(tmp_path: Path) -> None:
    write_note(tmp_path, "waits", "the run waits")
    first = NoteReader(tmp_path)
    assert [note.text for note in first.read_notes()] == ["the run waits"]
    write_note(tmp_path, "goes_on", "it goes on")
    assert [note.text for note in NoteReader(tmp_path).read_notes()] == ["it goes on"]
    assert NoteReader(tmp_path).read_notes() == []


def test_a_site_that_is_connected_and_does_not_run_the_job_is_started_at_the_second_look(
    own: JobKeeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = about(tmp_path, [0])
    job = rejoin.RunningJob(JOB, 1, False, frozenset({"site-1"}))
    said = {"site-1": True, "site-2": False}  # site-3 is connected and does not answer
    started: list[str] = []
    monkeypatch.setattr(rejoin, "connected_sites", lambda engine: ["site-1", "site-2", "site-3"])
    monkeypatch.setattr(rejoin, "is_meant_for", lambda engine, job_id, site: True)
    monkeypatch.setattr(rejoin, "asked_sites", lambda engine, job_id, sites: said)
    monkeypatch.setattr(own, "_start_soon", lambda job_id, site: started.append(site))
    own._look_for_absent(job)
    assert started == []
    own._look_for_absent(job)
    assert started == ["site-2"]
    (folder / RECORDS).write_text(json.dumps({"record": "job_done", "status": "completed"}) + "\n")
    for _ in range(3):  # a job that has ended is left alone
        own._look_for_absent(job)
    assert started == ["site-2"]


def test_a_job_that_is_to_go_on_waits_for_as_many_sites_as_it_needs(
    own: JobKeeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = NoteReader(about(tmp_path, [0]))
    there = ["site-1"]
    let_go: list[str] = []
    monkeypatch.setattr(keeper, "ALL_SITES_SECONDS", 0.1)
    monkeypatch.setattr(rejoin, "connected_sites", lambda engine: there)
    monkeypatch.setattr(rejoin, "status_of", lambda engine, job_id: "SUBMITTED")
    monkeypatch.setattr(rejoin, "end_at_sites", lambda engine, job_id, sites, seconds: [])
    monkeypatch.setattr(rejoin, "let_go", lambda engine, job_id: not let_go.append(job_id))
    known = own._about(JOB)
    assert known is not None and known.min_sites == 2
    own._go_on_later(JOB, known)
    wait_until(lambda: any(note.kind == "waits" for note in notes.read_notes()))
    time.sleep(0.6)
    assert let_go == []
    there.append("site-2")
    wait_until(lambda: let_go == [JOB])


def test_starts_of_long_ago_make_no_site_wait(
    own: JobKeeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about(tmp_path, [0])
    waits: list[float] = []
    monkeypatch.setattr(own, "_start", lambda job_id, site, wait: waits.append(wait))
    part = own._sites.setdefault(JOB, {}).setdefault("site-1", keeper._Site())
    part.starts = [time.monotonic() - keeper.SITE_STEADY_SECONDS - 1] * 9
    own._start_soon(JOB, "site-1")
    wait_until(lambda: waits == [keeper.SITE_WAITS[0]])
