"""The one writer of records.jsonl."""

from __future__ import annotations

import json
import time
from pathlib import Path

from fedfms.records.schema import Record


class RecordWriter:
    """Adds a line for each record; a reader may find the last one cut short."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: Record) -> None:
        """Add a record, with the time that it is now."""
        values = record.model_dump(mode="json") | {"time": time.time()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values, allow_nan=False) + "\n")
