"""A folder to the values of a site.yml: the layout, what labels mean, how images are read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fedfms.contracts.decode import from_dict
from fedfms.contracts.site import ImageFormat, SiteConfig, values_of_files
from fedfms.control import Control
from fedfms.data.adopt import known
from fedfms.data.adopt.names import (
    CONTRASTS,
    LABEL_WORDS,
    VAGUE_WORDS,
    class_name,
    class_names,
    contrast_of,
    known_words,
    words,
    words_of,
)
from fedfms.data.adopt.pairing import (
    Found,
    by_content,
    find_pairs,
    fits,
    image_at,
    is_plain_picture,
    label_at,
    label_error,
    values_in,
)
from fedfms.data.adopt.tree import (
    Tree,
    endings,
    folder_wildcards,
    glob_stem_and_ending,
    groups_of,
    look,
    stem_and_ending,
)
from fedfms.data.content import another_kind, read_bytes
from fedfms.data.formats import Stored, read_image
from fedfms.data.manifest import Scan, glob_expression, scan
from fedfms.data.numbers import count_of
from fedfms.data.pairs import WILDCARD
from fedfms.errors import SiteDataError

_Of = TypeVar("_Of")
_SOFT = 5  # values of a mask from which on it may be interpolated
_SOME = 5  # images that say how all are read
_NUMBERED = 24  # label values from which on they are numbers of objects and not of classes
_NO_IMAGES = ("a text", "a document", "a Python")  # kinds of files that lie beside images
_BRAIN = ("t1", "t1ce", "t2", "flair")
# of BraTS and FeTS: 4, or 3 in releases from 2023 on, is the enhancing tumour
_TUMOUR = {1: "necrotic_core", 2: "oedema", 3: "enhancing_tumour", 4: "enhancing_tumour"}


@dataclass(slots=True)
class Proposal:
    """What `fedfms adopt` writes, and says.

    values: of the SiteConfig, as site.yml has them.
    seen: name and text of each line of the table.
    unsure: sentences on what a person should look at.
    needs: what keeps this site.yml from working, problem and fix; empty if it works.
    """

    root: Path
    layout: str
    values: dict[str, Any]
    seen: list[tuple[str, str]] = field(default_factory=list)
    unsure: list[str] = field(default_factory=list)
    needs: list[SiteDataError] = field(default_factory=list)

    @property
    def site(self) -> SiteConfig:
        """The site that it describes."""
        return from_dict(SiteConfig, {**self.values, "data_root": self.root}, "the new site.yml")


def propose(
    root: Path, classes: Sequence[str] | None = None, control: Control | None = None
) -> Proposal:
    """Look at a folder; nothing in it is changed.

    Args:
        root: the folder.
        classes: names for the label values in their order; None: as far as they can be seen.
        control: told of the progress as phases "look" and "labels".

    Raises:
        SiteDataError: "layout-not-seen", with what is there; "no-data-root", "unreadable-folder".
        TaskAborted: somebody asked to stop.
    """
    control = control or Control()
    root = root.resolve()
    tree = look(root, control)
    if len(sets := known.data_sets(tree)) > 1:
        raise SiteDataError(
            f"{root} holds {len(sets)} data sets (folders with imagesTr and labelsTr): "
            f"{', '.join(sets[:4])}",
            "adopt one of these folders; a site.yml describes one task",
            code="layout-not-seen",
        )
    said = known.dataset_json(tree)
    layout, found = _layout(tree, said)
    if found is None and tree.dicom:
        from fedfms.data.adopt.archive import propose_dicom  # pydicom takes a second to import

        try:
            return _finished(propose_dicom(tree, classes, control), tree)
        except SiteDataError as error:
            raise _with_pictures(error, tree) from None
    if found is None:
        raise _not_seen(tree)
    unsure = [*found.unsure, *_other_parts(tree, found)]
    proposal = Proposal(root, layout, {"format": found.format}, unsure=unsure)
    add_globs(proposal, found)
    add_labels(proposal, found, tree, said, classes, control)
    _add_reading(proposal, found, tree, said)
    add_patients(proposal, [_key(pair[0]) for pair in found.pairs], found)
    return _finished(proposal, tree)


def _layout(tree: Tree, said: known.DatasetJson | None) -> tuple[str, Found | None]:
    if (found := known.nnunet(tree, said)) is not None:
        numbered = any(re.search(r"_\d{4}\.", glob) for glob in found.images.values())
        return ("nnU-Net raw" if numbered else "Medical Segmentation Decathlon"), found
    if readings := known.bids(tree):
        return "BIDS", _of_bids(readings, tree)
    for format in ("nifti", "image", "npy"):
        if format == "image" and tree.dicom:
            continue  # pictures beside a series are screenshots
        found = find_pairs(tree, format) if tree.of(format) else None
        if found is not None and len(found.pairs) > 1:
            return in_words(found), replace(found, unsure=(*found.unsure, *_besides(tree, format)))
    return "", None


def _with_pictures(error: SiteDataError, tree: Tree) -> SiteDataError:
    """The error for a folder of DICOM; it names pictures that have labels."""
    found = find_pairs(tree, "image") if error.code == "layout-not-seen" and tree.image else None
    if found is None or len(found.pairs) < 2:
        return error
    return SiteDataError(
        f"{error.problem}; besides there are {count_of(len(found.pairs), 'picture')} with labels "
        f"({next(iter(found.images.values()))})",
        "if these pictures are meant, adopt their folder by itself, or move the DICOM files away "
        f"({tree.dicom[0]}); else {error.fix}",
        code=error.code,
    )


def _other_parts(tree: Tree, found: Found) -> Iterator[str]:
    """Sentences on labelled cases in imagesVa, imagesTs and folders of further data sets."""
    taken = next(iter(found.labels.values())).rpartition("/")[0]
    for part, meaning in (("Va", "validation"), ("Ts", "test")):
        counts = Counter(
            file.rpartition("/")[0]
            for file in tree.of(found.format)
            if file.rpartition("/")[0].endswith(f"labels{part}")
        )
        for folder, count in sorted(counts.items()):
            if folder != taken and tree.root.joinpath(folder).with_name(f"images{part}").is_dir():
                yield (
                    f"{count_of(count, 'label')} in {folder} (for {meaning}) and their images are "
                    f"not taken: images and labels are those of {taken} alone. To take them put "
                    "them there, and write their names under split"
                )


def _besides(tree: Tree, format: ImageFormat) -> Iterator[str]:
    """Sentences on files of other formats that may be another task."""
    for other, what in (("image", "pictures"), ("npy", "arrays"), ("nifti", "volumes")):
        if other == format or not tree.of(other):  # type: ignore[arg-type]
            continue
        found = find_pairs(tree, other)  # type: ignore[arg-type]
        if found is not None and len(found.pairs) > 1:
            yield (
                f"there are {len(found.pairs)} {what} with labels, too, which are not taken "
                f"({next(iter(found.images.values()))}); if they are meant, adopt their folder "
                "by itself"
            )
    if tree.dicom and format == "nifti":
        yield (
            f"there are {count_of(len(tree.dicom), 'DICOM file')}, too, which are not taken; if "
            "they are meant, adopt their folder by itself"
        )


def _of_bids(readings: Sequence[Found], tree: Tree) -> Found:
    """The reading with most pairs that lie on one grid, and what else there is."""
    first = next((one for one in readings if fits(one, tree)), readings[0])
    alike = [
        one
        for one in readings
        if one.labels == first.labels and len(one.pairs) * 2 >= len(first.pairs) and fits(one, tree)
    ]
    unsure = []
    others = sorted({one.labels[""] for one in readings} - {first.labels[""]})
    if others:
        unsure.append(
            f"there are other segmentations, too: {', '.join(others[:3])}; taken is "
            f"{first.labels['']}"
        )
    named = {contrast_of(one.images[""].replace("*", " ")) or "": one for one in alike}
    if len(alike) < 2 or len(named) < len(alike) or "" in named:
        if len(alike) > 1:
            rest = [one.images[""] for one in alike if one is not first]
            unsure.append(f"other images pair with it, too: {', '.join(rest[:3])}")
        return replace(first, unsure=tuple(unsure))
    every = {label for one in alike for _, label in one.pairs}
    lacking = sum(any(f not in {p[1] for p in one.pairs} for one in alike) for f in every)
    return replace(
        max(alike, key=lambda one: len(one.pairs)),
        images={name: named[name].images[""] for name in sorted(named)},
        alone=max(one.alone for one in alike),
        lacking=lacking,
        unsure=tuple(unsure),
    )


def in_words(found: Found) -> str:
    """How images and labels lie."""
    image = next(iter(found.images.values()))
    label = next(iter(found.labels.values()))
    if len(found.images) > 1:
        how = f"{len(found.images)} contrasts of a case"
    elif folder_wildcards(image) > bool(found.parts or found.test):
        how = "one folder a case"
    elif image.rpartition("/")[0] == label.rpartition("/")[0]:
        how = "labels beside their images"
    else:
        how = "images and labels in folders of their own"
    return how + (", a label file for each class" if len(found.labels) > 1 else "")


def _key(file: str) -> str:
    return stem_and_ending(file)[0]


# ----------------------------------------------------------------------------------------- values


def add_globs(proposal: Proposal, found: Found) -> None:
    """Where images and labels are, what pairs them, and the parts of a split."""
    values = proposal.values
    if len(found.images) > 1:
        values["contrasts"] = dict(found.images)
        if found.lacking:
            values["missing_contrast"] = "mean"
            proposal.unsure.append(
                f"{count_of(found.lacking, 'case')} of {len(found.pairs)} lack a contrast; the "
                "mean of the others takes its place (missing_contrast)"
            )
    values["images"] = next(iter(found.images.values()))
    values["labels"] = next(iter(found.labels.values()))
    if len(found.labels) > 1:
        values["label_files"] = dict(found.labels)
    if found.pair_by != "wildcards":
        values["pair_by"] = found.pair_by
    if found.parts or found.test:
        lists = {"validation": found.parts, "test": found.test}
        values["split"] = {side: list(names) for side, names in lists.items() if names}


def add_labels(
    proposal: Proposal,
    found: Found,
    tree: Tree,
    said: known.DatasetJson | None,
    names: Sequence[str] | None,
    control: Control,
) -> None:
    """Classes and their values, from dataset.json or from the label files themselves."""
    values = proposal.values
    if "label_files" in values:
        found = _with_given_names(proposal, found, names)
        _add_class_files(proposal, found, tree, control)
        return
    occurring: Counter[int] = Counter()
    unreadable: list[str] = []
    files = sorted({label for _, label in found.pairs})
    for number, file in enumerate(files):
        control.report("labels", number, len(files))
        held = values_in(tree.root / file, found.format)
        if held is None:
            unreadable.append(file)
        occurring.update(held or ())
    control.report("labels", len(files), len(files))
    if unreadable and len(unreadable) == len(files):
        proposal.needs.append(_unread_label(tree.root / unreadable[0], found.format, len(files)))
    elif unreadable:
        proposal.unsure.append(
            f"{count_of(len(unreadable), 'label file')} cannot be read as labels; the first is "
            f"{unreadable[0]}; fedfms check-data says why"
        )
    proposal.seen.append(("label values", _some(sorted(occurring))))
    drawn = sorted(value for value in occurring if value != 0)
    if files and not drawn and not unreadable:
        proposal.unsure.append("label files hold nothing but 0: there is nothing drawn in them")
    if said is not None and said.classes:
        of_file = {value for given in said.classes.values() for value in given}
        if set(drawn) <= of_file | set(said.ignored):
            values["classes"] = _renamed(said.classes, names, proposal)
            if said.ignored:  # nnU-Net, documentation/ignore_label.md
                values["void"] = said.ignored
                proposal.seen.append(("teaches nothing", f"{_some(said.ignored)} (ignore)"))
            return
        proposal.unsure.append(
            f"label files hold {_some(drawn)}, and dataset.json says {_some(sorted(of_file))}"
        )
    if proposal.layout == "BIDS" and not names:
        of_table = known.bids_names(tree, files)
        if drawn and set(drawn) <= of_table.keys():
            classes: dict[str, tuple[int, ...]] = {}
            name_of = class_names([of_table[value] for value in drawn])
            for value in drawn:
                name = name_of[of_table[value]]
                classes[name] = (*classes.get(name, ()), value)
            values["classes"] = classes
            return
    if (masks := _interpolated(drawn, [tree.root / file for file in files], found)) is not None:
        low, high = masks
        base = names[0] if names and len(names) == 1 else _word_of_labels(found)
        values["classes"] = {base: high}
        values["background"] = (0, *low)
        proposal.unsure.append(
            f"labels hold {len(drawn)} values, and those between 0 and {drawn[-1]} only at edges: "
            f"interpolated masks. Values from {high[0]} on are taken for {base}, those below for "
            "background; better is to threshold the masks, and adopt the folder again"
        )
        return
    values["classes"] = _classes(drawn, names, found, proposal)


def _interpolated(
    drawn: Sequence[int], files: Sequence[Path], found: Found
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Of masks that were smoothed or scaled the values of background and class; None of others."""
    if found.format not in ("image", "npy", "dicom") or len(drawn) < _SOFT or drawn[0] < 0:
        return None
    highest, between, inner = drawn[-1], 0, 0
    if highest not in (100, 255):
        return None
    for file in files[:_SOME]:
        label = label_at(file, found.format)
        if label is None:
            continue
        middle = label.values[:, 1:-1, 1:-1]
        is_between = (middle > 0) & (middle < highest)
        is_inner = is_between.copy()  # all around is of one value, as within an object
        for axis, step in ((1, 1), (1, -1), (2, 1), (2, -1)):
            is_inner &= np.roll(label.values, step, axis)[:, 1:-1, 1:-1] == middle
        between += int(is_between.sum())
        inner += int(is_inner.sum())
    if inner * 20 > between:
        return None
    half = (highest + 1) // 2
    return (
        tuple(value for value in drawn if value < half),
        tuple(value for value in drawn if value >= half),
    )


