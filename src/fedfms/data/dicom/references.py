"""Which label was drawn on which series, by the UIDs inside the files.

A segmentation or structure set says on which series it was drawn (SeriesInstanceUID), and where it
does not, in which frame of reference (FrameOfReferenceUID) it lies. Headers alone are read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydicom import Dataset
from pydicom.uid import UID, RTStructureSetStorage, SegmentationStorage

from fedfms.contracts.site import SiteConfig
from fedfms.data.content import damaged, files_in
from fedfms.data.dicom.drawn import referenced_series
from fedfms.data.dicom.series import is_beside_images, read_header
from fedfms.data.pairs import some, unpaired
from fedfms.errors import SiteDataError

_LABEL_MAP_STORAGE = UID("1.2.840.10008.5.1.4.1.1.66.7")  # too new for pydicom's own list
LABEL_KINDS = (RTStructureSetStorage, SegmentationStorage, _LABEL_MAP_STORAGE)
_TAGS = [
    *("SeriesInstanceUID", "FrameOfReferenceUID", "SeriesDescription", "Modality"),
    *("SOPInstanceUID",),
    *("ReferencedSeriesSequence", "ReferencedFrameOfReferenceSequence"),
]


@dataclass(frozen=True, slots=True)
class _Uids:
    """Of an image what it holds, of a label to what it refers."""

    series: frozenset[str]
    frames: frozenset[str]
    files: frozenset[str]  # SOPInstanceUID


def pair(
    image_folders: Sequence[Path], label_paths: Sequence[Path], site: SiteConfig
) -> tuple[dict[Path, Path], list[SiteDataError], int]:
    """The label file of each image folder, all that is wrong, and how many images have none.

    The latter only where site.yml passes them over.

    Args:
        image_folders: candidates, folders or files; those without an image of a series that
            site.yml means are none.
        label_paths: files, or folders that hold them; files that are no SEG or RTSTRUCT are none.
        site: its `series` chooses among the images.
    """
    problems: list[SiteDataError] = []
    images: dict[Path, _Uids] = {}
    labels: dict[Path, _Uids] = {}
    for folder in image_folders:
        try:
            if (held := _held_by(folder, site)).series:
                images[folder] = held
        except SiteDataError as error:
            problems.append(error)
    for path in label_paths:
        try:
            labels.update(_labels_at(path))
        except SiteDataError as error:
            problems.append(error)
    if not problems and not (images and labels):
        problems.append(_none_of_a_kind(image_folders, label_paths, bool(images), site))
    if problems:
        return {}, problems, 0
    drawn_on: dict[Path, list[Path]] = {}
    orphans: list[Path] = []
    for path, refers in labels.items():
        meant = _meant(refers, images)
        if len(meant) > 1:
            problems.append(_ambiguous(path, refers, meant, site))
        elif meant:
            drawn_on.setdefault(meant[0], []).append(path)
        else:
            orphans.append(path)
    twice = {folder: paths for folder, paths in drawn_on.items() if len(paths) > 1}
    for folder, paths in list(twice.items())[:1]:
        more = f"; {len(twice) - 1} more series have several" if len(twice) > 1 else ""
        problems.append(
            SiteDataError(
                f"{len(paths)} labels were drawn on {_below(folder, site)}: {some(paths, site)}"
                f"{more}",
                "write the glob labels in site.yml so that it matches one of them, or move the "
                "others away",
                code="several-labels",
            )
        )
    alone = [] if problems else [folder for folder in images if folder not in drawn_on]
    passed_over = len(alone) if site.unlabelled == "pass_over" else 0
    if passed_over:
        alone = []
    if alone or orphans:
        problems.append(
            unpaired(
                alone,
                len(images),
                orphans,
                len(labels),
                site,
                "a label names the series that it was drawn on; choose the series that have labels "
                "with the glob images, or with series: and a part of their SeriesDescription, or "
                "write unlabelled: pass_over, and those without are no cases; if a "
                "program for removing names changed the UIDs, run it over images and labels "
                "together",
            )
        )
    return {folder: paths[0] for folder, paths in drawn_on.items()}, problems, passed_over


def _meant(refers: _Uids, images: dict[Path, _Uids]) -> list[Path]:
    """The folders that a label can mean; the frame of reference counts where it names no series."""
    if refers.series:
        of_series = {path: held for path, held in images.items() if held.series & refers.series}
        # several pictures of a study may be one series
        meant = [path for path, held in of_series.items() if held.files & refers.files]
        return meant if len(of_series) > 1 and meant else list(of_series)
    return [folder for folder, held in images.items() if held.frames & refers.frames]


def _held_by(folder: Path, site: SiteConfig) -> _Uids:
    series, frames, files = set(), set(), set()
    for header in _headers(files_in(folder) if folder.is_dir() else [folder]).values():
        if is_beside_images(header):
            continue
        description = str(header.get("SeriesDescription") or "")
        if site.series is None or re.search(site.series, description):
            series.add(str(header.get("SeriesInstanceUID", "")))
            frames.add(str(header.get("FrameOfReferenceUID", "")))
            files.add(str(header.get("SOPInstanceUID", "")))
    return _Uids(frozenset(series - {""}), frozenset(frames - {""}), frozenset(files - {""}))


def _labels_at(path: Path) -> dict[Path, _Uids]:
    found = {}
    for file, header in _headers(files_in(path) if path.is_dir() else [path]).items():
        if header.file_meta.get("MediaStorageSOPClassUID", "") in LABEL_KINDS:
            try:
                found[file] = _references(header)
            except Exception as error:  # a damaged header makes pydicom raise nearly anything
                raise damaged(file, type(error).__name__) from None
    return found


def _references(header: Dataset) -> _Uids:
    spaces = header.get("ReferencedFrameOfReferenceSequence") or []
    frames = {str(one.get("FrameOfReferenceUID", "")) for one in (header, *spaces)}
    series = {str(one.get("SeriesInstanceUID", "")) for one in referenced_series(header)}
    return _Uids(frozenset(series - {""}), frozenset(frames - {""}), referenced_files(header))


def referenced_files(label: Dataset) -> frozenset[str]:
    """SOPInstanceUID of the images that a segmentation names."""
    files = {
        str(image.get("ReferencedSOPInstanceUID", ""))
        for one in referenced_series(label)
        for image in one.get("ReferencedInstanceSequence") or []
    }
    return frozenset(files - {""})


def _headers(files: Sequence[Path]) -> dict[Path, Dataset]:
    """Those of the files that are DICOM, with their headers."""
    headers = {file: read_header(file, _TAGS) for file in files}
    return {file: header for file, header in headers.items() if header is not None}


def _none_of_a_kind(
    folders: Sequence[Path], labels: Sequence[Path], has_images: bool, site: SiteConfig
) -> SiteDataError:
    if has_images:
        return SiteDataError(
            f"of {len(labels)} files and folders that match labels: {site.labels} none is or holds "
            "a segmentation (SEG) or a structure set (RTSTRUCT)",
            "let the glob labels in site.yml match them; NIfTI labels are paired by their names, "
            "with pair_by: wildcards, folder or patient",
            code="no-labels",
        )
    chosen = f" of which series: {site.series} matches the description" if site.series else ""
    return SiteDataError(
        f"of {len(folders)} folders that match images: {site.images} none directly holds a DICOM "
        f"image{chosen}",
        "let the glob images in site.yml match the folders that hold the slices"
        + (", or correct series" if site.series else ""),
        code="no-images",
    )


def _ambiguous(path: Path, refers: _Uids, meant: Sequence[Path], site: SiteConfig) -> SiteDataError:
    by = "names series in" if refers.series else "names only a frame of reference, that of"
    return SiteDataError(
        f"{_below(path, site)} {by} {len(meant)} folders: "
        + ", ".join(_below(folder, site) for folder in meant[:3]),
        "leave one copy of each series, and choose the series that it was drawn on with the glob "
        "images, or with series: and a part of its SeriesDescription in site.yml",
        code="several-images",
    )


def _below(path: Path, site: SiteConfig) -> str:
    return path.relative_to(site.data_root).as_posix()
