"""The keeper's budgets and words; what it does to real processes is in tests/jobs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from nvflare.apis.fl_constant import SystemComponents
from nvflare.apis.job_def import RunStatus
from nvflare.app_common.job_schedulers.job_scheduler import DefaultJobScheduler

from fedfms.contracts.pause import Pause
from fedfms.errors import ConfigError
from fedfms.flare import keeper
from fedfms.flare.internals import rejoin
from fedfms.flare.keeper import JOB_WAITS, JobKeeper
from fedfms.flare.notes import NoteReader, write_note
from fedfms.flare.run_about import About
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


def test_a_site_that_was_left_out_and_runs_the_job_still_is_started_anew(
    own: JobKeeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about(tmp_path, [0])
    job = rejoin.RunningJob(JOB, 1, False, frozenset({"site-2"}))
    done: list[str] = []
    monkeypatch.setattr(rejoin, "connected_sites", lambda engine: ["site-1", "site-2"])
    monkeypatch.setattr(rejoin, "is_meant_for", lambda engine, job_id, site: True)
    monkeypatch.setattr(
        rejoin, "asked_sites", lambda engine, job_id, sites: dict.fromkeys(sites, True)
    )
    monkeypatch.setattr(
        rejoin,
        "end_at_sites",
        lambda engine, job_id, sites, seconds: done.append(f"end {sites}"),
    )
    monkeypatch.setattr(own, "_start_soon", lambda job_id, site: done.append(f"start {site}"))
    own._look_for_absent(job)
    own._look_for_absent(job)
    assert done == ["end ['site-1']", "start site-1"]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_site_is_left_out_if_its_line_is_not_back_by_then_and_the_round_is_told_again(
    own: JobKeeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    about(tmp_path, [0])
    done: list[str] = []
    part = own._sites.setdefault(JOB, {}).setdefault("site-1", keeper._Site())
    part.gone = time.monotonic()
    monkeypatch.setattr(
        rejoin, "asked_sites", lambda engine, job_id, sites: {"site-1": True} if is_there else {}
    )
    monkeypatch.setattr(rejoin, "leave_out", lambda engine, job_id, site: done.append("left out"))
    monkeypatch.setattr(rejoin, "give_up_outcome", lambda engine, job_id, site: None)
    own._tell_gone = lambda job_id, site: done.append("told")
    own._leave_out(JOB, "site-1")
    assert done == ([] if is_there else ["told", "left out"])
    assert (part.gone is None) == is_there


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


def known_sites(
    own: JobKeeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, min_sites: int
) -> tuple[NoteReader, dict[str, list[str]]]:
    """A job of three sites; what is asked of FLARE is noted."""
    folder = about(tmp_path, [0])
    did: dict[str, list[str]] = {"told": [], "left": [], "ended": [], "started": []}
    present = {"site-1", "site-2", "site-3"}

    def running(engine: object, job_id: str) -> rejoin.RunningJob:
        return rejoin.RunningJob(JOB, min_sites, False, frozenset(present))

    def leave(engine: object, job_id: str, site: str) -> None:
        present.discard(site)
        did["left"].append(site)

    def start(engine: object, job_id: str, site: str) -> None:
        present.add(site)
        did["started"].append(site)

    def tell_gone(job_id: str, site: str) -> None:
        if not own._holds_death(job_id, site, "gone"):
            did["told"].append(site)

    monkeypatch.setattr(rejoin, "running_job", running)
    monkeypatch.setattr(rejoin, "running_jobs", lambda engine: [running(engine, JOB)])
    monkeypatch.setattr(rejoin, "is_meant_for", lambda engine, job_id, site: True)
    monkeypatch.setattr(rejoin, "asked_sites", lambda engine, job_id, sites: {})
    monkeypatch.setattr(rejoin, "leave_out", leave)
    monkeypatch.setattr(rejoin, "give_up_outcome", lambda engine, job_id, site: None)
    monkeypatch.setattr(rejoin, "start_at_site", start)
    monkeypatch.setattr(
        rejoin, "end_at_site", lambda engine, job_id, site: did["ended"].append(site)
    )
    monkeypatch.setattr(keeper, "SITE_WAITS", (0.0,))
    monkeypatch.setattr(keeper, "LEAVE_SECONDS", 0.05)
    own._tell_gone = tell_gone
    return NoteReader(folder), did


def kinds_of(notes: NoteReader) -> list[tuple[str, str | None]]:
    return [(note.kind, note.site) for note in notes.read_notes()]


def test_with_two_of_three_gone_it_goes_on_when_one_is_back(
    own: JobKeeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes, did = known_sites(own, tmp_path, monkeypatch, min_sites=2)
    own._tell_gone(JOB, "site-2")
    own._tell_gone(JOB, "site-3")
    wait_until(lambda: did["left"] == ["site-2"])
    assert set(did["told"]) == {"site-2"}  # not of the one that is needed
    waits = own.waits(JOB)
    assert waits is not None and "site-2, site-3 are gone" in waits[0]
    own._start(JOB, "site-2", 0.0)  # site-3 stays away
    wait_until(lambda: did["left"] == ["site-2", "site-3"])
    assert set(did["told"]) == {"site-2", "site-3"}
    assert own.waits(JOB) is None
    said = [note for note in notes.read_notes() if note.kind in ("goes_on", "site_gone")]
    assert said[0].text.startswith("site-2 is gone; the run waits, and it takes part again")
    assert said[1].text == "enough sites are there again; the run goes on without site-3"


def test_a_site_that_pauses_is_left_out_at_once_and_started_after_it(
    own: JobKeeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes, did = known_sites(own, tmp_path, monkeypatch, min_sites=2)
    said = Pause.begin(None, datetime.now().astimezone()).to_dict()
    for _ in range(3):  # with each sign of life
        own._heard("site-2", said)
    wait_until(lambda: did["told"] == ["site-2"])
    assert (did["ended"], did["left"]) == (["site-2"], ["site-2"])
    (note,) = notes.read_notes()
    assert (note.kind, note.site) == ("site_paused", "site-2")
    assert "site-2 paused itself at " in note.text
    # what is left of its process ends, and nobody starts it again
    assert own._job_process_ended(JOB, "site-2", 9, "aborted") and did["started"] == []
    own._heard("site-2", None)
    wait_until(lambda: did["started"] == ["site-2"])
    wait_until(lambda: kinds_of(notes) == [("site_back", "site-2")])


def test_a_run_waits_for_sites_that_pause_as_for_those_that_are_gone(
    own: JobKeeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, did = known_sites(own, tmp_path, monkeypatch, min_sites=3)
    until = datetime.now().astimezone().replace(hour=18, minute=0)
    own._heard("site-2", Pause.begin(until, until.replace(hour=14, minute=2)).to_dict())
    wait_until(lambda: did["ended"] == ["site-2"] and own.waits(JOB) is not None)
    assert (did["told"], did["left"]) == ([], [])
    waits = own.waits(JOB)
    assert waits is not None
    assert "needs 3 sites, and site-2 paused itself at 14:02 until 18:00" in waits[0]
    own._heard("site-2", None)
    wait_until(lambda: own.waits(JOB) is None)


def test_what_was_stopped_stays_stopped_whatever_dies(own: JobKeeper, tmp_path: Path) -> None:
    folder = about(tmp_path, [0])
    known = About.read(folder)
    assert known is not None and own.goes_on(JOB)
    known.stop("ann")
    known.write(folder)
    assert not own.goes_on(JOB)
    for status in (RunStatus.FINISHED_EXECUTION_EXCEPTION, RunStatus.ABANDONED):
        assert own.status_after(JOB, status) == RunStatus.FINISHED_ABORTED


def test_somebody_is_told_when_a_run_waits_goes_on_and_ends(
    own: JobKeeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Told:
        def __init__(self) -> None:
            self.sentences: list[str] = []

        def tell(self, sentence: str) -> None:
            self.sentences.append(sentence)

    _, _ = known_sites(own, tmp_path, monkeypatch, min_sites=3)
    told = own._notifier = Told()  # type: ignore[assignment]
    own._tell_gone(JOB, "site-2")
    own._start(JOB, "site-2", 0.0)
    monkeypatch.setattr(rejoin, "status_of", lambda engine, job_id: "FINISHED:COMPLETED")
    folder = tmp_path / "runs" / JOB
    (folder / RECORDS).write_text(json.dumps({"record": "job_done", "status": "completed"}) + "\n")
    own._job_ended(JOB)
    assert [one.split(":")[0] for one in told.sentences] == [f"run {JOB}"] * 3
    assert "site-2 is gone" in told.sentences[0]
    assert "the run goes on" in told.sentences[1]
    assert "completed" in told.sentences[2]
    assert not folder.exists()


def test_the_operator_says_how_many_runs_are_at_work_at_once(
    own: JobKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = DefaultJobScheduler(max_jobs=1)
    engine = SimpleNamespace(get_component={SystemComponents.JOB_SCHEDULER: scheduler}.get)
    own._settings(engine)
    assert scheduler.max_jobs == 1
    monkeypatch.setenv("FEDFMS_MAX_RUNS", "3")
    own._settings(engine)
    assert scheduler.max_jobs == 3
    monkeypatch.setenv("FEDFMS_MAX_RUNS", "many")
    with pytest.raises(ConfigError, match="from 1 to 100"):
        own._settings(engine)
