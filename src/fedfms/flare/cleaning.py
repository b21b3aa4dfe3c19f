"""What servers and sites keep is bounded: old jobs, what is left of them, and logs.

A look once an hour, in a thread, removes

- at the server, jobs that ended more than FEDFMS_KEEP_DAYS ago (90), with what was kept of them:
  of completed ones only those whose results somebody fetched;
- at a site, the folders of jobs in which nothing was written for as long;
- of the audit what is beyond some 20 MB and two older parts of as much.

Nothing of a run that is not over goes, whatever the clock says: FLARE's own word of a job counts,
and an hour in which the clock jumped is no hour to tell ages by.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

from fedfms.contracts.machine import Machine

log = logging.getLogger(__name__)

LOOK_SECONDS = 3600.0
JUMP_SECONDS = 300.0  # by which clocks may differ in that time without having jumped
LOG_BYTES = 20 * 2**20
PARTS = 2  # of a log, beside the one that is written
AUDIT = "audit.log"

_JOB = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def clean_every_hour(look: Callable[[float], None]) -> None:
    """Have `look` called once an hour, with the age in seconds beyond which things go.

    Not called where FEDFMS_KEEP_DAYS is 0, nor after an hour in which the clock jumped.
    """
    days = Machine.from_environment().keep_days
    if days > 0:
        threading.Thread(target=_look_again, args=(look, days * 86400.0), daemon=True).start()


def _look_again(look: Callable[[float], None], age: float) -> None:
    while True:
        wall, steady = time.time(), time.monotonic()
        time.sleep(LOOK_SECONDS)
        passed = time.monotonic() - steady
        if abs(time.time() - wall - passed) > JUMP_SECONDS:
            log.warning("this machine's clock jumped; nothing old is removed in this hour")
            continue
        try:
            look(age)
        except Exception:
            log.exception("could not remove what is old")


def clean_folders(workspace: Path, age: float, keep: Collection[str]) -> list[str]:
    """Remove folders of jobs in which nothing was written for so long; their jobs' ids.

    Args:
        workspace: of FLARE.
        age: seconds.
        keep: jobs that are not over.
    """
    removed = []
    for folder in sorted(workspace.iterdir()):
        may_go = _JOB.fullmatch(folder.name) and folder.is_dir() and folder.name not in keep
        if may_go and time.time() - last_written(folder) > age:
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder.name)
    return removed


def last_written(folder: Path) -> float:
    """When something in a folder was written last, in seconds since 1970."""
    times = [folder.stat().st_mtime]
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            times.append(path.lstat().st_mtime)
    return max(times)


def bound_log(file: Path, largest: int = LOG_BYTES) -> bool:
    """Begin a log anew that has grown too long, and keep older parts; whether it was so.

    Who writes it may go on: it is emptied in its place, so it must have been opened to append.
    """
    try:
        if file.stat().st_size <= largest:
            return False
        for number in range(PARTS, 1, -1):
            older = file.with_name(f"{file.name}.{number - 1}")
            if older.exists():
                older.replace(file.with_name(f"{file.name}.{number}"))
        with file.open("r+b") as source, file.with_name(f"{file.name}.1").open("wb") as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            os.fsync(copy.fileno())
            copy.write(source.read())  # what came meanwhile
            source.truncate(0)
    except OSError as error:
        log.warning("%s grows on: %s", file.name, error.strerror)
        return False
    return True
