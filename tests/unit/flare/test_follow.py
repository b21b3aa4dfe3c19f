from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
import time
from pathlib import Path

import pytest

from fedfms.cli.common import logging_progress
from fedfms.errors import ConfigError, FederationError
from fedfms.flare.follow import follow, news_from, read_end
from fedfms.flare.job import RESULT_FOLDER
from fedfms.flare.progress import Event, JobProgress
from fedfms.flare.session import Admin, Coordinator, JobState
from fedfms.report.write import check_results_folder, write_results

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
from job_writer import RECIPE, Job


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A fetched job that completed, with one round that a site missed."""
    return Job().write(tmp_path / "job")


def records(job: Path) -> Path:
    return next(job.rglob("records.jsonl"))


def test_the_results_folder_appears_with_its_report(job: Path, tmp_path: Path) -> None:
    results = tmp_path / "place" / "results"
    write_results(records(job).parent, results)
    assert (results / "report.html").is_file()
    assert [path.name for path in results.parent.iterdir()] == ["results"]
    with pytest.raises(FederationError) as error:
        write_results(records(job).parent, results)
    assert error.value.code == "results-exist"


def test_what_cannot_be_written_whole_leaves_nothing(job: Path, tmp_path: Path) -> None:
    records(job).write_text("no record\n")
    with pytest.raises(FederationError):
        write_results(records(job).parent, tmp_path / "place" / "results")
    assert list((tmp_path / "place").iterdir()) == []


def test_a_place_where_nothing_can_be_written_is_found_before_the_job(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as error:
        check_results_folder(tmp_path / "file" / "results")
    assert error.value.code == "results-not-writable"
    with pytest.raises(FederationError):
        check_results_folder(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    check_results_folder(tmp_path / "empty")


def test_a_jobs_own_records_say_how_it_ended(job: Path) -> None:
    folder = records(job).parent
    assert read_end(folder, "FINISHED:ABNORMAL").completed
    lines = [json.loads(line) for line in records(job).read_text().splitlines()]
    kept = [line for line in lines if line["record"] != "job_done"]
    records(job).write_text("".join(json.dumps(line) + "\n" for line in kept))
    end = read_end(folder, "FINISHED:ABANDONED")
    assert (end.completed, end.reason) == (False, "FLARE says FINISHED:ABANDONED")
    assert end.problem.startswith("the job did not come to its end: FLARE says FINISHED:ABANDONED")


def test_an_aborted_job_is_said_to_be_aborted_and_no_site_is_blamed(job: Path) -> None:
    lines = [json.loads(line) for line in records(job).read_text().splitlines()]
    last = next(line["round"] for line in reversed(lines) if line["record"] == "round_started")
    answer = next(line for line in lines if line["record"] == "contribution")
    reason = "TaskAborted (aborted); the site's own log has the details"
    lines[-1:] = [
        {**answer, "round": last, "accepted": False, "reason": reason, "contribution": None},
        {**lines[-1], "record": "job_done", "status": "aborted", "reason": None},
    ]
    records(job).write_text("".join(json.dumps(line) + "\n" for line in lines))
    end = read_end(records(job).parent, "FINISHED:ABORTED")
    assert (end.completed, end.aborted) == (False, True)
    assert end.problem == "the run was stopped, with fedfms stop or in FLARE's console"


class AbortedJob:
    """FLARE's session with a job that somebody stopped, of which this is there."""

    def __init__(self, left: Path | None) -> None:
        self.left = left

    def download_job_result(self, job_id: str, folder: str) -> str:
        workspace = Path(folder) / job_id / "workspace"
        workspace.mkdir(parents=True)
        if self.left is not None:
            shutil.copytree(self.left, workspace / RESULT_FOLDER)
        return str(workspace.parent)


def fetch(left: Path | None, tmp_path: Path) -> bool:
    from fedfms.cli.jobs import _fetch

    coordinator = Coordinator(AbortedJob(left), Admin("ann@a.org", "a", "project_admin"))
    state = JobState("FINISHED:ABORTED", "", "0123", "fedmsa")
    return _fetch(coordinator, state, tmp_path / "results", tmp_path / "workspace", False)


