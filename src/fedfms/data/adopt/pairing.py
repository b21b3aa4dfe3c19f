"""Which group of files holds the images of a folder, and which their labels."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np

from fedfms.contracts.site import ImageFormat, Reading, SiteConfig
from fedfms.data.adopt.names import (
    IMAGE_WORDS,
    LABEL_WORDS,
    MACHINE_WORDS,
    PARTS,
    VAGUE_WORDS,
    Role,
    class_name,
    collapsed,
    known_words,
    part_of,
    words_of,
)
from fedfms.data.adopt.tree import (
    Group,
    Tree,
    folder_keys_of,
    folder_wildcards,
    glob_stem_and_ending,
    groups_of,
    keys_of,
    variants_of,
    with_all_endings,
)
from fedfms.data.content import EXTENSIONS, is_nifti, read_bytes
from fedfms.data.formats import Stored, read_image, read_label
from fedfms.data.grid import Cut
from fedfms.data.manifest import name_wildcards
from fedfms.data.pairs import WILDCARD
from fedfms.errors import FedfmsError

_LOOKED_AT = 3  # files of a group, or pairs, that are opened
_LOOKED_AT_MORE = 15  # of pairs of which some do not fit
_MAY_LACK = 4  # one of so many cases may lack a contrast
_FEW_FOLDERS = 8
_FEW_VALUES = 64  # a label has no more; images have hundreds
_FEWEST_IN_IMAGES = 16  # values, even of a picture that is nearly black
_MANY_VOXELS = 1_000_000  # of which values are counted
_COINCIDE = 0.8  # Dice from which on two labels are one thing that two people drew
_MAY_COINCIDE = 0.5  # and from which on they may be
_WITHIN = 0.98  # share of a label that lies in another, to be a part of it


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


def find_series_pairs(folders: Sequence[str], tree: Tree) -> Found | None:
    """The best reading of series in DICOM with labels in NIfTI; None where nothing pairs.

    Args:
        folders: those that hold a series each.
        tree: the folder.
    """
    images, groups = groups_of(folders), groups_of(tree.nifti)
    labels = [group for group in groups if group.role == "label"]
    of_few_values, _ = by_content([g for g in groups if g not in labels], tree.root, "nifti")
    labels += of_few_values
    unsure: list[str] = []
    images, labels = _with_their_own_labels(images, labels, "dicom", unsure)
    matches = [
        match
        for match in _all_matches(images, labels, "dicom")
        if 2 * match.orphans <= len(match.pairs)
    ]
    if not matches:
        return None
    chosen = _choose(matches, images, labels, tree, "dicom", unsure)
    return None if chosen is None else _with_parts(chosen, {}, unsure)


def _pairs_of(groups: Sequence[Group], tree: Tree, format: ImageFormat) -> Found | None:
    of_parts = {group for group in groups if group.part == "train"}
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
    images, labels = _with_their_own_labels(images, labels, format, unsure)
    matches = _all_matches(images, labels, format)
    paired = {match.label for match in matches}
    if parts and any(paired.isdisjoint((one.pattern, *one.variants)) for one in labels):
        # 21_training.tif and 01_test.tif: of parts that are called differently one by itself
        more = [group for group in of_parts if group not in groups]
        images += _may_be_images([one for one in more if one.role != "label"], format)
        labels += [one for one in more if one.role == "label"]
        matches = _all_matches(images, labels, format)
    if not matches:
        return None
    chosen = _choose(matches, images, labels, tree, format, unsure)
    if chosen is None:
        return None
    apart = {glob for group in of_parts for glob in (group.pattern, *group.variants)}
    if parts and apart & {*chosen.images.values()}:
        parts = {}
        unsure.append(
            "files of the parts of a split are called differently, and so only those to train on "
            "are taken"
        )
    return _with_parts(chosen, parts, unsure)


def _all_matches(
    images: Sequence[Group], labels: Sequence[Group], format: ImageFormat
) -> list[Match]:
    return [
        match
        for label in labels
        for image in images
        if (match := best_match(image, label, format)) is not None
    ]


def _with_their_own_labels(
    images: list[Group], labels: list[Group], format: ImageFormat, unsure: list[str]
) -> tuple[list[Group], list[Group]]:
    """Groups of images that each have labels called as they are, as one: they are cases.

    x_t1 with x_t1_seg and x_t2 with x_t2_seg are two visits, or two tasks, and no contrasts of a
    case of which each class has a file.
    """
    by_words: dict[frozenset[str], tuple[list[Group], list[Group]]] = {}
    for number, groups in enumerate((images, labels)):
        for group in groups:
            by_words.setdefault(_own_of(group), ([], []))[number].append(group)
    own = {words: both for words, both in by_words.items() if words and both[0] and both[1]}
    if len(own) < 2 or any(len(one) > 1 for both in own.values() for one in both):
        return images, labels
    varying = frozenset().union(*own) - frozenset.intersection(*own)
    joined = []
    for number in range(2):
        parts = [both[number][0] for both in own.values()]
        patterns = {_without_words(part.pattern, varying) for part in parts}
        if len(patterns) > 1 or not all(words & varying for words in own):
            return images, labels
        files = tuple(sorted(file for part in parts for file in part.files))
        pattern = patterns.pop()
        joined.append(
            replace(
                parts[0],
                pattern=pattern,
                files=files,
                contrast=None,
                variants=tuple(variants_of(pattern, files)),
            )
        )
    match = best_match(joined[0], joined[1], format)
    apart = [best_match(both[0][0], both[1][0], format) for both in own.values()]
    if match is None or len(match.pairs) < sum(len(one.pairs) for one in apart if one is not None):
        return images, labels
    taken = [group for both in own.values() for groups in both for group in groups]
    names = sorted(" ".join(sorted(words & varying)) for words in own)
    unsure.append(
        f"images called {', '.join(names[:4])} have labels of their own, called alike: taken for "
        "cases by themselves, and not for several images of one case"
    )
    return (
        [*(group for group in images if group not in taken), joined[0]],
        [*(group for group in labels if group not in taken), joined[1]],
    )


def _own_of(group: Group) -> frozenset[str]:
    """Words of a group's glob that say neither image nor label."""
    folder, _, name = group.pattern.rpartition("/")
    text = f"{folder}/{glob_stem_and_ending(name)[0]}".replace("*", " ")
    found = {word for word, *_ in known_words(text)}
    return frozenset(found - LABEL_WORDS - IMAGE_WORDS - PARTS.keys())


