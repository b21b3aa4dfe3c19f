"""DICOM as archives and planning systems export it: folders of UIDs, RS among CT, SEG elsewhere.

Which label belongs to which series its own references say (data/dicom/references.py). What is left
to find: the folders of series, which of several series has the labels, and what names in them mean.
"""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from pydicom import Dataset
from pydicom.uid import RTStructureSetStorage

from fedfms.contracts.site import Labels, SiteConfig
from fedfms.control import Control
from fedfms.data.adopt.names import class_name, class_names, glob_literal
from fedfms.data.adopt.pairing import find_series_pairs
from fedfms.data.adopt.propose import Proposal, add_globs, add_labels, add_reading
from fedfms.data.adopt.tree import Tree
from fedfms.data.adopt.views import (
    View,
    Views,
    add_patients_of,
    propose_masked,
    propose_segmented,
)
from fedfms.data.content import read_bytes
from fedfms.data.dicom.references import LABEL_KINDS, referenced_files
from fedfms.data.dicom.segmentation import read_segmentation
from fedfms.data.dicom.series import (
    has_many_frames,
    is_beside_images,
    is_picture,
    parsed_dicom,
    read_header,
)
from fedfms.data.dicom.structures import read_structures
from fedfms.data.formats import Stored, read_image
from fedfms.data.grid import Array
from fedfms.data.manifest import Case, scan
from fedfms.data.numbers import count_of
from fedfms.errors import FedfmsError, SiteDataError

_TAGS = [
    *("Modality", "SeriesDescription", "SeriesInstanceUID", "SOPInstanceUID", "PatientID"),
    *("NumberOfFrames", "ImagePositionPatient", "ReferencedSeriesSequence"),
    *("SegmentSequence", "StructureSetROISequence", "ROIContourSequence"),
]
_TOLD_EVERY = 200  # files
_LOOKED_AT = 3  # cases of which images and labels are read
# names of outlines that planning systems need and nobody segments for its own sake
_NO_CLASSES = re.compile(
    r"body|external|couch|skin|patient|tisch|isocent\w*|marker\w*|ref\w*", re.I
)
_INSIDE = 0.95  # share of a structure that lies in another, to be a part of it


@dataclass(slots=True)
class _Archive:
    """What headers say: series by folder, label files with the names in them, pictures.

    patients: PatientID by the folder of a series, empty where there is none.
    slices: how many files are no pictures.
    cine: how many files have many frames without places.
    """

    series: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    patients: dict[str, str] = field(default_factory=dict)
    modalities: Counter[str] = field(default_factory=Counter)
    labels: dict[str, list[str]] = field(default_factory=dict)
    views: Views = field(default_factory=Views)
    slices: int = 0
    cine: int = 0


def propose_dicom(tree: Tree, classes: Sequence[str] | None, control: Control) -> Proposal:
    """A site.yml for a folder of DICOM files, with labels in DICOM or in NIfTI.

    Args:
        tree: the folder.
        classes: names for the structures in their order; None: their own.
        control: told of the progress.

    Raises:
        SiteDataError: "layout-not-seen".
        TaskAborted: somebody asked to stop.
    """
    found = _look(tree, control)
    if not found.series:
        raise _nothing(tree, "none of its DICOM files is an image")
    if found.views.of and (pictures := _of_pictures(tree, found, classes, control)) is not None:
        return pictures
    if not found.slices:
        raise _no_pictures(tree, found)
    if not found.labels:
        if tree.nifti and (proposal := _with_nifti(tree, found, classes, control)) is not None:
            return proposal
        raise _nothing(tree, "it has DICOM images, and no segmentation (SEG) or structure set")
    proposal = Proposal(tree.root, "", {"format": "dicom"})
    _add_globs(proposal, found)
    _add_names(proposal, found, classes)
    _choose_series(proposal, found)
    _add_contents(proposal, found)
    if (several := _several_series(proposal, found)) is not None:
        proposal.needs.append(several)
    _add_patients(proposal, found)
    kinds = f"{count_of(len(found.series), 'folder')} with images, {len(found.labels)} labels"
    proposal.seen.insert(0, ("DICOM", kinds))
    return proposal


