"""The log of what left a site: one receipt a line, signed and chained; read without torch.

    WORK/egress.jsonl    a line for each answer, on the disk before the answer is handed out
    WORK/egress.end      how many there are, the last one's hash, and the keys that this trainer has
                         had, signed
    WORK/egress.room     room kept free for both, and for what the site counts, so that a full disk
                         keeps no answer back

A line is never changed. After KEEP_DAYS whole days (UTC) go; the line that stands first then says
so, signed, and from which receipt the chain goes on. Nothing else removes one: `fedfms forget`
does not. No line holds a name of a file, a case or a patient.

egress.end is written after its line, so that a crash between the two leaves a log that is longer
than egress.end says, by lines that are signed and follow one another. That is no problem, and no
cut log looks like it: a cut makes the log shorter. Only where the trainer has a new key it is
written before, too, since the new key's first line would be a stranger's to the old egress.end.
Whoever puts both files back as they were earlier is missed by neither; the server's records are
later then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fedfms.bounded import decode_json
from fedfms.contracts.decode import Misfits, validate
from fedfms.contracts.receipt import (
    ENDS,
    FIRST,
    MOST_KEYS,
    REMOVALS,
    TRAINERS,
    End,
    Receipt,
    Removed,
    SignedReceipt,
)
from fedfms.errors import Undecodable
from fedfms.exchange.signatures import TrainerSigner, is_signed_by_trainer
from fedfms.files import NO_ROOM, append_whole, cut_torn_line, read_whole, write_whole
from fedfms.trainer.own_key import public_key

log = logging.getLogger(__name__)

LOG, END, ROOM = "egress.jsonl", "egress.end", "egress.room"
KEEP_DAYS = 400
LATER_DAYS = 3  # on which something left since, or no clock is believed that days are old
ROOM_BYTES = 1 << 20  # some six hundred receipts
_PIECE_BYTES = 1 << 16  # of it, given back at a time
_DAY = 86400.0
_LARGEST_END = 1 << 14  # bytes
_REMEMBERED = 2000  # receipts, of which the same answer is recognized after a restart


@dataclass(frozen=True, slots=True)
class Next:
    """What the next receipt follows."""

    number: int
    previous: str


class EgressLog:
    """Adds receipts; one process, one thread at a time.

    Args:
        work: the site's private folder.
    """

    def __init__(self, work: Path) -> None:
        self._path, self._end_path, self._room = work / LOG, work / END, work / ROOM
        self._next: Next | None = None  # as soon as the log was read
        self._end: End | None = None  # as it is on the disk; None: there is none, or a stranger's
        self._since = 0  # see `End`
        self._keys: tuple[str, ...] = ()  # the same
        self._given: dict[tuple[str, ...], str] = {}  # what was answered -> its first receipt
        self._pruned = ""  # the day on which old ones were looked for

    def add(
        self,
        make: Callable[[Next, Callable[[Receipt], str | None]], Receipt],
        signer: TrainerSigner,
    ) -> SignedReceipt:
        """Add a receipt; it is on the disk when this returns.

        Args:
            make: gives the receipt that follows; it may ask whether the same answer was given
                before, and by which receipt.
            signer: has the trainer's key.

        Raises:
            OSError: it cannot be written; nothing may leave then.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._next is None:
            self._read(signer)
        self._keep_room()
        self._remove_old(signer)
        assert self._next is not None  # was read
        receipt = make(self._next, lambda one: self._given.get(_answer(one)))
        signed = SignedReceipt(
            receipt=receipt,
            key=signer.public,
            signature=signer.sign(TRAINERS + receipt.canonical),
        )
        try:
            if self._end is None or self._end.key != signer.public:
                self._write_end(signer)
            self._path.touch(0o600)
            append_for_sure(self._path, signed.canonical + b"\n")
            self._note(receipt)
            self._write_end(signer)
        except OSError:
            self._next = None  # perhaps it is there, and the disk said no later: read it again
            raise
        return signed

    def begin(self, signer: TrainerSigner) -> None:
        """Have egress.end beside a log that an earlier version began.

        Raises:
            OSError: it cannot be read or written.
        """
        if self._path.is_file() and not self._end_path.exists():
            self._read(signer)
            self._write_end(signer)

    def _note(self, receipt: Receipt) -> None:
        self._next = Next(receipt.number + 1, receipt.sha256)
        self._given.setdefault(_answer(receipt), receipt.sha256)

    def _read(self, signer: TrainerSigner) -> None:
        """Learn where the chain stands; what a killed process had begun to write did not leave."""
        self._next = Next(0, FIRST)
        cut_torn_line(self._path)
        raw, last_key = _raw_lines(self._path), ""
        for line in map(_parse, raw[-_REMEMBERED:]):
            if isinstance(line, SignedReceipt):
                self._note(line.receipt)
                last_key = line.key
            elif isinstance(line, Removed):
                self._next = Next(line.number, line.previous)
            else:
                log.error("a line of %s cannot be read: fedfms egress says which", self._path)
        self._end = self._read_end({signer.public, last_key})
        if self._end is None:
            keys = [one.key for one in map(_parse, raw) if isinstance(one, SignedReceipt)]
            if keys:
                log.warning("nothing says how long %s was: it is taken as it is", self._path)
            self._since, self._keys = self._next.number, tuple(dict.fromkeys(keys))
            return
        self._since, self._keys = self._end.since, tuple(self._end.keys)
        if self._end.number > self._next.number:
            log.error(
                "%d receipts at the end of %s are missing: the chain goes on after them, so that "
                "it shows where",
                self._end.number - self._next.number,
                self._path,
            )
            self._next = Next(self._end.number, self._end.previous)

    def _read_end(self, keys: set[str]) -> End | None:
        """What egress.end says, if one of these keys signed it."""
        try:
            end = read_end(self._end_path.parent)
        except (Misfits, Undecodable):
            end = None
        if end is None or end.key not in keys:
            return None
        is_signed = is_signed_by_trainer(end.key, end.signature, ENDS + end.canonical)
        return end if is_signed else None

    def _write_end(self, signer: TrainerSigner) -> None:
        """Say how long the log is, at need in the room kept free."""
        assert self._next is not None  # was read
        if self._keys[-1:] != (signer.public,):
            self._keys = (*self._keys, signer.public)[-MOST_KEYS:]
        end = End(
            number=self._next.number,
            previous=self._next.previous,
            since=self._since,
            keys=self._keys,
            key=signer.public,
        )
        end = dataclasses.replace(end, signature=signer.sign(ENDS + end.canonical))
        data = json.dumps(dataclasses.asdict(end), sort_keys=True).encode() + b"\n"
        while True:
            try:
                write_whole(self._end_path, data, mode=0o600)
                break
            except OSError as error:
                if error.errno not in NO_ROOM or not _give_room(self._room):
                    raise
        self._end = end

    def _keep_room(self) -> None:
        """Have the room there; what is kept free must not read as zeros, which some disks drop."""
        with contextlib.suppress(OSError):
            size = self._room.stat().st_size if self._room.exists() else 0
            free = shutil.disk_usage(self._room.parent).free
            if size < ROOM_BYTES and free > 2 * ROOM_BYTES:
                write_whole(self._room, os.urandom(ROOM_BYTES), mode=0o600)

    def _remove_old(self, signer: TrainerSigner) -> None:
        """Once a day: remove the days that are older than KEEP_DAYS."""
        today = _day(time.time())
        if self._pruned == today:
            return
        self._pruned = today
        raw = _raw_lines(self._path)
        oldest = next((o for o in map(_parse, raw[:2]) if isinstance(o, SignedReceipt)), None)
        newest = _parse(raw[-1]) if raw else None
        if oldest is None or not isinstance(newest, SignedReceipt):
            return
        # A clock that is years ahead for a while takes nothing away: the last receipt agrees with
        # it, and half of all receipts do, of several days.
        middle = _parse(raw[len(raw) // 2])
        now = min(time.time(), newest.receipt.time)
        if isinstance(middle, SignedReceipt):  # most days it says already that nothing is old
            now = min(now, middle.receipt.time)
        if _day(oldest.receipt.time) >= _day(now - KEEP_DAYS * _DAY):
            return
        lines = [_parse(line) for line in raw]
        dated = [one for one in lines if isinstance(one, SignedReceipt)]
        if len(dated) + 1 < len(lines):  # of a log that was damaged nothing is removed
            return
        now = min(now, statistics.median_low(one.receipt.time for one in dated))
        first_kept = _day(now - KEEP_DAYS * _DAY)
        days = {_day(one.receipt.time) for one in dated if one.receipt.time >= now}
        if _day(oldest.receipt.time) >= first_kept or len(days) < LATER_DAYS:
            return
        keep = 0
        while keep < len(dated) and _day(dated[keep].receipt.time) < first_kept:
            keep += 1
        last = dated[keep - 1].receipt
        head = Removed(
            until=first_kept,
            time=time.time(),
            number=last.number + 1,
            previous=last.sha256,
            key=signer.public,
        )
        head = dataclasses.replace(head, signature=signer.sign(REMOVALS + head.canonical))
        kept = [_removed_line(head), *(one.canonical + b"\n" for one in dated[keep:])]
        try:
            write_whole(self._path, b"".join(kept), mode=0o600)
        except OSError as error:
            log.warning("old receipts could not be removed: %s", error.strerror)
            return
        log.info("%d receipts from before %s were removed", keep, first_kept)


def append_for_sure(path: Path, line: bytes) -> None:
    """Add a line that must be on the disk before something leaves, at need in the room kept free.

    Raises:
        OSError: it cannot be written; nothing may leave then.
    """
    while True:
        try:
            append_whole(path, line, durable=True, mode=0o600)
            return
        except OSError as error:
            if error.errno not in NO_ROOM or not _give_room(path.with_name(ROOM)):
                raise


def _give_room(room: Path) -> bool:
    """Free some of it; whether there was any."""
    try:
        size = room.stat().st_size
        os.truncate(room, max(0, size - _PIECE_BYTES))
    except OSError:
        return False
    return size > 0


@dataclass(slots=True)
class Egress:
    """What a log says, and what is wrong with it."""

    receipts: list[SignedReceipt] = field(default_factory=list)  # the oldest first
    problems: list[str] = field(default_factory=list)  # a sentence each
    kept_from: str | None = None  # the first day of which nothing was removed; None: the beginning
    keys: list[str] = field(default_factory=list)  # that signed, in their order
    notes: list[str] = field(default_factory=list)  # what else a person wants to know


def read_egress(work: Path) -> Egress:
    """Read a site's log and check its chain and its signatures.

    Raises:
        OSError: it cannot be read; FileNotFoundError: there is none, nothing has left.
    """
    found = Egress()
    own = public_key(work)
    end, damaged = None, False
    try:
        end = read_end(work)  # before the log, which a trainer may be adding to
    except (Misfits, Undecodable):
        damaged = True
        found.problems.append(f"{END} cannot be read, or was changed")
    data = _read_log(work, end)
    if not data.endswith(b"\n") and data:
        found.problems.append("the last line has no end: it was not handed out, or was cut off")
    lines = [_parse(line) for line in data.split(b"\n")[:-1]]
    if end is None and not damaged:
        _say_no_end(found, own)
    trusted = _trusted(found, end, own, lines)
    next_one = Next(0, FIRST)
    for number, line in enumerate(lines, start=1):
        if line is None:
            found.problems.append(f"line {number} cannot be read, or was changed")
            continue
        where = f"line {number}"
        if isinstance(line, Removed):
            _check_removed(found, number, line)
            found.kept_from, next_one = line.until, Next(line.number, line.previous)
        else:
            receipt = line.receipt
            where += f", receipt {receipt.number}"
            if not is_signed_by_trainer(line.key, line.signature, TRAINERS + receipt.canonical):
                found.problems.append(f"{where}: its signature does not fit, so it was changed")
            if (receipt.number, receipt.previous) != (next_one.number, next_one.previous):
                found.problems.append(
                    f"{where} does not follow the line before it: one was changed, removed or put "
                    "in"
                )
            next_one = Next(receipt.number + 1, receipt.sha256)
            if line.key not in found.keys:
                found.keys.append(line.key)
            found.receipts.append(line)
        if line.key not in trusted:
            found.problems.append(f"{where} is signed by a key that this trainer has not had")
        if end is not None and next_one.number == end.number and next_one.previous != end.previous:
            found.problems.append(f"{where} is not the receipt that {END} names there")
    is_known = end is not None and end.key == own  # a new key that has signed no receipt yet
    if found.receipts and own is not None and found.receipts[-1].key != own and not is_known:
        found.problems.append("the last receipt is signed by another key than this trainer has now")
    if end is not None and next_one.number < end.number:
        found.problems.append(
            f"the end was cut off: the log goes up to receipt {next_one.number - 1}, and {END} "
            f"says that receipt {end.number - 1} was the last"
            if next_one.number
            else f"there is no receipt, and {END} says that there were {end.number}"
        )
    return found


def read_end(work: Path) -> End | None:
    """What egress.end says, whoever signed it; None where there is none.

    Raises:
        Misfits, Undecodable: it cannot be used.
        OSError: it cannot be read.
    """
    try:
        values = decode_json(read_whole(work / END, _LARGEST_END), END)
    except FileNotFoundError:
        return None
    return End.from_dict(values)


def _read_log(work: Path, end: End | None) -> bytes:
    try:
        return (work / LOG).read_bytes()
    except FileNotFoundError:
        if end is None or end.number == 0:
            raise
        return b""


def _say_no_end(found: Egress, own: str | None) -> None:
    """Of a trainer's own folder that is a problem: it makes the file when it starts."""
    if own is None:
        found.notes.append(f"without {END} nobody can say whether lines were cut off the end")
        return
    found.problems.append(
        f"{END} is missing, so that nobody can say whether lines were cut off the end: an earlier "
        "version wrote the log and the trainer was not started since, or somebody removed it"
    )


def _trusted(
    found: Egress, end: End | None, own: str | None, lines: list[SignedReceipt | Removed | None]
) -> set[str]:
    """The keys that this trainer has had; what is wrong with who says so goes into `found`.

    That is the key that it has now. Of a new one that has signed nothing yet, the one before; of a
    copy without a key, whichever signed, if the last receipt's is one of those it names.
    """
    receipts = [one for one in lines if isinstance(one, SignedReceipt)]
    last = receipts[-1].key if receipts else own
    ours = {own} if own is not None else set()
    signed_by = {one.key for one in receipts} | ours
    if end is None:
        return signed_by
    if not is_signed_by_trainer(end.key, end.signature, ENDS + end.canonical):
        found.problems.append(f"{END}: its signature does not fit, so it was changed")
        return signed_by
    if own is None:
        is_right = last is None or last in end.keys
    else:
        is_right = end.key == own or (own != last and end.key == last)
    if not is_right:
        found.problems.append(f"{END} is signed by another key than this trainer has")
        return signed_by
    if end.since:
        found.notes.append(
            f"before receipt {end.since} there was no {END}: whether lines were cut off until then "
            "nobody can say"
        )
    return {*end.keys, *ours}


def _check_removed(found: Egress, number: int, line: Removed) -> None:
    """Whether old days were removed by this trainer, and when they were old."""
    if number != 1:
        found.problems.append(f"line {number} says that days were removed in the middle")
    if not is_signed_by_trainer(line.key, line.signature, REMOVALS + line.canonical):
        found.problems.append(f"line {number}: its signature does not fit")
    now = time.time()
    if line.until > _day(now):
        found.problems.append(
            f"days before {line.until} were removed, and that day is still to come: the clock was "
            "ahead then, or is behind now"
        )
    elif line.until > _day(min(line.time, now) - KEEP_DAYS * _DAY):
        found.problems.append(f"days were removed before {KEEP_DAYS} days had passed")


def _raw_lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []


def _parse(line: bytes) -> SignedReceipt | Removed | None:
    try:
        values = decode_json(line, "a line of what left")
        if isinstance(values, dict) and "removed" in values:
            head = validate(Removed, values["removed"])
            return head if _removed_line(head) == line + b"\n" else None
        signed = SignedReceipt.from_dict(values)
        return signed if signed.canonical == line else None
    except (Undecodable, Misfits):
        return None


def _removed_line(head: Removed) -> bytes:
    values = {"removed": dataclasses.asdict(head)}
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _day(seconds: float) -> str:
    """The day in UTC, as 2026-01-31."""
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).date().isoformat()


def _answer(receipt: Receipt) -> tuple[str, ...]:
    """What two receipts of the same answer have in common."""
    task = (receipt.job, receipt.kind, str(receipt.round), receipt.model, receipt.model_in_sha256)
    return (*task, receipt.report_sha256, str(receipt.tensors_sha256), *receipt.pictures)