def _unread_label(path: Path, format: ImageFormat, count: int) -> SiteDataError:
    """Why no label can be read, of the first."""
    error = label_error(path, format)
    if error is None:
        return SiteDataError(f"{path} cannot be read", "look at it with fedfms check-data")
    return SiteDataError(
        f"none of {count_of(count, 'label file')} can be read; the first: {error.problem}",
        f"{error.fix}; then adopt the folder again",
        code=error.code,
    )


def _with_given_names(proposal: Proposal, found: Found, names: Sequence[str] | None) -> Found:
    """With label files by the names that were given for classes, in their order."""
    renamed = _renamed(found.labels, names, proposal)
    if renamed != found.labels:
        proposal.values["label_files"] = dict(renamed)
        found = replace(found, labels=renamed)
    return found


def _renamed(
    classes: Mapping[str, _Of], names: Sequence[str] | None, proposal: Proposal
) -> dict[str, _Of]:
    """Classes by the names that were given, in their order; said where these do not fit."""
    if not names:
        return dict(classes)
    if len(names) == len(classes):
        return dict(zip(names, classes.values(), strict=True))
    proposal.unsure.append(
        f"{count_of(len(names), 'name')} of classes were given, and there are {len(classes)}: "
        f"{', '.join([*classes][:12])}; the names given are not taken"
    )
    return dict(classes)


