"""What a benchmark is made of: two things measured in turns in one run, and their ratio.

A machine does other work, gets warm and is slower an hour later; two figures of one turn share all
that. A section's file in `benchmarks/sections/` measures with `alternate` and gives figures:

    TITLE = "The step on a processor"
    ABOUT = "What is compared, in a sentence or two; markdown."
    KIND = "cpu"  # or "gpu": make bench-gpu runs it

    def measure(pairs: int) -> list[Figure]: ...
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

Answer = Mapping[str, float]  # what one turn of a side cost, by quantity


class Worker:
    """A side in a process of its own, which answers each line with a JSON object.

    Args:
        command: after `python`; the first turn, which warms up, is made at once and not counted.
    """

    def __init__(self, *command: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self()

    def __call__(self) -> dict[str, float]:
        """One turn."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side ended with {self._process.wait()}; see above")
        return json.loads(line)  # type: ignore[no-any-return]

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def alternate(
    sides: Mapping[str, Callable[[], Answer]], pairs: int
) -> dict[str, list[dict[str, float]]]:
    """Turns of all sides, one after the other, so many times; every second time backwards."""
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(pairs):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            turns[name].append(dict(sides[name]()))
    return turns


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One ratio: of a quantity of one thing over that of another, in turns.

    low, high: the interval that holds the median of the ratio with 93 % or more.
    """

    what: str  # what is compared with what, for a reader
    quantity: str  # with its unit
    one: float  # median
    other: float
    ratio: float  # median of one / other
    low: float
    high: float
    pairs: int
    least: float | None = None  # the ratio must be this or more
    most: float | None = None  # or this or less
    aim: float | None = None  # what would be better still

    @property
    def kept(self) -> bool | None:
        """Whether the limit is kept; None where there is none."""
        if self.least is None and self.most is None:
            return None
        above = self.least is None or self.ratio >= self.least
        return above and (self.most is None or self.ratio <= self.most)


def figure(
    what: str,
    quantity: str,
    one: Sequence[float],
    other: Sequence[float],
    **limits: float | None,
) -> Figure:
    """The ratio of pairs that were measured in turns."""
    ratios = sorted(a / b for a, b in zip(one, other, strict=True))
    low, high = interval(ratios)
    return Figure(
        what=what,
        quantity=quantity,
        one=statistics.median(one),
        other=statistics.median(other),
        ratio=statistics.median(ratios),
        low=low,
        high=high,
        pairs=len(ratios),
        **limits,
    )


def interval(ordered: Sequence[float]) -> tuple[float, float]:
    """The narrowest two of the ordered values that hold the median with 93 % or more.

    By the binomial distribution of how many of n values lie below it; of 5 values the outermost,
    with 93.75 %. Fewer give the outermost, and less.
    """
    count = len(ordered)
    for skipped in range(count // 2, -1, -1):
        outside = 2 * sum(math.comb(count, k) for k in range(skipped + 1)) / 2**count
        if outside <= 0.07:
            return ordered[skipped], ordered[count - 1 - skipped]
    return ordered[0], ordered[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A measured section, as `results/benchmarks.json` keeps it."""

    name: str
    title: str
    about: str
    machine: str
    commit: str
    command: str
    date: str
    figures: tuple[Figure, ...]

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Section:
        """As `to_dict` gave it."""
        return cls(**{**values, "figures": tuple(Figure(**one) for one in values["figures"])})
