"""Which group of files holds the images of a folder, and which their labels."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np

from fedfms.contracts.site import ImageFormat, Reading, SiteConfig
from fedfms.data.adopt.names import (
    LABEL_WORDS,
    PARTS,
    VAGUE_WORDS,
    Role,
    class_name,
    known_words,
    part_of,
    words_of,
)
from fedfms.data.adopt.tree import (
    Group,
    Tree,
    folder_keys_of,
    folder_wildcards,
    groups_of,
    keys_of,
    with_all_endings,
)
from fedfms.data.content import EXTENSIONS, read_bytes
from fedfms.data.formats import Stored, read_image, read_label
from fedfms.data.grid import Cut
from fedfms.data.manifest import name_wildcards
from fedfms.data.pairs import WILDCARD
from fedfms.errors import FedfmsError

_LOOKED_AT = 3  # files of a group, or pairs, that are opened
_MAY_LACK = 4  # one of so many cases may lack a contrast
_FEW_FOLDERS = 8
_FEW_VALUES = 64  # a label has no more; images have hundreds


@dataclass(frozen=True, slots=True)
class Match:
    """An image's group and a label's, and what pairs them."""

    image: str  # glob
    label: str
    pair_by: Literal["wildcards", "folder"]
    pairs: tuple[tuple[str, str], ...]  # image and label, relative to the root
    alone: int  # images without a label
    orphans: int  # labels without an image

    @property
    def rank(self) -> tuple[int, ...]:
        """The larger the better."""
        return (-self.orphans, len(self.pairs), -self.alone, int(self.pair_by == "wildcards"))


@dataclass(frozen=True, slots=True)
class Found:
    """How images and labels lie, as site.yml says it.

    images, labels: globs by the name of a contrast or class; one of them has the name "".
    unsure: sentences on what was guessed.
    """

    format: ImageFormat
    images: dict[str, str]
    labels: dict[str, str]
    pair_by: Literal["wildcards", "folder"]
    pairs: tuple[tuple[str, str], ...]  # of the first contrast and class
    alone: int = 0
    lacking: int = 0  # cases without one of the contrasts
    unsure: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()  # globs of cases that validate by the names of folders
    test: tuple[str, ...] = ()


def find_pairs(tree: Tree, format: ImageFormat) -> Found | None:
    """The best reading of a folder's files of one format; None where nothing pairs."""
    found = _pairs_of(groups_of(tree.of(format)), tree, format)
    if format == "dicom":  # pictures: two views of a patient are two cases
        other = _pairs_of(groups_of(tree.of(format), kinds=False), tree, format)
        if other is not None and (found is None or len(other.pairs) > len(found.pairs)):
            found = other
    if found is not None:
        return found
    folders = {file.rpartition("/")[0] for file in tree.of(format)}
    if 1 < len(folders) <= _FEW_FOLDERS:
        return _pairs_of(groups_of(tree.of(format), by_folder=True), tree, format)
    return None


def _pairs_of(groups: Sequence[Group], tree: Tree, format: ImageFormat) -> Found | None:
    groups, parts = _without_parts(groups)
    labels = [group for group in groups if group.role == "label"]
    images = _may_be_images([group for group in groups if group.role != "label"], format)
    unsure: list[str] = []
    if not labels or not images:
        labels, others = by_content(groups, tree.root, format)
        images = _may_be_images(others, format)
        if labels and images:
            unsure.append(
                "names do not say which files are labels: taken are those that hold few values, "
                + ", ".join(sorted(group.pattern for group in labels)[:3])
            )
    images, labels = _with_all_endings(images, labels, format)
    matches = [
        match
        for label in labels
        for image in images
        if (match := best_match(image, label, format)) is not None
    ]
    if not matches:
        return None
    chosen = _choose(matches, images, labels, tree, format, unsure)
    return None if chosen is None else _with_parts(chosen, parts, unsure)


def _may_be_images(groups: Sequence[Group], format: ImageFormat) -> list[Group]:
    """Groups without those that are no images: PNG and the like beside pictures in DICOM."""
    if format != "dicom":
        return list(groups)
    return [group for group in groups if not is_plain_picture(group.files[0])]