def _classes(
    drawn: Sequence[int], names: Sequence[str] | None, found: Found, proposal: Proposal
) -> dict[str, tuple[int, ...]]:
    """Names for label values: given, known, or made of what labels are called."""
    if names and len(names) == len(drawn):
        return {name: (value,) for name, value in zip(names, drawn, strict=True)}
    if names:
        proposal.unsure.append(
            f"{count_of(len(names), 'name')} of classes were given, and there are "
            f"{count_of(len(drawn), 'label value')}: {_some(drawn)}"
        )
    if set(_BRAIN) <= found.images.keys() and drawn and set(drawn) <= set(_TUMOUR):
        proposal.unsure.append("the names of the classes are those of BraTS for these values")
        return {_TUMOUR[value]: (value,) for value in drawn}
    base = _word_of_labels(found)
    proposal.unsure.append(
        "the names of classes are the job's; ask the coordinator for them and correct classes"
    )
    if len(drawn) > _NUMBERED:
        proposal.unsure.append(
            f"labels hold {len(drawn)} values: taken for numbers of objects of one class"
        )
        low = min(drawn)
        return {base: tuple(range(1, 32768)) if low > 0 else tuple(drawn)}
    if len(drawn) <= 1:
        return {base: tuple(drawn) or (1,)}
    return {f"{base}_{value}".replace("-", "minus_"): (value,) for value in drawn}