def test_an_aborted_job_is_fetched_without_a_table_of_dashes(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.loads(line) for line in records(job).read_text().splitlines()]
    started = [line for line in lines if line["record"] in ("job", "round_started")][:2]
    end = {**lines[-1], "record": "job_done", "status": "aborted", "reason": None}
    records(job).write_text("".join(json.dumps(line) + "\n" for line in [*started, end]))
    assert fetch(records(job).parent, tmp_path) is False
    said = capsys.readouterr()
    assert "site-1" not in said.out
    assert "the run was stopped, with fedfms stop" in said.err
    assert "nothing is broken: fedfms resume goes on with it" in said.err
    assert "trainer" not in said.err
    with pytest.raises(FederationError) as error:
        fetch(None, tmp_path)  # it waited, and no process of it ever ran
    assert error.value.code == "aborted"
    assert "aborted before it began" in error.value.problem


def test_progress_comes_to_another_machine_as_it_was(job: Path) -> None:
    reader = JobProgress(records(job), rounds=5)
    reader.read_new()
    event = reader.event()
    assert event.finished
    assert event.missed
    assert Event.from_dict(json.loads(json.dumps(event.to_dict()))) == event


HUGE = {"phase": "train", "now": [{"name": "s", "phase": "train", "done": 10**40, "total": 1}]}


@pytest.mark.parametrize("values", [{}, {"phase": "train"}, {"phase": "lunch"}, HUGE])
def test_progress_of_another_version_is_none(values: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Event.from_dict(values)


def test_a_log_shows_each_step_once_in_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    sites = ("site-1", "site-2")
    first = Event("train", round=0, rounds=2, answered=("site-2",), sites=sites)
    left = Event("train", round=0, rounds=2, answered=sites, sites=sites, left=(5000, 5800))
    on_event = logging_progress({})
    for event in (first, first, left, Event("train", missed=("site-1 missed round 0: late",))):
        on_event(event)
    assert capsys.readouterr().err.splitlines() == [
        "round 0: 1 of 2 sites in (site-2)",
        "round 0: 2 of 2 sites in (site-1, site-2); 83 to 97 min left",
        "site-1 missed round 0: late",
    ]


def test_a_long_computation_says_in_a_log_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import fedfms.cli.common as common

    with common.progress(False) as quick:
        for done in range(4):
            quick("prepare", done, 4)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(common, "FIRST_LINE_SECONDS", 0.2)
    monkeypatch.setattr(common, "LINE_SECONDS", 0.2)
    with common.progress(False) as slow:
        for done in range(9):
            slow("train", done, 12)
            time.sleep(0.05)
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 2
    assert re.fullmatch(r"train: [4-6] of 12, about [01] s left of this", lines[0])


class FinishedJob:
    """FLARE's session, when a job has finished."""

    def get_job_meta(self, job_id: str) -> dict[str, str]:
        return {"status": "FINISHED:COMPLETED", "name": "fedmsa"}

    def show_stats(self, job_id: str, target: str) -> None:
        raise RuntimeError("no answer")


def test_a_job_whose_process_has_gone_is_followed_to_its_end() -> None:
    """FLARE answers no question about progress then, and each takes seconds to fail."""
    coordinator = Coordinator(FinishedJob(), Admin("coordinator@a.org", "a", "project_admin"))
    state = follow(coordinator, "job", news=news_from(coordinator, "job"), tell=print)
    assert state.is_completed


def test_the_records_tell_what_nobody_said_while_the_job_ran(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    event = read_end(records(job).parent, "FINISHED:COMPLETED").event
    on_event = logging_progress({})
    on_event(event)
    on_event(event)  # and nothing twice
    lines = capsys.readouterr().err.splitlines()
    told = [line for line in lines if line.startswith("round ")]
    assert len(told) == len(event.finished) > 0
    assert set(event.missed) <= set(lines)


def test_a_round_that_nobody_evaluates_is_told_apart_from_a_withheld_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = dataclasses.replace(RECIPE, evaluate_every=2, rounds=3)
    withheld = ("site-1", "site-2", "site-3", "site-4")
    for name, job in {"open": Job(recipe), "shut": Job(recipe, withheld=withheld)}.items():
        event = read_end(job.write(tmp_path / name), "FINISHED:COMPLETED").event
        assert Event.from_dict(json.loads(json.dumps(event.to_dict()))) == event
        logging_progress({})(event)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("round ")]
    ends = [line.partition("sites")[2] for line in told]
    assert [end.endswith("not evaluated") for end in ends] == [False, True, False] * 2
    assert [end.endswith("withheld") for end in ends] == [False] * 3 + [True, False, True]
