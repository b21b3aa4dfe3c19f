"""FLARE's own console, `fl_admin.sh`, as a person at a terminal uses it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from terminal import Console

PROMPT = "> "


@contextlib.contextmanager
def console(kit: Path, user: str) -> Iterator[Console]:
    """Start fl_admin.sh and log in."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # it calls python3
    script = str(kit / "startup" / "fl_admin.sh")
    with Console([script], {"PATH": path, "TERM": "dumb"}) as one:
        one.wait_for("User Name: ")
        one.type(user)
        one.wait_for(PROMPT)
        yield one
        one.type("bye")
        one.wait_for_end()