def _word_of_labels(found: Found) -> str:
    """What is drawn, as far as the labels' names say: of *_liver_mask liver."""
    image, label = (next(iter(globs.values())) for globs in (found.images, found.labels))
    for key in ("label", "seg"):  # of BIDS
        if (entity := re.search(rf"_{key}-([A-Za-z0-9+]+)", label)) is not None:
            return class_name(entity.group(1))
    if re.search(r"(^|/)sub-\*/", label):  # other entities say nothing of what is drawn
        return "foreground"
    of_image = {word for word, *_ in known_words(image)}
    name = glob_stem_and_ending(label.rpartition("/")[2])[0].replace("*", " ")
    own = [
        word
        for word, _, _, is_known in known_words(name)
        if not is_known and word not in of_image and not word.isdigit() and len(word) > 2
    ]
    return class_name("_".join(own)) if own else "foreground"


def _add_class_files(proposal: Proposal, found: Found, tree: Tree, control: Control) -> None:
    """Whether classes that have a file each share voxels in the first cases."""
    overlap = "refuse"
    main = next(iter(found.labels.values()))
    files = sorted({label for _, label in found.pairs})
    for number, file in enumerate(files[:_SOME]):
        control.report("labels", number, min(len(files), _SOME))
        count: Any = 0
        for pattern in found.labels.values():
            path = _of_same_case(tree.root, file, main, pattern)
            label = None if path is None else label_at(path, found.format)
            if label is not None and label.values.shape == (np.shape(count) or label.values.shape):
                count = count + (label.values != 0)
        if np.max(count) > 1:
            overlap = "keep" if len(found.labels) <= 12 else "highest"
    if overlap != "refuse":
        proposal.values["overlap"] = overlap
        proposal.unsure.append(
            "classes share voxels; a voxel has all of its classes (overlap: keep)"
            if overlap == "keep"
            else "classes share voxels; the last of them stands there (overlap: highest)"
        )
    proposal.values["classes"] = values_of_files(found.labels, overlap)
    proposal.seen.append(("classes", f"{len(found.labels)}, a file for each"))


def _of_same_case(root: Path, file: str, pattern: str, other: str) -> Path | None:
    """Of a file that a glob matches the one that another glob matches of the same case."""
    found = glob_expression(pattern).fullmatch(file)
    if found is None:
        return None
    parts = iter(found.groups())
    path = root / WILDCARD.sub(lambda wildcard: next(parts, wildcard.group()), other)
    if path.is_file():
        return path
    return next(path.parent.glob(other.rpartition("/")[2]), None)


