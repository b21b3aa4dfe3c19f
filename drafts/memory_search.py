"""Looks for numbers in the memory of a process, or in files, in every form they could have there.

Whatever 64 values of a row of numbers lie somewhere one after the other, they hold 32 of them that
begin at a multiple of 32: those are looked for, at every fourth byte.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import psutil

UNITS = 2**36  # of 1, as exchange/averaging.py sums
BLOCK = 32
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # spreads keys over the table
_BITS = 24
_CHUNK = 2**26  # bytes read at a time


class Wanted:
    """Numbers to look for, by name.

    Args:
        numbers: fp32, by the name of whose they are.
        weights: the integer that each may have been multiplied by.
    """

    def __init__(self, numbers: Mapping[str, np.ndarray], weights: Mapping[str, int]) -> None:
        self._whose: dict[bytes, str] = {}
        for name, values in numbers.items():
            for form in _forms(values, weights[name]):
                for start in range(0, len(form) - BLOCK + 1, BLOCK):
                    part = form[start : start + BLOCK]
                    if len(np.unique(part)) > BLOCK * 3 // 4:  # zeros lie everywhere
                        self._whose[part.tobytes()] = name
        self._by_key: dict[int, list[bytes]] = {}
        for part_bytes in self._whose:
            self._by_key.setdefault(int.from_bytes(part_bytes[:8], "little"), []).append(part_bytes)
        self._keys = np.array(sorted(self._by_key), np.uint64)
        self._table = np.zeros(2**_BITS, bool)
        self._table[_place(self._keys)] = True
        self.longest = max(map(len, self._whose))

    def __len__(self) -> int:
        return len(self._whose)

    def found_in(self, data: bytes) -> set[str]:
        """Whose numbers lie in these bytes."""
        found: set[str] = set()
        for offset in (0, 4):
            words = np.frombuffer(data, "<u8", max(0, len(data) - offset) // 8, offset)
            near = np.flatnonzero(self._table[_place(words)])
            for index in near[np.isin(words[near], self._keys)]:
                at = offset + 8 * int(index)
                for part in self._by_key[int(words[index])]:
                    if data[at : at + len(part)] == part:
                        found.add(self._whose[part])
        return found


def found_in_process(wanted: Wanted, process: psutil.Process) -> set[str]:
    """Whose numbers lie in what a process can write in its memory; it stands still meanwhile."""
    process.send_signal(signal.SIGSTOP)
    try:
        return _found(wanted, _memory(process.pid, wanted.longest))
    finally:
        process.send_signal(signal.SIGCONT)


def found_in_files(wanted: Wanted, folder: Path) -> set[str]:
    """Whose numbers lie in the files below a folder."""
    return _found(wanted, (path.read_bytes() for path in folder.rglob("*") if path.is_file()))


def _found(wanted: Wanted, chunks: Iterable[bytes]) -> set[str]:
    found: set[str] = set()
    for chunk in chunks:
        found |= wanted.found_in(chunk)
    return found


def _memory(pid: int, overlap: int) -> Iterator[bytes]:
    """What can be written, a part at a time; a part begins with the end of the one before."""
    regions = [one for one in psutil.Process(pid).memory_maps(grouped=False) if one.rss]
    with Path(f"/proc/{pid}/mem").open("rb", 0) as memory:
        for one in regions:
            if not one.perms.startswith("rw"):
                continue
            first, last = (int(end, 16) for end in one.addr.split("-"))
            for start in range(first, last, _CHUNK):
                try:
                    memory.seek(start)
                    data = memory.read(min(_CHUNK + overlap, last - start))
                except OSError:  # what a device has put there
                    continue
                if data.count(0) < len(data):
                    yield data


def _forms(values: np.ndarray, weight: int) -> Iterator[np.ndarray]:
    units = np.rint(values.astype(np.float64) * UNITS).astype(np.int64)
    for order in "<>":
        yield values.astype(f"{order}f4")
        yield values.astype(f"{order}f2")
        yield units.astype(f"{order}i8")
        yield (units * weight).astype(f"{order}i8")


def _place(words: np.ndarray) -> np.ndarray:
    return (words * _FACTOR) >> np.uint64(64 - _BITS)
