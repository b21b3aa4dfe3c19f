"""The one writer of records.jsonl; its lines are a chain (chain.py)."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from fedfms.files import NO_ROOM, append_whole
from fedfms.records.chain import PREVIOUS, Signer, last_line_sha256, line_sha256, make_seal
from fedfms.records.schema import Record

_BEGAN = time.time() - time.monotonic()


def clock() -> float:
    """Seconds since 1970 that pass evenly while this process lives, whatever is done to its clock.

    Else a clock that is set in the middle of a run would make rounds of hours, or of less than 0 s.
    """
    return _BEGAN + time.monotonic()


class RecordWriter:
    """Adds a line for each record, whole or not at all.

    It goes on with the chain of a file that is there, whoever wrote it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last: tuple[int, str] | None = None  # size of the file, and hash of its last line
        self.held: list[Record] = []  # that wait for room on the disk

    def write(self, record: Record) -> None:
        """Add a record, with the time that it is now.

        Raises:
            OSError: it cannot be written; nothing is held back then.
        """
        self._append(record, clock())

    def write_or_hold(self, record: Record) -> None:
        """The same, but a full disk is no error: the record is written when there is room.

        Raises:
            OSError: of another kind.
        """
        self.held.append(record.model_copy(update={"time": clock()}))
        self.write_held()

    def write_held(self) -> bool:
        """Write what was held back, in its order; whether all of it is written now.

        Raises:
            OSError: of another kind than a full disk.
        """
        while self.held:
            first = self.held[0]
            try:
                self._append(first, first.time)
            except OSError as error:
                if error.errno in NO_ROOM:
                    return False
                raise
            del self.held[0]
        return True

    def seal(self, files: Mapping[str, str], signer: Signer) -> None:
        """Add the line that seals the file; see `chain.make_seal`.

        Raises:
            OSError: it cannot be written.
        """
        line = make_seal(self.path, self._previous(), files, clock(), signer)
        self._add(line)

    def _append(self, record: Record, written: float | None) -> None:
        values = record.model_dump(mode="json")
        values |= {"time": written, PREVIOUS: self._previous()}
        self._add(json.dumps(values, allow_nan=False).encode())

    def _previous(self) -> str:
        """What the next line names; read anew where another has written to the file."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if self._last is None or self._last[0] != size:
            self._last = size, last_line_sha256(self.path)
        return self._last[1]

    def _add(self, line: bytes) -> None:
        append_whole(self.path, line + b"\n")
        self._last = self.path.stat().st_size, line_sha256(line)