def _add_reading(
    proposal: Proposal, found: Found, tree: Tree, said: known.DatasetJson | None
) -> None:
    """Plane, channels and intensity, from some of the images."""
    step = max(1, len(found.pairs) // _SOME)
    images = [image_at(tree.root / file, found.format) for file, _ in found.pairs[::step][:_SOME]]
    some = [image for image in images if image is not None]
    if not some:
        proposal.needs.append(_unread(proposal, tree.root / found.pairs[0][0]))
        return
    says_ct = said is not None and any("CT" in name.upper() for name in said.channels.values())
    add_reading(proposal, some, is_ct=says_ct, several=len(found.images) > 1)


def _unread(proposal: Proposal, path: Path) -> SiteDataError:
    """Why the first image cannot be read; for the Decathlon's volumes of several channels, the way
    out."""
    try:
        read_image(path, read_bytes(path, proposal.site), proposal.site)
    except SiteDataError as error:
        if error.code != "not-3d":
            return error
        return SiteDataError(
            error.problem,
            "of a task of the Decathlon, fedfms prepare decathlon --channel N cuts one channel "
            "out; else save each channel as a file of its own, and adopt the folder with these",
            code=error.code,
        )
    return SiteDataError(f"{path} cannot be read", "look at it with fedfms check-data")


def add_reading(proposal: Proposal, some: Sequence[Stored], *, is_ct: bool, several: bool) -> None:
    """Plane, channels and intensity that fit images.

    Args:
        proposal: gets them.
        some: of the images.
        is_ct: something says that they are of computed tomography.
        several: they are contrasts, each a grey channel.
    """
    values = proposal.values
    of_pictures = values["format"] == "dicom" and not any(one.is_volume for one in some)
    if (values["format"] in ("image", "npy") or of_pictures) and not several:
        coloured = [one for one in some if one.values.ndim == 4 and not _is_colourless(one)]
        if coloured:
            values["channels"] = "rgb"
        if all(_has_8_bits(one) for one in some):
            values["intensity"] = {"rule": "range", "low": 0, "high": 255}
        proposal.seen.append(("channels", "colours" if coloured else "gray"))
    if values["format"] in ("nifti", "dicom") and not of_pictures:
        planes = Counter(plane for plane in map(_plane_of, some) if plane is not None)
        plane = planes.most_common(1)[0][0] if planes else "axial"
        if plane != "axial":
            values["plane"] = plane
        spacing = " x ".join(f"{size:.2g}" for size in some[0].spacing[1:])
        proposal.seen.append(
            (
                "plane",
                f"{plane}, where voxels are finest ({spacing} mm)"
                if plane == "axial"
                else f"{plane}, where voxels are finest",
            )
        )
        low, high = (np.median([f(one.values) for one in some]) for f in (np.min, np.max))
        looks_so = values["format"] == "nifti" and low <= -900 and high >= 200
        contrasts = values.get("contrasts") or {}
        if (is_ct or looks_so) and not contrasts.keys() <= {"ct", "cta"}:
            proposal.unsure.append(
                f"one of {', '.join(contrasts)} is CT; all are read by percentiles, since one "
                "window does not fit all (intensity)"
            )
        elif is_ct or looks_so:
            values["intensity"] = {"rule": "window", "center": 40, "width": 400}
            proposal.unsure.append(
                "CT is read by a window for soft tissue, centre 40 and width 400; lungs need "
                "-600 and 1500, bones 400 and 1800 (intensity)"
            )
            proposal.seen.append(("intensity", "CT, window 40 : 400"))


def _has_8_bits(image: Stored) -> bool:
    """Whether an image's values go from 0 to 255, by what could be stored and not by what is:
    fractions from 0 to 1 and 12 bits that are hardly used are as small."""
    if image.series is not None:
        stored = image.series.headers[0]
        return bool(image.values.max() <= 255) and int(stored.BitsStored) <= 8
    return image.values.dtype == np.uint8


def _is_colourless(image: Stored) -> bool:
    return bool((image.values[..., :1] == image.values).all())


def _plane_of(image: Stored) -> str | None:
    """Where voxels are finest; axial unless another plane is clearly finer."""
    if image.cut is None or 1 in image.cut.shape:
        return None
    x, y, z = np.linalg.norm(image.cut.affine[:3, :3], axis=0)
    planes = {"axial": max(x, y), "coronal": max(x, z), "sagittal": max(y, z)}
    best = min(planes, key=lambda plane: planes[plane])
    return best if planes[best] * 1.2 < planes["axial"] else "axial"


# --------------------------------------------------------------------------------------- patients


def add_patients(proposal: Proposal, keys: Sequence[str], found: Found | None) -> None:
    """The expression for patients where several cases seem to be of one."""
    values = proposal.values
    if proposal.layout == "BIDS":
        values["patient"] = r"sub-([A-Za-z0-9]+)"
        proposal.seen.append(("a patient is", "what sub-<label> names"))
        return
    image = values["images"]
    folders, _, name = image.rpartition("/")
    levels = folders.split("/") if folders else []
    variable = [depth for depth, level in enumerate(levels) if "*" in level]
    stem, _ = glob_stem_and_ending(name)
    in_name = "*" in stem and values.get("pair_by") != "folder"
    skip = values.get("split") is not None  # the first variable folder is the part
    if skip and variable:
        variable = variable[1:]
    variable = variable[_categories(variable, keys, proposal) :]
    folders_of = [key.split("/")[variable[0]] for key in keys] if variable else []
    if variable and (len(variable) > 1 or (in_name and len(set(folders_of)) < len(keys))):
        before = "".join("[^/]+/" for _ in range(variable[0]))
        values["patient"] = f"^{before}([^/]+)/"
        proposal.seen.append(("a patient is", "a folder"))
        return
    depth = variable[0] if variable else len(levels)
    names = [key.split("/")[depth] for key in keys]
    tail = "" if variable else re.escape(stem.rpartition("*")[2])
    restarted = [name for name, count in Counter(names).items() if count > 1]
    if restarted:  # 1.png in train and in val, benign and malignant: the folder is kept
        proposal.unsure.append(
            f"names such as {min(restarted)} occur in several folders, and are taken for several "
            "patients; if they are one, patient in site.yml says it"
        )
    places = ["/".join(key.split("/")[: depth + 1]) for key in keys] if restarted else names
    found_so = _several_of_a_patient(places, tail, r"(?:/|$)" if variable else r"(?:\.[^/]*)?$")
    if found_so is not None:
        expression, example = found_so
        if expression is not None:
            before = "" if restarted else "[^/]+/" * depth if variable else "(?:.*/)?"
            values["patient"] = f"^{before}{expression}"
        proposal.unsure.append(
            f"names such as {', '.join(example)} look like several of one patient; "
            + (
                "patient in site.yml puts them on one side of the split"
                if expression is not None
                else "each is taken for a patient, and may lie on another side of the split; if "
                "they are one, patient in site.yml says it"
            )
        )
    if "patient" not in values:
        proposal.seen.append(("a patient is", "each case"))


# in small letters: folders that sort patients by what they have, or as they were packed
_SORTS = words(
    "benign malignant normal abnormal healthy pathological positive negative control controls "
    "patients hgg lgg covid tumor tumour tumors tumours cancer lesion lesions left right male "
    "female benigne maligne gesund krank bösartig gutartig batch part chunk"
)
# of these such as are numbered, which patients are too; t of t1
_PACKS = words(
    "batch part chunk fold hospital site center centre clinic klinik spital institution t"
)
_SIDES = "[LRlr]|OD|OS|od|os|[Ll]eft|[Rr]ight"  # of a body, behind a patient's number
_VISIT = re.compile(
    r"(?:[\d.]{8,}|.*\d{4}[-_.]?\d\d[-_.]?\d\d.*|"
    r"(?:v|ses|session|visit|visite|besuch|t|tp|time|timepoint|scan|st|study|baseline|followup|"
    r"follow-up|pre|post)[-_ ]*\S*)",
    re.IGNORECASE,
)
_MANY_VISITS = 4  # that a patient has not on average


# of what stands behind a patient's number: sides, views, phases of the heart, times, places
_STATES = words(
    "l r left right od os ou links rechts cc mlo ml lm lcc rcc lmlo rmlo ap pa lat ed es dia sys "
    "diastole systole pre post before after baseline bl followup follow fu initial final macula "
    "disc fovea sax lax sa la slice frame visit visite ses session scan study timepoint tp view "
    "img image"
)
_NUMBER = r"[^/\d]*\d[^-_ ./]*"
_DATE = r"(?:19|20)\d\d[-_.]?\d\d[-_.]?\d\d"


def _several_of_a_patient(
    names: Sequence[str], tail: str, end: str
) -> tuple[str | None, list[str]] | None:
    """The expression of what a patient's names share, and an example of such names.

    Args:
        names: of cases; with their folders where these belong to the name.
        tail: what stands behind each name and says nothing, as an expression.
        end: of a path, as an expression.

    Returns:
        None where no two names look like one patient's; no expression where they may be.
    """
    folder = ".*/" if any("/" in name for name in names) else ""
    below = "[^/]*/" if end.startswith("(?:/") else ""  # else the name of a file would match, too
    count = max(len(re.findall(r"[^-_ ./]*\d[^-_ ./]*", name)) for name in names)
    plain = [re.sub(f"{tail}$", "", name) if tail else name for name in names]
    doubtful: list[str] | None = None
    few: tuple[str, list[str]] | None = None
    candidates = [
        f"({folder}[^/]*?[^-_ ./])[-_ .]+{_DATE}",
        *(f"({folder}{_NUMBER}" + rf"(?:[-_ .]+{_NUMBER})" * n + ")" for n in range(count)),
        rf"({folder}[^/]*?\d)(?:[-_ .]?(?:{_SIDES}))?{tail}{end}",
        rf"({folder}[^/]*?)(?:[-_ .]+(?:{_states_in(plain)})[-_ ]*\d*)*{tail}{end}",
        rf"{folder}(?:{_SIDES})[-_ .]?(\d[^-_ ./]*)",
    ]
    for number, candidate in enumerate(candidates):
        matched = [re.match(candidate, name) for name in plain]
        if not all(matched):
            continue
        of: dict[str, list[tuple[str, str]]] = {}
        for name, found in zip(plain, matched, strict=True):
            assert found is not None
            of.setdefault(found.group(1), []).append((name, name[found.end(1) :]))
        several = [group for _, group in sorted(of.items()) if len(group) > 1]
        if len(of) < 2 or not several:
            continue
        example = sorted(name for name, _ in several[0])[:3]
        is_by_number = 0 < number <= count
        known = [group for group in several if all(_says_a_state(rest) for _, rest in group)]
        if is_by_number and 2 * len(known) < len(several):
            doubtful = doubtful or example
        elif is_by_number and len(of) == 2 and number < count:
            few = few or (candidate + below, example)  # two hospitals, rather; else two patients
        else:
            return (candidate if end in candidate else candidate + below), example
    return few or (None if doubtful is None else (None, doubtful))


def _states_in(names: Sequence[str]) -> str:
    """Of the words for states those that stand in names, as an expression."""
    states = _STATES | CONTRASTS.keys()
    pieces = {piece for name in names for piece in re.findall(r"[^-_ ./\d]+", name)}
    return "|".join(sorted(piece for piece in pieces if piece.lower() in states)) or "(?!)"


def _says_a_state(rest: str) -> bool:
    """Whether what stands behind a patient's number is another number, or a side, a view, a time;
    of 01_dr and 01_healthy that cannot be told."""
    first = re.match(r"[-_ .]*([^-_ ./]*)", rest)
    word = first.group(1).lower() if first is not None else ""
    return not word or any(sign.isdigit() for sign in word) or word in _STATES | CONTRASTS.keys()


def _are_numbered(names: Collection[str]) -> bool:
    """Whether folders are called as patients are: P1, covid_001, 1037; not as batch 1 is."""
    numbered = [name for name in names if re.search(r"\d$", name) and name.lower() != "t1"]
    packed = [name for name in names if {*words_of(re.sub(r"\d+", " ", name))} & _PACKS]
    return 2 * len(numbered) > len(names) and 2 * len(packed) <= len(names)


def _categories(variable: Sequence[int], keys: Sequence[str], proposal: Proposal) -> int:
    """How many of the first folders that differ sort patients and are none themselves.

    benign/1.png: by the words. Utrecht/0/T1.nii.gz: few, with many folders below, which are called
    differently in each and are no visits.
    """
    count = 0
    for depth in variable:
        rows = [key.split("/") for key in keys]
        names = {row[depth] for row in rows}
        said = [{*re.findall(r"[^\W\d_]+", name.lower()), *words_of(name)} for name in names]
        sorts = sum(bool(of & (_SORTS | CONTRASTS.keys())) for of in said)
        is_last = depth == variable[-1]
        # benign and malignant sort many; covid_001, control02 and T1_anna are patients
        is_sorted = sorts * 2 > len(names) > 1 and not (
            _are_numbered(names) or (is_last and len(names) == len(keys))
        )
        if not is_sorted and not is_last and not _are_numbered(names):
            below = {(row[depth], row[variable[variable.index(depth) + 1]]) for row in rows}
            inner = {name for _, name in below}
            is_sorted = (
                len(below) >= _MANY_VISITS * len(names)
                and len(inner) == len(below)
                and not all(_VISIT.fullmatch(name) for name in inner)
            )
        if not is_sorted:
            break
        count += 1
        some = ", ".join(sorted(names)[:3])
        proposal.unsure.append(
            f"folders such as {some} are taken for sorts of patients and not for patients; patient "
            "in site.yml would say it"
        )
    return count


# -------------------------------------------------------------------------------------------- end


def _finished(proposal: Proposal, tree: Tree) -> Proposal:
    """With what the code that trains finds by it, and what it does not take."""
    site = proposal.site
    found = scan(site)
    unpaired = [problem for problem in found.problems if problem.code == "unpaired-files"]
    if unpaired and "images have no label" in unpaired[0].problem:
        proposal.values["unlabelled"] = "pass_over"
        again = scan(proposal.site)
        if not any(problem.code == "unpaired-files" for problem in again.problems):
            found = again
            proposal.unsure.append(
                "without a label, and so no cases (unlabelled: pass_over): "
                f"{count_of(again.unlabelled, 'image')}"
            )
        else:
            del proposal.values["unlabelled"]
    proposal.needs += found.problems
    if (more := _further_labels(found, tree, proposal)) is not None:
        proposal.needs.append(more)
    if (unread := _unread_labels(tree, proposal)) is not None:
        proposal.needs.append(unread)
    _say_capitals(proposal, found, tree)
    _add_counts(proposal, found, tree)
    return proposal


def _say_capitals(proposal: Proposal, found: Scan, tree: Tree) -> None:
    """Say which files are not taken since they differ in capitals from those that are."""
    values = proposal.values
    globs = [
        *(values.get("contrasts") or {"": values["images"]}).values(),
        *(values.get("label_files") or {"": values["labels"]}).values(),
    ]
    taken = {path.relative_to(tree.root).as_posix() for path in found.taken}
    others = [
        file
        for file in tree.of(proposal.site.format)
        if file not in taken
        and any(glob_expression(glob.lower()).fullmatch(file.lower()) for glob in globs)
        and not any(glob_expression(glob).fullmatch(file) for glob in globs)
    ]
    if others:
        proposal.unsure.append(
            f"{count_of(len(others), 'file')} differ in capitals alone from those that are taken, "
            f"and are not: {', '.join(others[:3])}; rename them alike"
        )


def _unread_labels(tree: Tree, proposal: Proposal) -> SiteDataError | None:
    """Files called as labels that are not read here, where what is taken may be a mere field of
    view."""
    values = proposal.values
    taken = values.get("label_files") or {"": values["labels"]}
    if not all({*words_of(glob)} & LABEL_WORDS <= VAGUE_WORDS for glob in taken.values()):
        return None
    unread = [
        (file, kind)
        for file in tree.others
        if {*words_of(stem_and_ending(file)[0])} & LABEL_WORDS - VAGUE_WORDS
        and (kind := another_kind(Path(file))) is not None
        and not kind[0].startswith(_NO_IMAGES)
    ]
    if len(unread) < 2:
        return None
    file, (kind_of_first, fix) = unread[0]
    return SiteDataError(
        f"{len(unread)} files are called as labels and are not read here, each {kind_of_first}: "
        f"{file}; taken is {_words_of_labels(taken)}, which may be something else",
        f"{fix}; then adopt the folder again. If these are no labels, move them away",
        code="several-labels",
    )


def _words_of_labels(globs: Mapping[str, str]) -> str:
    return ", ".join(sorted(globs.values())[:3])


def _further_labels(found: Scan, tree: Tree, proposal: Proposal) -> SiteDataError | None:
    """Labels called as one that is taken, with a number behind: another part of the same label."""
    taken = {path.relative_to(tree.root).as_posix() for case in found.cases for path in case.labels}
    stems = {stem_and_ending(file)[0] for file in taken}
    is_of_pictures = proposal.site.format == "dicom" and any(map(is_plain_picture, taken))
    of_pictures = tree.image if is_of_pictures else ()  # beside a series they are screenshots
    more = [
        file
        for file in (*tree.of(proposal.site.format), *of_pictures)
        if file not in taken
        and (numbered := re.fullmatch(r"(.*?[^\d\s_.(-])[\s_.(-]*\d+\)?", stem_and_ending(file)[0]))
        and numbered.group(1) in stems
    ]
    if not more:
        return None
    return SiteDataError(
        f"{count_of(len(more), 'file')} beside labels that are taken would be lost, and what is "
        f"drawn there would count as background: {', '.join(more[:3])}",
        "draw all labels of an image into one file, or move these images with their labels away",
        code="several-labels",
    )


def _add_counts(proposal: Proposal, found: Scan, tree: Tree) -> None:
    patients = {case.patient: case for case in found.cases}
    train = sum(case.split == "train" for case in patients.values())
    test = f", {found.left_for_test} for a test" if found.left_for_test else ""
    proposal.seen[:0] = [
        ("layout", proposal.layout),
        ("cases", f"{len(found.cases)}{test}"),
        ("patients", f"{len(patients)}: {train} to train, {len(patients) - train} to validate"),
    ]
    used: set[Path] = set()
    for case in found.cases:
        used.update(case.image_files)
        used.update(case.labels)
    rest = [
        file
        for kind in ("nifti", "image", "npy", "dicom")
        for file in tree.of(kind)  # type: ignore[arg-type]
        if tree.root / file not in used and (tree.root / file).parent not in used
    ]
    if rest:
        proposal.seen.append(("not taken", _counted(rest)))
    if tree.others:
        proposal.seen.append(("no images", _counted(tree.others)))
    foreign = Counter(
        kind[0] for file in tree.others if (kind := another_kind(Path(file))) is not None
    )
    for name, count in foreign.most_common(2):
        if not name.startswith(_NO_IMAGES) and count * 2 >= len(found.cases):
            proposal.unsure.append(f"{count} files are not read here, each {name}")


def _counted(files: Sequence[str]) -> str:
    counts = endings(files)
    return ", ".join(f"{count} {ending}" for ending, count in counts.most_common(6))


def _some(values: Sequence[int] | tuple[int, ...]) -> str:
    if len(values) > 12:
        return f"{len(values)} from {min(values)} to {max(values)}"
    return ", ".join(map(str, values)) or "none"


def _not_seen(tree: Tree) -> SiteDataError:
    kinds = ("nifti", "image", "npy", "dicom")
    there = [
        f"{len(tree.of(kind))} {word}"  # type: ignore[arg-type]
        for kind, word in zip(kinds, ("NIfTI", "pictures", "NPY", "DICOM"), strict=True)
        if tree.of(kind)  # type: ignore[arg-type]
    ]
    places = Counter(
        file.rpartition("/")[0] or "."
        for kind in kinds
        for file in tree.of(kind)  # type: ignore[arg-type]
    )
    some = "; ".join(f"{folder}: {count}" for folder, count in places.most_common(4))
    foreign: Counter[tuple[str, str]] = Counter()
    for file in tree.others:
        kind = another_kind(Path(file))
        if kind is not None and not kind[0].startswith(_NO_IMAGES):
            foreign[kind] += 1
    cannot = "; ".join(
        f"{count} files are each {kind}" for (kind, _), count in foreign.most_common(2)
    )
    hand = (
        "name the folder that holds images and labels both; if it does, write site.yml by "
        "hand: images and labels are globs whose wildcards pair them (docs/site.md)"
    )
    fix = hand
    if foreign:
        ways = dict.fromkeys(fix for (_, fix), _ in foreign.most_common(2))
        fix = f"{'; '.join(ways)}; then adopt the folder again" + (
            f"; else {hand}" if there else ""
        )
    if not there and not tree.others:
        return SiteDataError(
            f"the folder {tree.root} holds no file",
            "name the folder with your images; where it is a drive, see that it is mounted",
            code="layout-not-seen",
        )
    if (single := _single_pair(tree)) is not None:
        return SiteDataError(
            f"{tree.root} holds one image with a label, {single[0]} and {single[1]}",
            "at least two patients are needed, one to train and one to validate: add cases",
            code="layout-not-seen",
        )
    outlines = _outlines(tree)
    if there and outlines and not _may_be_labels(tree):
        return SiteDataError(
            f"{tree.root} holds images ({', '.join(there)}) and no label that is read here; "
            f"{outlines} may hold outlines, as COCO, YOLO and programs for slides write them",
            f"{another_kind(Path('a.json'))[1]}; then adopt the folder again",  # type: ignore[index]
            code="layout-not-seen",
        )
    signs = [
        file
        for kind in kinds
        for file in tree.of(kind)  # type: ignore[arg-type]
        if _GLOB_SIGN.search(file)
    ]
    if signs:
        fix = f"names such as {signs[0]} hold [, ], * or ?, which are signs of globs: rename; {fix}"
    elif behind := _several_behind_names(tree):
        fix = (
            f"several files of a folder belong to one image, such as {', '.join(behind[:3])}: move "
            f"those of each class to a folder of its own, all called as their images; else {fix}"
        )
    if there and not foreign and not _may_be_labels(tree):
        return SiteDataError(
            f"{tree.root} holds images and no labels: {', '.join(there)}"
            + (f" ({some})" if some else ""),
            "name the folder that holds images and labels both; a site trains on images whose "
            "labels somebody drew (to have labels drawn by a trained model, see fedfms predict)",
            code="layout-not-seen",
        )
    return SiteDataError(
        f"how images and labels lie in {tree.root} cannot be seen: "
        f"{', '.join(there) or f'no image among {len(tree.others)} files'}"
        + (f" ({some})" if some else "")
        + (f"; not read here: {cannot}" if cannot else ""),
        fix,
        code="layout-not-seen",
    )


_GLOB_SIGN = re.compile(r"[\[\]*?]")


def _single_pair(tree: Tree) -> tuple[str, str] | None:
    """The one image and its label, if there is no more."""
    for files in (tree.nifti, tree.image, tree.npy):
        labels = [file for file in files if {*words_of(stem_and_ending(file)[0])} & LABEL_WORDS]
        if len(files) == 2 and len(labels) == 1:
            return next(file for file in files if file not in labels), labels[0]
    return None


def _several_behind_names(tree: Tree) -> list[str]:
    """Example of files that are called as one image with words behind: p0_liver, p0_tumor."""
    for files in (tree.nifti, tree.image, tree.npy):
        stems = {stem_and_ending(file.rpartition("/")[2])[0] for file in files}
        behind: dict[str, list[str]] = {}
        for stem in sorted(stems):
            found = re.fullmatch(r"(.+?)[-_ .]+[^\W\d_]+", stem)
            if found is not None and found.group(1) in stems:
                behind.setdefault(found.group(1), []).append(stem)
        example = next((several for several in behind.values() if len(several) > 1), None)
        if example is not None:
            return example
    return []


def _outlines(tree: Tree) -> str:
    """Texts that may be outlines, in words: by words in their path, or one beside each image."""
    stems = {stem_and_ending(Path(file).name)[0] for file in (*tree.image, *tree.nifti)}
    texts = [
        file
        for file in tree.others
        if file.lower().endswith((".json", ".xml", ".geojson", ".txt"))
        and (Path(file).stem in stems or {*words_of(file)} & (LABEL_WORDS | {"instances"}))
    ]
    return f"{count_of(len(texts), 'text')} such as {texts[0]}" if texts else ""


def _may_be_labels(tree: Tree) -> bool:
    """Whether any file may be a label by its name, or by what it holds."""
    formats: tuple[ImageFormat, ...] = ("nifti", "image", "npy")
    for format in formats:
        groups = groups_of(tree.of(format))
        if (
            any(group.role == "label" for group in groups)
            or by_content(groups, tree.root, format)[0]
        ):
            return True
    return False
