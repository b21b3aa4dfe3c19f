"""Layouts that say themselves what they are: nnU-Net raw and Decathlon, BIDS.

- nnU-Net raw: github.com/MIC-DKFZ/nnUNet, documentation/dataset_format.md. `imagesTr` holds a file
  for each case and channel, {CASE}_{0000}.ending, `labelsTr` {CASE}.ending, `dataset.json` what
  channels and labels are called.
- Medical Segmentation Decathlon (medicaldecathlon.com; Simpson et al. 2019, arXiv 1902.09063): the
  same folders, one file a case, `dataset.json` with `modality` and `labels` by number.
- BIDS (bids-specification.readthedocs.io, imaging derivatives): sub-<label>[/ses-<label>]/anat/,
  segmentations and masks in derivatives/<pipeline>/ under the same names, with other entities
  behind them and the suffix dseg or mask.
"""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from fedfms.bounded import read_json_object
from fedfms.data.adopt.names import class_name, class_names, contrast_of, glob_literal, role_of
from fedfms.data.adopt.pairing import Found, best_match
from fedfms.data.adopt.tree import Group, Tree, endings_glob, stem_and_ending
from fedfms.errors import FedfmsError
from fedfms.files import read_whole

_LARGEST = 16 * 1024**2  # bytes of a dataset.json


@dataclass(frozen=True, slots=True)
class DatasetJson:
    """What a dataset.json says.

    classes: name -> label values; background, and what is ignored, are none.
    ignored: label values that nnU-Net ignores in its loss.
    """

    folder: str  # relative to the root, with a / at its end, or empty
    channels: dict[int, str]
    classes: dict[str, tuple[int, ...]]
    ignored: tuple[int, ...] = ()


def dataset_json(tree: Tree) -> DatasetJson | None:
    """The one dataset.json beside an imagesTr; None where there is none, or several."""
    places = [
        file
        for file in tree.others
        if PurePosixPath(file).name == "dataset.json"
        and (tree.root / file).parent.joinpath("imagesTr").is_dir()
    ]
    if len(places) != 1:
        return None
    try:
        values = read_json_object(tree.root / places[0], _LARGEST)
    except (FedfmsError, OSError, ValueError):
        return None
    named = values.get("channel_names", values.get("modality"))
    folder = places[0].removesuffix("dataset.json")
    channels: dict[int, str] = {}
    if isinstance(named, dict):
        for key, name in named.items():
            if str(key).isdigit():
                channels[int(key)] = str(name)
    classes, ignored = _classes(values.get("labels"))
    return DatasetJson(folder, channels, classes, ignored)


def data_sets(tree: Tree) -> list[str]:
    """Folders of the tree that each are a data set as nnU-Net or the Decathlon have it."""
    parts: dict[str, set[str]] = defaultdict(set)
    for file in (*tree.nifti, *tree.image):
        folder, _, last = file.rpartition("/")[0].rpartition("/")
        if last in ("imagesTr", "labelsTr"):
            parts[folder].add(last)
    return sorted(folder for folder, found in parts.items() if len(found) == 2)


def _classes(labels: Any) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
    """Of nnU-Net's {name: value or values}, or the Decathlon's {value: name}."""
    found: dict[str, tuple[int, ...]] = {}
    ignored: list[int] = []
    if not isinstance(labels, dict):
        return {}, ()
    name_of = class_names(
        str(given) if str(key).isdigit() else str(key) for key, given in labels.items()
    )
    for key, given in labels.items():
        name, values = (str(given), [key]) if str(key).isdigit() else (str(key), given)
        values = values if isinstance(values, list) else [values]
        numbers = [int(value) for value in values if str(value).isdigit()]
        if name.strip().lower() == "ignore":
            ignored += numbers
        elif name.strip().lower() != "background" and numbers and numbers != [0]:
            found[name_of[name]] = (*found.get(name_of[name], ()), *numbers)
    return found, tuple(ignored)


