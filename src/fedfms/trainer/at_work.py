"""What the trainer is at, on its disk: of one that was killed it is there still, for its successor.

A process that is killed for want of memory says nothing: the kernel ends it with SIGKILL, exit code
137. All other ends of a trainer are its own, and it removes the note first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fedfms.bounded import read_json_object
from fedfms.contracts.messages import Task
from fedfms.errors import Undecodable
from fedfms.files import read_whole, write_whole
from fedfms.training.plan import Plan

log = logging.getLogger(__name__)

KILLED = (
    "the trainer before this one was killed in the middle of its work (%s), most likely because it "
    "ran out of memory; fix: give it more (TRAINER_MEMORY in .env, or a machine with more), or set "
    "a smaller micro_batch or fewer workers in site.yml. The same round is tried again, and "
    "training with a smaller memory plan"
)

_FILE = ".at-work"
_KILLED_PLAN = ".killed-plan"
_LONGEST = 1000  # bytes
_DECODE = TypeAdapter(Plan)


class AtWork:
    """The note of one site's trainer.

    Args:
        work: the site's private folder.
    """

    def __init__(self, work: Path) -> None:
        self._file = work / _FILE
        self._killed_plan = work / _KILLED_PLAN

    def begin(self, task: Task) -> None:
        """A task begins. Where this cannot be written nothing will be said of it."""
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._file, f"{task.kind} of round {task.round} of job {task.job}")

    @contextlib.contextmanager
    def training(self, task: Task, plan: Plan | None) -> Iterator[None]:
        """Training itself, by this plan of memory; of who is killed inside it was too large."""
        said = f"{task.kind} of round {task.round} of job {task.job}"
        has_begun = self._file.is_file()
        if plan is not None:
            values = {"job": task.job, **dataclasses.asdict(plan)}
            with contextlib.suppress(OSError):
                write_whole(self._file, f"{said}\n{json.dumps(values)}")
        try:
            yield
        finally:
            if has_begun:
                self.begin(task)
            else:
                self.end()

    def end(self) -> None:
        """It ended, or this process ends by itself."""
        with contextlib.suppress(OSError):
            self._file.unlink(missing_ok=True)

    def say_what_was_killed(self) -> bool:
        """Log what a trainer of before was at when it was killed, if one was; whether it was."""
        try:
            text = read_whole(self._file, _LONGEST).decode(errors="replace")
        except OSError:
            return False
        self.end()
        said, _, plan = text.partition("\n")
        log.error(KILLED, said)
        if plan:
            with contextlib.suppress(OSError):
                write_whole(self._killed_plan, plan)
        return True

    def killed_plan(self, job: str) -> Plan | None:
        """The plan with which a trainer of before was killed while it trained in this job."""
        try:
            values = read_json_object(self._killed_plan, _LONGEST)
            if values.pop("job", None) != job:
                return None
            return _DECODE.validate_python(values)
        except (OSError, Undecodable, ValidationError):
            return None
