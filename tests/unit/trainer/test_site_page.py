"""What a site's own people read of what was asked and what left, as a trainer process writes it."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from trainer_process import SITE, Place, TrainerProcess, task_runner

from fedfms.contracts.messages import Task
from fedfms.control import Control
from fedfms.errors import DoorClosed, FedfmsError, TaskAborted, TrainingError
from fedfms.exchange.bounds import read_policy
from fedfms.trainer.client import run_task
from fedfms.trainer.ledger import LEDGER, MAX_BYTES, PAGE, Ledger, read_ledger
from fedfms.trainer.site_page import render, runs_of
from small_disk import small_disk


def words(source: str) -> str:
    body = re.sub(r"<(style|head).*?</\1>", "", source, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


@pytest.fixture
def asked(train_task: Task) -> Task:
    return dataclasses.replace(train_task, submitter="ada@hospital.example", job_name="fedmsa")


def test_a_trainer_writes_what_left_what_did_not_and_no_name(
    start: Callable[..., TrainerProcess], place: Place, asked: Task, global_model
) -> None:
    place.set_policy(min_cases=1)
    start()
    result = run_task(place.exchange, asked, global_model, aborted=lambda: False)
    place.set_policy(min_cases=1, methods=["another"])
    with pytest.raises(FedfmsError):
        run_task(
            place.exchange, dataclasses.replace(asked, round=1), global_model, aborted=lambda: False
        )
    entries = read_ledger(place.work)
    assert [one.event for one in entries] == ["asked", "left", "asked", "refused"]
    left, refused = entries[1], entries[3]
    assert left.tensors == len(result.tensors) > 10
    assert left.values == sum(one.numel() for one in result.tensors.values())
    assert left.bytes == sum(one.numel() * one.element_size() for one in result.tensors.values())
    assert left.metrics == result.contribution.metrics and left.told
    assert refused.code == "method-not-allowed"

    read = words((place.work / PAGE).read_text())
    assert f"What left {SITE}" in read and "submitted by ada@hospital.example" in read
    assert f"{left.tensors} tensors" in read
    assert "train round 1 of" in read and "train round 2 of" in read
    assert "refused its policy does not allow this method (method-not-allowed)" in read
    assert "Methods that may run here: another" in read
    for metric in left.told:
        assert f"{metric.mean:.4f}" in read
    everything = (place.work / PAGE).read_text() + (place.work / LEDGER).read_text()
    files = [file for name in ("images", "labels") for file in (place.data / name).iterdir()]
    assert len(files) == 16
    assert not [file.stem for file in files if file.stem in everything]
    assert str(place.root) not in everything


def test_the_page_is_rewritten_while_a_task_runs(tmp_path: Path, place: Place, asked: Task) -> None:
    ledger = Ledger(tmp_path, lambda entries: render(entries, SITE, read_policy(place.policy)))
    ledger.asked(asked, holdout=False)
    read = words((tmp_path / PAGE).read_text())
    assert "Now: the server asked to train round 1 of" in read
    assert "for a job of ada@hospital.example. Nothing of that has left yet." in read
    ledger.not_left(asked, False, TaskAborted("stopped", "nothing"))
    assert "Nothing is asked at the moment." in words((tmp_path / PAGE).read_text())
    assert [one.event for one in read_ledger(tmp_path)] == ["asked", "stopped"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "1m") as folder:
        yield folder


def test_no_line_is_lost_or_torn_on_a_full_disk(disk: Path, place: Place, asked: Task) -> None:
    ledger = Ledger(disk, lambda entries: render(entries, SITE, read_policy(place.policy)))
    ledger.asked(asked, holdout=False)
    with pytest.raises(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while file.write(b"\0" * 64):
            pass
    for number in range(40):  # more than what is left of the last page of the file
        ledger.asked(dataclasses.replace(asked, round=1 + number), holdout=False)
    lines = (disk / LEDGER).read_bytes().splitlines(keepends=True)
    assert len(lines) < 41 and all(json.loads(line) and line.endswith(b"\n") for line in lines)
    (disk / "filler").unlink()
    ledger.not_left(asked, False, TaskAborted("stopped", "nothing"))
    assert len((disk / LEDGER).read_bytes().splitlines()) == 42
    entries = read_ledger(disk)
    assert [one.round for one in entries[:41]] == list(range(41))
    assert entries[41].event == "stopped"


@pytest.mark.parametrize(
    ("error", "event", "code"),
    [
        (DoorClosed("no", "fix", code="non-finite"), "refused", "non-finite"),
        (
            TrainingError("/data/patient-7.nii", "fix", code="out-of-memory"),
            "failed",
            "out-of-memory",
        ),
        (KeyError("patient-7"), "failed", "KeyError"),
    ],
)
def test_of_an_error_its_code_alone_is_written(
    tmp_path: Path, place: Place, asked: Task, error: Exception, event: str, code: str
) -> None:
    ledger = Ledger(tmp_path, lambda entries: render(entries, SITE, read_policy(place.policy)))
    ledger.not_left(asked, False, error)
    (entry,) = read_ledger(tmp_path)
    assert (entry.event, entry.code) == (event, code)
    assert "patient-7" not in (tmp_path / PAGE).read_text() + (tmp_path / LEDGER).read_text()


def test_an_answer_that_is_given_again_is_said_to_be_the_same(
    tmp_path: Path, place: Place, asked: Task, global_model
) -> None:
    place.set_policy(min_cases=1)
    outcome = task_runner(place).run(asked, lambda: global_model, Control())
    ledger = Ledger(tmp_path, lambda entries: render(entries, SITE, read_policy(place.policy)))
    for _ in range(2):
        ledger.asked(asked, False)
        ledger.left(asked, False, outcome)
    (run,) = runs_of(read_ledger(tmp_path))
    assert [line.what for line in run.lines] == ["left, the same again", "left"]


def test_nothing_here_keeps_an_answer_from_leaving(tmp_path: Path, asked: Task) -> None:
    (tmp_path / "work").write_text("a file where a folder should be")
    ledger = Ledger(tmp_path / "work", lambda entries: "")
    ledger.asked(asked, False)  # raises nothing

    def broken(entries: object) -> str:
        raise RuntimeError("no page")

    Ledger(tmp_path / "other", broken).asked(asked, False)
    assert len(read_ledger(tmp_path / "other")) == 1


def test_the_ledger_stays_bounded_and_a_damaged_line_harms_no_other(
    tmp_path: Path, asked: Task
) -> None:
    ledger = Ledger(tmp_path, lambda entries: "")
    ledger.asked(asked, False)
    line = (tmp_path / LEDGER).read_text()
    (tmp_path / LEDGER).write_text(line * (MAX_BYTES // len(line) + 2) + "{half of a li\n")
    ledger.asked(asked, False)
    assert (tmp_path / LEDGER).stat().st_size < 0.6 * MAX_BYTES
    assert json.loads((tmp_path / LEDGER).read_text().splitlines()[-1])["event"] == "asked"
    assert read_ledger(tmp_path)


def test_the_command_tells_it_and_where_the_page_lies(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, place: Place, asked: Task
) -> None:
    code, out, err = run("site-page", "--work", tmp_path, "--html")
    assert code == 1 and "no task has come yet" in err
    ledger = Ledger(tmp_path, lambda entries: render(entries, SITE, read_policy(place.policy)))
    ledger.not_left(asked, False, DoorClosed("no", "fix", code="non-finite"))
    code, out, _ = run("site-page", "--work", tmp_path)
    assert code == 0
    assert "submitted by ada@hospital.example" in out
    assert "train round 1 of" in out and "it holds NaN or infinity (non-finite)" in out
    assert f"the page: {tmp_path / PAGE}" in out
    code, out, _ = run("site-page", "--work", tmp_path, "--html")
    assert code == 0 and out.strip() == (tmp_path / PAGE).read_text().strip()
