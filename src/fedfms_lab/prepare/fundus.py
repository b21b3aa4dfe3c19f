"""Optic disc and cup at four sites: REFUGE, ORIGA, G1020 and Drishti-GS1.

What is written holds 0 background, 1 disc outside the cup, 2 cup. The whole disc, which the
literature scores, is 1 and 2; the ring without the cup, which the paper's code trains, is 1 alone.
So both are a line of site.yml (`od_mode`), and the label files are the same.

REFUGE, ORIGA and G1020 are read as Kaggle's "Glaucoma Datasets" (arnavjain1/glaucoma-datasets) has
them: Images/ and Masks/ with PNG masks of 0, 1, 2. REFUGE is read as the challenge packs it as
well: BMP masks of 255 background, 128 ring, 0 cup. Drishti-GS1 has a soft map for each of disc and
cup: the share of its four experts, as 0, 64, 128, 191, 255.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedfms.errors import ConfigError
from fedfms_lab.prepare.pictures import png, read_numbers, read_rgb, require_same_size
from fedfms_lab.prepare.plan import Item, Made, SitePlan, chosen, items_of
from fedfms_lab.prepare.source import Files, Source, pair_by_key, unexpected_values

# site -> the provider's number of cases
SITES = {"REFUGE": 1200, "ORIGA": 650, "G1020": 1020, "Drishti-GS1": 101}
SOFT_FROM = 100  # of 255: at least two of the four experts, as the paper's code
_DISC_CLASS: dict[str, list[int]] = {"full": [1, 2], "ring": [1]}
_DRISHTI = {"_odsegsoftmap": "disc", "_cupsegsoftmap": "cup"}
_PHOTOS = (".jpg", ".jpeg", ".png")
_COUNTS = {"Drishti-GS1": ("cup_outside_disc_pixels", "soft_map_resized")}


def plan_fundus(
    source: Source,
    *,
    paper: bool = False,
    od_mode: str | None = None,
    only: Sequence[str] | None = None,
) -> list[SitePlan]:
    """One plan for each of the four sites.

    Args:
        source: a folder below which the four sets lie.
        paper: the ring as disc (unless `od_mode` says otherwise) and one in ten for validation.
        od_mode: full or ring; None: full, and ring with `paper`.
        only: these sites alone.

    Raises:
        SiteDataError: "missing-download-file", "ambiguous-download".
        ConfigError: an unknown site or mode.
    """
    mode = od_mode or ("ring" if paper else "full")
    if mode not in _DISC_CLASS:
        raise ConfigError(f"there is no od_mode {mode}", "choose full or ring")
    find: dict[str, Callable[[Source], list[Item]]] = {
        "REFUGE": _refuge_items,
        "ORIGA": functools.partial(_folder_items, "ORIGA"),
        "G1020": functools.partial(_folder_items, "G1020"),
        "Drishti-GS1": _drishti_items,
    }
    disc = "disc is the whole disc" if mode == "full" else "disc is the ring around the cup"
    return [
        SitePlan(
            command="fundus",
            given_name=name,
            items=find[name](source),
            settings={
                "format": "image",
                "classes": {"optic_disc": _DISC_CLASS[mode], "optic_cup": [2]},
                "channels": "rgb",
            },
            patient=r"^(.+)\.png$",
            paper=paper,
            comments=[
                f"fundus photographs; od_mode {mode}: {disc}.",
                "Labels: 0 background, 1 disc outside the cup, 2 cup. Each photograph counts as a "
                "patient of its own.",
            ],
            known_cases=SITES[name],
            count_names=_COUNTS.get(name, ()),
        )
        for name in chosen(tuple(SITES), only)
    ]


# ------------------------------------------------------------------------------------------ finding


def _folder_items(name: str, source: Source) -> list[Item]:
    """ORIGA/Images/001.jpg with ORIGA/Masks/001.png; other folders beside them are variants."""
    folder = [name.casefold()]
    images, masks = _kaggle(source, lambda parts: parts[-1:] == folder)
    if not images or not masks:
        raise source.missing(f"images and masks of {name}", f"{name}/Images and {name}/Masks")
    return items_of(pair_by_key(source, images, masks), _make_from_mask)


def _refuge_items(source: Source) -> list[Item]:
    """REFUGE as Kaggle has it; where that is not there, as the challenge packs it."""
    folders = [["refuge", part] for part in ("train", "val", "test")]
    images, masks = _kaggle(source, lambda parts: parts[-2:] in folders)
    if not images and not masks:
        images, masks = _refuge_of_the_challenge(source)
    if not images or not masks:
        raise source.missing(
            "images and masks of REFUGE", "REFUGE/train/Images and REFUGE/train/Masks"
        )
    return items_of(pair_by_key(source, images, masks), _make_from_mask)


def _kaggle(source: Source, wanted: Callable[[list[str]], bool]) -> tuple[Files, Files]:
    """Photographs in Images/ and PNG in Masks/, where the folders above them are wanted."""
    images: Files = []
    masks: Files = []
    for path in source.files:
        *above, last = ["", *(part.casefold() for part in source.parts(path))]
        if not wanted(above):
            continue
        if last == "images" and path.suffix.lower() in _PHOTOS:
            images.append((path.stem, path))
        elif last == "masks" and path.suffix.lower() == ".png":
            masks.append((path.stem, path))
    return images, masks


def _refuge_of_the_challenge(source: Source) -> tuple[Files, Files]:
    """JPEG in …Training400, …Validation400, …Test400; BMP in folders called Disc_Cup_Masks."""
    images: Files = []
    masks: Files = []
    for path in source.files:
        parts = [part.casefold() for part in source.parts(path)]
        if "disc_cup_masks" in parts and path.suffix.lower() == ".bmp":
            masks.append((path.stem, path))
        elif path.suffix.lower() in (".jpg", ".jpeg") and any(
            part.endswith(("training400", "validation400", "test400")) for part in parts
        ):
            images.append((path.stem, path))
    return images, masks


def _drishti_items(source: Source) -> list[Item]:
    images: Files = []
    maps: dict[str, Files] = {"disc": [], "cup": []}
    for path in source.where(lambda path: path.name.lower().startswith("drishtigs_")):
        if path.suffix.lower() != ".png":
            continue
        for ending, kind in _DRISHTI.items():
            if path.stem.lower().endswith(ending):
                maps[kind].append((path.stem[: -len(ending)], path))
                break
        else:
            images.append((path.stem, path))
    if not images:
        raise source.missing(
            "images of Drishti-GS1", "Training/Images/drishtiGS_002.png and Training/GT"
        )
    discs = pair_by_key(source, images, maps["disc"])
    cups = {key: cup for key, _, cup in pair_by_key(source, images, maps["cup"])}
    return [
        Item(
            case=key,
            patient=key,
            sources=(image, disc, cups[key]),
            make=functools.partial(_make_from_soft_maps, image, disc, cups[key]),
        )
        for key, image, disc in discs
    ]


# ------------------------------------------------------------------------------------------- making

_CHALLENGE: Mapping[int, int] = {255: 0, 128: 1, 0: 2}  # value in a BMP -> ours
_KAGGLE: Mapping[int, int] = {0: 0, 1: 1, 2: 2}


def _make_from_mask(image_path: Path, mask_path: Path) -> Made:
    image, mask = read_rgb(image_path), read_numbers(mask_path)
    require_same_size(image_path, image, mask_path, mask)
    meaning = _CHALLENGE if mask_path.suffix.lower() == ".bmp" else _KAGGLE
    found = {int(value) for value in np.unique(mask)}
    if not found <= meaning.keys():
        raise unexpected_values(mask_path, found, meaning)
    label = np.zeros(mask.shape, np.uint8)
    for value, ours in meaning.items():
        label[mask == value] = ours
    return Made(png(image), png(label))


def _make_from_soft_maps(image_path: Path, disc_path: Path, cup_path: Path) -> Made:
    """Two soft maps to one label. A cup pixel outside the disc is cup, and so in the full disc."""
    image = read_rgb(image_path)
    disc, disc_resized = _soft_map(disc_path, image_path, image)
    cup, cup_resized = _soft_map(cup_path, image_path, image)
    label = np.zeros(disc.shape, np.uint8)
    label[disc] = 1
    label[cup] = 2
    counts = {
        "cup_outside_disc_pixels": int((cup & ~disc).sum()),
        "soft_map_resized": int(disc_resized or cup_resized),
    }
    return Made(png(image), png(label), counts)


def _soft_map(path: Path, image_path: Path, image: NDArray[Any]) -> tuple[NDArray[np.bool_], bool]:
    """(H, W) bool on the picture's grid, and whether it had to be resized for that.

    Some soft maps of the provider are a few pixels smaller than their picture. Up to one per cent
    of a side they are stretched (nearest neighbour); more is an error.
    """
    soft = read_numbers(path)
    if soft.shape == image.shape[:2]:
        return soft >= SOFT_FROM, False
    sides = zip(soft.shape, image.shape[:2], strict=True)
    if any(abs(ours - theirs) > 0.01 * theirs for ours, theirs in sides):
        require_same_size(image_path, image, path, soft)
    rows, columns = image.shape[:2]
    stretched = Image.fromarray((soft >= SOFT_FROM).astype(np.uint8)).resize(
        (columns, rows), Image.Resampling.NEAREST
    )
    return np.asarray(stretched) == 1, True
