"""How much memory a piece of work takes at its peak, whatever the process took before it."""

from __future__ import annotations

import re
from pathlib import Path

_PROCESS = Path("/proc/self")
# Environment of a process whose peaks are compared with another's: what it frees goes back at once.
# Else glibc keeps of it as much as it happens to, and `forget_peak` begins with that.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def forget_peak() -> int:
    """Begin to measure; bytes of memory that are in use now."""
    (_PROCESS / "clear_refs").write_text("5")  # the peak is what is in use now
    return peak()


def peak() -> int:
    """The most bytes of memory that were in use since `forget_peak`."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", (_PROCESS / "status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024