def _without_words(pattern: str, words: frozenset[str]) -> str:
    """A glob with a * for each of some words."""
    folder, _, name = pattern.rpartition("/")
    stem, ending = glob_stem_and_ending(name)
    parts = []
    for part in (*(folder.split("/") if folder else ()), stem):
        for word, start, end, _ in reversed([*known_words(part)]):
            if word in words:
                part = part[:start] + "*" + part[end:]
        parts.append(collapsed(part))
    return "/".join(parts) + ending


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
    odd = {match: misfits(match.pairs, tree, format) for match in enough}
    fitting = [match for match in enough if odd[match] is not None] or [best]
    label_groups = {glob: group for group in labels for glob in (group.pattern, *group.variants)}
    by_glob = {glob: group for group in images for glob in (group.pattern, *group.variants)}
    label_globs = _one_a_group(_in_order(fitting), label_groups)
    label_globs, twice, doubtful = _without_twins(label_globs, fitting, tree, format)
    files = _files_of_classes(label_globs, label_groups, tree, format)
    files = files or _folders_of_classes(label_globs, fitting, tree, format)
    label_of = files if len(files) > 1 else {"": label_globs[0]}
    main = next(iter(label_of.values()))
    of_main = [match for match in fitting if match.label == main]
    drawn = [match for match in of_main if not _holds_few(match, tree, format)] or of_main
    first = max(drawn, key=lambda match: match.rank)
    alike = [match for match in drawn if match.pair_by == first.pair_by]
    contrasts = {match.image: match for match in alike}
    named = _contrast_names([by_glob[glob] for glob in contrasts], list(contrasts))
    if len(named) < 2:
        first = max(
            drawn,
            key=lambda one: (*one.rank, by_glob[one.image].role == "image", -len(one.image)),
        )
        named = {"": first.image}
    else:
        first = max((contrasts[glob] for glob in named.values()), key=lambda one: len(one.pairs))
    chosen = [contrasts[glob] for glob in named.values()] if len(named) > 1 else [first]
    taken = [match for match in fitting if match.label in label_of.values()]
    taken = [match for match in taken if match.image in named.values()]
    unsure += [
        *_twice_drawn(twice, main),
        *(_maybe_twice(doubtful) if files else ()),
        *_labels_left(label_of, label_groups, matches, taken, {*twice}, len(first.pairs)),
        *_images_left(named, by_glob, matches, odd, [m for m in of_main if m not in drawn]),
        *_off_their_grid([label for match in taken for label in odd.get(match) or ()]),
    ]
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


