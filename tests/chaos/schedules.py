"""What is done to a federation, and when: drawn from a seed, or fixed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

KILLS = ("server", "job at the server", "client", "job process", "trainer")
PAUSES = ("pause client", "pause trainer")
CUTS = ("cut silent", "cut reset", "cut forgotten")  # see tests/jobs/slow_line.py
FULL = ("full server", "full client", "full trainer", "full exchange")
AT_THE_SERVER = ("server", "job at the server", "full server")
# In fixed schedules only: client away, client told to stop, server told to stop, everything (the
# power is cut) and everything told to stop (the container engine restarts).

FIRST_SECONDS = (10.0, 25.0)
GAP_SECONDS = (15.0, 40.0)  # between two faults; a server needs up to 30 s
LASTING_SECONDS = (5.0, 40.0)  # so long a pause, a cut and a full disk go on, into the next fault
FEWEST = 7  # one of each sort, and two more


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong."""

    at: float  # seconds after the job's start
    kind: str
    site: str = ""  # none: the server
    seconds: float = 0.0  # for what goes on for a while

    def __str__(self) -> str:
        return " ".join(part for part in (self.kind, self.site) if part)


def drawn(seed: int, seconds: float, sites: Sequence[str]) -> list[Fault]:
    """At least a kill of server and client, a pause, a cut and a full disk; the same each time.

    Args:
        seed: of the draw.
        seconds: from the job's start to the last moment at which a fault may begin.
        sites: their names.
    """
    draw = random.Random(seed)
    times = [draw.uniform(*FIRST_SECONDS)]
    while (after := times[-1] + draw.uniform(*GAP_SECONDS)) < seconds or len(times) < FEWEST:
        times.append(after)
    kinds = ["server", "client", draw.choice(PAUSES), draw.choice(CUTS), draw.choice(FULL)]
    more = len(times) - len(kinds)
    kinds += draw.choices(2 * KILLS + PAUSES + CUTS + FULL, k=more)
    draw.shuffle(kinds)
    faults = []
    for at, kind in zip(times, kinds, strict=True):
        site, lasts = draw.choice(sites), draw.uniform(*LASTING_SECONDS)
        faults.append(
            Fault(
                at,
                kind,
                "" if kind in AT_THE_SERVER else site,
                0.0 if kind in KILLS else lasts,
            )
        )
    return faults


# name -> rounds, faults. `fixed` is for every change; the others are the rows of
# results/reliability.md
FIXED: dict[str, tuple[int, list[Fault]]] = {
    "fixed": (
        12,
        [
            Fault(10, "client", "site-2"),
            Fault(25, "cut reset", "site-1", 10),
            Fault(45, "server"),
        ],
    ),
    "deaths": (
        40,
        [
            Fault(15, "job process", "site-1"),
            Fault(45, "client", "site-2"),
            Fault(75, "client told to stop", "site-3"),
            Fault(105, "trainer", "site-1"),
            Fault(120, "job at the server"),
            Fault(170, "server"),
            Fault(230, "server told to stop"),
        ],
    ),
    "everything": (
        36,
        [
            Fault(15, "everything told to stop"),
            Fault(100, "everything"),
        ],
    ),
    "lines": (
        75,
        [
            Fault(15, "pause client", "site-1", 180),
            Fault(210, "cut silent", "site-2", 120),
            Fault(340, "cut reset", "site-3", 30),
            Fault(390, "pause trainer", "site-1", 60),
        ],
    ),
    "gone": (
        45,
        [
            Fault(15, "client away", "site-1", 120),
            Fault(160, "client away", "site-2", 100),
            Fault(160, "client away", "site-3", 120),
        ],
    ),
    "disks": (
        45,
        [
            Fault(15, "full client", "site-1", 40),
            Fault(70, "full trainer", "site-2", 40),
            Fault(130, "full exchange", "site-3", 40),
            Fault(190, "full server", "", 60),
        ],
    ),
}