def _look(tree: Tree, control: Control) -> _Archive:
    found = _Archive()
    for number, file in enumerate(tree.dicom):
        if number % _TOLD_EVERY == 0:
            control.report("look", number, len(tree.dicom))
        with contextlib.suppress(FedfmsError):
            header = read_header(tree.root / file, _TAGS)
            if header is None:
                continue
            kind = header.file_meta.get("MediaStorageSOPClassUID", "")
            if kind in LABEL_KINDS:
                found.labels[file] = _names_in(header)
                if kind != RTStructureSetStorage:
                    found.views.drawn_on[file] = referenced_files(header)
            elif not is_beside_images(header):
                folder = file.rpartition("/")[0]
                uid = str(header.get("SeriesInstanceUID", ""))
                found.series[folder][uid] = str(header.get("SeriesDescription") or "")
                found.patients[folder] = str(header.get("PatientID") or "").strip()
                found.modalities[str(header.get("Modality") or "")] += 1
                if not is_picture(header):
                    found.slices += 1
                elif has_many_frames(header):
                    found.cine += 1
                else:
                    found.views.of[file] = View(
                        str(header.get("PatientID") or "").strip(),
                        uid,
                        str(header.get("SOPInstanceUID", "")),
                    )
    return found


def _of_pictures(
    tree: Tree, found: _Archive, classes: Sequence[str] | None, control: Control
) -> Proposal | None:
    """Pictures with labels of their own; None where the labels are of slices, or there are none."""
    segmented = found.views.segmented()
    if found.slices and not segmented and (found.labels or tree.nifti):
        return None  # pictures beside series are screenshots
    proposal = propose_masked(tree, found.views, classes, control)
    if proposal is None and segmented:
        own = {label for label in found.labels if label in segmented.values()}
        found.labels = {file: names for file, names in found.labels.items() if file in own}
        proposal = propose_segmented(tree, found.views)
        _add_names(proposal, found, classes)
        _let_meet(proposal)
    if proposal is not None and found.slices:
        proposal.unsure.append(
            f"there are {count_of(found.slices, 'file')} of series of slices, too, which are not "
            "taken; if they are meant, adopt their folder by itself"
        )
    return proposal


def _let_meet(proposal: Proposal) -> None:
    """Whether structures meet in the first pictures."""
    met: Counter[tuple[int, int]] = Counter()
    size: Counter[int] = Counter()
    site = proposal.site
    for case in scan(_with(proposal, unlabelled="pass_over")).cases[:_LOOKED_AT]:
        with contextlib.suppress(FedfmsError):
            image = read_image(case.image, read_bytes(case.image, site), site)
            _count_meetings(_masks(case, image, site), size, met)
    if +met:
        _let_overlap(proposal, size, met)


def _no_pictures(tree: Tree, found: _Archive) -> SiteDataError:
    if found.cine:
        return SiteDataError(
            f"{count_of(found.cine, 'DICOM file')} in {tree.root} hold many frames that lie "
            "nowhere in a patient, such as cine loops",
            "export the single frames that were drawn on as DICOM or PNG, each an image by itself, "
            "with their labels; then adopt the folder again",
            code="layout-not-seen",
        )
    outlines = len(found.labels) - len(found.views.drawn_on)
    return SiteDataError(
        f"{tree.root} holds {count_of(len(found.views.of), 'picture')} in DICOM, and no labels of "
        "them" + (f"; of pictures no structure sets are read ({outlines})" if outlines else ""),
        "name the folder that holds images and labels both; labels of pictures are PNG, TIFF or "
        "masks in DICOM, called as the picture with a word such as _mask or in a folder of their "
        "own, or segmentations (SEG) that name it",
        code="layout-not-seen",
    )


def _names_in(label: Dataset) -> list[str]:
    """Names of what is drawn in a segmentation or structure set."""
    if label.file_meta.get("MediaStorageSOPClassUID", "") != RTStructureSetStorage:
        return [str(one.get("SegmentLabel") or "") for one in label.get("SegmentSequence") or []]
    drawn = {
        int(one.ReferencedROINumber)
        for one in label.get("ROIContourSequence") or []
        if one.get("ContourSequence")
    }
    return [
        str(one.get("ROIName") or "")
        for one in label.get("StructureSetROISequence") or []
        if int(one.ROINumber) in drawn
    ]


# ------------------------------------------------------------------------------------------ globs


def _add_globs(proposal: Proposal, found: _Archive) -> None:
    folders = sorted(found.series)
    of_labels = sorted({file.rpartition("/")[0] for file in found.labels})
    images = _glob_of(folders)
    if set(of_labels) <= set(folders):  # among the slices
        proposal.layout = "DICOM, labels in the folders of their series"
        labels = _among(found, images) if images != "**/*" else images
    elif (
        len({*map(_depth, folders), *map(_depth, of_labels)}) == 1 and _glob_of(of_labels) == images
    ):
        proposal.layout = "DICOM, labels in folders of their own series"
        labels = images
    else:
        proposal.layout = "DICOM, labels in other folders"
        labels = _files_glob(sorted(found.labels))
    proposal.values |= {"images": images, "labels": labels, "pair_by": "reference"}


