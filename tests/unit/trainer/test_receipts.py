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
from fedfms.contracts.receipt import (
    ENDS,
    FIRST,
    REMOVALS,
    TRAINERS,
    Removed,
    canonical,
    report_sha256,
)
from fedfms.errors import FedfmsError
from fedfms.exchange.signatures import TrainerSigner, new_key
from fedfms.exchange.tensors import fingerprint, update_norm
from fedfms.trainer import egress
from fedfms.trainer.client import run_task
from fedfms.trainer.connection import ping
from fedfms.trainer.egress import END, KEEP_DAYS, LOG, read_egress
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
    start, now = 1_800_000_000.0, [0.0]
    monkeypatch.setattr(time, "time", lambda: now[0])

    def leave(day: int) -> None:
        now[0] = start + day * DAY
        give(site, day, day)

    for day in (0, 0, 1):
        leave(day)
    later = [KEEP_DAYS + 10, KEEP_DAYS + 11, KEEP_DAYS + 12, KEEP_DAYS + 13]
    for day in later[:3]:  # until then less than half of the receipts are so late
        leave(day)
        assert read_egress(site.work).kept_from is None
    leave(later[3])
    assert len(read_egress(site.work).receipts) == 7
    site.restart()
    leave(later[3])  # four of seven are
    found = read_egress(site.work)
    assert found.problems == []
    assert found.kept_from == time.strftime("%Y-%m-%d", time.gmtime(start + 10 * DAY))
    assert [one.receipt.number for one in found.receipts] == [3, 4, 5, 6, 7]
    path = site.work / LOG
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[1:]))  # the line that says that days were removed
    assert any("does not follow" in one for one in read_egress(site.work).problems)
    head = json.loads(lines[0])
    head["removed"]["number"] += 1
    changed = json.dumps(head, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    path.write_bytes(b"".join([changed, lines[2]]))  # one more than was removed
    assert any("its signature does not fit" in one for one in read_egress(site.work).problems)
    path.write_bytes(whole)
    now[0] = start  # by a clock that is right now, that day is to come
    (named,) = read_egress(site.work).problems
    assert named.startswith(f"days before {found.kept_from} were removed, and that day is still to")
    now[0] = start + 100 * DAY
    assert read_egress(site.work).problems == ["days were removed before 400 days had passed"]


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


def test_a_clock_that_is_years_ahead_for_several_answers_takes_nothing_away(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a short log, of which they are more than half, and on two days."""
    now = [1_800_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    for number in range(3):
        give(site, number, number)
    for number, day in enumerate((730, 730, 730, 731, 731, 731), start=3):
        now[0] = 1_800_000_000.0 + day * DAY
        site.restart()
        give(site, number, number)
    now[0] = 1_800_000_000.0
    site.restart()
    give(site, 9, 9)
    found = read_egress(site.work)
    assert (found.problems, found.kept_from, len(found.receipts)) == ([], None, 10)


# ------------------------------------------------------------------- its end, and whose keys it has


def test_lines_that_were_cut_off_the_end_are_missed_also_after_the_next_answer(
    site: Site, run: Run
) -> None:
    for number in range(5):
        give(site, number, number)
    path = site.work / LOG
    whole = path.read_bytes()
    assert stat.S_IMODE((site.work / END).stat().st_mode) == 0o600
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-3]))
    (named,) = read_egress(site.work).problems
    assert named == (
        "the end was cut off: the log goes up to receipt 1, and egress.end says that receipt 4 was "
        "the last"
    )
    code, out, _ = run("egress", "--work", site.work)
    assert code == 1 and "the end was cut off" in out
    site.restart()
    give(site, 5, 5)  # the trainer goes on, and hides nothing
    (named,) = read_egress(site.work).problems
    assert named.startswith("line 3, receipt 5 does not follow the line before it")
    path.unlink()
    (named,) = read_egress(site.work).problems
    assert named == "there is no receipt, and egress.end says that there were 6"


def test_a_process_that_is_killed_between_a_line_and_the_end_is_no_false_alarm(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def give_and_be_killed(writes: int) -> None:
        """Killed in place of the write of egress.end with this number, from 1."""
        real, done = egress.write_whole, [0]

        def write(path: Path, *about: object, **more: int) -> None:
            if path.name == END:
                done[0] += 1
                if done[0] == writes:
                    raise Killed
            real(path, *about, **more)

        with monkeypatch.context() as patched:
            patched.setattr(egress, "write_whole", write)
            with pytest.raises(Killed):
                give(site, 1, 1)
        site.restart()

    give_and_be_killed(2)  # the first answer of all: before it, and after it
    assert read_egress(site.work).problems == []
    give(site)
    give_and_be_killed(1)
    assert read_egress(site.work).problems == []
    give(site, 2, 2)
    for writes in (2, 1):  # a new key says that it is the next one before it signs a line
        (site.work / KEY).unlink()
        site.receipts.have_key()
        give_and_be_killed(writes)
        if writes == 2:
            assert read_egress(site.work).problems == []
        give(site, 3, 3)
        assert read_egress(site.work).problems == []
    assert [one.receipt.number for one in read_egress(site.work).receipts] == list(range(7))


def test_every_changed_byte_of_the_end_is_named(site: Site) -> None:
    for number in range(3):
        give(site, number, number)
    path = site.work / END
    whole = path.read_bytes()
    drawn = random.Random(8)
    for place in drawn.sample(range(len(whole) - 1), 60):
        data = bytearray(whole)
        data[place] ^= 1 << drawn.randrange(8)
        path.write_bytes(data)
        assert any(END in one for one in read_egress(site.work).problems), place
    path.write_bytes(whole)
    assert read_egress(site.work).problems == []


def test_a_stranger_can_neither_remove_lines_nor_sign_them_anew(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        give(site, number, number)
    path, end = site.work / LOG, site.work / END
    whole, ended = path.read_bytes(), end.read_bytes()
    receipts = read_egress(site.work).receipts
    stranger = TrainerSigner(new_key())

    last = receipts[1].receipt
    head = Removed(
        until="2024-01-01",
        time=time.time(),
        number=last.number + 1,
        previous=last.sha256,
        key=stranger.public,
    )
    head = dataclasses.replace(head, signature=stranger.sign(REMOVALS + head.canonical))
    line = canonical({"removed": dataclasses.asdict(head)}) + b"\n"
    without_two = line + b"".join(whole.splitlines(keepends=True)[2:])
    path.write_bytes(without_two)
    (named,) = read_egress(site.work).problems
    assert named == "line 1 is signed by a key that this trainer has not had"

    path.write_bytes(  # all but the last line, and an end that says that it is right so
        b"".join(
            dataclasses.replace(
                one,
                key=stranger.public,
                signature=stranger.sign(TRAINERS + one.receipt.canonical),
            ).canonical
            + b"\n"
            for one in receipts[:-1]
        )
        + receipts[-1].canonical
        + b"\n"
    )
    named = read_egress(site.work).problems
    assert [one.partition(" is signed by a key that")[0] for one in named] == [
        f"line {number}, receipt {number - 1}" for number in (1, 2, 3)
    ]
    theirs = json.loads(ended)
    theirs |= {"keys": [stranger.public, receipts[0].key], "key": stranger.public}
    del theirs["signature"]
    signature = stranger.sign(ENDS + canonical({"end": theirs}))
    end.write_bytes(canonical(theirs | {"signature": signature}))
    assert read_egress(site.work).problems == [
        "egress.end is signed by another key than this trainer has"
    ]


def test_a_log_of_an_earlier_version_gets_an_end_when_its_trainer_starts(
    site: Site, run: Run
) -> None:
    for number in range(3):
        give(site, number, number)
    (site.work / END).unlink()
    (named,) = read_egress(site.work).problems
    assert named.startswith("egress.end is missing, so that nobody can say")
    site.restart()
    site.receipts.have_key()  # as at every start
    found = read_egress(site.work)
    assert found.problems == []
    (note,) = found.notes
    assert note.startswith("before receipt 3 there was no egress.end")
    code, out, _ = run("egress", "--work", site.work)
    assert code == 0 and "before receipt 3" in out
    give(site, 3, 3)
    assert read_egress(site.work).notes == [note]
    (site.work / END).unlink()
    (site.work / KEY).unlink()  # a copy of the log alone
    found = read_egress(site.work)
    assert found.problems == []
    assert found.notes == ["without egress.end nobody can say whether lines were cut off the end"]


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
