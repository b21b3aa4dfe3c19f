"""Errors that a person reads: what is wrong, and what to do now.

An error has two texts. `str(error)` is for the person at the machine and may name a file. `public`
is for everyone else: it holds the error's code and never a file or patient name, so it may cross
from the trainer to the FLARE client, into a log that leaves the site.
"""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import TypeVar


class FedfmsError(Exception):
    """A problem with its fix.

    Args:
        problem: what is wrong and where, in one sentence; may name files.
        fix: what to do now, as an instruction.
        code: a short fixed word for the kind of problem, such as "unpaired-files"; safe to publish.
    """

    default_code = "error"

    def __init__(self, problem: str, fix: str, *, code: str | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.fix = fix
        self.code = code or self.default_code
        self.files: tuple[Path, ...] = ()  # that it is about, where something goes on without them
        self.details = ""  # of an exception that nobody foresaw: its traceback, for who mends it

    def __str__(self) -> str:
        return f"{self.problem}\n  fix: {self.fix}"

    @property
    def public(self) -> str:
        """The error without a name from the site: its class and code."""
        return f"{type(self).__name__} ({self.code}); the site's own log has the details"


class ConfigError(FedfmsError):
    """A recipe, site.yml, policy or command line that cannot be used."""

    default_code = "config"


class Undecodable(FedfmsError, ValueError):
    """What another party wrote cannot be decoded, or is beyond a bound (bounded.py).

    It is a ValueError, too, as Python's own decoders raise.
    """

    default_code = "undecodable"


class SiteDataError(FedfmsError):
    """Images or labels of a site that cannot be used."""

    default_code = "site-data"


class CheckpointError(FedfmsError):
    """A model file that is missing, damaged, or not the one that was asked for."""

    default_code = "checkpoint"


class TrainingError(FedfmsError):
    """A local round or evaluation that cannot go on: no memory, a loss that is no number."""

    default_code = "training"


class DoorClosed(FedfmsError):
    """The site's policy does not let this leave (exchange/door.py)."""

    default_code = "door-closed"


class ContributionRefused(FedfmsError):
    """The server does not accept what a site sent (exchange/guard.py)."""

    default_code = "contribution-refused"


class TrainerError(FedfmsError):
    """The trainer process is not there, died, hung, or answered nonsense."""

    default_code = "trainer"


class TaskAborted(FedfmsError):
    """A task was stopped on request; nothing of it leaves the site."""

    default_code = "aborted"


class FederationError(FedfmsError):
    """A federation that could not be provisioned, started, or brought to its end."""

    default_code = "federation"


_NO_MEMORY = re.compile("out of memory|not enough memory|unable to allocate|bad_alloc", re.I)

Kind = TypeVar("Kind", bound=FedfmsError)


def unexpected(error: Exception, what: str, kind: type[Kind]) -> Kind:
    """Any exception of any library as the problem of one thing, so that others can go on.

    Args:
        error: the exception; only its text is kept, since a traceback holds all its arrays.
        what: happened, such as "a.png cannot be read".
        kind: of the error that is made.
    """
    lines = str(error).strip().splitlines()
    name, said = type(error).__name__, (lines[0][:300] if lines else "")
    code = "unexpected"
    if isinstance(error, OSError) and error.strerror:
        said = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        fix = "check that the file or folder is there, may be used, and that the disk has room"
        code = "unusable-file"
    elif isinstance(error, MemoryError) or _NO_MEMORY.search(said):
        fix = "close other programs, or use a machine with more memory"
        code = "out-of-memory"
    else:
        fix = "if the files are whole in other programs, report this with its details"
    told = kind(f"{what}: {f'{name}: {said}' if said else name}", fix, code=code)
    told.details = "".join(traceback.format_exception(error))
    return told