def _one_a_group(globs: Sequence[str], groups: Mapping[str, Group]) -> list[str]:
    """Globs without further ones of the same files."""
    found: dict[tuple[str, ...], str] = {}
    for glob in globs:
        found.setdefault(groups[glob].files, glob)
    return list(found.values())


# --------------------------------------------------------------------------------- what is left


def _labels_left(
    taken: Mapping[str, str],
    groups: Mapping[str, Group],
    matches: Sequence[Match],
    of_taken: Sequence[Match],
    said: set[str],
    cases: int,
) -> Iterator[str]:
    """The sentence on labels that pair and are not taken, if there are some."""
    used = {file for match in of_taken for _, file in match.pairs}
    of_cases = {image for match in of_taken for image, _ in match.pairs}
    left: dict[tuple[str, ...], str] = {}
    hint = ""
    for match in sorted(matches, key=lambda one: (len(one.pairs), one.rank)):
        group = groups[match.label]
        if set(group.files) <= used or {match.label, group.pattern} & {*taken.values(), *said}:
            continue
        of = f"{len(match.pairs)} of {cases}" if len(match.pairs) <= cases else len(match.pairs)
        left = {files: one for files, one in left.items() if not {*files} < {*group.files}}
        left[group.files] = f"{match.label} ({of} cases)"
        if of_cases >= {image for image, _ in match.pairs}:
            hint = "; what is drawn there counts as background" + (
                ", and becomes a class where each case has such a file, an empty one where nothing "
                "is drawn"
                if len(match.pairs) < cases
                else ""
            )
    if left:
        yield (
            f"there are {len(left) + len(taken)} kinds of labels; taken is "
            f"{_some(sorted(taken.values()))}, not {_some(sorted(left.values()))}{hint}"
        )
    unpaired = {
        group.files: glob
        for glob, group in groups.items()
        if group.role == "label" and not any(groups[match.label] == group for match in matches)
    }
    if unpaired:
        yield (
            "called as labels, and not taken, since they pair with no image as the others do: "
            f"{_some(sorted(unpaired.values()))}"
        )


def _images_left(
    taken: Mapping[str, str],
    groups: Mapping[str, Group],
    matches: Sequence[Match],
    odd: Mapping[Match, tuple[str, ...] | None],
    with_few_values: Sequence[Match],
) -> Iterator[str]:
    """The sentence on images that pair with labels and are not taken, if there are some."""
    used = {file for glob in taken.values() for file in groups[glob].files}
    few = {groups[match.image].files for match in with_few_values}
    left: dict[tuple[str, ...], str] = {}
    for match in sorted(matches, key=lambda one: one.rank):
        files = groups[match.image].files
        if set(files) <= used:
            continue
        why = (
            " (few values, as labels have)"
            if files in few
            else " (on another grid)"
            if odd.get(match, ()) is None
            else ""
        )
        left[files] = match.image + why
    if left:
        yield (
            "other images pair with the labels too, and are not taken: "
            f"{_some(sorted(left.values()))}"
        )


