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
# (29 to 31 where values or labels are float64), with three colours 53, of 8 bits 24.
READING_BYTES = 23
READING_BYTES_OF_COLOURS = 54
READING_BYTES_OF_8_BIT_COLOURS = 26

CACHE_FOLDER = "prepared"  # below a trainer's private folder, where site.yml names no cache
FEATURES_FOLDER = "features"  # there, too: what the frozen part of an encoder made of slices
RECORD_ENDING = ".case"  # of a prepared case in the cache

# control groups: version 2, or the memory controller of version 1
_V2, _V1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")
_V1_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes")
_OF_PROCESS = Path("/proc/self/cgroup")
_NO_LIMIT = 2**60  # version 1 has no word for it, and says the largest number of pages


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
    limits = [group.limit for group in _groups() if group.limit is not None]
    return min([psutil.virtual_memory().total, *limits])


@dataclass(frozen=True, slots=True)
class Room:
    """What this process may hold at the most, of what is used and free now.

    bytes: resident, what it holds already included.
    by: what sets the limit, in words.
    """

    bytes: int
    by: str


def room() -> Room:
    """How large this process may become before the kernel ends one.

    Of each limit (control groups of version 1 and 2 from this process' own upwards, and the memory
    of the machine) what others use now is taken away; files that the kernel keeps in memory are not
    counted, since it gives them up.
    """
    used = psutil.Process().memory_info()
    own = used.rss - used.shared
    rooms = [Room(psutil.virtual_memory().available + own, "the machine's free memory")]
    for group in _groups():
        if group.limit is not None:
            others = max(0, group.used - own)
            bytes_ = max(0, group.limit - others) + used.shared  # files of ours are not counted
            rooms.append(Room(bytes_, "the container's limit"))
    return min(rooms, key=lambda one: one.bytes)


@dataclass(frozen=True, slots=True)
class _Group:
    limit: int | None  # bytes; None: no limit
    used: int  # by all its processes, without the files that the kernel can give up


def _groups() -> list[_Group]:
    """The memory control groups in which this process is, its own first, and what limits them."""
    found = []
    for mount, limit, usage in ((_V2, "memory.max", "memory.current"), (_V1, *_V1_FILES)):
        for folder in _folders(mount):
            bound = _number(folder / limit)
            current = _number(folder / usage)
            if bound is None and current is None:
                continue
            files = _files_kept(folder)
            huge = bound is not None and bound >= _NO_LIMIT
            found.append(_Group(None if huge else bound, max(0, (current or 0) - files)))
    return found


def _folders(mount: Path) -> list[Path]:
    """Below a mount the folders of this process' groups, its own first and the mount last.

    In a container the mount itself is the container's group, and what /proc names may not be there.
    """
    own = ""
    with contextlib.suppress(OSError):
        for line in _OF_PROCESS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if (controllers == "") == (mount == _V2) and controllers in ("", "memory"):
                own = path.strip("/")
    folder = mount / own
    if not folder.is_dir():
        return [mount]
    return [folder, *(one for one in folder.parents if one.is_relative_to(mount))]


def _number(path: Path) -> int | None:
    """The number in a file; None of "max", and where there is none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _files_kept(folder: Path) -> int:
    """Bytes of files in memory, of a group and those below it."""
    try:
        rows = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    names = ("inactive_file", "active_file")
    return sum(int(rows.get(f"total_{name}", rows.get(name, 0))) for name in names)


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