def _add_patients(proposal: Proposal, found: _Archive) -> None:
    """A PatientID where all series have one, and not all the same; else what folders say."""
    cases = scan(_with(proposal, unlabelled="pass_over")).cases
    folders = [case.image.relative_to(proposal.root).as_posix() for case in cases]
    ids = {folder: found.patients.get(folder, "") for folder in folders}
    if "**" not in proposal.values["images"] or (
        "" not in ids.values() and len({*ids.values()}) > 1
    ):
        add_patients_of(proposal, ids, None, "series")
        return
    proposal.unsure.append(
        "PatientIDs do not tell patients apart, and folders lie in several depths: each series is "
        "taken for a patient; if some are of one, patient in site.yml says it"
    )


def _depth(folder: str) -> int:
    return len(folder.split("/"))


def _glob_of(folders: Sequence[str]) -> str:
    """The glob of folders: what all share stays, what differs is a *."""
    rows = [folder.split("/") for folder in folders]
    if len(set(map(len, rows))) > 1:
        return "**/*"
    levels = [
        glob_literal(level[0]) if len(set(level)) == 1 and len(rows) > 1 else "*"
        for level in zip(*rows, strict=True)
    ]
    return "/".join(levels if "*" in levels else [*levels[:-1], "*"])


def _files_glob(files: Sequence[str]) -> str:
    folders = _glob_of([file.rpartition("/")[0] or "." for file in files])
    name = "*.dcm" if all(file.endswith(".dcm") for file in files) else "*"
    return name if folders in (".", "*") and "/" not in files[0] else f"{folders}/{name}"


def _among(found: _Archive, images: str) -> str:
    """RS.* beside CT.*: labels that begin alike, and no slice does; else the folders themselves."""
    names = [PurePosixPath(file).name for file in found.labels]
    start = re.match(r"[A-Za-z]+[._-]", names[0])
    if start is None or not all(name.startswith(start.group()) for name in names):
        return images
    ending = ".dcm" if all(name.endswith(".dcm") for name in names) else ""
    alike = f"{glob_literal(start.group())}*{ending}"
    if not all(fnmatch.fnmatchcase(name, alike) for name in names):  # of seg.dcm
        alike = f"{glob_literal(start.group())}*"
    return f"{images}/{alike}"


# ----------------------------------------------------------------------------------------- series


def _choose_series(proposal: Proposal, found: _Archive) -> None:
    """Of several series those that have labels, by their description where that tells."""
    site = proposal.site
    first = scan(site)
    codes = {problem.code for problem in first.problems}
    several = any(len(series) > 1 for series in found.series.values())
    if not several and not codes & {"unpaired-files"}:
        return
    passing = scan(_with(proposal, unlabelled="pass_over"))
    labelled = {case.image.relative_to(proposal.root).as_posix() for case in passing.cases}
    if not labelled:
        return
    with_labels, without = _descriptions(proposal, found, labelled)
    if with_labels and not with_labels & without and "" not in with_labels:
        options = sorted(map(re.escape, with_labels))
        series = f"^{options[0]}$" if len(options) == 1 else f"^({'|'.join(options)})$"
        again = scan(_with(proposal, series=series))
        if not {problem.code for problem in again.problems} & {"unpaired-files", "no-images"}:
            proposal.values["series"] = series
            proposal.seen.append(("series", f"labels are on {', '.join(sorted(with_labels))}"))
            if without:
                proposal.seen.append(("not labelled", ", ".join(sorted(without))[:200]))


def _several_series(proposal: Proposal, found: _Archive) -> SiteDataError | None:
    """Folders of several series of which a description does not choose one."""
    series = proposal.values.get("series")
    mixed = [
        folder or "."
        for folder, of in sorted(found.series.items())
        if sum(series is None or bool(re.search(series, one)) for one in of.values()) > 1
    ]
    if not mixed:
        return None
    return SiteDataError(
        f"{count_of(len(mixed), 'folder')} hold slices of several series, and their "
        f"SeriesDescription does not say which is meant: {', '.join(mixed[:3])}",
        "put each series with its label into a folder of its own, or export study by study",
        code="several-series",
    )


