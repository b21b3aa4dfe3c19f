"""How long a coordinator waits: for a server that starts, and for sites that are not there yet."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedfms.contracts.announcement import Announcement
from fedfms.errors import FederationError, FedfmsError
from fedfms.flare.follow import LOST_SECONDS
from fedfms.flare.session import Coordinator, connect

POLL_SECONDS = 2.0
WAIT_SECONDS = 600.0  # for a number of sites, where nobody says how long
TOLD_SECONDS = 30.0  # between two lines about what is waited for

Tell = Callable[[str], None]  # one line for the person who waits


@dataclass(frozen=True, slots=True)
class Patience:
    """What is waited for, and how long."""

    sites: int | None = None  # that must be ready; None: as many as the job needs
    seconds: float | None = None  # None: 600 for a number of sites, else not at all

    def deadline(self) -> float:
        """Until when, from now, by time.monotonic()."""
        if self.seconds is not None:
            return time.monotonic() + self.seconds
        return time.monotonic() + (WAIT_SECONDS if self.sites is not None else 0.0)


@contextlib.contextmanager
def connect_patiently(
    kit: Path, scratch: Path, patience: Patience, on_wait: Callable[[], object]
) -> Iterator[Coordinator]:
    """A session, as `connect`; where sites are waited for, the server may be starting as well.

    Args:
        on_wait: called before each new attempt; may raise to give up.

    Raises:
        FederationError: as `connect`, at the end of the patience.
    """
    deadline = patience.deadline()
    with contextlib.ExitStack() as stack:
        while True:
            try:
                coordinator = stack.enter_context(connect(kit, scratch=scratch))
                break
            except FederationError as error:
                if error.code != "no-server" or time.monotonic() > deadline:
                    raise
                on_wait()
                time.sleep(POLL_SECONDS)
        yield coordinator


def wait_for_sites(
    coordinator: Coordinator,
    check: Callable[[list[Announcement]], list[str]],
    patience: Patience,
    *,
    without: Sequence[str] = (),
    tell: Tell,
) -> tuple[list[Announcement], list[str]]:
    """Wait until there are enough sites and the job fits them.

    Args:
        coordinator: an open session.
        check: gives the sites that would take part, or raises why the job does not fit.
        patience: how many, how long.
        without: sites that do not count.
        tell: gets a line when what is missing changes, and each half minute.

    Returns:
        what all connected sites announce, and those that take part.

    Raises:
        FedfmsError: of `check`, at the end of the patience or where waiting changes nothing; or too
            few sites are ready (too-few-sites); or the server is lost (no-server).
    """
    deadline = patience.deadline()
    before, told_at = "", 0.0
    last_answer = time.monotonic()
    while True:
        late = time.monotonic() >= deadline
        try:
            told = coordinator.announcements()
            last_answer = time.monotonic()
        except FederationError as error:  # a server that just starts, or is busy
            if late or error.code != "no-server" or time.monotonic() > last_answer + LOST_SECONDS:
                raise
            time.sleep(POLL_SECONDS)
            continue
        ready = [one.site for one in told if one.ready and one.site not in without]
        enough = patience.sites is None or len(ready) >= patience.sites
        try:
            sites = check(told)
            if enough:
                return told, sites
        except FedfmsError:
            # where all are there, waiting changes nothing
            if late or (patience.sites is not None and enough):
                raise
        if late:
            raise FederationError(
                f"{len(ready)} of the {patience.sites} sites that were waited for are ready",
                "start the others, or wait for fewer; fedfms status shows who is there",
                code="too-few-sites",
            )
        line = _waiting_line(told, ready, patience.sites)
        if line != before or time.monotonic() > told_at + TOLD_SECONDS:
            before, told_at = line, time.monotonic()
            tell(line)
        time.sleep(POLL_SECONDS)


def _waiting_line(told: Sequence[Announcement], ready: Sequence[str], wanted: int | None) -> str:
    of = f" of {wanted}" if wanted is not None else ""
    line = f"waiting for sites: {len(ready)}{of} ready ({', '.join(ready) or 'none'})"
    others = [f"{one.site}: {one.fault}" for one in told if not one.ready]
    return f"{line}; not ready: {', '.join(others)}" if others else line
