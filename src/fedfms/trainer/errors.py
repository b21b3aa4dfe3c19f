"""The site's own file of errors in full, with names of files; it never leaves."""

from __future__ import annotations

import re
from pathlib import Path

from fedfms.files import write_whole

ERRORS = "errors.log"  # in the trainer's private folder
_ENTRY = re.compile(r"^(?=\d{4}-\d\d-\d\d \d\d:\d\d:\d\d job )", re.MULTILINE)


def forget_errors(path: Path, job: str) -> None:
    """Take a job's entries out of the file.

    Raises:
        OSError: it cannot be read or written.
    """
    if not path.exists():
        return
    entries = _ENTRY.split(path.read_text(encoding="utf-8", errors="surrogateescape"))
    others = [one for one in entries if f" job {job} " not in one.split("\n", 1)[0]]
    if len(others) < len(entries):
        write_whole(path, "".join(others).encode(errors="surrogateescape"), mode=0o600)
