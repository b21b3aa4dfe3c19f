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
from PIL import Image
from scipy.ndimage import binary_erosion
from torch import Tensor

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.cache import StoredCase
from fedfms.data.manifest import Case, find_cases
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


@dataclass(frozen=True, slots=True)
class Shown:
    """One picture of the page."""

    source: str  # data: address
    caption: str


@dataclass(frozen=True, slots=True)
class Row:
    """A slice as it is, and what augmentation makes of it."""

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

    Only those cases are read, and nothing that is prepared of them stays.

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
    if slices < 1 or variants < 1 or slices * (variants + 1) > MOST_PICTURES:
        raise ConfigError(
            f"{slices} slices with {variants} variants each",
            f"ask for at least one of each, and {MOST_PICTURES} pictures in all",
            code="page-not-written",
        )
    training = [case for case in find_cases(site) if case.split == "train"]
    dataset = _some_slices(training, site, recipe, slices, control or Control())
    items = _spread(len(dataset), slices)
    rows = [_row(dataset, item, recipe, variants if recipe.augment else 0) for item in items]
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
    cases: Sequence[Case], site: SiteConfig, recipe: Recipe, count: int, control: Control
) -> SliceDataset:
    """Slices of some cases, spread over all; of more where those show none of the classes."""
    here_only = dataclasses.replace(site, cache=None)  # and gone with this process
    while True:
        chosen = [cases[place] for place in _spread(len(cases), count)]
        is_last = count >= len(cases)
        try:
            prepared: list[StoredCase] = prepare_cases(chosen, here_only, control)
            return SliceDataset(prepared, here_only, recipe)
        except SiteDataError as error:
            if error.code not in ("empty-masks", "no-training-slices") or is_last:
                raise
        count *= 2


def _spread(size: int, count: int) -> list[int]:
    """At most so many numbers below `size`, at equal distances, the middle of each part."""
    count = min(size, count)
    return [(2 * place + 1) * size // (2 * count) for place in range(count)]


def _row(dataset: SliceDataset, item: int, recipe: Recipe, variants: int) -> Row:
    number, index = dataset.slices[item]
    case = dataset.prepared[number]
    variation = Variation(dataset, recipe, 0, os.urandom(32))
    levels = dataset.levels(item)
    of = len(case.images)
    caption = f"slice {index + 1} of {of}" if of > 1 else "as it is"
    plain = Shown(_picture(changed_item(levels, Change(), recipe), recipe), caption)
    changed = []
    for turn in range(variants):
        change = variation.change(item, turn)
        seen = _picture(changed_item(levels, change, recipe), recipe)
        changed.append(Shown(seen, ", ".join(change.words()) or "as it is"))
    return Row(plain, changed)


def _picture(item: dict[str, Tensor], recipe: Recipe) -> str:
    """A network's input as grey levels or colours, with the contours of its masks, as an address.

    Args:
        item: image (3, S, S) and target (K, M, M), as of a `SliceDataset`.
    """
    mean, std = (torch.tensor(one)[:, None, None] for one in pixel_statistics(recipe))
    levels = (item["image"] * std + mean).round().clamp(0, 255).to(torch.uint8)
    size = (_SIDE, _SIDE)
    shown = Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
    pixels = np.array(shown.resize(size, Image.Resampling.BILINEAR))
    for number, mask in enumerate(item["target"].numpy() > 0.5):
        large = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
        inside = np.array(large) > 127
        pixels[inside & ~binary_erosion(inside)] = CLASS_COLOURS[number % len(CLASS_COLOURS)]
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _render(rows: Sequence[Row], site: SiteConfig, recipe: Recipe) -> str:
    drawn = [name for name in recipe.classes if name in site.classes]
    page: str = _template().render(
        rows=rows,
        recipe=recipe,
        drawn=_colours(recipe, drawn),
        missing=[name.replace("_", " ") for name in recipe.classes if name not in drawn],
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