def _with(proposal: Proposal, **changes: Any) -> SiteConfig:
    return Proposal(proposal.root, "", {**proposal.values, **changes}).site


def _descriptions(
    proposal: Proposal, found: _Archive, labelled: set[str]
) -> tuple[set[str], set[str]]:
    """SeriesDescriptions of series to which labels refer, and of those to which none does."""
    from fedfms.data.dicom.drawn import referenced_series

    tags = ["ReferencedSeriesSequence", "ReferencedFrameOfReferenceSequence"]
    meant: set[str] = set()
    for file in found.labels:
        with contextlib.suppress(FedfmsError):
            header = read_header(proposal.root / file, tags)
            if header is not None:
                meant |= {
                    str(one.get("SeriesInstanceUID", "")) for one in referenced_series(header)
                }
    of: tuple[set[str], set[str]] = (set(), set())
    for folder, series in found.series.items():
        for uid, description in series.items():
            is_meant = uid in meant if meant else folder in labelled
            of[0 if is_meant else 1].add(description)
    return of


# ------------------------------------------------------------------------------------------ names


def _add_names(proposal: Proposal, found: _Archive, classes: Sequence[str] | None) -> None:
    """Which names in labels are which class."""
    counts: Counter[str] = Counter()
    spellings: dict[str, set[str]] = defaultdict(set)
    left_out: set[str] = set()
    of = _class_of_names(list(found.labels.values()))
    for names in found.labels.values():
        for name in sorted(set(names)):
            plain = name.strip()
            if _NO_CLASSES.fullmatch(plain) and len(set(names)) > 1:
                left_out.add(plain)
                continue
            counts[of[plain]] += 1
            spellings[of[plain]].add(plain)
    order = [name for name, _ in counts.most_common()]
    if classes and len(classes) == len(order):
        named = dict(zip(order, classes, strict=True))
    else:
        named = {name: name for name in order}
        if classes:
            proposal.unsure.append(
                f"{count_of(len(classes), 'name')} of classes were given, and there are "
                f"{len(order)}: {', '.join(order[:12])}; the names given are not taken"
            )
        proposal.unsure.append(
            "the names of classes are those in the labels; ask the coordinator for the job's, and "
            "correct classes"
        )
    proposal.values["classes"] = {named[name]: (n,) for n, name in enumerate(order, start=1)}
    label_names: dict[int, list[str]] = {
        n: sorted(spellings[name]) for n, name in enumerate(order, start=1)
    }
    if left_out:
        label_names[0] = sorted(left_out)
        proposal.unsure.append(
            f"left out, since nobody segments them: {', '.join(sorted(left_out))}"
        )
    proposal.values["label_names"] = label_names
    rare = [name for name in order if counts[name] * 2 < len(found.labels)]
    if rare:
        proposal.unsure.append(
            f"in less than half of the labels: {', '.join(rare[:6])}; other spellings of one thing "
            "belong in one line of label_names"
        )
    merged = [sorted(spellings[name]) for name in order if len(spellings[name]) > 1]
    if merged:
        some = "; ".join(" = ".join(names) for names in merged[:3])
        proposal.unsure.append(f"taken for one name each: {some}")


def _class_of_names(files: Sequence[Sequence[str]]) -> dict[str, str]:
    """The class of each name in label files: GTV and GTV1 are one, if no file has both."""
    rows = [{name.strip() for name in names} for names in files]
    every = sorted({name for row in rows for name in row})
    plain = {name: class_name(re.sub(r"\d+$", "", name) or name) for name in every}
    apart = {
        found
        for row in rows
        for found, count in Counter(plain[name] for name in row).items()
        if count > 1
    }
    own = class_names(name for name in every if plain[name] in apart)
    return {name: own.get(name, plain[name]) for name in every}


# --------------------------------------------------------------------------------------- contents


def _add_contents(proposal: Proposal, found: _Archive) -> None:
    """Whether structures meet, the plane and the intensity, from the first cases."""
    site = proposal.site
    images: list[Stored] = []
    met: Counter[tuple[int, int]] = Counter()
    size: Counter[int] = Counter()
    for case in scan(site).cases[:_LOOKED_AT]:
        with contextlib.suppress(FedfmsError):
            image = read_image(case.image, read_bytes(case.image, site), site)
            images.append(image)
            _count_meetings(_masks(case, image, site), size, met)
    if images:
        add_reading(proposal, images, is_ct=_are_ct(images, found), several=False)
    if not +met:
        return
    _let_overlap(proposal, size, met)


