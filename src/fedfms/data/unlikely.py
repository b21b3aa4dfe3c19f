"""Numbers of a site's data that can be right and seldom are: each is a warning with its fix.

A warning says what was seen in how many cases, so that a person can tell at once whether it is
meant. Real data sets that are in order give none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.data.memory import free_bytes, size_text
from fedfms.data.numbers import CaseNumbers, DataSummary, MaskGrid, count_of, percent

_MOST_OF_THE_PICTURE = 0.6  # mean share of a class in its slices; organs in cropped pictures: less
_LIKE_A_BACKGROUND = (0.5, 0.9)  # share of the picture and of its border that a background covers
_RARE_CASES = 0.1  # share of the cases that have a class, from ten cases on
_FEW_PIXELS = 4  # nobody draws so little: a click
_TOO_SMALL_OBJECTS = 0.25  # share of the outlines; the ends of a structure are always small
_NOT_SQUARE = 1.5
_OTHER_UNIT = 100.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of problem, however many files have it.

    An "error" stops training at this site; a "warning" is worth a look and stops nothing.
    """

    code: str
    problem: str
    fix: str
    severity: Literal["error", "warning"]


def warning(code: str, problem: str, fix: str) -> Finding:
    """A finding that stops nothing."""
    return Finding(code, problem, fix, "warning")


def unlikely(
    summary: DataSummary,
    read: Sequence[CaseNumbers],
    site: SiteConfig,
    grid: MaskGrid,
    recipe: Recipe | None = None,
) -> list[Finding]:
    """What in a site's numbers is worth a look.

    Args:
        summary: of all cases.
        read: the cases that could be read.
        site: the site's configuration.
        grid: on which the job learns.
        recipe: of the job; None: it is not known, and the grid is SAM's own.
    """
    if not read:
        return []
    findings: list[Finding | None] = []
    told: set[tuple[int, ...]] = set()  # label values that cover most of the picture
    for name in site.classes:
        if summary.classes[name].share is None:
            continue
        most = _covers_most(name, summary, read, site)
        if most is not None:  # then the rest says nothing
            values = _occurring(name, summary, site)
            findings += [] if values in told else [most]
            told.add(values)
            continue
        findings += [
            _rare(name, summary, read),
            _on_one_side(name, summary, site),
            _too_small(name, read, grid, recipe),
        ]
    findings += [
        _same_values(site),
        _pixels(read, site),
        _sizes(read),
        _colours(read),
        _units(read),
        _offset(read, site),
        _memory(summary),
        _disk(summary, site),
    ]
    return [finding for finding in findings if finding is not None]


# --------------------------------------------------------------------------------------- classes


def _covers_most(
    name: str, summary: DataSummary, read: Sequence[CaseNumbers], site: SiteConfig
) -> Finding | None:
    """Inverted masks, an alpha channel that was the mask, labels that were filled to the edge."""
    least, on_border = _LIKE_A_BACKGROUND
    having = [numbers for numbers in read if numbers.drawn[name].pixels.any()]
    suspects = [
        numbers
        for numbers in having
        if numbers.share(name) > least and numbers.drawn[name].on_border > on_border
    ]
    numbers = summary.classes[name]
    assert numbers.share is not None
    if numbers.share[1] > _MOST_OF_THE_PICTURE:
        suspects = having
    if not suspects:
        return None
    share = float(np.mean([numbers.share(name) for numbers in suspects]))
    what = "the whole picture" if share == 1 else f"{percent(share)} of the picture on average"
    where = (
        f"in all {len(having)} cases that have it"
        if len(suspects) == len(having)
        else f"in {len(suspects)} of the {len(having)} cases that have it; the first is "
        f"{suspects[0].case.label}"
    )
    values = ", ".join(map(str, _occurring(name, summary, site)))
    others = sorted(
        {value for numbers in suspects for value in numbers.values} & set(site.background)
    )
    if share == 1:
        fix = (
            "look at the label files: if each was filled to its edges, or the mask was in an alpha "
            "channel, export the masks again"
        )
    elif len(suspects) < len(having):
        fix = (
            "look at these labels: if black and white are the other way round in them, invert "
            "them, so that a value means the same in every file"
        )
    elif others:
        fix = (
            f"look at a label: if {values} is the background in it (black on white), write "
            f"{name}: [{', '.join(map(str, others))}] under classes and background: [{values}] in "
            "site.yml"
        )
    else:
        fix = f"look at a label: if {values} is not {name}, correct classes in site.yml"
    return warning("covers-most", f"{name} covers {what} {where}", fix)


