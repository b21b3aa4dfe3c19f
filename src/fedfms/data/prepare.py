"""All cases of a site, read once and kept on disk as the network's side wants them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.cache import Shelves, StoredCase, cache_key
from fedfms.data.manifest import Case
from fedfms.data.prepared import combine
from fedfms.data.several import read_case_image, read_case_label, read_contents
from fedfms.data.together import problems_together
from fedfms.errors import FedfmsError, SiteDataError, unexpected

log = logging.getLogger(__name__)


def prepare_cases(
    cases: Sequence[Case],
    site: SiteConfig,
    control: Control | None = None,
    *,
    folder: Path | None = None,
) -> list[StoredCase]:
    """Read all cases one after another, from the cache where it has them.

    Memory is needed for one case at a time, whatever their number: what is returned reads from the
    disk. Progress is reported as phase "prepare".

    Args:
        cases: of the site, from `find_cases`.
        site: says how files are read, and where the cache is.
        control: told of the progress; asked whether to stop.
        folder: for the cache where site.yml names none. Without either, cases lie in a file that is
            gone with this process.

    Raises:
        SiteDataError: the first file that cannot be used, or what is wrong with the files
            together: unknown label values, masks that are empty everywhere, one image on both
            sides of the split; "no-room" where the disk is full.
        TaskAborted: somebody asked to stop.
    """
    shelves = Shelves(site.cache or folder)
    control = control or Control()
    prepared = []
    for number, case in enumerate(cases):
        control.report("prepare", number, len(cases))
        prepared.append(_guarded(case, site, shelves))
    control.report("prepare", len(cases), len(cases))
    problems = problems_together([case.summary() for case in prepared], site)
    if problems:
        raise problems[0]
    if shelves.cache is not None:
        shelves.cache.remove_unused()
    log.info(
        "prepared %d cases with %d slices", len(prepared), sum(p.record.shape[0] for p in prepared)
    )
    return prepared


def _guarded(case: Case, site: SiteConfig, shelves: Shelves) -> StoredCase:
    """`_prepare`, and whatever a library raises at a case as this case's problem."""
    try:
        return _prepare(case, site, shelves)
    except FedfmsError:
        raise
    except Exception as error:
        raise unexpected(error, f"{case.image} cannot be prepared", SiteDataError) from None


def _prepare(case: Case, site: SiteConfig, shelves: Shelves) -> StoredCase:
    images, labels = read_contents(case, site)
    key = None
    if shelves.cache is not None:
        key = cache_key(case, images, labels, site)
        found = shelves.cache.get(case, key)
        if found is not None:
            return found
    image = read_case_image(case, images, site)
    return shelves.put(combine(case, image, read_case_label(case, labels, site, image), site), key)
