"""Errors that a person reads: what is wrong, and what to do now.

An error has two texts. `str(error)` is for the person at the machine and may name a file. `public`
is for everyone else: it holds the error's code and never a file or patient name, so it may cross
from the trainer to the FLARE client, into a log that leaves the site.
"""

from __future__ import annotations


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

    def __str__(self) -> str:
        return f"{self.problem}\n  fix: {self.fix}"

    @property
    def public(self) -> str:
        """The error without a name from the site: its class and code."""
        return f"{type(self).__name__} ({self.code}); the site's own log has the details"


class ConfigError(FedfmsError):
    """A recipe, site.yml, policy or command line that cannot be used."""

    default_code = "config"


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