def is_plain_picture(file: str | Path) -> bool:
    """Whether a file is a PNG, JPEG or TIFF by its name."""
    return str(file).lower().endswith(EXTENSIONS["image"])


def _with_all_endings(
    images: list[Group], labels: list[Group], format: ImageFormat
) -> tuple[list[Group], list[Group]]:
    """Groups of several endings in the place of their parts, where more pairs by them."""
    joined = [dict(with_all_endings(groups)) for groups in (images, labels)]
    if not joined[0] and not joined[1]:
        return images, labels
    every = [
        (match.rank, image, label)
        for image in (*images, *joined[0])
        for label in (*labels, *joined[1])
        if (match := best_match(image, label, format)) is not None
    ]
    best = max(every, key=lambda one: one[0], default=None)
    if best is None:
        return images, labels
    kept = []
    for groups, of_several, chosen in ((images, joined[0], best[1]), (labels, joined[1], best[2])):
        parts = of_several.get(chosen, ())
        kept.append([group for group in groups if group not in parts] + [chosen] * bool(parts))
    return kept[0], kept[1]


def best_match(image: Group, label: Group, format: ImageFormat) -> Match | None:
    """How two groups pair; None where they do not."""
    found = [
        match
        for one, other in itertools.product(
            (image.pattern, *image.variants), (label.pattern, *label.variants)
        )
        for match in _matches(one, other, image, label, format)
    ]
    return max(found, key=lambda match: match.rank, default=None)


def _matches(
    image: str, label: str, images: Group, labels: Group, format: ImageFormat
) -> Iterator[Match]:
    wild = [name_wildcards(pattern, format) for pattern in (image, label)]
    if wild[0] and wild[0] == wild[1] and image != label:
        yield from _match(
            image,
            label,
            "wildcards",
            keys_of(image, images.files, format),
            keys_of(label, labels.files, format),
        )
    folders = [folder_wildcards(pattern) for pattern in (image, label)]
    if folders[0] and folders[0] == folders[1]:
        yield from _match(
            image,
            label,
            "folder",
            folder_keys_of(image, images.files),
            folder_keys_of(label, labels.files),
        )


def _match(
    image: str,
    label: str,
    pair_by: Literal["wildcards", "folder"],
    images: dict[str, list[str]],
    labels: dict[str, list[str]],
) -> Iterator[Match]:
    several = any(len(files) > 1 for files in (*images.values(), *labels.values()))
    both = sorted(images.keys() & labels.keys())
    if several or not both:
        return
    yield Match(
        image,
        label,
        pair_by,
        tuple((images[key][0], labels[key][0]) for key in both),
        len(images.keys() - labels.keys()),
        len(labels.keys() - images.keys()),
    )


# ----------------------------------------------------------------------------------------- choice


