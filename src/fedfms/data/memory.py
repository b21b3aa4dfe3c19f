"""How much memory a site's data needs in the trainer, and how much this process may have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

GIB = 1024**3
# While a case is read, for each of its pixels on top of what is kept of it: its values as float32,
# the steps from stored values to grey levels, its label. Measured with what is kept: 19 to 23 bytes
# (29 to 31 where values or labels are float64), with three colours 53.
READING_BYTES = 22
READING_BYTES_OF_COLOURS = 50

_V2_LIMIT = Path("/sys/fs/cgroup/memory.max")
_V1_LIMIT = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes of memory for a site's data in the trainer; the model and its work come on top.

    cases: of all prepared cases, kept for the whole job.
    slices: of the training slices that are kept as the network wants them.
    reading: on top of the cases, while the largest one is read.
    allowed: that this process may use, see `allowed_bytes`.
    """

    cases: int
    slices: int
    reading: int
    allowed: int

    @property
    def needed(self) -> int:
        """The most at one time: cases are read before slices are made."""
        return self.cases + max(self.slices, self.reading)

    def text(self) -> str:
        """What is needed, and of what it consists."""
        parts = f"{size_text(self.cases)} for the whole job, "
        if self.slices > self.reading:
            parts += f"{size_text(self.slices)} for slices at the network's size"
        else:
            parts += f"{size_text(self.reading)} while the largest case is read"
        return f"{size_text(self.needed)} for the data: {parts}; the model comes on top"


def allowed_bytes() -> int:
    """The machine's memory, or this container's limit where that is less."""
    total = psutil.virtual_memory().total
    for path in (_V2_LIMIT, _V1_LIMIT):
        try:
            return min(total, int(path.read_text()))
        except (OSError, ValueError):  # another version, or "max"
            continue
    return total


def size_text(count: int) -> str:
    """A number of bytes as a person reads it."""
    if count >= GIB:
        return f"{count / GIB:.1f} GiB"
    return f"{count / 1024**2:.0f} MiB" if count >= 1024**2 else "less than 1 MiB"
