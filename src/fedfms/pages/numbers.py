"""Numbers, times and lists as a reader sees them, whatever they are of."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone

NONE = "–"  # where there is no value


def count(value: int | None) -> str:
    """A whole number, thousands apart by a narrow space."""
    return NONE if value is None else f"{value:,}".replace(",", "\u202f")


def size(value: float | None) -> str:
    """Bytes with a decimal unit: 1 MB is 1 000 000 bytes."""
    if value is None:
        return NONE
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= 0.9995 * scale:
            number = value / scale
            return f"{number:.2f} {unit}" if number < 9.995 else f"{number:.1f} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float | None) -> str:
    """Seconds as `8.3 s`, `4 min 12 s` or `2 h 05 min`."""
    if seconds is None:
        return NONE
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{count(hours)} h {minutes:02d} min"


def moment(unix: float | None) -> str:
    """A point in time as date and time in UTC."""
    if unix is None:
        return NONE
    return datetime.fromtimestamp(unix, tz=timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def listing(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def numerals(number: int, one: str) -> str:
    """`1 site`, `3 sites`."""
    return f"{count(number)} {one if number == 1 else one + 's'}"
