"""What the server's main process tells a job's process: lines of a file beside the run's state.

The two share the workspace and nothing else that outlives one of them.
"""

from __future__ import annotations

import json
from pathlib import Path

from fedfms.records.schema import Note, NoteKind, record_from_dict
from fedfms.records.write import RecordWriter

_FILE = "notes.jsonl"


def write_note(kept: Path, kind: NoteKind, text: str, site: str | None = None) -> None:
    """Add a note for a run's records.

    Args:
        kept: the run's folder at the server; made if it is not there.
        text: one sentence, for people.

    Raises:
        OSError: it cannot be written.
    """
    kept.mkdir(parents=True, exist_ok=True)
    RecordWriter(kept / _FILE).write(Note(kind=kind, site=site, text=text))


class NoteReader:
    """Reads the notes that are new since this process started."""

    def __init__(self, kept: Path) -> None:
        self._path = kept / _FILE
        self._offset = 0
        self._offset_file = kept / ".notes.read"
        try:
            self._offset = int(self._offset_file.read_text())
        except (OSError, ValueError):
            self._offset = 0

    def read_new(self) -> list[Note]:
        """Notes that no process of the job has read yet."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        if not whole:
            return []
        self._offset += len(whole)
        self._offset_file.write_text(str(self._offset))
        notes = [record_from_dict(json.loads(line)) for line in whole.splitlines()]
        return [note for note in notes if isinstance(note, Note)]
