"""A site's pause: it takes no task, for the clinic's hours, and says so to the server.

The site's FLARE client keeps it in its workspace, so that it survives restarts, and puts it into
its signs of life. The site's clock has the last word: a pause with an end is over by itself.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from fedfms.bounded import read_json
from fedfms.contracts.decode import Misfits, validate
from fedfms.files import write_whole

_FILE = "pause.json"
LOOK_SECONDS = 1.0  # between two looks at the file
LONGEST_HOURS = 24  # that "until HH:MM" can mean

Moment = Annotated[float, Field(ge=0, lt=1e11, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """Since when, until when, and what the site's clock shows then."""

    since: Moment  # seconds since 1970-01-01 UTC
    until: Moment | None = None  # None: until somebody types fedfms unpause
    offset: Annotated[int, Field(ge=-24 * 60, le=24 * 60)] = 0  # minutes east of UTC, at the site

    @classmethod
    def begin(cls, until: datetime | None, now: datetime) -> Pause:
        """One that begins now.

        Args:
            until: with a time zone, or None.
            now: with the site's time zone.
        """
        offset = now.utcoffset() or timedelta()
        return cls(
            since=now.timestamp(),
            until=until.timestamp() if until is not None else None,
            offset=round(offset.total_seconds() / 60),
        )

    @property
    def is_over(self) -> bool:
        """Whether its end has come, by this machine's clock."""
        return self.until is not None and time.time() >= self.until

    @property
    def words(self) -> str:
        """Such as "at 14:02 until 18:00", as the site's clock shows it."""
        here = datetime.now().astimezone().utcoffset() or timedelta()
        zone = ""
        if timedelta(minutes=self.offset) != here:
            hours, minutes = divmod(abs(self.offset), 60)
            sign = "-" if self.offset < 0 else "+"
            zone = f" (UTC{sign}{hours}{f':{minutes:02d}' if minutes else ''})"
        until = f" until {self._clock(self.until)}" if self.until is not None else ""
        return f"at {self._clock(self.since)}{until}{zone}"

    def _clock(self, moment: float) -> str:
        there = timezone(timedelta(minutes=self.offset))
        when = datetime.fromtimestamp(moment, there)
        is_near = abs(moment - self.since) < LONGEST_HOURS * 3600
        return when.strftime("%H:%M" if is_near else "%Y-%m-%d %H:%M")

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return dataclasses.asdict(self)


def pause_of(said: Any) -> Pause | None:
    """What a site says of its pause; None for a site that does not pause, or says nonsense."""
    if not isinstance(said, dict):
        return None
    try:
        return validate(Pause, said, unknown="ignore")
    except (Misfits, ValueError, TypeError):
        return None


def read_pause(workspace: Path) -> Pause | None:
    """The pause of a site's FLARE client, unless it is over."""
    try:
        pause = pause_of(read_json(workspace / _FILE))
    except (OSError, ValueError):
        return None
    return None if pause is None or pause.is_over else pause


def write_pause(workspace: Path, pause: Pause | None) -> None:
    """Keep a pause, or none.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    if pause is None:
        (workspace / _FILE).unlink(missing_ok=True)
    else:
        write_whole(workspace / _FILE, json.dumps(pause.to_dict()))


class Gate:
    """Whether a site pauses, asked often; it looks at the file about once a second.

    Args:
        workspace: of the site's FLARE client.
    """

    def __init__(self, workspace: Path) -> None:
        self._workspace = workspace
        self._looked_at = float("-inf")
        self._pause: Pause | None = None

    def pause(self) -> Pause | None:
        """The pause, as far as it is known."""
        if time.monotonic() >= self._looked_at + LOOK_SECONDS:
            self._looked_at = time.monotonic()
            self._pause = read_pause(self._workspace)
        return self._pause
