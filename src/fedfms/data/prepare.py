"""All cases of a site, read once and kept on disk as the network's side wants them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.cache import Shelves, StoredCase, cache_key
from fedfms.data.left_out import LeftOut
from fedfms.data.manifest import Case
from fedfms.data.prepared import combine
from fedfms.data.several import read_case_image, read_case_label, read_contents
from fedfms.data.together import check_not_empty, problems_together
from fedfms.errors import FedfmsError, SiteDataError, unexpected

log = logging.getLogger(__name__)


def prepare_cases(
    cases: Sequence[Case],
    site: SiteConfig,
    control: Control | None = None,
    *,
    folder: Path | None = None,
    left_out: LeftOut | None = None,
) -> list[StoredCase]:
    """Read all cases one after another, from the cache where it has them.

    Memory is needed for one case at a time, whatever their number: what is returned reads from the
    disk. Progress is reported as phase "prepare".

    Args:
        cases: of the site, from `find_cases`.
        site: says how files are read, and where the cache is.
        control: told of the progress; asked whether to stop.
        left_out: takes the cases that cannot be used; None: the first of them is an error.
        folder: for the cache where site.yml names none. Without either, cases lie in a file that is
            gone with this process.

    Raises:
        SiteDataError: "too-many-left-out", or the first file that cannot be used, or what is wrong
            with the files together: unknown label values, masks that are empty everywhere, one
            image on both sides of the split; "no-room" where the disk is full.
        TaskAborted: somebody asked to stop.
    """
    shelves = Shelves(site.cache or folder)
    control = control or Control()
    prepared = []
    for number, case in enumerate(cases):
        control.report("prepare", number, len(cases))
        try:
            prepared.append(_guarded(case, site, shelves))
        except SiteDataError as error:
            if left_out is None:
                raise
            left_out.add(case.image, error)
            if not prepared and left_out.is_hopeless:
                break
    control.report("prepare", len(cases), len(cases))
    if left_out is not None:
        left_out.check()
        if left_out.found:
            log.warning("%s", left_out)
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
        stored = _prepare(case, site, shelves)
        if not site.may_be_empty:
            check_not_empty(case, [v for values in stored.slice_values() for v in values], site)
        return stored
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
