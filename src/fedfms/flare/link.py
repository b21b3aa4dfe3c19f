"""A server that lets its sites measure their lines: it sends and takes bytes, within a budget.

A site asks as it asks for the greeting (greeting.py, measure_link.py), in pieces of at most 4 MiB.
Each site, and all of them together, have a budget of bytes, which is small while a job runs: so
nobody can fill a line that a run needs.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

from fedfms.flare.internals.server import Asked

# of the request: bytes that the server is to send; of the reply: bytes that it got
HEADER = "fedfms_link"
# of the reply: why there are no bytes, in how many seconds there will be; what the server's .env
# says of its slowest site's line, in megabytes a second
REFUSED, WAIT, TOLD = "fedfms_link_refused", "fedfms_link_wait", "fedfms_link_told"

PIECE = 4 * 1024 * 1024  # bytes, at most

BUDGET_SECONDS = 600.0
# bytes in that time, of one site and of all together: a measurement takes up to 11 MB
SITE_BUDGET, SITE_BUDGET_BUSY = 48_000_000, 12_000_000
ALL_BUDGET, ALL_BUDGET_BUSY = 480_000_000, 48_000_000


class LinkMeter:
    """Answers a server's sites that measure their lines, within a budget of bytes.

    Args:
        told: what the server's lines are said to carry, in megabytes a second; None: not said.
        now: seconds of a clock that never goes back.
    """

    def __init__(
        self, told: float | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._told, self._now = told, now
        self._lock = threading.Lock()
        self._carried: list[tuple[float, str, int]] = []  # when, for whom, how many bytes
        self._bytes = secrets.token_bytes(PIECE)  # nothing on the way can make them fewer

    def answer(self, asked: Asked) -> tuple[dict[str, Any], bytes | None]:
        """Headers and payload for one piece; refused with the seconds to wait if it is too much."""
        if asked.revoked:
            return {HEADER: 0, REFUSED: "revoked", WAIT: 0.0}, None
        taken = len(asked.payload) if isinstance(asked.payload, bytes | bytearray) else 0
        wanted = asked.wanted if isinstance(asked.wanted, int) else 0
        wanted = max(0, min(wanted, PIECE))
        wait = self._book(asked.name, taken + wanted, asked.busy)
        if wait > 0:
            return {HEADER: taken, REFUSED: "budget", WAIT: wait}, None
        return {HEADER: taken, TOLD: self._told or 0.0}, self._bytes[:wanted]

    def _book(self, name: str, size: int, busy: bool) -> float:
        """Count bytes against both budgets; seconds until they fit, 0 if they do now."""
        limits = (SITE_BUDGET_BUSY, ALL_BUDGET_BUSY) if busy else (SITE_BUDGET, ALL_BUDGET)
        now = self._now()
        with self._lock:
            self._carried = [c for c in self._carried if c[0] > now - BUDGET_SECONDS]
            wait = 0.0
            own = [one for one in self._carried if one[1] == name]
            for carried, limit in zip((own, self._carried), limits, strict=True):
                over = sum(one[2] for one in carried) + size - limit
                for at, _, bytes_then in carried:  # the oldest first
                    if over <= 0:
                        break
                    over -= bytes_then
                    wait = max(wait, at + BUDGET_SECONDS - now)
            if wait == 0.0:
                self._carried.append((now, name, size))
            return wait
