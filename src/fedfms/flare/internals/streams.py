"""What a process remembers of streams that have arrived. Read in FLARE 2.9.0 (`fuel/f3/streaming`).

FLARE remembers each one for as long as its sender may repeat it, ten minutes and more with our
settings, and has a thread of its own wait for the end of that. A job of four sites has some three a
second, so that after five minutes no new thread can be started where their number is limited, as in
a container. Here one thread waits for all of them.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

from nvflare.fuel.f3.streaming import byte_receiver
from nvflare.fuel.f3.streaming.byte_receiver import RxTask

from fedfms.flare.internals.version import Assumption, broken_assumptions, changed, takes, uses

log = logging.getLogger(__name__)

TIMERS = Assumption(
    "a receiver has a stream forgotten by threading.Timer, which RxTask._schedule_remove_task(ttl) "
    "keeps as cleanup_timer; the module makes no other use of threading.Timer",
    lambda: (
        takes(RxTask._schedule_remove_task, "ttl")
        and uses(
            RxTask._schedule_remove_task,
            *("threading", "Timer", "cleanup_timer", "completed_task_ttl", "_remove_task"),
            *("daemon", "start"),
        )
        and uses(RxTask._remove_task, "cleanup_timer", "cancel")
        and sum("Timer" in one.__code__.co_names for one in _functions(RxTask)) == 1
    ),
)


class Later:
    """Stands for a `threading.Timer`; all that were started share one thread.

    Args:
        seconds: from `start` on.
        what: is called then; it must be quick, since others wait for it.
    """

    _waiting: list[tuple[float, int, Later]] = []  # noqa: RUF012 - one for all, on purpose
    _numbers = itertools.count()
    _changed = threading.Condition()
    _thread: threading.Thread | None = None

    def __init__(self, seconds: float, what: Callable[[], object]) -> None:
        self.daemon = True
        self._seconds = seconds
        self._what: Callable[[], object] | None = what

    def start(self) -> None:
        """Begin to wait."""
        with Later._changed:
            if Later._thread is None:
                Later._thread = threading.Thread(
                    target=Later._wait, name="streams_forgotten", daemon=True
                )
                Later._thread.start()
            entry = (time.monotonic() + self._seconds, next(Later._numbers), self)
            heapq.heappush(Later._waiting, entry)
            if Later._waiting[0] is entry:
                Later._changed.notify()

    def cancel(self) -> None:
        """Call nothing; the place in the queue goes when its time has come."""
        self._what = None

    @staticmethod
    def _wait() -> None:
        while True:
            with Later._changed:
                now = time.monotonic()
                if not Later._waiting or Later._waiting[0][0] > now:
                    Later._changed.wait(Later._waiting[0][0] - now if Later._waiting else None)
                    continue
                one = heapq.heappop(Later._waiting)[2]
            if (what := one._what) is not None:
                try:
                    what()
                except Exception:
                    log.exception("a stream could not be forgotten")


class _Threading:
    """The module `threading`, with another Timer."""

    Timer = Later

    def __getattr__(self, name: str) -> object:
        return getattr(threading, name)


def forget_in_one_thread() -> None:
    """Have one thread of this process forget streams; again is no harm.

    With a FLARE that does it otherwise nothing is done, and a line of the log says so.
    """
    if broken := broken_assumptions("streams"):
        log.warning("each stream has a thread of its own: %s", changed(broken).problem)
        return
    byte_receiver.threading = _Threading()


def _functions(of: type) -> list[Callable[..., object]]:
    found = [getattr(one, "__func__", one) for one in vars(of).values()]
    return [one for one in found if hasattr(one, "__code__")]
