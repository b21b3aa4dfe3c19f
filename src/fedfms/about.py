"""Which build of the package runs here, as far as it is known: for the records of a job.

A version alone does not say which code ran. A container image cannot know its own digest, so who
starts it may say it; the commit stands in the image, in an installation from a repository, or in
the checkout that a developer works in.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

from fedfms.bounded import json_object
from fedfms.contracts.machine import Machine

DISTRIBUTION = "fedfms-kit"


def known_image() -> str | None:
    """Digest of the container image, where its environment says it (FEDFMS_IMAGE_DIGEST)."""
    return Machine.from_environment().image


def known_revision() -> str | None:
    """Commit that this package was made of, with "+changes" where files differ from it.

    From FEDFMS_REVISION, which an image holds that was built with it; else from what pip noted of
    an installation from a repository, or from the checkout that the package lies in.
    """
    if said := Machine.from_environment().revision:
        return said
    try:
        noted = importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
        about = json_object(noted or "{}", "direct_url.json")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
    if (Path(__file__).parents[2] / "pyproject.toml").is_file():
        return _checked_out()
    commit = about.get("vcs_info", {}).get("commit_id")
    return str(commit) if commit else None


def _checked_out() -> str | None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.check_output(
            command, stderr=subprocess.DEVNULL, text=True, timeout=5
        ).strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None