def _off_their_grid(labels: Sequence[str]) -> Iterator[str]:
    if labels:
        yield (
            f"not on the grid of their images, while the others are: {_some(sorted(set(labels)))}; "
            "fedfms check-data names all of them"
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def _holds_few(match: Match, tree: Tree, format: ImageFormat) -> bool:
    """Whether the images of a match hold few values, as labels and predictions do."""
    for image_file, _ in match.pairs[:_LOOKED_AT]:
        image = image_at(tree.root / image_file, format)
        if image is None:
            return False
        step = max(1, image.values.size // _MANY_VOXELS)
        if len(np.unique(image.values.reshape(-1)[::step])) > _FEWEST_IN_IMAGES:
            return False
    return True


# -------------------------------------------------------------------------------- drawn twice


def _without_twins(
    globs: Sequence[str], matches: Sequence[Match], tree: Tree, format: ImageFormat
) -> tuple[list[str], list[str], list[tuple[str, str]]]:
    """Globs of labels; of them those that draw what one before them draws; and pairs that may.

    Two do that if nearly all of both coincides, none lies within the other, as a cup does in a
    disc, and no words say that they are two classes. Of the others that coincide a person knows.
    """
    pairs = {
        glob: dict(max((m for m in matches if m.label == glob), key=lambda m: m.rank).pairs)
        for glob in globs
    }
    shared = [image for image in pairs[globs[0]] if all(image in one for one in pairs.values())]
    kept, twins = list(globs), []
    shared = shared[:_LOOKED_AT] if len(globs) > 1 else []
    dice: dict[tuple[str, str], list[float]] = defaultdict(list)
    for image in shared:
        drawn = {glob: label_at(tree.root / pairs[glob][image], format) for glob in globs}
        masks = {glob: one.values != 0 for glob, one in drawn.items() if one is not None}
        sizes = {glob: int(mask.sum()) for glob, mask in masks.items()}
        for one, other in itertools.combinations(masks, 2):
            small, large = sorted((sizes[one], sizes[other]))
            if masks[one].shape != masks[other].shape or 2 * small < _MAY_COINCIDE * large:
                continue
            both = int((masks[one] & masks[other]).sum())
            if not (both >= _WITHIN * small and small < 0.9 * large):
                dice[one, other].append(2 * both / max(1, small + large))
    alike = {pair: found for pair, found in dice.items() if 2 * len(found) > len(shared)}
    for (one, other), found in alike.items():
        is_twin = _COINCIDE <= float(np.median(found)) < 1 and not _say_classes(one, other)
        if is_twin and one in kept and other in kept:
            kept.remove(other)
            twins.append(other)
    doubtful = [
        pair
        for pair, found in alike.items()
        if {*pair} <= {*kept} and float(np.median(found)) >= _MAY_COINCIDE
    ]
    return kept, twins, doubtful


def _say_classes(one: str, other: str) -> bool:
    """Whether both of two globs have a word of their own that may be a class, as liver and spleen
    do; initials, numbers, auto and manual are none."""
    own = {*words_of(one)} ^ {*words_of(other)}
    own -= LABEL_WORDS | IMAGE_WORDS | MACHINE_WORDS
    words = {word for word in own if len(word) > 3 and not _DRAWN_BY.fullmatch(word)}
    return all(words & {*words_of(glob)} for glob in (one, other))


def _twice_drawn(twins: Sequence[str], main: str) -> Iterator[str]:
    if twins:
        yield (
            f"{_some(twins)} mostly coincide with labels that are taken, such as {main}, as what "
            "two people drew of one thing does; each thing is taken once"
        )


def _maybe_twice(pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    if pairs:
        yield (
            f"{pairs[0][0]} and {pairs[0][1]} coincide by more than half and are taken for two "
            "classes; if they are one thing that two people drew, take one of them out of "
            "label_files"
        )


def _in_order(matches: Sequence[Match]) -> list[str]:
    """Globs of labels: those with most pairs first, of these those that no program drew.

    Those that are mere masks come behind what else is drawn on the same images: they may say where
    the retina or the brain is.
    """
    best = {
        glob: max((m for m in matches if m.label == glob), key=lambda match: match.rank)
        for glob in {match.label for match in matches}
    }
    images = {glob: {image for image, _ in match.pairs} for glob, match in best.items()}
    vague = {glob: set(words_of(glob)) & LABEL_WORDS <= VAGUE_WORDS for glob in best}

    def order(glob: str) -> tuple[bool, int, bool, int, str]:
        is_behind = vague[glob] and any(
            not vague[other] and images[other] <= images[glob] for other in best
        )
        is_of_machine = bool(set(words_of(glob)) & MACHINE_WORDS)
        return (is_behind, -len(best[glob].pairs), is_of_machine, len(glob), glob)

    return sorted(best, key=order)


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
    with contextlib.suppress(FedfmsError):
        return _label_at(path, format, image)
    return None


def label_error(path: Path, format: ImageFormat) -> FedfmsError | None:
    """Why a file cannot be read as a label; None where it can."""
    try:
        _label_at(path, format, None)
    except FedfmsError as error:
        return error
    return None


def _label_at(path: Path, format: ImageFormat, image: Stored | None) -> Stored:
    if format == "dicom" and is_plain_picture(path):
        format = "image"
    elif format == "dicom" and is_nifti(path):
        format = "nifti"
    site = reading_of(format)
    data = read_bytes(path, site)
    if format != "dicom":
        return read_label(path, data, site, image)
    from fedfms.data.dicom.labels import read_mask  # pydicom takes a second to import

    assert isinstance(data, bytes)  # a picture is a file
    return Stored(read_mask(path, data).transpose(2, 1, 0), (1.0, 1.0, 1.0), False)


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
    """Whether most pairs lie on one grid; what cannot be read does not say no."""
    return misfits(found.pairs, tree, found.format) is not None


def misfits(
    pairs: Sequence[tuple[str, str]], tree: Tree, format: ImageFormat
) -> tuple[str, ...] | None:
    """Labels that do not lie on the grid of their image; None where most do not.

    The first pairs are looked at, and more where these differ: one that is wrong says nothing of
    the others.
    """
    some = list(pairs[:_LOOKED_AT])
    wrong = [pair for pair in some if _on_one_grid(pair, tree, format) is False]
    if wrong and len(wrong) < len(some):
        step = max(1, len(pairs) // _LOOKED_AT_MORE)
        more = pairs[_LOOKED_AT:][::step]
        wrong += [pair for pair in more if _on_one_grid(pair, tree, format) is False]
        some += more
    return None if 2 * len(wrong) >= len(some) > 0 else tuple(label for _, label in wrong)


def _on_one_grid(pair: tuple[str, str], tree: Tree, format: ImageFormat) -> bool | None:
    image, label = (tree.root / file for file in pair)
    if format == "nifti":
        return _by_headers(image, label)
    if format == "dicom" and is_nifti(label):
        return _by_series(image, label)
    return _by_size(image, label, format)


def _by_headers(image: Path, label: Path) -> bool | None:
    """Whether two NIfTI files lie on one grid, from their headers; None where that cannot be
    told."""
    grid, other = _grid_of(image), _grid_of(label)
    if grid is None or other is None:
        return None
    try:
        return Cut.onto(*other, Cut.of(*grid, "axial")) is not None
    except (ValueError, np.linalg.LinAlgError):
        return None


def _by_series(folder: Path, label: Path) -> bool | None:
    """Whether a label in NIfTI lies on the grid of a series in DICOM."""
    image, other = image_at(folder, "dicom"), _grid_of(label)
    if image is None or image.cut is None or other is None:
        return None
    try:
        return Cut.onto(*other, image.cut) is not None
    except (ValueError, np.linalg.LinAlgError):
        return None


def _grid_of(path: Path) -> tuple[Any, tuple[int, int, int]] | None:
    """Affine and shape of a NIfTI file; None where they cannot be told."""
    try:
        header: Any = nibabel.load(path)
        x, y, z, *more = (*header.shape, 1, 1)[: max(3, len(header.shape))]
        return None if any(size != 1 for size in more) else (header.affine.astype(float), (x, y, z))
    except Exception:  # a damaged file makes a decoder raise nearly anything
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
        variants = tuple(variants_of(pattern, files))
        kept.append(replace(first, pattern=pattern, files=files, part=None, variants=variants))
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
