"""What a person who watches a run sees of it now: a few lines in a log, a small table on a screen.

A handful of sites is shown in full; of many the worst, and the others in numbers. Nothing stands
still for more than a few seconds: where no news come, the time since the last ones is said.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from fedfms.contracts.now import PHASE_WORDS, SiteNow, SitePhase

if TYPE_CHECKING:
    from fedfms.flare.progress import Event

STATUS_SECONDS = 8.0  # between two lines of a log in which nothing else is said
SILENT_SECONDS = 15.0  # without news, after which it is said
ROWS = 12  # of sites in a table; of more the worst
NAMED = 4  # sites in a line of a log
_LONGEST_NAME = 24  # in a table
_NARROW = 60  # characters of a reason in one line

_STYLES: dict[SitePhase, str] = {
    "failed": "bold red",
    "gone": "red",
    "paused": "yellow",
    "start": "yellow",
    "answered": "green",
}
_COUNTED: dict[SitePhase, tuple[str, str]] = {  # one site, several
    "waits": ("waits", "wait"),
    "download": ("receives the model", "receive the model"),
    "start": ("waits for its trainer", "wait for their trainers"),
    "prepare": ("prepares images", "prepare images"),
    "evaluate": ("evaluates", "evaluate"),
    "train": ("trains", "train"),
    "upload": ("sends its answer", "send their answers"),
    "answered": ("has answered", "have answered"),
    "failed": ("failed", "failed"),
    "paused": ("is paused", "are paused"),
    "gone": ("is gone", "are gone"),
}


class Clock:
    """What the server's clock shows now: that of the last news, and the time since."""

    def __init__(self, event: Event) -> None:
        self.event = event
        self._came = time.monotonic()

    @property
    def silent(self) -> float:
        """Seconds since the last news."""
        return time.monotonic() - self._came

    def since(self, at: float | None) -> float | None:
        """Seconds between a moment by the server's clock and now."""
        if at is None or self.event.time is None:
            return None
        return max(0.0, self.event.time - at + self.silent)


def headline(clock: Clock) -> str:
    """Which round, for how long, who has answered, and how long it all lasts yet; else empty."""
    event = clock.event
    if event.phase == "evaluate":
        what = "final evaluation"
    elif event.phase == "train" and event.round is not None:
        what = f"round {event.round} ({event.round + 1} of {event.rounds})"
    else:
        return ""
    if (seconds := clock.since(event.began)) is not None:
        what += f", {duration(seconds)}"
    what += f": {len(event.answered)} of {len(event.now or event.sites)} sites in"
    if event.waits:
        return f"{what}; {event.waits}"
    return "; ".join(filter(None, [what, time_left(event, clock.silent)]))


def time_left(event: Event, passed: float = 0.0) -> str:
    """How long the run lasts yet, as a range; empty where nobody can say.

    Args:
        passed: seconds since the event.
    """
    if event.left is None:
        return ""
    low, high = (max(0.0, seconds - passed) for seconds in event.left)
    divisor, unit = (1, "s") if high < 100 else (60, "min") if high < 6000 else (3600, "h")
    digits, fine = (1, 10) if unit == "h" else (0, 1)
    first = f"{math.floor(low / divisor * fine) / fine:.{digits}f}"
    last = f"{math.ceil(high / divisor * fine) / fine:.{digits}f}"
    return f"about {last} {unit} left" if first == last else f"{first} to {last} {unit} left"


