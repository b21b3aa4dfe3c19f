"""What is known of a run outside its job's process: one small file in its folder at the server."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from fedfms.bounded import read_json_object
from fedfms.files import write_whole
from fedfms.records.layout import RECORDS
from fedfms.records.read import read_last
from fedfms.records.schema import JobDone

_FILE = "job.json"


@dataclass(slots=True)
class About:
    """What the server's main process has to know of a run to keep it going."""

    sites: list[str]  # that ever took part
    min_sites: int
    starts: list[int] = field(default_factory=list)  # rounds done at each start
    earlier_starts: int = 0  # before a person let it go on
    stopped_by: str | None = None  # who stopped it; None: nobody
    stopped_at: float | None = None  # seconds since 1970-01-01 UTC
    is_canary: bool = False  # of which nothing is kept, however it ends

    @classmethod
    def read(cls, folder: Path) -> About | None:
        """Of a run's folder; None where there is none that can be read."""
        try:
            values = read_json_object(folder / _FILE)
            known = {one.name for one in dataclasses.fields(cls)}
            about = cls(**{key: value for key, value in values.items() if key in known})
            about.sites = [str(site) for site in about.sites]
            about.min_sites = int(about.min_sites)
            about.starts = [int(number) for number in about.starts]
        except (OSError, ValueError, TypeError, AttributeError):
            return None
        return about

    def write(self, folder: Path) -> None:
        """Into a run's folder, whole or not at all.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / _FILE, json.dumps(dataclasses.asdict(self)))

    def stop(self, who: str) -> None:
        """From now on the run stays stopped."""
        self.stopped_by, self.stopped_at = who, time.time()

    def let_go_on(self) -> None:
        """The run may start again, with all of its budget."""
        self.stopped_by = self.stopped_at = None
        self.earlier_starts, self.starts = self.all_starts, []

    @property
    def is_stopped(self) -> bool:
        """Whether a person stopped it."""
        return self.stopped_by is not None

    @property
    def all_starts(self) -> int:
        """How often the job's process was started at the server."""
        return self.earlier_starts + len(self.starts)

    def starts_in_vain(self, rounds: int) -> int:
        """How often the job was started since it last finished a round."""
        return sum(1 for done in self.starts if done >= rounds)


def end_of(folder: Path) -> JobDone | None:
    """How a run came to its end by its own records; None where it did not."""
    last = read_last(folder / RECORDS)
    return last if isinstance(last, JobDone) else None
