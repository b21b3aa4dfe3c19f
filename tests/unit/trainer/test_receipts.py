"""What left a site, as its own log has it: before it leaves, whole, for 400 days."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import random
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from trainer_process import SITE, Place, TrainerProcess, task_runner

from fedfms.contracts.messages import Task
from fedfms.contracts.receipt import FIRST, canonical, report_sha256
from fedfms.errors import FedfmsError
from fedfms.exchange.tensors import fingerprint, update_norm
from fedfms.trainer import egress
from fedfms.trainer.client import run_task
from fedfms.trainer.connection import ping
from fedfms.trainer.egress import KEEP_DAYS, LOG, read_egress
from fedfms.trainer.own_key import KEY
from sealed_run import Site, difference, make_kits, task_of
from small_disk import small_disk

Run = Callable[..., tuple[int, str, str]]
DAY = 86400.0


def test_a_trainer_logs_what_leaves_before_it_leaves_and_again_when_it_is_the_same(
    start: Callable[..., TrainerProcess], place: Place, train_task: Task, global_model
) -> None:
    place.set_policy(min_cases=1)
    trainer = start()
    key = ping(place.exchange).trainer_key
    assert key is not None
    assert stat.S_IMODE((place.work / KEY).stat().st_mode) == 0o600
    task = dataclasses.replace(train_task, submitter="ada@hospital.example", job_name="fedmsa")
    first = run_task(place.exchange, task, global_model)
    trainer.end()
    start()
    again = run_task(place.exchange, task, global_model)
    evaluation = dataclasses.replace(task, kind="evaluate", model="final", round=3)
    scores = run_task(place.exchange, evaluation, global_model)

    found = read_egress(place.work)
    assert found.problems == []
    assert found.receipts == [first.receipt, again.receipt, scores.receipt]
    assert found.keys == [key] == [first.receipt.key]  # of the first start
    one, two, three = (signed.receipt for signed in found.receipts)
    assert (one.number, one.previous, one.same_as) == (0, FIRST, None)
    assert (two.number, two.previous, two.same_as) == (1, one.sha256, one.sha256)
    assert (three.previous, three.same_as) == (two.sha256, None)
    assert (one.submitter, one.job_name, one.job) == ("ada@hospital.example", "fedmsa", "job-1")
    assert one.model_in_sha256 == fingerprint(global_model) == three.model_in_sha256
    assert one.tensors_sha256 == fingerprint(first.tensors)
    assert one.norm == pytest.approx(update_norm(first.tensors))
    assert one.values == sum(tensor.numel() for tensor in first.tensors.values())
    assert one.report_sha256 == report_sha256(first.contribution)
    policy = (place.policy / "privacy.json").read_bytes()
    assert one.policy_sha256 == hashlib.sha256(policy).hexdigest()
    assert three.tensors_sha256 is None and three.values == 0
    assert abs(one.time - time.time()) < 120

    task_runner(place).forget("job-1")  # the coordinator has the run forgotten
    assert read_egress(place.work).receipts == found.receipts


def test_nothing_leaves_that_cannot_be_logged(
    start: Callable[..., TrainerProcess], place: Place, train_task: Task, global_model
) -> None:
    start()
    (place.work / LOG).mkdir()
    with pytest.raises(FedfmsError):
        run_task(place.exchange, train_task, global_model)
    assert [path.name for path in place.exchange.iterdir()] == ["trainer.sock"]
    (place.work / LOG).rmdir()
    (place.work / KEY).write_bytes(b"no key")
    with pytest.raises(FedfmsError) as caught:
        run_task(place.exchange, train_task, global_model)
    assert caught.value.code == "trainer-key"
    assert "delete it, and the trainer makes another" in (place.work / "errors.log").read_text()
    (place.work / KEY).unlink()
    assert run_task(place.exchange, train_task, global_model).receipt.receipt.number == 0


# ------------------------------------------------------------------------------- the log by itself


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kits(tmp_path_factory.mktemp("project"))


@pytest.fixture
def site(tmp_path: Path, kits: Path) -> Site:
    return Site(SITE, tmp_path, kits)


def give(site: Site, number: int = 0, seed: int = 0) -> None:
    site.give(task_of(SITE, "train", number), {"w": torch.zeros(3)}, difference(seed))


def test_every_changed_byte_of_the_log_is_named_by_its_line(site: Site) -> None:
    for number in range(4):
        give(site, number, number)
    path = site.work / LOG
    whole = path.read_bytes()
    assert read_egress(site.work).problems == []
    drawn = random.Random(5)
    for place in drawn.sample(range(len(whole) - 1), 120):
        data = bytearray(whole)
        data[place] ^= 1 << drawn.randrange(8)
        path.write_bytes(data)
        line = whole.count(b"\n", 0, place) + 1
        named = read_egress(site.work).problems
        assert any(f"line {line}" in one for one in named), (place, line, named)
    lines = whole.splitlines(keepends=True)
    for changed in (lines[1:], lines[:1] + lines[2:], [lines[1], lines[0], *lines[2:]]):
        path.write_bytes(b"".join(changed))
        assert any("does not follow" in one for one in read_egress(site.work).problems)


def test_the_chain_goes_on_after_a_restart_and_after_a_half_written_line(site: Site) -> None:
    give(site, 0)
    with (site.work / LOG).open("ab") as file:
        file.write(b'{"key": "half of a li')  # killed: so it was not handed out either
    assert any("no end" in one for one in read_egress(site.work).problems)
    site.restart()
    give(site, 1, 1)
    found = read_egress(site.work)
    assert found.problems == []
    assert [one.receipt.number for one in found.receipts] == [0, 1]


def test_a_new_key_goes_on_with_the_log_and_is_told(site: Site, run: Run) -> None:
    give(site, 0)
    (site.work / KEY).unlink()
    site.restart()
    give(site, 1, 1)
    found = read_egress(site.work)
    assert found.problems == [] and len(set(found.keys)) == 2
    assert "an earlier key of this trainer" in run("egress", "--work", site.work)[1]
    (site.work / KEY).unlink()
    site.restart()
    site.receipts.have_key()
    (named,) = read_egress(site.work).problems
    assert "signed by another key than this trainer has now" in named


def test_whole_days_go_after_400_and_the_chain_goes_on(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1_800_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    days = (0, 0, 1, KEEP_DAYS - 1, KEEP_DAYS)
    for number, day in enumerate(days):
        now[0] = 1_800_000_000.0 + day * DAY
        give(site, number, number)
    assert len(read_egress(site.work).receipts) == len(days)  # the first day is the 400th before
    for day, before, left in (  # counted from the last answer
        (KEEP_DAYS + 1, KEEP_DAYS, 6),
        (KEEP_DAYS + 2, KEEP_DAYS + 1, 5),
        (3 * KEEP_DAYS, KEEP_DAYS + 2, 5),
        (3 * KEEP_DAYS + 1, 3 * KEEP_DAYS, 2),
    ):
        now[0] = 1_800_000_000.0 + day * DAY
        give(site, day, day)
        found = read_egress(site.work)
        assert found.problems == []
        assert len(found.receipts) == left
        first_kept = 1_800_000_000.0 + (before - KEEP_DAYS) * DAY
        if left < 6:
            assert found.kept_from == time.strftime("%Y-%m-%d", time.gmtime(first_kept))
    site.restart()
    give(site, 9, 9)
    found = read_egress(site.work)
    assert found.problems == []
    assert [one.receipt.number for one in found.receipts] == [7, 8, 9]
    path = site.work / LOG
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[1:]))  # the line that says that days were removed
    assert any("does not follow" in one for one in read_egress(site.work).problems)
    head = json.loads(lines[0])
    head["removed"]["number"] += 1
    changed = json.dumps(head, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    path.write_bytes(b"".join([changed, lines[2]]))  # one more than was removed
    assert any("its signature does not fit" in one for one in read_egress(site.work).problems)


def test_a_clock_that_is_wrong_for_a_while_takes_nothing_of_the_log_away(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1_800_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    for number, day in enumerate((0, 1, 20_000, 2, -9_000, 3)):  # years ahead, and back to 2002
        now[0] = 1_800_000_000.0 + day * DAY
        give(site, number, number)
        site.restart()
    found = read_egress(site.work)
    assert found.problems == [] and found.kept_from is None
    assert [one.receipt.number for one in found.receipts] == [0, 1, 2, 3, 4, 5]


def test_a_disk_that_says_no_after_the_line_is_there_breaks_no_chain(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk over a network tells only when the file is flushed that it is full."""
    give(site, 0)

    def full(file: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError):
            give(site, 1, 1)
    give(site, 2, 2)
    found = read_egress(site.work)
    assert found.problems == []
    assert [one.receipt.number for one in found.receipts] == [0, 1]  # what did not leave is out