def nnunet(tree: Tree, said: DatasetJson | None) -> Found | None:
    """nnU-Net raw or Decathlon, with dataset.json or without; None if it is neither."""
    places: dict[str, list[str]] = defaultdict(list)
    for kind in ("nifti", "image"):
        for file in tree.of(kind):
            folder, _, name = file.rpartition("/")
            if folder.rpartition("/")[2] in ("imagesTr", "labelsTr"):
                places[f"{kind} {folder}"].append(file)
    images = [key for key in places if key.endswith("imagesTr")]
    if said is not None:
        images = [key for key in images if key.split(" ", 1)[1] == f"{said.folder}imagesTr"]
    if len(images) != 1:
        return None
    kind, folder = images[0].split(" ", 1)
    base = folder.removesuffix("imagesTr")
    labels = places.get(f"{kind} {base}labelsTr", [])
    if not labels:
        return None
    every_ending = {stem_and_ending(file)[1] for file in labels}
    label = Group(
        f"{glob_literal(base)}labelsTr/*{endings_glob(every_ending)}", tuple(labels), "label"
    )
    stems = {stem_and_ending(PurePosixPath(file).name)[0] for file in labels}
    by_channel: dict[int, list[str]] = defaultdict(list)
    plain: list[str] = []
    for file in places[images[0]]:
        stem, of_image = stem_and_ending(PurePosixPath(file).name)
        numbered = re.fullmatch(r"(.*)_(\d{4})", stem)
        if numbered is not None and (numbered.group(1) in stems or stem not in stems):
            by_channel[int(numbered.group(2))].append(file)
        elif of_image in every_ending or stem in stems:
            plain.append(file)
    globs: dict[str, Group] = {}
    if by_channel and len(plain) * 2 < len(places[images[0]]):
        for number, files in sorted(by_channel.items()):
            of_images = endings_glob({stem_and_ending(file)[1] for file in files})
            pattern = f"{glob_literal(folder)}/*_{number:04d}{of_images}"
            name = said.channels.get(number, "") if said else ""
            contrast = contrast_of(name) or (class_name(name) if name else f"channel_{number}")
            if contrast in globs:
                contrast = f"{contrast}_{number}"
            globs[contrast] = Group(pattern, tuple(files), "image", contrast)
    elif plain:
        of_images = endings_glob({stem_and_ending(file)[1] for file in plain})
        pattern = f"{glob_literal(folder)}/*{of_images}"
        globs[""] = Group(pattern, tuple(plain), "image")
    matches = {name: best_match(group, label, "nifti") for name, group in globs.items()}
    found = {name: match for name, match in matches.items() if match is not None}
    if not found or len(found) < len(globs):
        return None
    first = next(iter(found.values()))
    several = len(found) > 1
    every = {pair[1] for match in found.values() for pair in match.pairs}
    lacking = sum(
        any(one not in {pair[1] for pair in match.pairs} for match in found.values())
        for one in every
    )
    return Found(
        "nifti" if kind == "nifti" else "image",
        {name if several else "": match.image for name, match in found.items()},
        {"": first.label},
        "wildcards",
        max((match.pairs for match in found.values()), key=len),
        max(match.alone for match in found.values()),
        lacking if several else 0,
    )


# ------------------------------------------------------------------------------------------- BIDS

_SUBJECT = re.compile(r"(?:^|/)sub-[A-Za-z0-9]+(?:/ses-[A-Za-z0-9]+)?/(?P<type>[a-z]+)/[^/]+$")
# entities that an image has and its segmentation has before those of its own
_OF_IMAGES = ("sub", "ses", "task", "acq", "ce", "rec", "dir", "run", "echo", "part", "sample")


def bids(tree: Tree) -> list[Found]:
    """All readings of a BIDS folder: an image's suffix with a kind of segmentation each."""
    images: dict[str, list[str]] = defaultdict(list)
    labels: dict[str, list[str]] = defaultdict(list)
    for file in tree.nifti:
        found = _SUBJECT.search(f"/{file}")
        if found is None:
            continue
        start = file[: file.index("sub-")]
        stem, ending = stem_and_ending(PurePosixPath(file).name)
        entities = stem.split("_")
        own = next(
            (n for n, one in enumerate(entities) if one.partition("-")[0] not in _OF_IMAGES),
            len(entities) - 1,
        )
        tail = "_".join(entities[own:])
        place = f"{glob_literal(start)}sub-*/**/{found['type']}/*_{tail}{ending}"
        is_label = role_of(entities[-1]) == "label" or any(
            one.startswith("label-") for one in entities
        )
        if is_label:
            labels[place].append(file)
        elif not start or "derivatives" not in start:
            images[place].append(file)
    readings = []
    for image, of_image in images.items():
        for label, of_label in labels.items():
            match = best_match(
                Group(image, tuple(of_image), "image"),
                Group(label, tuple(of_label), "label"),
                "nifti",
            )
            if match is None or match.orphans:
                continue
            readings.append(
                Found(
                    "nifti",
                    {"": match.image},
                    {"": match.label},
                    match.pair_by,
                    match.pairs,
                    match.alone,
                )
            )
    return sorted(readings, key=lambda found: (-len(found.pairs), found.alone, found.images[""]))


def bids_names(tree: Tree, labels: Sequence[str]) -> dict[int, str]:
    """What the lookup tables of segmentations call their values; empty where there is none.

    A table is `<matches>.tsv` beside a segmentation, or one with fewer entities in a folder above
    it (`dseg.tsv`), of which the nearest counts; its columns are index and name.
    """
    tables = [file for file in tree.others if file.endswith(("dseg.tsv", "mask.tsv"))]
    used = {table for label in labels if (table := _nearest(tables, label)) is not None}
    names: dict[int, str] = {}
    for table in sorted(used):
        try:
            text = read_whole(tree.root / table, _LARGEST).decode("utf-8-sig")
            rows = [*csv.DictReader(io.StringIO(text), delimiter="\t")]
        except (FedfmsError, OSError, ValueError, csv.Error):
            continue
        for row in rows:
            index, name = (str(row.get(column) or "").strip() for column in ("index", "name"))
            if index.isdigit() and name and names.setdefault(int(index), name) != name:
                return {}  # two pipelines that mean different things
    return names


def _nearest(tables: Sequence[str], label: str) -> str | None:
    """By BIDS's inheritance: of its entities a table has all or fewer, and it lies beside or
    above."""
    folder, _, name = label.rpartition("/")
    entities = stem_and_ending(name)[0].split("_")
    fitting = []
    for table in tables:
        above, _, own = table.rpartition("/")
        of_table = own.removesuffix(".tsv").split("_")
        is_above = not above or f"{folder}/".startswith(f"{above}/")
        if is_above and of_table[-1] == entities[-1] and set(of_table) <= set(entities):
            fitting.append((len(above), len(of_table), table))
    return max(fitting)[2] if fitting else None
