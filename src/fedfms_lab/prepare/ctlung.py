"""CT of the lung at five sites. The paper does not say where its pictures come from.

What its code shows is a gray picture with a mask whose third channel is at least 150 where the lung
is, at sites 1 to 5. The public set that fits this is "Chest CT Segmentation" (Kaggle,
polomarco/chest-ct-segmentation): JPEG slices with RGB masks in which blue is the lung, green the
heart and red the trachea; JPEG leaves values near 0 and near 255, hence a threshold. That it is the
paper's set is our assumption, and so is everything about the five sites: that set has none, so
patients are dealt by a hash.

Who holds the five sites themselves puts each into a folder 1 to 5 with images/ and labels/.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from fedfms_lab.prepare.pictures import (
    png,
    read_channel_of_mask,
    read_gray,
    require_same_size,
)
from fedfms_lab.prepare.plan import (
    Item,
    Made,
    SitePlan,
    deal,
    items_of,
    read_assignment,
)
from fedfms_lab.prepare.source import Files, Source, pair_by_key

SITES = ("1", "2", "3", "4", "5")
LUNG_CHANNEL = 2  # of red, green, blue
LUNG_FROM = 150  # of 255
_SLICE = re.compile(r"(ID\d+)(_mask)?_(\d+)\.jpe?g", re.IGNORECASE)
_PICTURES = (".jpg", ".jpeg", ".png")


def plan_ctlung(
    source: Source, *, paper: bool = False, sites_from: Path | None = None
) -> list[SitePlan]:
    """Five plans.

    Args:
        source: the folder with images/ and masks/ of "Chest CT Segmentation", or with 1/ to 5/.
        paper: the paper's share of validation.
        sites_from: CSV of patient and site; None: patients are dealt by a hash.

    Raises:
        SiteDataError: "missing-download-file", "ambiguous-download".
        ConfigError: what is wrong with the CSV.
    """
    own = _items_by_folder(source)
    if own is not None and sites_from is None:
        items, patient, split = own, r"^(.+)\.png$", "as they were given in the folders 1 to 5."
    else:
        items_of = _items_by_patient(source)
        sites = (
            read_assignment(sites_from, "patient", items_of)
            if sites_from
            else deal(items_of, SITES)
        )
        items = {site: [] for site in sorted(set(sites.values()))}
        for name in sorted(items_of):
            items[sites[name]].extend(items_of[name])
        patient = r"^(ID\d+)_"
        split = (
            f"patients by {sites_from.name}."
            if sites_from
            else "patients dealt to five sites by a hash: an assumption, the set has no sites."
        )
    return [
        SitePlan(
            command="ctlung",
            given_name=site,
            items=sorted(items[site], key=lambda item: item.case),
            settings={
                "format": "image",
                "classes": {"lung": [255]},
                "channels": "gray",
            },
            patient=patient,
            paper=paper,
            comments=[
                "CT slices of the chest, lung from the blue channel of the mask (150 and more).",
                f"Sites: {split}",
            ],
        )
        for site in items
    ]


def _items_by_patient(source: Source) -> dict[str, list[Item]]:
    """Items of each patient, of file names such as ID0…_11.jpg and ID0…_mask_11.jpg."""
    images: Files = []
    labels: Files = []
    for path in source.files:
        found = _SLICE.fullmatch(path.name)
        if found is not None:
            key = f"{found.group(1)}_{int(found.group(3)):04d}"
            (labels if found.group(2) else images).append((key, path))
    if not images and not labels:
        raise source.missing(
            "CT slices with masks", "images/images/ID00007637202177411956430_11.jpg"
        )
    items: dict[str, list[Item]] = {}
    pairs = pair_by_key(source, images, labels)
    for item in items_of(pairs, _make, lambda key: key.rsplit("_", 1)[0]):
        items.setdefault(item.patient, []).append(item)
    return items


def _items_by_folder(source: Source) -> dict[str, list[Item]] | None:
    """Items of each of the folders 1 to 5; None where these are not what the download holds."""
    pairs: dict[str, tuple[Files, Files]] = {}
    for path in source.files:
        parts = source.parts(path)
        if len(parts) < 2 or parts[-2] not in SITES or path.suffix.lower() not in _PICTURES:
            continue
        if parts[-1] in ("images", "labels"):
            of_site = pairs.setdefault(parts[-2], ([], []))
            of_site[parts[-1] == "labels"].append((path.stem, path))
    if not pairs:
        return None
    missing = [site for site in SITES if site not in pairs]
    if missing:
        raise source.missing(f"folder {missing[0]}/images", "1/images and 1/labels, to 5")
    return {site: items_of(pair_by_key(source, *pairs[site]), _make) for site in SITES}


def _make(image_path: Path, label_path: Path) -> Made:
    image = read_gray(image_path)
    blue = read_channel_of_mask(label_path, LUNG_CHANNEL)
    require_same_size(image_path, image, label_path, blue)
    lung = np.where(blue >= LUNG_FROM, np.uint8(255), np.uint8(0))
    return Made(png(image), png(lung))
