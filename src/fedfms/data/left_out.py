"""Cases that cannot be used and are left out, as far as the site's own limit allows.

A case is left out where it has no label (or a label no image), where a contrast or the file of a
class is missing, where a file of it cannot be read,
where image and label do not fit each other, or where it is empty and may not be. A problem of the
whole site (a wrong glob, unknown label values, a full disk) is none of a case. The table with names
stays at the site; numbers by reason are all that is told of it, and small ones are not.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedfms.contracts.contribution import LEFT_OUT_REASONS
from fedfms.contracts.site import SiteConfig
from fedfms.errors import SiteDataError
from fedfms.files import write_whole

TABLE = "left-out.csv"  # in the trainer's private folder
SHOWN = 40  # lines of the table in an error

# by the code of an error; what is not here does not fit: image and label, or both and site.yml
_REASONS: Mapping[str, str] = {
    "unpaired-files": "unlabelled",
    "no-labels": "unlabelled",
    "missing-label-file": "unlabelled",
    "empty-label": "empty",
    "empty-file": "empty",
    "constant-image": "empty",
    "intensity-flat": "empty",
    "damaged-file": "unreadable",
    "unreadable-file": "unreadable",
    "unreadable-folder": "unreadable",
    "cannot-be-read-here": "unreadable",
    "wrong-magic": "unreadable",
    "wrong-extension": "unreadable",
    "no-decoder": "unreadable",
    "not-dicom": "unreadable",
    "no-files": "unreadable",
    "unexpected": "unreadable",
}
assert {*_REASONS.values()} < {*LEFT_OUT_REASONS}
# problems of the machine, whichever case met them first
NO_CASE = frozenset(("no-room", "cache-gone"))


@dataclass(frozen=True, slots=True)
class Bad:
    """One case that cannot be used; for the person at the site."""

    name: str  # of its file, below the data root
    error: SiteDataError

    @property
    def reason(self) -> str:
        """One of LEFT_OUT_REASONS."""
        return _REASONS.get(self.error.code, "unfit")


@dataclass(slots=True)
class LeftOut:
    """The cases that one look at a site left out.

    Args:
        site: whose own limit counts.
        total: all its cases, with those that have no counterpart.
        share: of them that may be left out; None: what the site allows a job.
    """

    site: SiteConfig
    total: int
    share: float | None = None
    found: list[Bad] = field(default_factory=list)

    @property
    def most(self) -> int:
        """How many may be left out."""
        share = self.site.leaves_out if self.share is None else self.share
        return int(share * self.total + 1e-9)

    @property
    def is_hopeless(self) -> bool:
        """Whether so many were found that, where none is well, no further one has to be read."""
        return len(self.found) > max(self.most, SHOWN)

    @property
    def names(self) -> list[str]:
        """Of the files, for the person at the site."""
        return [one.name for one in self.found]

    def add(self, path: Path, error: SiteDataError) -> None:
        """A case that cannot be used.

        Args:
            path: of its image; where it has none, its label.

        Raises:
            SiteDataError: it, where nothing may be left out, or where it is no problem of a case.
        """
        if self.most == 0 or error.code in NO_CASE:
            raise error
        self.found.append(Bad(self._name(path), error))

    def check(self) -> None:
        """To be asked when all cases were looked at.

        Raises:
            SiteDataError: code too-many-left-out, with the table.
        """
        if len(self.found) > self.most:
            raise too_many(self.found, self.total, self.most)

    def by_reason(self) -> dict[str, int]:
        """How many for each reason that there is."""
        return dict(sorted(Counter(one.reason for one in self.found).items()))

    def write(self, folder: Path) -> None:
        """Write the table for the person at the site; of nothing, no table is left.

        Raises:
            OSError: it cannot be written.
        """
        path = folder / TABLE
        if not self.found:
            path.unlink(missing_ok=True)
            return
        text = io.StringIO(newline="")
        rows = csv.writer(text)
        rows.writerow(["case", "reason", "code", "problem", "fix"])
        for one in self.found:
            error = one.error
            rows.writerow([one.name, one.reason, error.code, error.problem, error.fix])
        write_whole(path, text.getvalue().encode(errors="surrogateescape"), mode=0o600)

    def __str__(self) -> str:
        """Numbers alone: it may stand in a log that leaves the site."""
        return f"{len(self.found)} of {self.total} cases are left out: {_counts(self.found)}"

    def _name(self, path: Path) -> str:
        try:
            return path.relative_to(self.site.data_root).as_posix()
        except ValueError:
            return path.name


def too_many(found: Sequence[Bad], total: int, most: int) -> SiteDataError:
    """The error of a site with more such cases than it may leave out."""
    lines = [f"  {one.name}: {one.reason} ({one.error.code})" for one in found[:SHOWN]]
    if len(found) > SHOWN:
        lines.append(f"  and {len(found) - SHOWN} more")
    return SiteDataError(
        f"{len(found)} of {total} cases cannot be used ({_counts(found)}), and leave_out allows "
        f"{most}:\n" + "\n".join(lines),
        "mend them (fedfms check-data says of each what is wrong), move them away, or raise "
        "leave_out in site.yml",
        code="too-many-left-out",
    )


def _counts(found: Sequence[Bad]) -> str:
    counts = Counter(one.reason for one in found)
    return ", ".join(f"{counts[reason]} {reason}" for reason in LEFT_OUT_REASONS if counts[reason])
