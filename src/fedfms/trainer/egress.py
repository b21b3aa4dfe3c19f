"""The log of what left a site: one receipt a line, signed and chained; read without torch.

    WORK/egress.jsonl    a line for each answer, on the disk before the answer is handed out
    WORK/egress.room     room kept free for it, and for what the site counts, so that a full disk
                         keeps no answer back

A line is never changed. After KEEP_DAYS whole days (UTC) go; the line that stands first then says
so, signed, and from which receipt the chain goes on. Nothing else removes one: `fedfms forget`
does not. No line holds a name of a file, a case or a patient.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fedfms.bounded import decode_json
from fedfms.contracts.decode import Misfits, validate
from fedfms.contracts.receipt import FIRST, REMOVALS, TRAINERS, Receipt, Removed, SignedReceipt
from fedfms.errors import Undecodable
from fedfms.exchange.signatures import TrainerSigner, is_signed_by_trainer
from fedfms.files import NO_ROOM, append_whole, cut_torn_line, write_whole
from fedfms.trainer.own_key import public_key

log = logging.getLogger(__name__)

LOG, ROOM = "egress.jsonl", "egress.room"
KEEP_DAYS = 400
ROOM_BYTES = 1 << 20  # some six hundred receipts
_PIECE_BYTES = 1 << 16  # of it, given back at a time
_DAY = 86400.0
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
        self._path, self._room = work / LOG, work / ROOM
        self._next: Next | None = None  # as soon as the log was read
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
            self._read()
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
            self._path.touch(0o600)
            append_for_sure(self._path, signed.canonical + b"\n")
        except OSError:
            self._next = None  # perhaps it is there, and the disk said no later: read it again
            raise
        self._note(receipt)
        return signed

    def _note(self, receipt: Receipt) -> None:
        self._next = Next(receipt.number + 1, receipt.sha256)
        self._given.setdefault(_answer(receipt), receipt.sha256)

    def _read(self) -> None:
        """Learn where the chain stands; what a killed process had begun to write did not leave."""
        self._next = Next(0, FIRST)
        cut_torn_line(self._path)
        for line in map(_parse, _raw_lines(self._path)[-_REMEMBERED:]):
            if isinstance(line, SignedReceipt):
                self._note(line.receipt)
            elif isinstance(line, Removed):
                self._next = Next(line.number, line.previous)
            else:
                log.error("a line of %s cannot be read: fedfms egress says which", self._path)

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
        # a clock that is years ahead for an hour takes nothing away: the last receipt agrees
        now = min(time.time(), newest.receipt.time)
        first_kept = _day(now - KEEP_DAYS * _DAY)
        if _day(oldest.receipt.time) >= first_kept:
            return
        lines = [_parse(line) for line in raw]
        dated = [one for one in lines if isinstance(one, SignedReceipt)]
        if len(dated) + 1 < len(lines):  # of a log that was damaged nothing is removed
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


def read_egress(work: Path) -> Egress:
    """Read a site's log and check its chain and its signatures.

    Raises:
        OSError: it cannot be read; FileNotFoundError: there is none, nothing has left.
    """
    found = Egress()
    next_one = Next(0, FIRST)
    (work / LOG).stat()
    data = (work / LOG).read_bytes()
    if not data.endswith(b"\n") and data:
        found.problems.append("the last line has no end: it was not handed out, or was cut off")
    for number, line in enumerate(_lines(work / LOG), start=1):
        if line is None:
            found.problems.append(f"line {number} cannot be read, or was changed")
            continue
        if isinstance(line, Removed):
            if number != 1:
                found.problems.append(f"line {number} says that days were removed in the middle")
            if not is_signed_by_trainer(line.key, line.signature, REMOVALS + line.canonical):
                found.problems.append(f"line {number}: its signature does not fit")
            if line.until > _day(line.time - KEEP_DAYS * _DAY):
                found.problems.append(f"days were removed before {KEEP_DAYS} days had passed")
            found.kept_from, next_one = line.until, Next(line.number, line.previous)
            continue
        receipt = line.receipt
        where = f"line {number}, receipt {receipt.number}"
        if not is_signed_by_trainer(line.key, line.signature, TRAINERS + receipt.canonical):
            found.problems.append(f"{where}: its signature does not fit, so it was changed")
        if (receipt.number, receipt.previous) != (next_one.number, next_one.previous):
            found.problems.append(
                f"{where} does not follow the line before it: one was changed, removed or put in"
            )
        next_one = Next(receipt.number + 1, receipt.sha256)
        if line.key not in found.keys:
            found.keys.append(line.key)
        found.receipts.append(line)
    own = public_key(work)
    if found.receipts and own is not None and found.receipts[-1].key != own:
        found.problems.append("the last receipt is signed by another key than this trainer has now")
    return found


def _lines(path: Path) -> Iterator[SignedReceipt | Removed | None]:
    """What each line holds; None where it is not exactly one of ours."""
    yield from map(_parse, _raw_lines(path))


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
