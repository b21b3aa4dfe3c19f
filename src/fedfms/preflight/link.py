"""What a measured line between a site and its server means for a round, and for `.env`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedfms.contracts.machine import UNTOLD_MEGABYTES_PER_SECOND

# values that travel, of SAM ViT-B with one class; a class more adds less than a hundredth
VALUES = {"fedmsa": 10_607_232, "lora": 3_801_216, "fedsam": 93_177_216}
WIDTHS = {"fp32": 4, "fp16": 2, "int8": 1.01}  # bytes a value, with a scale for each row
OVERHEAD = 1.03  # times the tensors, of what crosses the line


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line as it was measured, or as `.env` says that it is."""

    down: float  # megabytes a second, from the server to this site
    up: float
    round_trip: float | None = None  # seconds; None: not measured
    # megabytes a second that the server's `.env` says of its slowest site; None: not known
    server_told: float | None = None


def told_line(megabytes_per_second: float | None) -> Line:
    """What is taken for a line that nobody measured."""
    rate = megabytes_per_second or UNTOLD_MEGABYTES_PER_SECOND
    return Line(down=rate, up=rate)


@dataclass(frozen=True, slots=True)
class RoundTime:
    """How long the transfers of one round take; computing is not in it."""

    method: str
    precision: str
    megabytes: float  # each way
    down: float  # seconds
    up: float

    @property
    def seconds(self) -> float:
        """Both transfers, one after the other."""
        return self.down + self.up


def round_times(line: Line) -> list[RoundTime]:
    """What the rounds of the shipped methods take over a line, with SAM ViT-B."""
    times = []
    down, up = line.down / OVERHEAD, line.up / OVERHEAD
    for method, values in VALUES.items():
        for precision, width in WIDTHS.items():
            size = values * width / 1e6
            times.append(RoundTime(method, precision, size, size / down, size / up))
    return times


@dataclass(frozen=True, slots=True)
class Advice:
    """LINK_MB_PER_SECOND as it should be written; None where what holds now is good."""

    site: str | None  # in the site's .env
    server: str | None  # in the server's .env, if no other site has a slower line


def advise(line: Line, told: float | None) -> Advice:
    """What to write for a measured line.

    Args:
        told: LINK_MB_PER_SECOND of this site; None where it is not set.
    """
    return Advice(_to_write(line.up, told), _to_write(line.down, line.server_told))


def _to_write(carries: float, told: float | None) -> str | None:
    if carries >= (told or UNTOLD_MEGABYTES_PER_SECOND):
        return None
    digits = 1 - math.floor(math.log10(carries))
    return f"{max(math.floor(carries * 10**digits) / 10**digits, 0.01):g}"  # rounded down


def as_time(seconds: float) -> str:
    """A duration for people, of two units at most: 40 s, 3 min 20 s, 2 h 5 min."""
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    hours, minutes = divmod(round(whole / 60), 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def as_rate(megabytes_per_second: float) -> str:
    """A rate with two digits that count: 0.098 MB/s, 1.2 MB/s, 110 MB/s."""
    digits = max(0, 1 - math.floor(math.log10(megabytes_per_second)))
    return f"{megabytes_per_second:.{digits}f} MB/s"
