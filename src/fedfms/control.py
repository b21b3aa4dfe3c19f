"""The thread of control through a long computation: may it go on, and how far is it?"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from fedfms.errors import TaskAborted

Progress = Callable[[str, int, int], None]  # phase, done, total


class Control:
    """Handed into training and evaluation; checked between micro-batches.

    Args:
        on_progress: called with (phase, done, total); phases are "prepare", "evaluate", "train".
    """

    def __init__(self, on_progress: Progress | None = None) -> None:
        self._abort = threading.Event()
        self._on_progress = on_progress
        self.last_sign_of_life = time.monotonic()

    def abort(self) -> None:
        """Ask the computation to stop at its next check; any thread may call it."""
        self._abort.set()

    @property
    def aborted(self) -> bool:
        """Whether somebody asked to stop."""
        return self._abort.is_set()

    def check(self) -> None:
        """Raise TaskAborted if somebody asked to stop; note a sign of life otherwise."""
        if self._abort.is_set():
            raise TaskAborted("the task was stopped on request", "nothing; submit the job again")
        self.last_sign_of_life = time.monotonic()

    def report(self, phase: str, done: int, total: int) -> None:
        """Check, then tell how far the phase is.

        Raises:
            TaskAborted: as `check`.
        """
        self.check()
        if self._on_progress is not None:
            self._on_progress(phase, done, total)
