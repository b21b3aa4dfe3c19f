"""Which images a process opens: kept in a log, and refused where they are none of its business.

A study trains on some sites and scores on others, all on one machine. Its training processes are
watched, so that an image of a held-out site cannot be opened in one of them, and the run can say
how many files of each site it did open. `python -m fedfms_lab.study.watch` is a site's trainer that
is watched as FEDFMS_WATCH says.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedfms.trainer.__main__ import main as run_trainer

WATCH_VARIABLE = "FEDFMS_WATCH"  # the file of `write_watch`
WATCHED_TRAINER = "fedfms_lab.study.watch"  # this module


def write_watch(
    path: Path, files: Mapping[str, Iterable[Path]], allowed: Iterable[str], log: Path
) -> None:
    """Write what `watch_files` reads.

    Args:
        path: of the file to write.
        files: site to its image and label files, or folders of them (a DICOM series).
        allowed: sites whose files the process may open.
        log: that it appends the sites of opened files to.
    """
    owners = {
        name: site
        for site, paths in files.items()
        for one in paths
        for name in (str(one.absolute()), str(one.resolve()))
    }
    path.write_text(
        json.dumps({"log": str(log.absolute()), "allowed": sorted(allowed), "files": owners})
    )


def watch_files(path: Path) -> None:
    """From now on, and for good, this process notes and refuses as `write_watch` said.

    It sees what Python opens; the readers of images are given what Python has read. A refused file
    is a PermissionError where it was opened.
    """
    said = json.loads(path.read_text())
    owners: dict[str, str] = said["files"]
    allowed = frozenset(said["allowed"])
    log = os.open(said["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        # not Path.resolve, which would ask the disk about every file that is opened
        name = os.path.abspath(os.fsdecode(arguments[0]))  # noqa: PTH100
        owner = owners.get(name) or owners.get(name.rpartition("/")[0])
        if owner is None:
            return
        if owner not in allowed:
            raise PermissionError(f"this process does not train on {owner}")
        os.write(log, f"{owner}\n".encode())

    sys.addaudithook(look)


def opened_files(logs: Iterable[Path], sites: Iterable[str]) -> dict[str, int]:
    """How often the processes of these logs opened a file of each site; 0 for those they did not.

    A log that was never begun counts nothing.
    """
    counts: Counter[str] = Counter()
    for log in logs:
        if log.is_file():
            counts.update(log.read_text().split())
    return {site: counts[site] for site in sorted(sites)}


if __name__ == "__main__":
    watch_files(Path(os.environ[WATCH_VARIABLE]))
    sys.exit(run_trainer())