def _occurring(name: str, summary: DataSummary, site: SiteConfig) -> tuple[int, ...]:
    """The class's values that labels hold."""
    return tuple(value for value in summary.label_values if value in site.classes[name])


def _rare(name: str, summary: DataSummary, read: Sequence[CaseNumbers]) -> Finding | None:
    numbers = summary.classes[name]
    most = max(int(case.drawn[name].pixels.max()) for case in read)
    if most <= _FEW_PIXELS:
        return warning(
            "hardly-drawn",
            f"{name} never has more than {count_of(most, 'pixel')} in a slice",
            "look at the labels in which it occurs: these may be slips of the mouse, or another "
            "class's value",
        )
    if summary.read >= 10 and numbers.cases.total < _RARE_CASES * summary.read:
        return warning(
            "class-rare",
            f"{name} is drawn in {numbers.cases.total} of {summary.read} cases",
            "if it was not looked for in the others, leave those out, or move the class to "
            "not_annotated in site.yml: an empty label teaches that there is none",
        )
    return None


def _on_one_side(name: str, summary: DataSummary, site: SiteConfig) -> Finding | None:
    cases = summary.classes[name].cases
    if cases.train and (cases.validation or summary.cases.validation < site.min_cases):
        return None  # where few cases validate at all, that is said already
    side, effect = (
        ("to validate", "it gets no score here")
        if cases.train
        else ("to train", "it is not learnt")
    )
    return warning(
        "class-on-one-side",
        f"{name} is drawn in {count_of(cases.total, 'case')}, and in none of those {side}, so that "
        f"{effect}",
        "set another validation_seed or a larger validation_fraction in site.yml",
    )


def _too_small(
    name: str, read: Sequence[CaseNumbers], grid: MaskGrid, recipe: Recipe | None
) -> Finding | None:
    objects = sum(numbers.drawn[name].objects for numbers in read)
    small = sum(numbers.drawn[name].too_small for numbers in read)
    if not objects or small < _TOO_SMALL_OBJECTS * objects:
        return None
    largest = max(read, key=lambda numbers: max(numbers.shape[1:]))
    rows, columns = grid.mask_pixel(largest.shape[1:], largest.spacing[1:])
    size = "at the job's" if recipe is not None else "at SAM's own"
    return warning(
        "objects-too-small",
        f"{name}: {small} of the {objects} outlines looked at are smaller than one pixel of the "
        f"network's mask, which covers {rows:.1f} x {columns:.1f} pixels of a picture of "
        f"{largest.shape[1]} x {largest.shape[2]} {size} image_size {grid.image_size}",
        "cut the pictures into tiles or crop them, so that objects are larger in them"
        + (", or use a larger image_size" if grid.image_size < 1024 else "")
        + ("" if recipe is not None else "; --job looks at a job's own size"),
    )


def _same_values(site: SiteConfig) -> Finding | None:
    by_values: dict[frozenset[int], list[str]] = {}
    for name, values in site.classes.items():
        by_values.setdefault(frozenset(values), []).append(name)
    twins = next((names for names in by_values.values() if len(names) > 1), None)
    if twins is None:
        return None
    return warning(
        "same-label-values",
        f"{' and '.join(twins)} have the same label values",
        "give each class the values that mean it under classes in site.yml",
    )


# -------------------------------------------------------------------------------------- pictures


def _pixels(read: Sequence[CaseNumbers], site: SiteConfig) -> Finding | None:
    """Slices whose pixels are far from square, or far from the finest that the volume has."""
    coarse = [
        numbers
        for numbers in read
        if numbers.finest is not None and max(numbers.spacing[1:]) > _NOT_SQUARE * numbers.finest[0]
    ]
    uneven = [
        numbers
        for numbers in read
        if max(numbers.spacing[1:]) > _NOT_SQUARE * min(numbers.spacing[1:])
    ]
    if coarse:
        first = max(coarse, key=lambda numbers: max(numbers.spacing[1:]))
        assert first.finest is not None
        return warning(
            "plane-not-finest",
            f"in {len(coarse)} of {count_of(len(read), 'volume')} the {site.plane} slices have "
            f"pixels of up to {_pixel(first)} mm, {first.finest[1]} ones of {first.finest[0]:.3g} "
            "mm or less",
            f"if the sites of the job agree on it, set plane: {first.finest[1]} in site.yml; "
            "slices keep their shape in millimetres, but not detail that was never taken",
        )
    if uneven:
        first = max(uneven, key=lambda numbers: max(numbers.spacing[1:]) / min(numbers.spacing[1:]))
        return warning(
            "pixels-not-square",
            f"in {len(uneven)} of {count_of(len(read), 'volume')} the pixels of a slice are far "
            f"from square, up to {_pixel(first)} mm (rows x columns)",
            "slices keep their shape in millimetres, but detail is that of the longer side; check "
            "that the voxel sizes are right",
        )
    return None


