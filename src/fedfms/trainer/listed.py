"""The site's cases as its folders have them now: added, or taken out, between two rounds.

A patient who withdraws is no part of the next round, and the prepared images go from the trainer's
cache. Which cases were prepared last stands in the private folder, so that a restart between does
not matter.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedfms.bounded import decode_json
from fedfms.contracts.site import SiteConfig
from fedfms.data.cache import StoredCase
from fedfms.data.left_out import LeftOut
from fedfms.data.manifest import Case, find_whole_cases, list_matches
from fedfms.errors import FedfmsError
from fedfms.files import write_whole

log = logging.getLogger(__name__)

LIST_SECONDS = 30.0  # for the names of all files; a dead network share never answers
_FILE = "prepared.json"  # in the private folder: case -> record in the cache
_LARGEST = 256 << 20


@dataclass(frozen=True, slots=True)
class Listing:
    """A site's cases, and what its globs matched when they were listed."""

    cases: list[Case]
    left_out: LeftOut  # what has no counterpart
    matched: frozenset[Path]

    @classmethod
    def of(cls, site: SiteConfig) -> Listing:
        """As the folders are now.

        Raises:
            SiteDataError: the first thing wrong with folders, names, pairs or patients.
        """
        matched = list_matches(site)
        return cls(*find_whole_cases(site), matched)

    def is_alike(self, other: Listing) -> bool:
        """Whether it has the same cases as another, and the same that have no counterpart."""
        mine, theirs = (self.cases, self.left_out.names), (other.cases, other.left_out.names)
        return mine == theirs

    def now(self, site: SiteConfig, seconds: float = LIST_SECONDS) -> Listing:
        """Itself where the same files are there, which opens none; else as the folders are now.

        Itself, too, where they cannot be read: the prepared images are in the cache, and a share
        that is away for a while costs no round.
        """
        found: list[Listing] = []

        def look() -> None:
            try:
                found.append(self if list_matches(site) == self.matched else Listing.of(site))
            except FedfmsError as error:
                log.warning("the folders cannot be listed now: %s", error.public)

        # a daemon: to list a dead network share blocks for ever
        looking = threading.Thread(target=look, name="cases", daemon=True)
        looking.start()
        looking.join(seconds)
        return found[0] if found else self


def forget_withdrawn(work: Path, prepared: Sequence[StoredCase]) -> int:
    """Remove from the cache what was prepared of cases that are there no more; how many.

    Args:
        work: the trainer's private folder.
        prepared: all cases of the site.
    """
    before, now = _listed(work), _records_of(prepared)
    gone = [path for key, path in before.items() if key not in now and path not in now.values()]
    for path in gone:
        with contextlib.suppress(OSError):
            Path(path).unlink(missing_ok=True)
    if now != before:
        _list(work, now)
    if gone:
        log.info("%d cases are there no more; what was prepared of them is removed", len(gone))
    return len(gone)


def list_prepared(work: Path, prepared: Sequence[StoredCase]) -> None:
    """Have it known that some of the site's cases are in the cache, without a look at the others.

    Args:
        work, prepared: as `forget_withdrawn`.
    """
    before = _listed(work)
    if (now := {**before, **_records_of(prepared)}) != before:
        _list(work, now)


def _records_of(prepared: Sequence[StoredCase]) -> dict[str, str]:
    return {one.case.key: str(one.record_path) for one in prepared if one.record_path is not None}


def _listed(work: Path) -> dict[str, str]:
    listed: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        # of this process's own folder, a line for each case: as many as the site has
        text = (work / _FILE).read_text(encoding="utf-8", errors="surrogateescape")
        found = decode_json(text, str(_FILE), max_bytes=_LARGEST, any_text=True)
        listed = {str(key): str(value) for key, value in dict(found).items()}
    return listed


def _list(work: Path, records: dict[str, str]) -> None:
    text = json.dumps(records).encode(errors="surrogateescape")
    with contextlib.suppress(OSError):
        write_whole(work / _FILE, text, mode=0o600)
