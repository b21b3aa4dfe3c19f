"""Pictures of what a site's network sees, as a page for the site's own people; it never leaves.

It goes the way of a training batch: the same reading, resizing and augmentation. What is drawn here
is not what a run draws, which follows from the site's secret.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_erosion
from torch import Tensor

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.cache import StoredCase
from fedfms.data.left_out import LeftOut
from fedfms.data.manifest import Case, find_whole_cases
from fedfms.data.prepare import prepare_cases
from fedfms.data.slices import SliceDataset
from fedfms.errors import ConfigError, SiteDataError
from fedfms.files import write_whole
from fedfms.geometry import pixel_statistics
from fedfms.pages.parts import Line, environment
from fedfms.training.augment import Change, Variation, changed_item
from fedfms.training.overlay import CLASS_COLOURS

BATCH_PAGE = "batch.html"  # in the trainer's private folder

MOST_PICTURES = 400  # of a page
_SIDE = 256  # pixels of a picture on the page
_VOID = (221, 51, 51)  # colour of the stripes over void pixels
_STRIPE, _DISTANCE = 2, 8  # pixels of a stripe, and from one to the next


@dataclass(frozen=True, slots=True)
class Shown:
    """One picture of the page."""

    source: str  # data: address
    caption: str


@dataclass(frozen=True, slots=True)
class Row:
    """A slice, or one contrast of it, as it is, and what augmentation makes of it."""

    plain: Shown
    changed: Sequence[Shown]


def show_batch(
    site: SiteConfig,
    recipe: Recipe,
    work: Path,
    *,
    slices: int = 6,
    variants: int = 4,
    control: Control | None = None,
) -> Path:
    """Write the page for some training slices, of as many cases as there are slices.

    Only those cases are read, and nothing that is prepared of them stays. Those that cannot be used
    are passed over as far as a job would leave them out.

    Args:
        site, recipe: whose pictures, and of which job.
        work: the trainer's private folder; is made if it is not there.
        slices: how many, at least 1.
        variants: of each after augmentation, at least 1; none where the recipe has no augmentation.

    Returns:
        the file, which only this user may read.

    Raises:
        SiteDataError: what is wrong with the files or the classes.
        ConfigError: code page-not-written.
    """
    shown = max(1, len(recipe.contrasts))
    if slices < 1 or variants < 1 or shown * slices * (variants + 1) > MOST_PICTURES:
        raise ConfigError(
            f"{slices} slices with {variants} variants each"
            + (f", of {shown} contrasts" if shown > 1 else ""),
            f"ask for at least one of each, and {MOST_PICTURES} pictures in all",
            code="page-not-written",
        )
    cases, left_out = find_whole_cases(site)
    training = [case for case in cases if case.split == "train"]
    dataset = _some_slices(training, left_out, site, recipe, slices, control or Control())
    items = _spread(len(dataset), slices)
    made = [_rows(dataset, item, recipe, variants if recipe.augment else 0) for item in items]
    rows = [row for rows_of_slice in made for row in rows_of_slice]
    page = work / BATCH_PAGE
    try:
        work.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(page, _render(rows, site, recipe), mode=0o600)
    except OSError as error:
        raise ConfigError(
            f"{page} cannot be written: {error.strerror}",
            "free room there, or name another folder with --work",
            code="page-not-written",
        ) from None
    return page


def _some_slices(
    cases: Sequence[Case],
    left_out: LeftOut,
    site: SiteConfig,
    recipe: Recipe,
    count: int,
    control: Control,
) -> SliceDataset:
    """Slices of some cases, spread over all; of more where those show none of the classes."""
    here_only = dataclasses.replace(site, cache=None)  # and gone with this process
    while True:
        chosen = [cases[place] for place in _spread(len(cases), count)]
        is_last = count >= len(cases)
        without = dataclasses.replace(left_out, found=[*left_out.found])
        try:
            prepared: list[StoredCase] = prepare_cases(chosen, here_only, control, left_out=without)
            return SliceDataset(prepared, here_only, recipe)
        except SiteDataError as error:
            if error.code not in ("empty-masks", "no-training-slices") or is_last:
                raise
        count *= 2


def _spread(size: int, count: int) -> list[int]:
    """At most so many numbers below `size`, at equal distances, the middle of each part."""
    count = min(size, count)
    return [(2 * place + 1) * size // (2 * count) for place in range(count)]


def _rows(dataset: SliceDataset, item: int, recipe: Recipe, variants: int) -> list[Row]:
    """Of a slice: one, or one of each contrast."""
    case, index = dataset.picture(item)
    variation = Variation(dataset, recipe, 0, os.urandom(32))
    levels = dataset.levels(item)
    of = len(case.images)
    caption = f"slice {index + 1} of {of}" if of > 1 else "as it is"
    unchanged = changed_item(levels, Change(), recipe)
    changes = [variation.change(item, turn) for turn in range(variants)]
    items = [changed_item(levels, change, recipe) for change in changes]
    rows = []
    for contrast, name in enumerate(recipe.contrasts or ("",)):
        said = f"{name}, {caption}" if name else caption
        changed = [
            Shown(_picture(one, contrast, recipe), ", ".join(change.words(contrast)) or "as it is")
            for one, change in zip(items, changes, strict=True)
        ]
        rows.append(Row(Shown(_picture(unchanged, contrast, recipe), said), changed))
    return rows


def _picture(item: dict[str, Tensor], contrast: int, recipe: Recipe) -> str:
    """A network's input as grey levels or colours, with the contours of its masks, as an address.

    Args:
        item: as of a `SliceDataset`.
        contrast: which of the recipe's is shown; 0 where it names none.
    """
    mean, std = (torch.tensor(one)[:, None, None] for one in pixel_statistics(recipe))
    levels = (item["image"] * std + mean).round().clamp(0, 255).to(torch.uint8)
    if recipe.contrasts:
        levels = levels[[contrast] * 3]
    shown = Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
    pixels = np.array(shown.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))
    masks = item["target"].numpy() > 0.5
    count = len(recipe.classes)
    if len(masks) > count:
        down, right = np.indices(pixels.shape[:2])
        pixels[_enlarged(masks[count]) & ((down + right) % _DISTANCE < _STRIPE)] = _VOID
    for number, (mask, taught) in enumerate(zip(masks[:count], item["annotated"], strict=True)):
        if taught:
            inside = _enlarged(mask)
            pixels[inside & ~binary_erosion(inside)] = CLASS_COLOURS[number % len(CLASS_COLOURS)]
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _enlarged(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(M, M) to the page's size."""
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    large: NDArray[np.bool_] = np.array(grey.resize((_SIDE, _SIDE), Image.Resampling.NEAREST)) > 127
    return large


def _render(rows: Sequence[Row], site: SiteConfig, recipe: Recipe) -> str:
    drawn = [name for name in recipe.classes if name in site.classes]
    page: str = _template().render(
        rows=rows,
        recipe=recipe,
        drawn=_colours(recipe, drawn),
        missing=[name.replace("_", " ") for name in recipe.classes if name not in drawn],
        void=f"rgb{_VOID}" if site.void else None,
    )
    return page


def _colours(recipe: Recipe, drawn: Sequence[str]) -> list[Line]:
    """Of each class that was drawn here the colour of its contour."""
    found = []
    for number, name in enumerate(recipe.classes):
        red, green, blue = CLASS_COLOURS[number % len(CLASS_COLOURS)]
        if name in drawn:
            found.append(Line(f"#{red:02x}{green:02x}{blue:02x}", name.replace("_", " ")))
    return found


@functools.cache
def _template() -> Any:
    return environment("fedfms.trainer", "fedfms.pages").get_template("batch.html.j2")