def test_a_log_that_cannot_be_read_is_not_called_empty(site: Site, run: Run) -> None:
    code, _, err = run("egress", "--work", site.work)
    assert code == 1 and "nothing has left" in err
    (site.work / LOG).mkdir(parents=True)
    code, _, err = run("egress", "--work", site.work)
    assert code == 1 and "nobody can say what has left" in err and "nothing has left" not in err
    (site.work / LOG).rmdir()
    give(site)
    code, _, err = run("egress", "--work", site.work, "--from", "2026-02-01", "--to", "2026-01-31")
    assert code == 2 and "2026-01-31 is before 2026-02-01" in err
    line = (site.work / LOG).read_bytes()
    changed = json.loads(line)
    changed["receipt"]["time"] = 1e300  # no calendar has it
    (site.work / LOG).write_bytes(canonical(changed) + b"\n" + line)
    code, out, _ = run("egress", "--work", site.work)
    assert code == 1 and "line 1 cannot be read, or was changed" in out


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "4m") as folder:
        yield folder


def test_a_full_disk_takes_what_the_room_holds_and_then_nothing_leaves(
    disk: Path, kits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(egress, "ROOM_BYTES", 2**17)  # an eighth, so that it is full sooner
    site = Site(SITE, disk, kits)
    give(site)
    with (disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError):
        while file.write(b"\0" * 4096):
            pass
    for number in range(80):
        give(site, number, number)
    with pytest.raises(OSError, match="No space left"):
        for number in range(200):
            give(site, number, number)
    found = read_egress(site.work)
    assert found.problems == []
    (disk / "filler").unlink()
    give(site)
    after = read_egress(site.work)
    assert after.problems == []
    assert len(after.receipts) == len(found.receipts) + 1 > 82


# ------------------------------------------------------------------------------------- the command


def test_the_command_answers_what_left_on_that_day(
    site: Site, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run("egress", "--work", site.work)
    assert code == 1 and "nothing has left" in err
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        real = time.time
        for number, day in enumerate(("2026-03-02", "2026-03-03", "2026-03-03", "2026-03-04")):
            noon = time.mktime(time.strptime(f"{day} 23:30", "%Y-%m-%d %H:%M"))
            monkeypatch.setattr(time, "time", lambda at=noon: at)
            give(site, number % 2, number % 3)
        monkeypatch.setattr(time, "time", real)
        code, out, _ = run(
            "egress", "--from", "2026-03-03", "--to", "2026-03-03", "--work", site.work
        )
        assert code == 0
        lines = out.splitlines()
        assert [line[:19] for line in lines[1:3]] == ["2026-03-03 23:30:00"] * 2
        assert "round 2 of 2" in lines[1] and "ada@hospital.example, fedmsa 0b1f3b9e" in lines[1]
        assert fingerprint(difference(1))[:16] in lines[1]
        assert lines[3] == (
            "2 answers from 2026-03-03 to 2026-03-03, for 1 job: 44 numbers, 176 bytes of tensors, "
            "0 pictures"
        )
        assert lines[4] == "PASS the chain is whole from the beginning: 4 receipts"
        code, out, _ = run("egress", "--from", "2027-01-01", "--work", site.work)
        assert (code, out.splitlines()[0]) == (0, "nothing left from 2027-01-01")
        code, out, _ = run("egress", "--to", "2026-03-02", "--work", site.work, "--json")
        (receipt,) = json.loads(out)["receipts"]
        assert receipt["tensors_sha256"] == fingerprint(difference(0))
        assert receipt["sha256"] == read_egress(site.work).receipts[0].receipt.sha256
    finally:
        monkeypatch.delenv("TZ")
        time.tzset()
    data = (site.work / LOG).read_bytes()
    (site.work / LOG).write_bytes(data.replace(b"fedmsa", b"fedsam", 1))
    code, out, _ = run("egress", "--work", site.work)
    assert code == 1
    assert "is broken:\n     line 1, receipt 0: its signature does not fit" in out