def _sizes(read: Sequence[CaseNumbers]) -> Finding | None:
    """One case in another unit of length than the rest, such as cm instead of mm."""
    volumes = np.array([np.prod(numbers.spacing) for numbers in read if numbers.is_volume])
    if not volumes.size:
        return None
    usual = float(np.median(volumes))
    far = np.flatnonzero((volumes > _OTHER_UNIT * usual) | (volumes * _OTHER_UNIT < usual))
    if not far.size:
        return None
    first = [numbers for numbers in read if numbers.is_volume][int(far[0])]
    sizes = " x ".join(f"{size:.3g}" for size in first.spacing)
    return warning(
        "other-voxel-size",
        f"the voxels of {count_of(len(far), 'volume')} are over 100 times larger or smaller than "
        f"those of most; the first is {first.case.image} with {sizes} mm (slices x rows x columns)",
        "check the voxel size and the unit of length in the header; volumes and distances follow "
        "from it",
    )


def _pixel(numbers: CaseNumbers) -> str:
    return f"{numbers.spacing[1]:.3g} x {numbers.spacing[2]:.3g}"


def _colours(read: Sequence[CaseNumbers]) -> Finding | None:
    grey = [numbers for numbers in read if numbers.channels == 3 and numbers.is_colourless]
    coloured = sum(numbers.channels == 3 for numbers in read) - len(grey)
    if not grey or not coloured:
        return None
    return warning(
        "colours-differ",
        f"{count_of(len(grey), 'picture')} have no colour, {coloured} have; the first without is "
        f"{grey[0].case.image}",
        "if the grey ones are of another kind, leave them out or make them a site of their own; "
        "or set channels: gray in site.yml",
    )


def _units(read: Sequence[CaseNumbers]) -> Finding | None:
    """One case in other units than the rest, such as 0 to 1 instead of 0 to 255."""
    spreads = np.array([numbers.spread or np.ptp(numbers.stored) for numbers in read])
    usual = float(np.median(spreads))
    far = np.flatnonzero((spreads > _OTHER_UNIT * usual) | (spreads * _OTHER_UNIT < usual))
    if not far.size:
        return None
    first = read[int(far[0])]
    return warning(
        "other-intensities",
        f"the stored values of {count_of(len(far), 'image')} spread over 100 times more or less "
        f"than those of most; the first is {first.case.image} with {first.stored[0]:.4g} to "
        f"{first.stored[1]:.4g}",
        "check that all images have one unit, and are of one kind; export those that differ again",
    )


def _offset(read: Sequence[CaseNumbers], site: SiteConfig) -> Finding | None:
    """CT of which some is in Hounsfield units and some is stored 1024 higher."""
    if site.intensity.rule != "window":
        return None
    lows = np.array([numbers.stored[0] for numbers in read])
    shifted = np.flatnonzero(lows >= 0)
    if not shifted.size or np.median(lows) > -500:
        return None
    return warning(
        "other-intensities",
        f"{count_of(len(shifted), 'image')} have no value below 0, most others reach "
        f"{np.median(lows):.0f}; the first is {read[int(shifted[0])].case.image}",
        "check that these are in Hounsfield units: the window is meant for those",
    )


# --------------------------------------------------------------------------------------- machine


def _memory(summary: DataSummary) -> Finding | None:
    memory = summary.memory
    if memory.needed < memory.allowed:
        return None
    return warning(
        "memory-short",
        f"the data needs {size_text(memory.needed)} of memory in the trainer, the model not "
        f"counted, and this process may use {size_text(memory.allowed)}",
        "raise TRAINER_MEMORY in .env if this is a container, use a machine with more memory, or "
        "fewer or smaller cases",
    )


def _disk(summary: DataSummary, site: SiteConfig) -> Finding | None:
    """Of a cache that site.yml names; fedfms check-site looks at the trainer's own folder."""
    if site.cache is None:
        return None
    missing, free = summary.disk.missing(site.cache), free_bytes(site.cache)
    if missing < free:
        return None
    return warning(
        "disk-short",
        f"prepared cases need {size_text(missing)} more in {site.cache}, the cache of site.yml, "
        f"and {size_text(free)} are free on its disk",
        "free room there, or name a folder on a larger disk with cache in site.yml",
    )
