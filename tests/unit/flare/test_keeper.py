"""The keeper's budgets and words; what it does to real processes is in tests/jobs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
    (folder / "job.json").write_text(json.dumps({"sites": ["site-1"], "starts": starts}))
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


def test_a_site_that_ends_again_and_again_is_left_out_with_a_note(
    own: JobKeeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    monkeypatch.setattr(keeper, "SITE_WAITS", (0.0, 0.0))
    monkeypatch.setattr(rejoin, "start_at_site", lambda engine, job, site: started.append(site))
    notes = NoteReader(about(tmp_path, [0]))
    for _ in range(3):
        own._start_soon(JOB, "site-1")
        while own._sites[JOB]["site-1"].is_starting:
            pass
    assert started == ["site-1", "site-1"]
    said = [(note.kind, note.site) for note in notes.read_notes()]
    assert said.count(("site_back", "site-1")) == 2 and said[-1] == ("site_gone", "site-1")


def test_a_note_is_read_once_by_one_process_after_the_other(tmp_path: Path) -> None:
    write_note(tmp_path, "waits", "the run waits")
    first = NoteReader(tmp_path)
    assert [note.text for note in first.read_notes()] == ["the run waits"]
    write_note(tmp_path, "goes_on", "it goes on")
    assert [note.text for note in NoteReader(tmp_path).read_notes()] == ["it goes on"]
    assert NoteReader(tmp_path).read_notes() == []
