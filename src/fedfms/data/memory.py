"""How much memory and disk a site's data needs in the trainer, and what this process may have."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

GIB = 1024**3
# While a case is read, for each of its pixels: its values as float32,
# the steps from stored values to grey levels, its label. Measured: 19 to 23 bytes
# (29 to 31 where values or labels are float64), with three colours 53.
READING_BYTES = 23
READING_BYTES_OF_COLOURS = 54

CACHE_FOLDER = "prepared"  # below a trainer's private folder, where site.yml names no cache
FEATURES_FOLDER = "features"  # there, too: what the frozen part of an encoder made of slices
RECORD_ENDING = ".case"  # of a prepared case in the cache

_V2_LIMIT = Path("/sys/fs/cgroup/memory.max")
_V1_LIMIT = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes of memory for a site's data in the trainer; the model and its work come on top.

    reading: while the largest case is read; prepared cases lie on the disk, however many they are.
    allowed: that this process may use, see `allowed_bytes`.
    """

    reading: int
    allowed: int

    @property
    def needed(self) -> int:
        """The most at one time: cases are read one after another."""
        return self.reading

    def text(self) -> str:
        """What is needed, and for what."""
        return (
            f"{size_text(self.needed)} for the data, while the largest case is read; the model "
            "comes on top"
        )


@dataclass(frozen=True, slots=True)
class DiskNeed:
    """Bytes that the trainer keeps on its disk of a site's data.

    cases: of all prepared cases; they stay for the next job.
    slices: of the training slices as the network wants them, while a job runs.
    """

    cases: int
    slices: int

    @property
    def needed(self) -> int:
        """Both together."""
        return self.cases + self.slices

    def missing(self, folder: Path) -> int:
        """Bytes that are not there yet in a folder for prepared cases, and are to be written."""
        there = 0
        with contextlib.suppress(OSError):
            for path in folder.glob(f"*{RECORD_ENDING}"):
                there += path.stat().st_size
        return max(0, self.cases - there) + self.slices

    def text(self) -> str:
        """What is needed, and of what it consists."""
        parts = f"{size_text(self.cases)} for prepared cases"
        if self.slices:
            parts += f", {size_text(self.slices)} for slices at the network's size"
        return f"{size_text(self.needed)} in the trainer's private folder: {parts}"


def allowed_bytes() -> int:
    """The machine's memory, or this container's limit where that is less."""
    total = psutil.virtual_memory().total
    for path in (_V2_LIMIT, _V1_LIMIT):
        try:
            return min(total, int(path.read_text()))
        except (OSError, ValueError):  # another version, or "max"
            continue
    return total


def free_bytes(folder: Path) -> int:
    """Free on the disk on which a folder lies, or would lie."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def size_text(count: int) -> str:
    """A number of bytes as a person reads it."""
    if count >= GIB:
        return f"{count / GIB:.1f} GiB"
    return f"{count / 1024**2:.0f} MiB" if count >= 1024**2 else "less than 1 MiB"
