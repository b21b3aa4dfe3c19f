"""A trainer in a container with little memory: the limit is said, and who passes it is killed."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

import fedfms.data.memory
import fedfms.trainer.server
from fedfms.trainer.__main__ import main

MORE_BYTES = 250 * 1024**2  # than a trainer without work; to plan a step takes 90 MB


def taken() -> int:
    """What cannot be given back, as a kernel counts it."""
    used = psutil.Process().memory_info()
    return used.rss - used.shared


def kill_beyond(limit: int) -> None:
    while True:
        if taken() > limit:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.002)


if __name__ == "__main__":
    most = taken() + MORE_BYTES
    said = Path(f"memory.{os.getpid()}", "memory.max").resolve()
    said.parent.mkdir()
    said.write_text(str(most))
    fedfms.data.memory._V2 = said.parent
    threading.Thread(target=kill_beyond, args=(most,), daemon=True).start()
    sys.exit(main())
