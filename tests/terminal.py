"""A program behind a pseudo-terminal, as a person at a keyboard uses it."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence


class Console:
    """Starts a command on a terminal of its own; use as a context."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self._command = command
        self._environment = {**os.environ, **(environment or {})}
        self._unread = ""
        self.text = ""  # everything it has shown

    def __enter__(self) -> Console:
        self._terminal, theirs = os.openpty()
        self._process = subprocess.Popen(
            self._command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=self._environment,
            start_new_session=True,
        )
        os.close(theirs)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(timeout=30)
        os.close(self._terminal)

    def type(self, line: str) -> None:
        """Type a line and press Enter."""
        os.write(self._terminal, f"{line}\n".encode())

    def wait_for(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        """Read on until what came since the last match matches."""
        deadline = time.monotonic() + seconds
        while (match := re.search(pattern, self._unread)) is None:
            left = deadline - time.monotonic()
            assert left > 0, f"no {pattern!r} within {seconds:.0f} s in {self._unread!r}"
            if select.select([self._terminal], [], [], left)[0]:
                try:
                    chunk = os.read(self._terminal, 65536).decode(errors="replace")
                except OSError:  # it has ended
                    raise AssertionError(f"no {pattern!r} in {self.text!r}") from None
                self.text += chunk
                self._unread += chunk
        self._unread = self._unread[match.end() :]
        return match

    def wait_for_end(self, seconds: float = 30) -> None:
        """Wait until the program has ended."""
        self._process.wait(timeout=seconds)
