"""Brain tumours by institution: FeTS 2022, of which the paper takes four of nine partitions.

Each subject is a folder with four co-registered MRI volumes and a segmentation: 1 necrotic core, 2
oedema, 4 enhancing tumour (3 in the packings that follow BraTS 2023). The tumour core is 1 and 4
(or 3); oedema is background. `partitioning_1.csv` says which institution a subject comes from.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from fedfms.errors import ConfigError, SiteDataError
from fedfms_lab.prepare.plan import SitePlan, items_of
from fedfms_lab.prepare.source import Source
from fedfms_lab.prepare.volumes import label_values, volume_pair

MODALITIES = ("t1ce", "flair", "t1", "t2")
PAPER_SITES = ("1", "6", "18", "21")
PARTITIONS = "partitioning_1.csv"  # by institution; partitioning_2 cuts these once more by size


def plan_fets(
    source: Source,
    *,
    paper: bool = False,
    sites: Sequence[str] = PAPER_SITES,
    modality: str = "t1ce",
) -> list[SitePlan]:
    """One plan for each partition in `sites`.

    Args:
        source: the folder with partitioning_1.csv and the subjects' folders.
        paper: the paper's clip at the 99th percentile and share of validation.
        sites: values of Partition_ID.
        modality: the one MRI contrast to learn from. The rim of the tumour core takes up contrast
            agent, which T1ce alone shows; the paper's code does not say which it took.

    Raises:
        ConfigError: an unknown partition or modality.
        SiteDataError: "missing-download-file", "unexpected-file", "unexpected-label-values".
    """
    if modality not in MODALITIES:
        raise ConfigError(
            f"there is no modality {modality}", f"choose among {', '.join(MODALITIES)}"
        )
    subjects = _partitions(source)
    unknown = [site for site in sites if site not in subjects]
    if unknown or not sites:
        raise ConfigError(
            f"{PARTITIONS} has no partition {unknown[0]}" if unknown else "no partition is named",
            f"choose among {', '.join(sorted(subjects, key=_as_number))}",
        )
    files = {path.name.lower(): path for path in source.files}
    plans = []
    for site in sorted(dict.fromkeys(sites), key=_as_number):
        pairs = _pairs(source, files, subjects[site], modality)
        enhancing = _enhancing_value([label for _, _, label in pairs])
        plans.append(
            SitePlan(
                command="fets",
                given_name=site,
                items=items_of(pairs, volume_pair),
                settings={
                    "format": "nifti",
                    "classes": {"tumor_core": [1, enhancing]},
                    "background": [0, 2],
                    "plane": "axial",
                    "channels": "neighbours",
                    "keep_empty_every": 5,
                },
                patient=r"^(.+)\.nii\.gz$",
                paper=paper,
                comments=[
                    f"partition of FeTS 2022 by institution ({PARTITIONS}), {modality} volumes.",
                    f"Tumour core: necrosis (1) and enhancing tumour ({enhancing}); oedema (2) is "
                    "background.",
                ],
                pictures=False,  # its terms of use ask every user to register
            )
        )
    return plans


def _partitions(source: Source) -> dict[str, list[str]]:
    """Partition -> its subjects, sorted."""
    found = source.where(lambda path: path.name == PARTITIONS)
    if len(found) != 1:
        if found:
            raise SiteDataError(
                f"{source.root} holds {PARTITIONS} {len(found)} times",
                "keep one copy of the download below the folder that you name",
                code="ambiguous-download",
            )
        raise source.missing(PARTITIONS, f"MICCAI_FeTS2022_TrainingData/{PARTITIONS}")
    with found[0].open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"Partition_ID", "Subject_ID"} <= rows[0].keys():
        raise SiteDataError(
            f"{source.relative(found[0])} has not the columns Partition_ID and Subject_ID",
            "download the file again from the challenge",
            code="unexpected-file",
        )
    subjects: dict[str, list[str]] = {}
    for row in rows:
        if row["Partition_ID"] and row["Subject_ID"]:
            subjects.setdefault(row["Partition_ID"].strip(), []).append(row["Subject_ID"].strip())
    return {site: sorted(set(names)) for site, names in subjects.items()}


def _pairs(
    source: Source, files: dict[str, Path], subjects: Sequence[str], modality: str
) -> list[tuple[str, Path, Path]]:
    pairs, missing = [], []
    for subject in subjects:
        found = []
        for kind in (modality, "seg"):
            stem = f"{subject}_{kind}.nii".lower()
            path = files.get(stem + ".gz") or files.get(stem)
            if path is None:
                missing.append(f"{subject}/{subject}_{kind}.nii.gz")
            else:
                found.append(path)
        if len(found) == 2:
            pairs.append((subject, found[0], found[1]))
    if missing:
        raise source.lacking(
            f"of subjects that {PARTITIONS} names",
            missing,
            "unpack the download again, all of it; it comes with a folder for each subject",
        )
    return pairs


def _enhancing_value(labels: Sequence[Path]) -> int:
    """4 as in BraTS to 2021, or 3 as in later packings: what the first that has one says."""
    for path in labels:
        found = label_values(path) & {3, 4}
        if found:
            return min(found)
    return 4


def _as_number(partition: str) -> tuple[int, str]:
    return (int(partition) if partition.isdigit() else 10**9, partition)
