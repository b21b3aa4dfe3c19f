"""The one writer of records.jsonl."""

from __future__ import annotations

import json
import time
from pathlib import Path

from fedfms.files import NO_ROOM, append_whole
from fedfms.records.schema import Record

_BEGAN = time.time() - time.monotonic()


def clock() -> float:
    """Seconds since 1970 that pass evenly while this process lives, whatever is done to its clock.

    Else a clock that is set in the middle of a run would make rounds of hours, or of less than 0 s.
    """
    return _BEGAN + time.monotonic()


class RecordWriter:
    """Adds a line for each record, whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.held: list[Record] = []  # that wait for room on the disk

    def write(self, record: Record) -> None:
        """Add a record, with the time that it is now.

        Raises:
            OSError: it cannot be written; nothing is held back then.
        """
        append_whole(self.path, _line(record, clock()))

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
                append_whole(self.path, _line(first, first.time))
            except OSError as error:
                if error.errno in NO_ROOM:
                    return False
                raise
            del self.held[0]
        return True


def _line(record: Record, written: float | None) -> bytes:
    values = record.model_dump(mode="json") | {"time": written}
    return (json.dumps(values, allow_nan=False) + "\n").encode()
