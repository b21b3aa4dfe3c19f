"""The one reader of records.jsonl, of a finished job or of one that runs."""

from __future__ import annotations

import contextlib
import json
import typing
from pathlib import Path

from fedfms.errors import FederationError
from fedfms.records.schema import FORMAT, RECORDS, JobRecord, Record

_KINDS = frozenset(
    one.model_fields["record"].default for one in typing.get_args(Record)
)  # those of this version

_END_BYTES = 64 * 1024  # of a file: more than the last record


class RecordReader:
    """Reads a growing records.jsonl; what is not a whole line yet is read next time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = []  # all that were read
        self.damaged = 0  # lines that cannot be read
        self._offset = 0

    def read_new(self) -> list[Record]:
        """Records since the last call."""
        data = self._unread()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return self._take(whole)

    def read_rest(self) -> list[Record]:
        """The same of a file that grows no more: a last line without its end counts too."""
        return self.read_new() + self._take(self._unread())

    def _unread(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                return file.read()
        except OSError:
            return b""

    def _take(self, lines: bytes) -> list[Record]:
        new = []
        for line in lines.split(b"\n"):
            if not line.strip():
                continue
            try:
                values = json.loads(line.decode(errors="replace"))
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
