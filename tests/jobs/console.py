"""FLARE's own console, `fl_admin.sh`, as a person at a terminal uses it."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PROMPT = "> "


class Console:
    """A pseudo-terminal with the console behind it."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal
        self.text = ""  # everything it has shown

    def wait_for(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        """Read on until the text since the last match matches."""
        deadline = time.monotonic() + seconds
        start = len(self.text)
        unread = getattr(self, "_unread", "")
        while (match := re.search(pattern, unread)) is None:
            left = deadline - time.monotonic()
            assert left > 0, f"no {pattern!r} within {seconds:.0f} s in {unread!r}"
            if select.select([self._terminal], [], [], left)[0]:
                try:
                    chunk = os.read(self._terminal, 65536).decode(errors="replace")
                except OSError:  # it has ended
                    raise AssertionError(f"it ended before {pattern!r}: {unread!r}") from None
                self.text += chunk
                unread += chunk
        assert start <= len(self.text)
        self._unread = unread[match.end() :]
        return match

    def type(self, line: str) -> None:
        os.write(self._terminal, f"{line}\n".encode())


@contextlib.contextmanager
def console(kit: Path, user: str) -> Iterator[Console]:
    """Start fl_admin.sh and log in."""
    ours, theirs = os.openpty()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # it calls python3
    process = subprocess.Popen(
        [str(kit / "startup" / "fl_admin.sh")],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "PATH": path, "TERM": "dumb"},
        start_new_session=True,
    )
    os.close(theirs)
    try:
        one = Console(ours)
        one.wait_for("User Name: ")
        one.type(user)
        one.wait_for(PROMPT)
        yield one
        one.type("bye")
        process.wait(timeout=30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.close(ours)
