"""FLARE's audit log on a full disk. Read in FLARE 2.9.0 (`fuel/sec/audit.py`).

A line of it is written for each command and each task, before anything else is done; as shipped, a
disk without room makes every one of them fail. Here the lines wait in memory until there is room.
"""

from __future__ import annotations

import logging
from pathlib import Path

from nvflare.fuel.sec.audit import Auditor, AuditService

from fedfms.files import NO_ROOM, append_whole
from fedfms.flare.internals.version import Assumption, broken_assumptions, changed, uses

log = logging.getLogger(__name__)

MAX_LINES = 20_000  # that wait, some 4 MB; the oldest go first

AUDIT = Assumption(
    "the auditor writes each line with audit_file.write and audit_file.flush, under its own lock",
    lambda: all(
        uses(add, "audit_file", "write", "flush", "_lock")
        for add in (Auditor.add_event, Auditor.add_job_event)
    ),
)


class PatientFile:
    """Stands for a file that lines are added to; what does not fit on the disk waits.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[str] = []

    def write(self, text: str) -> None:
        """Add a line, with its end."""
        self._lines.append(text)

    def flush(self) -> None:
        """Write what waits, whole or not at all.

        Raises:
            OSError: of another kind than a full disk.
        """
        try:
            append_whole(self._path, "".join(self._lines).encode())
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            if len(self._lines) == 1:
                log.warning("%s waits for room on its disk", self._path.name)
            del self._lines[:-MAX_LINES]
            return
        self._lines.clear()

    def close(self) -> None:
        """Write what waits, as far as there is room."""
        self.flush()


def let_audit_wait() -> None:
    """Have this process's audit log wait for room instead of failing; again is no harm.

    With a FLARE that does it otherwise nothing is done, and a line of the log says so.
    """
    if broken := broken_assumptions("audit"):
        log.warning("the audit does not wait for room on its disk: %s", changed(broken).problem)
        return
    auditor = AuditService.get_auditor()
    if auditor is None or isinstance(auditor.audit_file, PatientFile | None):
        return
    path = Path(auditor.audit_file.name)
    auditor.audit_file.close()
    auditor.audit_file = PatientFile(path)
