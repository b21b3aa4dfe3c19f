"""Looks for numbers in the memory of a process, in files, or in what crossed a network.

Found is what lies somewhere as 64 values one after the other, in any of the forms below at any
byte: of each row of numbers so many groups of 8 bytes are known that 64 of its values, wherever
they lie, have three of them at a multiple of 16 bytes; what is around these is compared.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

RUN = 64  # values one after the other
VARIED = 48  # more of them differ: zeros lie everywhere
UNITS = 2**36  # of 1, as exchange/averaging.py sums
_STEP = 16  # bytes
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # spreads words over the table
_BITS = 26
_PART = 2**26  # bytes that are read at a time
_ALIKE = 16  # places of a row that one word is known of, at most


@dataclass(frozen=True)
class Row:
    """Numbers in one form."""

    name: str
    form: str
    values: np.ndarray
    data: bytes

    @property
    def run(self) -> int:
        """Bytes of what is looked for."""
        return RUN * self.values.itemsize


class Wanted:
    """Numbers to look for.

    Args:
        numbers: fp32, by the name of whose they are.
        weights: the integer that each may have been multiplied by.
    """

    def __init__(self, numbers: Mapping[str, np.ndarray], weights: Mapping[str, int]) -> None:
        self.rows = [
            Row(name, form, values, values.tobytes())
            for name, of_site in numbers.items()
            for form, values in _forms(of_site, weights[name])
        ]
        words, rows, places = [], [], []
        for index, row in enumerate(self.rows):
            every = _STEP * ((row.run - _STEP - 7) // _STEP + 1) // 3
            every -= every % _STEP
            starts = np.arange(0, len(row.data) - _STEP - 8, every)
            at = (starts[:, None] + np.arange(_STEP)).reshape(-1)
            octets = np.frombuffer(row.data, np.uint8)[at[:, None] + np.arange(8)]
            words.append(octets.view("<u8").reshape(-1))
            rows.append(np.full(len(at), index, np.int32))
            places.append(at.astype(np.int32))
        all_words, of_rows, at_places = map(np.concatenate, (words, rows, places))
        # words such as 1 or -1 are everywhere, and no row of varied numbers is made of them alone
        octets = np.sort(all_words.view(np.uint8).reshape(-1, 8), axis=1)
        telling = np.flatnonzero((np.diff(octets, axis=1) != 0).sum(axis=1) >= 3)
        order = telling[np.argsort(all_words[telling], kind="stable")]
        alike = all_words[order[_ALIKE:]] == all_words[order[:-_ALIKE]]
        order = np.delete(order, _ALIKE + np.flatnonzero(alike))
        self._words, self._rows, self._places = (
            of[order] for of in (all_words, of_rows, at_places)
        )
        self._table = np.zeros(2**_BITS, bool)
        self._table[_place(self._words)] = True
        self.longest = max(row.run for row in self.rows)

    def found_in(self, data: bytes | bytearray) -> set[tuple[str, str]]:
        """Whose numbers lie in these bytes, each with its form."""
        found: set[tuple[str, str]] = set()
        words = np.frombuffer(data, "<u8", len(data) // _STEP * 2)[::2]
        near = np.flatnonzero(self._table[_place(words)])
        first = np.searchsorted(self._words, words[near])
        first[first == len(self._words)] = 0
        same = self._words[first] == words[near]
        for index, key in zip(near[same].tolist(), first[same].tolist(), strict=True):
            while key < len(self._words) and self._words[key] == words[index]:
                row = self.rows[self._rows[key]]
                place = int(self._places[key])
                if (row.name, row.form) not in found and _lies(row, place, data, _STEP * index):
                    found.add((row.name, row.form))
                key += 1
        return found

    def found_in_all(self, parts: Iterable[bytes | bytearray]) -> set[tuple[str, str]]:
        """Whose numbers lie in one of several parts."""
        found: set[tuple[str, str]] = set()
        for part in parts:
            found |= self.found_in(part)
        return found


def memory_of(process: psutil.Process, overlap: int) -> list[bytes]:
    """A copy of all that a process has in memory but of its programs; it stands still meanwhile.

    Args:
        overlap: bytes that are at the end of a part and at the beginning of the next one, too.
    """
    process.send_signal(signal.SIGSTOP)
    try:
        return list(_memory(process.pid, overlap))
    except PermissionError:
        pytest.skip("NOT SEARCHED: this user may not read the memory of its own processes")
    finally:
        process.send_signal(signal.SIGCONT)


def files_below(folder: Path) -> Iterator[bytes]:
    """The content of each file, one that goes meanwhile left out."""
    for path in sorted(folder.rglob("*")):
        try:
            if path.is_file():
                yield path.read_bytes()
        except FileNotFoundError:
            continue


def _memory(pid: int, overlap: int) -> Iterator[bytes]:
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    with Path(f"/proc/{pid}/mem").open("rb", 0) as memory:
        for line in maps:
            ends, rights, _, _, inode, *_ = line.split()
            if "r" not in rights or ("w" not in rights and inode != "0"):
                continue  # a program or its constants, as on the disk
            first, last = (int(end, 16) for end in ends.split("-"))
            for start in range(first, last, _PART):
                try:
                    memory.seek(start)
                    data = memory.read(min(_PART + overlap, last - start))
                except (OSError, ValueError, OverflowError):  # the kernel's own
                    continue
                if data.count(0) < len(data):
                    yield data


def _forms(values: np.ndarray, weight: int) -> Iterator[tuple[str, np.ndarray]]:
    units = np.rint(values.astype(np.float64) * UNITS).astype(np.int64)
    for order in "<>":
        for kind in ("f2", "f4", "f8"):
            yield f"{order}{kind}", values.astype(f"{order}{kind}")
        yield f"{order}i8", units.astype(f"{order}i8")
        yield f"{order}i8 x weight", (units * weight).astype(f"{order}i8")


def _lies(row: Row, place: int, data: bytes | bytearray, at: int) -> bool:
    """Whether 64 varied values around a place of a row lie around a place in data."""
    before = min(row.run, place, at)
    after = min(row.run, len(row.data) - place, len(data) - at)
    mine = np.frombuffer(row.data, np.uint8, before + after, place - before)
    found = np.frombuffer(data, np.uint8, before + after, at - before)
    differ = np.flatnonzero(mine != found)
    left, right = differ[differ < before], differ[differ >= before]
    size = row.values.itemsize
    first = -(-(place - before + (int(left[-1]) + 1 if len(left) else 0)) // size)
    last = (place - before + (int(right[0]) if len(right) else before + after)) // size
    return last - first >= RUN and len(np.unique(row.values[first : first + RUN])) > VARIED


def _place(words: np.ndarray) -> np.ndarray:
    return (words * _FACTOR) >> np.uint64(64 - _BITS)