def _are_ct(images: Sequence[Stored], found: _Archive) -> bool:
    """Whether the images that were read are CT by their headers; a PET beside a CT is not."""
    kinds = {
        str(image.series.headers[0].get("Modality") or "")
        for image in images
        if image.series is not None
    } - {""}
    return kinds == {"CT"} if kinds else "CT" in found.modalities


def _count_meetings(
    masks: Mapping[int, Array], size: Counter[int], met: Counter[tuple[int, int]]
) -> None:
    """Add the voxels of each structure, and those that it shares with others."""
    for value, mask in masks.items():
        size[value] += int(mask.sum())
        for other, also in masks.items():
            if other != value:
                met[value, other] += int((mask & also).sum())


def _masks(case: Case, image: Stored, site: SiteConfig) -> dict[int, Array]:
    """Each structure of a case's label by itself."""
    data = read_bytes(case.label, site)
    assert image.series is not None
    if not isinstance(data, bytes):
        return {}
    label = parsed_dicom(case.label, data)
    is_outlines = label.file_meta.get("MediaStorageSOPClassUID", "") == RTStructureSetStorage
    read = read_structures if is_outlines else read_segmentation
    drawn = read(case.label, label, site.part(Labels), image.series)
    return {value: one.mask for value, one in drawn.items()}


def _let_overlap(proposal: Proposal, size: Counter[int], met: Counter[tuple[int, int]]) -> None:
    """Structures that share voxels: the smaller stands above, and is a part of what it lies in."""
    classes: dict[str, tuple[int, ...]] = proposal.values["classes"]
    names = {values[0]: name for name, values in classes.items()}
    order = sorted(names, key=lambda value: -size[value])
    number = {old: new for new, old in enumerate(order, start=1)}
    proposal.values["classes"] = {
        names[old]: (
            number[old],
            *sorted(
                number[part]
                for part in order
                if part != old
                and number[part] > number[old]
                and size[part]
                and met[part, old] >= _INSIDE * size[part]
            ),
        )
        for old in order
    }
    label_names = proposal.values["label_names"]
    proposal.values["label_names"] = {
        **{number[old]: label_names[old] for old in order},
        **({0: label_names[0]} if 0 in label_names else {}),
    }
    proposal.values["overlap"] = "highest"
    partly = [
        f"{names[one]} and {names[other]}"
        for (one, other), count in sorted(met.items())
        if one < other and count and count < _INSIDE * min(size[one], size[other])
    ]
    proposal.unsure.append(
        "structures share voxels; there the smaller one stands (overlap: highest), and what lies "
        "in another is a part of it" + (f"; not wholly: {', '.join(partly[:4])}" if partly else "")
    )


# --------------------------------------------------------------------------------- labels in NIfTI


def _with_nifti(
    tree: Tree, archive: _Archive, classes: Sequence[str] | None, control: Control
) -> Proposal | None:
    """Series in DICOM whose labels are NIfTI, paired by their names."""
    found = find_series_pairs(sorted(archive.series), tree)
    if found is None:
        return None
    proposal = Proposal(
        tree.root,
        "DICOM, labels in NIfTI" + (", a file for each class" if len(found.labels) > 1 else ""),
        {"format": "dicom"},
        unsure=list(found.unsure),
    )
    add_globs(proposal, found)
    proposal.values["pair_by"] = found.pair_by  # in DICOM the default is another
    add_labels(proposal, found, tree, None, classes, control)
    site = proposal.site
    images = []
    for file, _ in found.pairs[:_LOOKED_AT]:
        with contextlib.suppress(FedfmsError):
            images.append(read_image(tree.root / file, read_bytes(tree.root / file, site), site))
    if images:
        several = len(found.images) > 1
        add_reading(proposal, images, is_ct=_are_ct(images, archive), several=several)
    _add_patients(proposal, archive)
    return proposal


def _nothing(tree: Tree, what: str) -> SiteDataError:
    return SiteDataError(
        f"how images and labels lie in {tree.root} cannot be seen: {what} "
        f"({len(tree.dicom)} DICOM files, {len(tree.nifti)} NIfTI, {len(tree.image)} pictures)",
        "name the folder that holds images and labels both; export the segmentations or structure "
        "sets with the series"
        + (
            "; labels drawn as PNG or other pictures are not read for a series in DICOM: save "
            "those of a series as one NIfTI on its grid"
            if tree.image
            else ""
        ),
        code="layout-not-seen",
    )
