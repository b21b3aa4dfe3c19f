"""Which fedfms wrote a report, as the report itself says it, so that it can be made again."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

from fedfms import __version__

_MAKE_REPORTS = ("pages", "records", "report")  # packages that tables and pages are made by
_DO_NOT = {"again.py", "averages.py", "trainer_keys.py", "verify.py"}  # files of them
_SAID = re.compile(r"\bfedfms [A-Za-z0-9.+!_-]{1,64}, report [0-9a-f]{12}\b")


@functools.cache
def written_by() -> str:
    """The version, and the code that reports are made by, such as "fedfms 0.1.0, report 3f9a…".

    A version alone does not say it: between two releases it stays as it is.
    """
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(path for name in _MAKE_REPORTS for path in (package / name).rglob("*")):
        if path.suffix in (".py", ".j2", ".css") and path.name not in _DO_NOT:
            digest.update(path.relative_to(package).as_posix().encode() + b"\n")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return f"fedfms {__version__}, report {digest.hexdigest()[:12]}"


def said_writer(text: str) -> str | None:
    """Who wrote a report by its own words; None where it does not say."""
    said = _SAID.findall(text)
    return str(said[-1]) if said else None


def without_writer(text: str) -> str:
    """A report of this version as it was before reports said who wrote them."""
    return "".join(line for line in text.splitlines(keepends=True) if written_by() not in line)
