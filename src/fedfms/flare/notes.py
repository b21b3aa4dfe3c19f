"""What the server's main process tells a job's process: lines of a file beside the run's state.

The two share the workspace and nothing else that outlives one of them.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from fedfms.files import write_whole
from fedfms.records.read import RecordReader
from fedfms.records.schema import Note, NoteKind
from fedfms.records.write import RecordWriter

_FILE = "notes.jsonl"


def write_note(kept: Path, kind: NoteKind, text: str, site: str | None = None) -> None:
    """Add one note for a run's records; what does not fit on the disk is lost. See `NoteWriter`."""
    NoteWriter(kept).write(kind, text, site)


class NoteWriter:
    """Adds notes for a run's records; what does not fit on the disk is held until there is room.

    Args:
        kept: the run's folder at the server; made if it is not there.
    """

    def __init__(self, kept: Path) -> None:
        self._writer = RecordWriter(kept / _FILE)

    def write(self, kind: NoteKind, text: str, site: str | None = None) -> None:
        """Add a note, one sentence for people.

        Raises:
            OSError: it cannot be written, and not for want of room.
        """
        self._writer.path.parent.mkdir(parents=True, exist_ok=True)
        self._writer.write_or_hold(Note(kind=kind, site=site, text=text))

    def write_held(self) -> None:
        """Write what was held back, as far as there is room.

        Raises:
            OSError: it cannot be written, and not for want of room.
        """
        self._writer.write_held()


class NoteReader(RecordReader):
    """Reads the notes that no process of the job has read yet."""

    def __init__(self, kept: Path) -> None:
        super().__init__(kept / _FILE)
        self._place = kept / ".notes.read"
        with contextlib.suppress(OSError, ValueError):
            self._offset = int(self._place.read_text())

    def read_notes(self) -> list[Note]:
        """Notes since the last call, of this process or of one before it."""
        notes = [record for record in self.read_new() if isinstance(record, Note)]
        if notes:
            write_whole(self._place, str(self._offset))
        return notes
