"""All cases of a site together: what is wrong with cases that are fine one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedfms.contracts.site import SiteConfig
from fedfms.data.manifest import Case
from fedfms.data.pictures import Palette, different_palettes
from fedfms.data.prepared import PreparedCase, values_of
from fedfms.errors import SiteDataError


class Summary(NamedTuple):
    """What of a case is needed to judge all cases together."""

    case: Case
    values: frozenset[int]  # label values that occur
    digest: bytes  # of the grey levels: alike exactly where the prepared images are alike
    palette: Palette | None = None  # of a label picture


def digest_of(images: NDArray[np.uint8]) -> bytes:
    """SHA-256 of grey levels and their shape."""
    digest = hashlib.sha256(str(images.shape).encode())
    digest.update(np.ascontiguousarray(images).data)
    return digest.digest()


def summarize(prepared: PreparedCase) -> Summary:
    """The case's label values and the SHA-256 of its grey levels."""
    values = frozenset(values_of(prepared.labels))
    return Summary(prepared.case, values, digest_of(prepared.images), prepared.palette)


def check_not_empty(case: Case, values: Iterable[int], site: SiteConfig) -> None:
    """Whether a label shows a class of the site, where site.yml says that each does.

    Raises:
        SiteDataError: code empty-label.
    """
    if {value for of in site.classes.values() for value in of}.isdisjoint(values):
        of = "".join(f" and {len(case.labels) - 1} beside it" for _ in case.labels[1:2])
        raise SiteDataError(
            f"{case.label}{of} shows no class, and site.yml says that none is empty (may_be_empty)",
            "look at that label; where a case without a finding is meant, set may_be_empty: true",
            code="empty-label",
        )


def problems_together(summaries: Sequence[Summary], site: SiteConfig) -> list[SiteDataError]:
    """What is wrong with cases that are fine one by one; empty if nothing is."""
    problems = _label_problems(summaries, site)
    differ = different_palettes([(s.case.label, s.values, s.palette) for s in summaries])
    if differ is not None:
        problems.insert(0, differ)  # values that mean several things explain what follows
    twins: dict[bytes, Summary] = {}
    for summary in summaries:
        twin = twins.setdefault(summary.digest, summary)
        if twin.case.split != summary.case.split:
            problems.append(
                SiteDataError(
                    f"{twin.case.image} and {summary.case.image} show the same image, once under "
                    f"patient {twin.case.patient} and once under {summary.case.patient}, and the "
                    "split puts them on both sides",
                    "remove one of them, or correct patient in site.yml so that both are one",
                    code="patient-on-both-sides",
                )
            )
            break
    return problems


def _label_problems(summaries: Sequence[Summary], site: SiteConfig) -> list[SiteDataError]:
    mapped = {value for values in site.classes.values() for value in values}
    found = {value for summary in summaries for value in summary.values}
    unknown = sorted(found - mapped - set(site.background) - site.void_values)
    if unknown:
        where = [s.case.label for s in summaries if not s.values.isdisjoint(unknown)]
        twin = {255: 1, 1: 255}.get(unknown[0])
        names = [name for name, values in site.classes.items() if twin in values]
        if len(unknown) == 1 and names and twin not in found:
            return [
                SiteDataError(
                    f"the foreground of {len(where)} label files is {unknown[0]}, but site.yml "
                    f"says {names[0]}: [{twin}]; the first is {where[0]}",
                    f"write {names[0]}: [{unknown[0]}] under classes in site.yml",
                    code=f"foreground-is-{unknown[0]}",
                )
            ]
        some = ", ".join(map(str, unknown[:8])) + (" and more" if len(unknown) > 8 else "")
        hint = (
            "; numbered objects are a range such as [1-167], or nonzero; grey levels need a "
            "threshold first"
            if len(unknown) > 16
            else ""
        )
        return [
            SiteDataError(
                f"{len(where)} label files hold values that site.yml does not know: {some}; the "
                f"first is {where[0]}",
                f"list each value under its class, or under background, in site.yml{hint}",
                code="unknown-label-values",
            )
        ]
    if any(s.case.split == "train" for s in summaries) and not found & mapped:
        return [
            SiteDataError(
                f"all {len(summaries)} label files are empty: no value of any class occurs in them",
                "check that labels in site.yml points at the label files, and classes at the "
                "values in them",
                code="empty-masks",
            )
        ]
    return []