def duration(seconds: float) -> str:
    """Such as 48 s, 12 min, 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def status_line(clock: Clock) -> str:
    """All of it in one line of a log; empty where no round runs."""
    line = headline(clock)
    if not line:
        return ""
    worst = clock.event.worst_first
    shown = worst if len(worst) <= NAMED + 1 else worst[: NAMED - 1]
    busy = [one for one in shown if one.phase != "answered"]
    parts = [f"{one.name} {doing(one, clock)}" for one in busy]
    if rest := worst[len(shown) :]:
        parts.append(in_numbers(rest, "others"))
    if clock.silent > SILENT_SECONDS:
        parts.append(f"nothing heard from the server for {duration(clock.silent)}")
    return "; ".join([line, *parts])


def doing(one: SiteNow, clock: Clock, longest: int = _NARROW) -> str:
    """What a site is at: trains 40 of 120; failed: TrainerError (…)."""
    words = PHASE_WORDS[one.phase]
    if one.total > 0:
        words += f" {one.done} of {one.total}"
    if one.phase == "gone" and (silent := clock.since(one.heard)) is not None:
        words += f", last heard {duration(silent)} ago"
    if one.gpu == "lost":
        words += ", its GPU is lost"
    if one.failure:
        words += f": {_cut(one.failure, longest)}"
    return words


def in_numbers(sites: Sequence[SiteNow], others: str = "more") -> str:
    """Many sites in one line: 60 train (12 to 80 %), 28 have answered."""
    counts = Counter(one.phase for one in sites)
    parts = []
    for phase, number in counts.most_common():
        part = f"{number} {_COUNTED[phase][number > 1]}"
        shares = [one.share for one in sites if one.phase == phase and one.share is not None]
        if shares:
            low, high = round(100 * min(shares)), round(100 * max(shares))
            part += f" ({low} %)" if low == high else f" ({low} to {high} %)"
        parts.append(part)
    return f"{len(sites)} {others}: {', '.join(parts)}"


def _cut(text: str, longest: int) -> str:
    if len(text) > longest:
        text = text.partition("; fix: ")[0]
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


class Screen:
    """The part of a terminal that changes: one line of the run, and a row for each site."""

    def __init__(self) -> None:
        self._clock: Clock | None = None
        self._before = ""
        self._began = time.monotonic()

    def show(self, event: Event) -> None:
        """There are news."""
        self._clock = Clock(event)
        self._before = before_a_round(event) or self._before

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        alive = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"[int(time.monotonic() * 8) % 10]
        clock = self._clock
        line = headline(clock) if clock is not None else ""
        if clock is None or not line:
            what = self._before or "waiting"
            yield Text(f"{alive} {what}, {duration(time.monotonic() - self._began)}")
            return
        if clock.silent > SILENT_SECONDS:
            line += f"; nothing heard from the server for {duration(clock.silent)}"
        yield Text(f"{alive} {line}", overflow="fold")
        yield from _rows(clock, max(3, min(ROWS, console.height - 6)), options.max_width)


def _rows(clock: Clock, rows: int, width: int) -> Iterator[Text]:
    """A line for each of the worst sites, cut at the terminal's edge; the others in numbers."""
    worst = clock.event.worst_first
    shown = worst if len(worst) <= rows else worst[: rows - 1]
    names = min(_LONGEST_NAME, max((cell_len(one.name) for one in shown), default=0))
    for one in shown:
        line = Text("  ", no_wrap=True)
        line.append(set_cell_size(one.name, names) + " " + _bar(one.share) + " ")
        line.append(doing(one, clock, longest=max(_NARROW, width)), _STYLES.get(one.phase, ""))
        since = clock.since(one.since)
        if since is not None and one.phase not in ("gone", "failed"):
            line.append(f", {duration(since)}", "dim")
        line.truncate(width, overflow="ellipsis")
        yield line
    if rest := worst[len(shown) :]:
        yield Text(f"  and {in_numbers(rest)}")


def _bar(share: float | None, width: int = 12) -> str:
    if share is None:
        return " " * width
    return "━" * round(share * width) + "─" * (width - round(share * width))


def before_a_round(event: Event) -> str:
    """What happens before the first round and after the last."""
    if event.phase == "start":
        return f"starting: {len(event.answered)} of {len(event.sites)} sites are there"
    return {
        "provision": "making keys and certificates",
        "submit": "the job waits for its start",
        "train": "the job starts",
        "done": "the job ends",
        "fetch": "fetching the result",
    }.get(event.phase, "")


class StatusLines:
    """Says in a log how far a run is, whenever nothing else was said for a few seconds.

    Args:
        print_line: prints one line; called by another thread, too, between `start` and `stop`.
    """

    def __init__(self, print_line: Callable[[str], None]) -> None:
        self._print = print_line
        self._lock = threading.Lock()
        self._clock: Clock | None = None
        self._before = "waiting"
        self._began = self._said = time.monotonic()
        self._ended = threading.Event()

    def start(self) -> None:
        """Begin to look every second."""
        threading.Thread(target=self._run, name="status", daemon=True).start()

    def stop(self) -> None:
        """Say nothing any more."""
        self._ended.set()

    def say(self, text: str) -> None:
        """Print a line of somebody else's."""
        with self._lock:
            self._said = time.monotonic()
            self._print(text)

    def show(self, event: Event) -> None:
        """There are news."""
        self._clock = Clock(event)
        self._before = before_a_round(event) or self._before

    def _run(self) -> None:
        while not self._ended.wait(1.0):
            with self._lock:
                if time.monotonic() - self._said < STATUS_SECONDS:
                    continue
                line = status_line(self._clock) if self._clock is not None else ""
                if not line:
                    line = f"{self._before}, {duration(time.monotonic() - self._began)}"
                self._said = time.monotonic()
                self._print(line)
