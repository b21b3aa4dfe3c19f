"""Tell somebody by a command of theirs; whatever it does, nothing waits for it or fails with it."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import shlex
import shutil
import signal
import subprocess
import threading
import time

from fedfms.errors import ConfigError

log = logging.getLogger(__name__)

COMMAND_SECONDS = 30.0  # for one sentence; then the command is ended
LARGEST_QUEUE = 100  # sentences that wait; more are dropped


class Notifier:
    """Runs a command with a sentence as its last argument, one after the other.

    No shell reads the sentence, whose words may be a site's.

    Args:
        command: as it is typed in a shell, such as `mail -s fedfms me@example.org`, without pipes
            or variables.

    Raises:
        ConfigError: code notify; there is no such command.
    """

    def __init__(self, command: str) -> None:
        try:
            self._command = shlex.split(command)
        except ValueError:
            self._command = []
        if not self._command or shutil.which(self._command[0]) is None:
            raise ConfigError(
                f"there is no command that could be told something: {command}",
                "name a program and its arguments, as in a shell; the sentence comes last",
                code="notify",
            )
        self._sentences: queue.Queue[str] = queue.Queue(LARGEST_QUEUE)
        self._thread: threading.Thread | None = None

    def tell(self, sentence: str) -> None:
        """Run the command with this sentence soon; returns at once."""
        try:
            self._sentences.put_nowait(sentence)
        except queue.Full:
            log.warning("nobody is told of this, the command is too slow: %s", sentence)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="notify", daemon=True)
            self._thread.start()

    def close(self, seconds: float = COMMAND_SECONDS) -> None:
        """Wait until all is told, for a process that ends; not longer than so."""
        deadline = time.monotonic() + seconds
        while self._sentences.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.05)

    def _run(self) -> None:
        while True:
            sentence = self._sentences.get()
            try:
                self._tell(sentence)
            except Exception as error:  # whatever it is: it is none of the run's business
                log.warning("%s could not be run: %s", self._command[0], error)
            finally:
                self._sentences.task_done()

    def _tell(self, sentence: str) -> None:
        process = subprocess.Popen(
            [*self._command, sentence],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # what it starts is ended with it
        )
        try:
            _, said = process.communicate(timeout=COMMAND_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            log.warning("%s did not end in %g s", self._command[0], COMMAND_SECONDS)
            return
        if process.returncode != 0:
            last = said.decode(errors="replace").strip().splitlines()[-1:]
            why = f": {last[0][:300]}" if last else ""
            log.warning("%s ended with code %d%s", self._command[0], process.returncode, why)
