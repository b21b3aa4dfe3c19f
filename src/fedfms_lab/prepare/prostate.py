"""Prostate MRI of six sites: the "Multi-site Dataset for Prostate MRI Segmentation" (SAML).

Liu et al., "Shape-aware meta-learning for generalizing prostate MRI segmentation to unseen
domains", MICCAI 2020. Each site is a folder with CaseNN.nii.gz and CaseNN_segmentation.nii.gz (one
site writes _Segmentation). Labels are 0, 1, 2: two sites tell the zones apart (1 and 2), four have
the whole gland as 1. Both values are prostate.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fedfms.errors import SiteDataError
from fedfms_lab.prepare.plan import Item, SitePlan, chosen, items_of
from fedfms_lab.prepare.source import Files, Source, pair_by_key
from fedfms_lab.prepare.volumes import ENDINGS, volume_pair

# site -> its folder's names, then the provider's number of cases
SITES: dict[str, tuple[tuple[str, ...], int]] = {
    "BIDMC": (("BIDMC",), 12),
    "HK": (("HK",), 12),
    "I2CVB": (("I2CVB",), 19),
    "ISBI": (("ISBI", "RUNMC"), 30),
    "ISBI_1.5": (("ISBI_1.5", "ISBI1.5", "BMC"), 30),
    "UCL": (("UCL",), 13),
}
_CASE = re.compile(r"(case\d+)(_segmentation)?\.nii(?:\.gz)?", re.IGNORECASE)


def plan_prostate(
    source: Source, *, paper: bool = False, only: Sequence[str] | None = None
) -> list[SitePlan]:
    """One plan for each of the six sites.

    Args:
        source: the folder that holds the six sites' folders, at any depth.
        paper: the paper's clip at the 99th percentile, its slices as the files store them, and its
            share of validation.
        only: these sites alone.

    Raises:
        SiteDataError: "missing-download-file", "unexpected-file", "ambiguous-download".
    """
    plans = []
    for name in chosen(list(SITES), only):
        folders, known = SITES[name]
        files = [
            path
            for path in source.files
            if path.name.lower().endswith(ENDINGS) and path.parent.name in folders
        ]
        if not files:
            raise source.missing(f"volumes of site {name}", f"{folders[0]}/Case00.nii.gz")
        plans.append(
            SitePlan(
                command="prostate",
                given_name=name,
                items=_items(source, files),
                settings={
                    "format": "nifti",
                    "classes": {"prostate": [1, 2]},
                    "plane": "stored" if paper else "axial",
                    "channels": "gray",
                    "keep_empty_every": 1,
                },
                patient=r"^(Case\d+)\.",
                paper=paper,
                comments=[
                    "T2-weighted MRI of the prostate, Multi-site Dataset for Prostate MRI "
                    "Segmentation (SAML).",
                    "Label 1 and 2 are zones at ISBI and ISBI_1.5, 1 the whole gland elsewhere.",
                ],
                known_cases=known,
                count_names=("header_copied",),
            )
        )
    return plans


def _items(source: Source, files: Sequence[Path]) -> list[Item]:
    images: Files = []
    labels: Files = []
    for path in files:
        found = _CASE.fullmatch(path.name)
        if found is None:
            raise SiteDataError(
                f"{source.relative(path)} is neither a CaseNN volume nor its segmentation",
                "name the folder with the six sites as it was downloaded, without files of your "
                "own",
                code="unexpected-file",
            )
        key = found.group(1).capitalize()
        (labels if found.group(2) else images).append((key, path))
    return items_of(pair_by_key(source, images, labels), volume_pair, index_pairs=True)
