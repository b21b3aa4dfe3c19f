"""The processes of a federation on one machine: started, watched, and never left behind.

All of them, and whatever they start, carry one mark in their environment. To stop means to end
every process of this user that carries it, so that FLARE's job processes are found wherever they
hang in the process tree. A watchdog process does the same as soon as the simulation itself is gone,
however it went. A simulation that is itself such a process, as in a study, adds its mark to the
one that it carries, so that the outer end ends the inner one too.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

log = logging.getLogger(__name__)

MARK = "FEDFMS_SIMULATION"  # in the environment: the marks of all simulations it belongs to
STOP_SECONDS = 4.0  # after SIGTERM, before SIGKILL
RESTART_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  # waits before one start after another
STEADY_SECONDS = 60.0  # a process that ran for so long starts again without a long wait

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


@dataclass(slots=True)
class Supervised:
    """One process, or the place of one that is to be started again."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    folder: Path  # its working directory
    log: Path
    restarts: bool
    process: subprocess.Popen[bytes] | None = None
    exits: int = 0
    _started: float = 0.0
    _next_start: float = field(default=0.0)

    def start(self) -> None:
        """Start it; its output is appended to its log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.arguments,
                cwd=self.folder,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours; we stop the others in order
            )
        self._started = time.monotonic()

    def look(self) -> bool:
        """Whether it just ended; starts it again when its time has come."""
        now = time.monotonic()
        if self.process is None:
            if self.restarts and now >= self._next_start:
                self.start()
            return False
        if self.process.poll() is None:
            return False
        log.info("%s ended with exit code %s", self.name, self.process.returncode)
        if now - self._started > STEADY_SECONDS:
            self.exits = 0
        wait = RESTART_SECONDS[min(self.exits, len(RESTART_SECONDS) - 1)]
        self.exits += 1
        self.process, self._next_start = None, now + wait
        return True

    @property
    def is_running(self) -> bool:
        """Whether there is a process."""
        return self.process is not None and self.process.poll() is None

    def last_lines(self, count: int = 15) -> str:
        """The end of its log."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-count:])


class Processes:
    """Starts processes, and ends all of them on leaving the `with`, whatever the reason."""

    def __init__(self) -> None:
        self.mark = secrets.token_hex(8)
        self._all: dict[str, Supervised] = {}
        self._watchdog: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Processes:
        _adopt_orphans(True)
        self._watchdog = subprocess.Popen(
            [sys.executable, "-m", "fedfms.local.processes", self.mark],
            stdin=subprocess.PIPE,  # closed by the kernel when this process is gone
            start_new_session=True,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        # a second Ctrl-C does not interrupt the few seconds in which everything is stopped
        with signals_mean(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM):
            end_marked(self.mark)
            if self._watchdog is not None:
                assert self._watchdog.stdin is not None  # it was started with a pipe
                self._watchdog.stdin.close()
                try:
                    self._watchdog.wait(timeout=STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    self._watchdog.kill()
                    self._watchdog.wait()
            _adopt_orphans(False)

    def start(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        folder: Path,
        log_file: Path,
        environment: Mapping[str, str],
        restarts: bool = False,
    ) -> Supervised:
        """Start a process with the mark and this environment, and nothing else of ours."""
        one = Supervised(
            name=name,
            arguments=arguments,
            environment={**environment, MARK: f"{os.environ.get(MARK, '')} {self.mark}".strip()},
            folder=folder,
            log=log_file,
            restarts=restarts,
        )
        self._all[name] = one
        one.start()
        return one

    def look(self) -> list[Supervised]:
        """The processes that ended since the last look; restarts those that are to run on."""
        return [one for one in self._all.values() if one.look()]


def end_marked(mark: str) -> None:
    """End every process that carries the mark: SIGTERM, a moment, SIGKILL until none is left."""
    seconds = STOP_SECONDS
    for number in (signal.SIGTERM, *[signal.SIGKILL] * 20):  # one may have started another one
        processes = _marked(mark)
        if not processes:
            return
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)
        psutil.wait_procs(processes, timeout=seconds)  # reaps those that are our children
        seconds = 0.1


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    me = os.getpid()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != me and mark in process.environ().get(MARK, "").split():
                found.append(process)
    return found


def _adopt_orphans(adopt: bool) -> None:
    """FLARE's job processes become our children when their parent ends; then we can reap them."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


@contextlib.contextmanager
def signals_mean(handler: Callable[..., None] | signal.Handlers, *numbers: int) -> Iterator[None]:
    """What signals do meanwhile; all stays as it is outside of the main thread."""
    try:
        before = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:  # not in the main thread
        before = {}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _watch() -> None:
    """The watchdog: wait until the simulation's end of the pipe closes, then end what is left."""
    while sys.stdin.buffer.read(1):
        pass
    end_marked(sys.argv[1])


if __name__ == "__main__":
    _watch()
