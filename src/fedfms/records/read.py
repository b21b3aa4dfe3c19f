"""The one reader of records.jsonl, of a finished job or of one that runs."""

from __future__ import annotations

import contextlib
import typing
from pathlib import Path

from fedfms.bounded import decode_json
from fedfms.errors import FederationError
from fedfms.records.schema import FORMAT, RECORDS, JobRecord, Record

_KINDS = frozenset(
    one.model_fields["record"].default for one in typing.get_args(Record)
)  # those of this version

_END_BYTES = 64 * 1024  # of a file: more than the last record
MAX_LINE_BYTES = 1 << 20  # of one record; a site with 1000 scores has 200 kB
_PIECE_BYTES = 4 << 20  # read at once


class RecordReader:
    """Reads a growing records.jsonl; what is not a whole line yet is read next time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = []  # all that were read
        self.damaged = 0  # lines that cannot be read
        self._offset = 0

    def read_new(self) -> list[Record]:
        """Records since the last call."""
        new = []
        while data := self._unread(_PIECE_BYTES):
            whole = data[: data.rfind(b"\n") + 1]
            if not whole and len(data) == _PIECE_BYTES:
                whole = data  # no record is so long: a part of what cannot be read
            if not whole:
                break
            self._offset += len(whole)
            new += self._take(whole)
        return new

    def read_rest(self) -> list[Record]:
        """The same of a file that grows no more: a last line without its end counts too."""
        return self.read_new() + self._take(self._unread(_PIECE_BYTES))

    def _unread(self, size: int) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                return file.read(size)
        except OSError:
            return b""

    def _take(self, lines: bytes) -> list[Record]:
        new = []
        for line in lines.split(b"\n"):
            if not line.strip():
                continue
            try:
                text = line[: MAX_LINE_BYTES + 1].decode(errors="replace")
                values = decode_json(text, "a record", max_bytes=MAX_LINE_BYTES)
                if not isinstance(values, dict) or not isinstance(values.get("record"), str):
                    raise ValueError("no record")
                if values["record"] in _KINDS:  # a kind that only a later version knows is no harm
                    new.append(RECORDS.validate_python(values))
            except ValueError:
                self.damaged += 1
        self.records += new
        return new


def read_last(path: Path) -> Record | None:
    """The last record, from the end of the file alone; None where it is longer than a few lines."""
    reader = RecordReader(path)
    with contextlib.suppress(OSError):
        reader._offset = max(0, path.stat().st_size - _END_BYTES)
    reader.read_rest()
    return reader.records[-1] if reader.records else None


def read_records(path: Path) -> tuple[list[Record], int]:
    """All readable records, and how many lines were not readable.

    Raises:
        FederationError: there is none, or they are of another version (`no-records`).
    """
    reader = RecordReader(path)
    records = reader.read_rest()
    if not records:
        raise FederationError(
            f"{path} has no readable record",
            "look at the server's log: the job ended before its first round",
            code="no-records",
        )
    if any(isinstance(one, JobRecord) and one.format != FORMAT for one in records):
        raise FederationError(
            f"{path} is of another version of fedfms",
            "read it with the version that the server runs",
            code="no-records",
        )
    return records, reader.damaged