def _choose(
    matches: Sequence[Match],
    images: Sequence[Group],
    labels: Sequence[Group],
    tree: Tree,
    format: ImageFormat,
    unsure: list[str],
) -> Found | None:
    """Of all that pairs what is meant: one image or several contrasts, one label or one a class."""
    best = max(matches, key=lambda match: match.rank)
    enough = [match for match in matches if 2 * len(match.pairs) >= len(best.pairs)]
    # a contrast may be missing here and there
    enough = [m for m in enough if m.orphans <= max(best.orphans, len(best.pairs) // _MAY_LACK)]
    fitting = [match for match in enough if _fit(match.pairs, tree, format)]
    if not fitting:
        fitting = [best]
    label_globs = sorted({match.label for match in fitting}, key=lambda p: _order(p, fitting))
    groups = {glob: group for group in labels for glob in (group.pattern, *group.variants)}
    files = _files_of_classes(label_globs, groups, tree, format)
    files = files or _folders_of_classes(label_globs, fitting, tree, format)
    if len(files) > 1:
        label_of = dict(files)
        main = next(iter(label_of.values()))
    else:
        main = label_globs[0]
        label_of = {"": main}
        if len(label_globs) > 1:
            unsure.append(
                f"there are {len(label_globs)} kinds of labels; taken is {main}, not "
                + ", ".join(label_globs[1:4])
            )
    of_main = [match for match in fitting if match.label == main]
    first = max(of_main, key=lambda match: match.rank)
    alike = [match for match in of_main if match.pair_by == first.pair_by]
    contrasts = {match.image: match for match in alike}
    by_glob = {glob: group for group in images for glob in (group.pattern, *group.variants)}
    named = _contrast_names([by_glob[glob] for glob in contrasts], list(contrasts))
    others = [match for match in of_main if match.image not in named.values()]
    if len(named) < 2:
        first = max(of_main, key=lambda match: (*match.rank, -len(match.image)))
        named = {"": first.image}
        others = [match for match in of_main if match is not first]
    else:
        first = max((contrasts[glob] for glob in named.values()), key=lambda one: len(one.pairs))
    if others:
        unsure.append(
            "other images pair with the labels too, and are not taken: "
            + ", ".join(sorted({match.image for match in others})[:3])
        )
    chosen = [contrasts[glob] for glob in named.values()] if len(named) > 1 else [first]
    every = {label for match in chosen for _, label in match.pairs}
    lacking = sum(
        any(label not in {pair[1] for pair in match.pairs} for match in chosen) for label in every
    )
    return Found(
        format,
        named,
        label_of,
        first.pair_by,
        first.pairs,
        max(match.alone for match in chosen),
        lacking,
    )


def _order(pattern: str, matches: Sequence[Match]) -> tuple[int, bool, int, str]:
    """The labels with most pairs first, and of these those that are no mere masks."""
    pairs = max(len(match.pairs) for match in matches if match.label == pattern)
    said = set(words_of(pattern)) & LABEL_WORDS
    return (-pairs, said <= VAGUE_WORDS, len(pattern), pattern)


def _contrast_names(groups: Sequence[Group], globs: Sequence[str]) -> dict[str, str]:
    """Globs of several images of a case by the contrast's name; empty if names do not tell."""
    if len(groups) < 2:
        return {}
    named: dict[str, str] = {}
    for group, glob in zip(groups, globs, strict=True):
        name = group.contrast
        if name is None:
            continue
        if name in named:  # two of one contrast: which, only a person knows
            return {}
        named[name] = glob
    order = ["t1", "t1ce", "t2", "flair"]
    names = sorted(named, key=lambda name: (order.index(name) if name in order else 9, name))
    return {name: named[name] for name in names}


# of names in which people differ who drew one thing, and no classes
_DRAWN_BY = re.compile(
    r"(?:class_)?(?:\d(?:st|nd|rd|th)|rater|reader|observer|annotator|expert).*", re.IGNORECASE
)


def _files_of_classes(
    globs: Sequence[str], groups: Mapping[str, Group], tree: Tree, format: ImageFormat
) -> dict[str, str]:
    """Globs of labels in one file a class by the class; empty if it is not so.

    They lie in one folder of a case, are called differently, and each holds one value beside 0.
    """
    if len(globs) < 2 or len({glob.rpartition("/")[0] for glob in globs}) != 1:
        return {}
    for glob in globs:
        for file in groups[glob].files[:_LOOKED_AT]:
            values = values_in(tree.root / file, format)
            if values is None or len(values - {0}) > 1:
                return {}
    names = _own_words([groups[glob].name for glob in globs])
    if len(set(names)) < len(globs) or all(_DRAWN_BY.fullmatch(name) for name in names):
        return {}
    return dict(sorted(zip(names, globs, strict=True)))


def _folders_of_classes(
    globs: Sequence[str], matches: Sequence[Match], tree: Tree, format: ImageFormat
) -> dict[str, str]:
    """Globs of labels that differ in one folder, by the class that it names; empty if it is not so.

    leftMask/1.png and rightMask/1.png: each holds one value beside 0 and no two meet, as what
    two people drew of one thing does.
    """
    rows = [glob.split("/") for glob in globs]
    if len(globs) < 2 or len({len(row) for row in rows}) > 1:
        return {}
    differ = [depth for depth, column in enumerate(zip(*rows, strict=True)) if len({*column}) > 1]
    if len(differ) != 1 or differ[0] == len(rows[0]) - 1:
        return {}
    pairs = [dict(next(m for m in matches if m.label == glob).pairs) for glob in globs]
    shared = [image for image in pairs[0] if all(image in one for one in pairs)]
    for image in shared[:_LOOKED_AT]:
        drawn = [label_at(tree.root / one[image], format) for one in pairs]
        masks = [label.values != 0 for label in drawn if label is not None]
        held = [set(np.unique(label.values).tolist()) - {0} for label in drawn if label is not None]
        if len(masks) < len(globs) or len({mask.shape for mask in masks}) > 1:
            return {}
        if any(len(values) > 1 for values in held) or np.max(np.sum(masks, axis=0)) > 1:
            return {}
    names = _own_words([re.sub(r"(?<=[a-z])(?=[A-Z])", " ", row[differ[0]]) for row in rows])
    if not shared or len(set(names)) < len(globs):
        return {}
    return dict(sorted(zip(names, globs, strict=True)))


def _own_words(patterns: Sequence[str]) -> list[str]:
    """Of several names what each has for itself, as names of classes."""
    rows = [
        [word for word, _, _, known in known_words(pattern.replace("*", " ")) if not known]
        for pattern in patterns
    ]
    if not all(rows):
        rows = [[w for w, *_ in known_words(pattern.replace("*", " "))] for pattern in patterns]
    return [class_name("_".join(row)) for row in rows]


# ---------------------------------------------------------------------------------------- content


def reading_of(format: ImageFormat) -> SiteConfig:
    """How files are opened while nothing is known of them."""
    return SiteConfig(
        data_root=Path(), format=format, images="*", labels="*/*", classes={"any": (1,)}
    )


def image_at(path: Path, format: ImageFormat) -> Stored | None:
    """An image, with colours if it has some; None where it cannot be read."""
    site: Reading = reading_of(format)
    with contextlib.suppress(FedfmsError):
        if format != "nifti":
            with contextlib.suppress(FedfmsError):
                return read_image(path, read_bytes(path, site), replace(site, channels="rgb"))
        return read_image(path, read_bytes(path, site), site)
    return None


def label_at(path: Path, format: ImageFormat, image: Stored | None = None) -> Stored | None:
    """A label; None where it cannot be read as one. In DICOM it is that of a picture."""
    if format == "dicom" and is_plain_picture(path):
        format = "image"
    site = reading_of(format)
    with contextlib.suppress(FedfmsError):
        data = read_bytes(path, site)
        if format != "dicom":
            return read_label(path, data, site, image)
        from fedfms.data.dicom.labels import read_mask  # pydicom takes a second to import

        assert isinstance(data, bytes)  # a picture is a file
        return Stored(read_mask(path, data).transpose(2, 1, 0), (1.0, 1.0, 1.0), False)
    return None


def values_in(path: Path, format: ImageFormat) -> set[int] | None:
    """The values of a label; None where it cannot be read as one."""
    label = label_at(path, format)
    return None if label is None else set(np.unique(label.values).tolist())


def by_content(
    groups: Sequence[Group], root: Path, format: ImageFormat
) -> tuple[list[Group], list[Group]]:
    """Labels and images told by what they hold, where names do not say."""
    labels: list[Group] = []
    images: list[Group] = []
    for group in groups:
        held = [values_in(root / file, format) for file in group.files[:_LOOKED_AT]]
        is_label = all(values is not None and len(values) <= _FEW_VALUES for values in held)
        (labels if is_label else images).append(group)
    return labels, images


def fits(found: Found, tree: Tree) -> bool:
    """Whether the first pairs lie on one grid; what cannot be read does not say no."""
    return _fit(found.pairs, tree, found.format)


def _fit(pairs: Sequence[tuple[str, str]], tree: Tree, format: ImageFormat) -> bool:
    for image_file, label_file in pairs[:_LOOKED_AT]:
        image, label = tree.root / image_file, tree.root / label_file
        one_grid = (
            _by_headers(image, label) if format == "nifti" else _by_size(image, label, format)
        )
        if one_grid is False:
            return False
    return True


def _by_headers(image: Path, label: Path) -> bool | None:
    """Whether two NIfTI files lie on one grid, from their headers; None where that cannot be
    told."""
    grids = []
    for path in (image, label):
        try:
            header: Any = nibabel.load(path)
            shape = tuple(header.shape) + (1,) * (3 - len(header.shape))
            if any(size != 1 for size in shape[3:]):
                return None
            grids.append((np.asarray(header.affine, np.float64), shape[:3]))
        except Exception:  # a damaged file makes a decoder raise nearly anything
            return None
    (affine, shape), other = grids
    try:
        return Cut.onto(*other, Cut.of(affine, shape, "axial")) is not None
    except (ValueError, np.linalg.LinAlgError):
        return None


def _by_size(image: Path, label: Path, format: ImageFormat) -> bool | None:
    """Whether a picture and its label have one size; False of what is no label, as a JPEG is."""
    one, other = image_at(image, format), label_at(label, format)
    if other is None:
        return False if format in ("image", "dicom") else None
    return None if one is None else one.values.shape[:3] == other.values.shape


# ------------------------------------------------------------------------------------------ parts


def _without_parts(groups: Sequence[Group]) -> tuple[list[Group], dict[str, list[str]]]:
    """Groups of train, validation and test joined, and globs of the cases of each part.

    train/images and val/images are one group, */images. Of a part that has images and no labels
    nothing is taken, nor of imagesTs.
    """
    parts: dict[str, list[str]] = {}
    joined: dict[tuple[str, Role | None], list[tuple[Group, _Part]]] = {}
    kept: list[Group] = []
    found = {group.pattern: _part_in(group) for group in groups}
    labelled, pictured = (
        {part.side for g in groups if g.role == role and (part := found[g.pattern]) is not None}
        for role in ("label", "image")
    )
    for group in groups:
        part = found[group.pattern]
        if part is None:
            kept.append(group)
        elif re.fullmatch(r"(images|labels)(Tr|Ts|Va)", part.folder, re.IGNORECASE):
            if part.side == "train":
                kept.append(group)
        elif group.role != "image" or part.side in labelled or not labelled:
            if group.role == "label" and pictured and part.side not in pictured:
                kept.append(group)
                continue
            joined.setdefault((part.anywhere, group.role), []).append((group, part))
    for (pattern, _), of_parts in joined.items():
        if len(of_parts) == 1:
            kept.append(of_parts[0][0])
            continue
        first = of_parts[0][0]
        files = tuple(file for group, _ in of_parts for file in group.files)
        kept.append(replace(first, pattern=pattern, files=files, part=None, variants=()))
        for _, part in of_parts:
            if part.side != "train" and part.cases not in parts.setdefault(part.side, []):
                parts[part.side].append(part.cases)
    return kept, parts


@dataclass(frozen=True, slots=True)
class _Part:
    """Of a group that lies in a folder of a part of a split.

    side: train, validation or test.
    folder: the folder that says so.
    anywhere: the group's glob with a * for the word that says so, as in Task1_*_Input/*.jpg.
    cases: the keys of its cases, as a glob.
    """

    side: str
    folder: str
    anywhere: str
    cases: str


def _part_in(group: Group) -> _Part | None:
    folders = group.pattern.split("/")[:-1]
    at = next((n for n, f in enumerate(folders) if "*" not in f and part_of(f)), None)
    if group.part is None or at is None:
        return None
    folder = folders[at]
    word = [word for word in words_of(folder) if word in PARTS][-1]
    said = [*re.finditer(re.escape(word), folder, re.IGNORECASE)][-1]
    general = folder[: said.start()] + "*" + folder[said.end() :]
    before = "".join("*/" for _ in WILDCARD.findall("/".join(folders[:at])))
    return _Part(
        part_of(folder) or "train",
        folder,
        "/".join([*folders[:at], general, *folders[at + 1 :], group.pattern.split("/")[-1]]),
        f"{before}{said.group()}/*",
    )


def _with_parts(found: Found, parts: dict[str, list[str]], unsure: list[str]) -> Found:
    return replace(
        found,
        unsure=tuple(unsure),
        parts=tuple(parts.get("validation", ())),
        test=tuple(parts.get("test", ())),
    )
