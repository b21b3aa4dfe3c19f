"""Pictures for the report: one slice with what was drawn and what was found, and no name."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont
from scipy.ndimage import binary_dilation, binary_erosion, gaussian_filter
from torch import nn

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.classes import class_masks
from fedfms.data.features import FeatureFolder
from fedfms.data.prepared import Prepared
from fedfms.geometry import pieces
from fedfms.pages import parts as pages
from fedfms.training.evaluate import CaseScore, foreground, predict
from fedfms.training.metrics import Mask

Colour = tuple[int, int, int]

# Of one class what was drawn and what was found have a colour each; of several each class has one,
# from the first on.
CLASS_COLOURS: list[Colour] = [
    (red, green, blue) for red, green, blue, *_ in map(ImageColor.getrgb, pages.CLASS_COLOURS)
]
TRUTH_COLOUR, PREDICTION_COLOUR = CLASS_COLOURS[:2]

_LONGER_SIDE = 512  # pixels of the picture
_LINE = 2  # pixels of a contour
_DASH = 7  # pixels along a contour
_CAPTION_HEIGHT = 44
_LEGEND_LINE = 19  # pixels of a line of class names
_FONT_SIZE = 14
_WHITE: Colour = (255, 255, 255)


class Choice(NamedTuple):
    """A case to show."""

    key: str
    rank: int  # from 1, by Dice, the best first
    word: str  # best, median or worst
    dice: float  # mean over classes


def site_pictures(
    model: nn.Module,
    cases: Sequence[Prepared],
    scores: Sequence[CaseScore],
    recipe: Recipe,
    site: SiteConfig,
    control: Control,
    features: FeatureFolder | None = None,
) -> list[bytes]:
    """The best, the median and the worst case, each in the slice with most truth, as PNG files.

    Args:
        scores: of these cases with this model, from `training.evaluate.evaluate`.

    Returns:
        at most three files; fewer for fewer cases with a score. Nothing in them names a case.
    """
    by_key = {case.case.key: case for case in cases}
    choices = choose_cases(scores)
    ranked = len({score.key for score in scores if not np.isnan(score.dice)})
    truths = [class_masks(by_key[choice.key], site, recipe).numpy() for choice in choices]
    slices = [
        (by_key[choice.key], fullest_slice(truth))
        for choice, truth in zip(choices, truths, strict=True)
    ]
    pictures = []
    of_each = [pieces(case, recipe, index) for case, index in slices]
    stream = predict(model, [*chain(*of_each)], recipe, site, control, features)
    for choice, truth, (case, index), parts in zip(choices, truths, slices, of_each, strict=True):
        caption = (
            f"case {choice.rank} of {ranked} ({choice.word}), slice {index + 1} of "
            f"{len(case.images)}, Dice {choice.dice:.2f}"
        )
        drawn = [number for number, name in enumerate(recipe.classes) if name in site.classes]
        predicted = foreground(islice(stream, len(parts)), case, recipe, 1)[drawn, 0]
        names = {
            recipe.classes[number]: CLASS_COLOURS[number % len(CLASS_COLOURS)] for number in drawn
        }
        classes = names if len(recipe.classes) > 1 else None
        shown = list(site.contrasts).index(recipe.contrasts[0]) if _has_first(site, recipe) else 0
        channel = shown if site.contrasts else None
        pictures.append(
            draw_overlay(
                case, index, predicted, truth[drawn, index], caption, classes, channel=channel
            )
        )
    return pictures


def _has_first(site: SiteConfig, recipe: Recipe) -> bool:
    """Whether the recipe's first contrast is one of the site's."""
    return bool(recipe.contrasts) and recipe.contrasts[0] in site.contrasts


def choose_cases(scores: Sequence[CaseScore]) -> list[Choice]:
    """Best, median and worst case by mean Dice over classes; cases without a Dice do not count."""
    by_key: dict[str, list[float]] = {}
    for score in scores:
        if not np.isnan(score.dice):
            by_key.setdefault(score.key, []).append(score.dice)
    ranked = sorted(by_key, key=lambda key: (-float(np.mean(by_key[key])), key))
    words = {len(ranked) // 2: "median", len(ranked) - 1: "worst", 0: "best"}  # the last one wins
    return [
        Choice(ranked[place], place + 1, words[place], float(np.mean(by_key[ranked[place]])))
        for place in sorted(words)
        if 0 <= place < len(ranked)
    ]


def fullest_slice(truth: Mask) -> int:
    """The slice of (K, D, H, W) with most foreground of any class; the middle one if none has."""
    sizes = truth.any(axis=0).sum(axis=(1, 2))
    return int(sizes.argmax()) if sizes.any() else len(sizes) // 2


def draw_overlay(
    prepared: Prepared,
    index: int,
    predicted: Mask,
    truth: Mask,
    caption: str,
    classes: Mapping[str, Colour] | None = None,
    *,
    channel: int | None = None,
) -> bytes:
    """One slice in grey, true contours just outside, predicted ones just inside.

    So both stay visible where they agree. Of one class the true contour is blue and the predicted
    one orange; of several a class has one colour, and its true contour is dashed. Pixels become as
    wide and high as they are in the body.

    Args:
        index: the slice.
        predicted, truth: (K, H, W) of that slice.
        caption: printed below; it leaves the site with the picture, so it names nobody.
        classes: K names with their colours, in this order, for the legend; None: one class.
        channel: which of several contrasts is drawn on; None: the picture has none.

    Returns:
        a PNG file without metadata.
    """
    picture = prepared.images[index]
    if channel is not None:
        picture = np.ascontiguousarray(picture[..., channel])
    height, width = picture.shape[:2]
    tall, wide = height * prepared.spacing[1], width * prepared.spacing[2]
    zoom = _LONGER_SIDE / max(tall, wide)
    size = (max(1, round(wide * zoom)), max(1, round(tall * zoom)))  # columns, rows, as Pillow
    gray = Image.fromarray(picture).convert("L").resize(size, Image.Resampling.BILINEAR)
    pixels = np.array(gray.convert("RGB"))
    colours = list(classes.values()) if classes is not None else [None] * len(truth)
    for mask, colour in zip(truth, colours, strict=True):
        large = _enlarge(mask, size)
        band = binary_dilation(large, iterations=_LINE) & ~large
        pixels[band if colour is None else _dashed(band, large)] = colour or TRUTH_COLOUR
    for mask, colour in zip(predicted, colours, strict=True):
        large = _enlarge(mask, size)
        pixels[large & ~binary_erosion(large, iterations=_LINE)] = colour or PREDICTION_COLOUR

    width = max(size[0], _LONGER_SIDE)
    font = ImageFont.load_default(_FONT_SIZE)
    legend = _legend(classes, width, font)
    lines = max((line for line, *_ in legend), default=0)
    canvas = Image.new("RGB", (width, size[1] + _CAPTION_HEIGHT + lines * _LEGEND_LINE))
    canvas.paste(Image.fromarray(pixels), ((canvas.width - size[0]) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    draw.text((6, size[1] + 4), caption, fill=_WHITE, font=font)
    for line, left, text, colour in legend:
        draw.text((left, size[1] + 23 + line * _LEGEND_LINE), text, fill=colour, font=font)
    stream = io.BytesIO()
    canvas.save(stream, format="PNG", compress_level=6)  # 9: 12 x the time for 4/5 of it
    return stream.getvalue()


def _legend(
    classes: Mapping[str, Colour] | None, width: int, font: Any
) -> list[tuple[int, int, str, Colour]]:
    """(line, left edge in pixels, text, colour): first the kinds of contours, then the classes."""
    if classes is None:
        return [
            (0, 6, "drawn by the site", TRUTH_COLOUR),
            (0, 160, "found by the model", PREDICTION_COLOUR),
        ]
    placed: list[tuple[int, int, str, Colour]] = [
        (0, 6, "dashed: drawn by the site; solid: found by the model", _WHITE)
    ]
    line, left = 1, 6
    for name, colour in classes.items():
        text = name.replace("_", " ")
        needs = int(font.getlength(text))
        if left > 6 and left + needs > width:
            line, left = line + 1, 6
        placed.append((line, left, text, colour))
        left += needs + 18
    return placed


def _dashed(band: Mask, inside: Mask) -> Mask:
    """Every other stretch of the contours in `band`: by rows where they go up, else by columns."""
    down, right = np.gradient(gaussian_filter(inside.astype(np.float32), 3 * _LINE))
    rows, columns = np.indices(band.shape)
    along = np.where(np.abs(right) > np.abs(down), rows, columns)
    dashes: Mask = band & (along // _DASH % 2 == 0)
    return dashes


def _enlarge(mask: Mask, size: tuple[int, int]) -> Mask:
    pixels: NDArray[np.uint8] = np.array(
        Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
    )
    return pixels > 127
