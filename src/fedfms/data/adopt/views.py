"""Pictures in DICOM (X-ray, mammography, ultrasound), each file an image, with their labels.

Labels are segmentations (SEG), which name the picture that they were drawn on, or PNG, TIFF and
masks in DICOM, which are told by their names as those of any pictures are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from fedfms.control import Control
from fedfms.data.adopt.names import glob_literal
from fedfms.data.adopt.pairing import Found, find_pairs, image_at, is_plain_picture
from fedfms.data.adopt.propose import (
    Proposal,
    add_globs,
    add_labels,
    add_patients,
    add_reading,
    in_words,
)
from fedfms.data.adopt.tree import Tree, endings_glob, stem_and_ending
from fedfms.data.formats import Stored
from fedfms.data.numbers import count_of

_LOOKED_AT = 5  # images that say how all are read


@dataclass(frozen=True, slots=True)
class View:
    """What the header of a picture says."""

    patient: str
    series: str
    uid: str  # SOPInstanceUID


@dataclass(slots=True)
class Views:
    """The pictures of a folder, and segmentations with what they refer to.

    of: by file, relative to the root.
    drawn_on: of each segmentation the SOPInstanceUIDs that it names.
    """

    of: dict[str, View] = field(default_factory=dict)
    drawn_on: dict[str, frozenset[str]] = field(default_factory=dict)

    def segmented(self) -> dict[str, str]:
        """Pictures with a segmentation of theirs."""
        by_uid = {view.uid: file for file, view in self.of.items()}
        return {
            by_uid[uid]: label
            for label, uids in self.drawn_on.items()
            for uid in uids
            if uid in by_uid
        }


def propose_masked(
    tree: Tree, views: Views, classes: Sequence[str] | None, control: Control
) -> Proposal | None:
    """Pictures in DICOM whose labels are PNG, TIFF or pictures in DICOM; None where none pair."""
    found = find_pairs(Tree(tree.root, dicom=(*sorted(views.of), *tree.image)), "dicom")
    segmented = views.segmented()
    if found is None or len(found.pairs) < 2 or len(found.pairs) <= len(segmented):
        return None
    proposal = Proposal(
        tree.root,
        f"pictures in DICOM, {in_words(found)}",
        {"format": "dicom"},
        unsure=list(found.unsure),
    )
    add_globs(proposal, found)
    add_labels(proposal, found, tree, None, classes, control)
    taken = [image for image, _ in found.pairs]
    _add_reading(proposal, taken)
    add_patients_of(proposal, {file: views.of[file].patient for file in taken}, found)
    if others := segmented.keys() - set(taken):
        proposal.unsure.append(
            f"{count_of(len(others), 'picture')} more have a segmentation (SEG), which is not "
            "taken; a site.yml reads one kind of labels"
        )
    labels = "PNG or TIFF" if is_plain_picture(found.pairs[0][1]) else "pictures in DICOM, too"
    proposal.seen.insert(
        0, ("DICOM", f"{count_of(len(views.of), 'picture')}, each an image; labels are {labels}")
    )
    return proposal


def propose_segmented(tree: Tree, views: Views) -> Proposal:
    """Pictures in DICOM with segmentations; what names in these mean is still to be added."""
    proposal = Proposal(
        tree.root,
        "pictures in DICOM, segmentations that name them",
        {
            "format": "dicom",
            "images": _glob_of(sorted(views.of), tree.dicom),
            "labels": _glob_of(sorted(views.drawn_on), tree.dicom),
            "pair_by": "reference",
        },
    )
    segmented = views.segmented()
    _add_reading(proposal, sorted(segmented))
    add_patients_of(proposal, {file: views.of[file].patient for file in segmented}, None)
    kinds = f"{count_of(len(views.of), 'picture')}, each an image; {len(views.drawn_on)} labels"
    proposal.seen.insert(0, ("DICOM", kinds))
    return proposal


def _glob_of(files: Sequence[str], every: Collection[str]) -> str:
    """A glob that takes files and no folders: what all names share stays, what differs is a *.

    Others that it takes, such as a segmentation among pictures, are told by what they hold.
    """
    rows = [file.split("/") for file in files]
    endings = {stem_and_ending(row[-1])[1] for row in rows}
    stems = [stem_and_ending(row[-1])[0] for row in rows]
    start = _letters_in_common(stems)
    ending = "" if "" in endings else endings_glob(endings)
    alike = all(stem_and_ending(file)[1] in endings for file in every)
    name = f"*{ending}" if ending and (alike or not start) else f"{glob_literal(start)}*{ending}"
    if len(set(map(len, rows))) > 1:
        return f"**/{name}"
    levels = [
        glob_literal(level[0]) if len(set(level)) == 1 else "*"
        for level in zip(*(row[:-1] for row in rows), strict=True)
    ]
    return "/".join([*levels, name])


def _letters_in_common(names: Sequence[str]) -> str:
    """Of IM0001 and IM0002 IM."""
    found = re.match(r"[^\W\d_]+", names[0])
    start = found.group() if found is not None else ""
    return start if all(name.startswith(start) for name in names) else ""


def _add_reading(proposal: Proposal, files: Sequence[str]) -> None:
    step = max(1, len(files) // _LOOKED_AT)
    images = [image_at(proposal.root / file, "dicom") for file in files[::step][:_LOOKED_AT]]
    some: list[Stored] = [image for image in images if image is not None]
    if some:
        add_reading(proposal, some, is_ct=False, several="contrasts" in proposal.values)


def add_patients_of(
    proposal: Proposal, ids: Mapping[str, str], found: Found | None, what: str = "pictures"
) -> None:
    """A PatientID where it tells patients apart; else what folders and names say.

    Args:
        proposal: gets the expression.
        ids: PatientID of each picture, or folder of a series, by its path; empty where it has none.
        found: how they lie, if names paired them.
        what: is read, for the sentences.
    """
    counts = Counter(ids.values())
    if "" not in counts and len(counts) > 1:
        proposal.seen.append(("a patient is", "a PatientID"))
        return
    add_patients(proposal, [stem_and_ending(file)[0] for file in sorted(ids)], found)
    if "" not in counts:  # one for all, which a program for removing names wrote
        proposal.unsure.append(
            f"all {what} have one PatientID; patient in site.yml says whose each is by its path"
        )
        proposal.values.setdefault("patient", _each(ids))
    else:
        proposal.unsure.append(
            f"{counts['']} of {len(ids)} {what} have no PatientID, and so none counts; names and "
            "folders do"
        )
        if len(counts) > 1:
            proposal.values.setdefault("patient", _each(ids))


def _each(files: Collection[str]) -> str:
    """The expression by which each picture is a patient of its own, by its whole path."""
    return "^(.+/.+)$" if all("/" in file for file in files) else "^(.+)$"
