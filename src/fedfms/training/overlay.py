"""Pictures for the report: one slice with what was drawn and what was found, and no name."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_dilation, binary_erosion
from torch import nn

from fedfms.config import Recipe, SiteConfig
from fedfms.control import Control
from fedfms.data.dataset import PreparedCase, class_masks
from fedfms.training.evaluate import CaseScore, foreground, predict
from fedfms.training.metrics import Mask

# Okabe and Ito's blue and orange, which people with any colour blindness tell apart
TRUTH_COLOUR = (86, 180, 233)
PREDICTION_COLOUR = (230, 159, 0)

_LONGER_SIDE = 512  # pixels of the picture
_LINE = 2  # pixels of a contour
_CAPTION_HEIGHT = 44
_FONT_SIZE = 14


class Choice(NamedTuple):
    """A case to show."""

    key: str
    rank: int  # from 1, by Dice, the best first
    word: str  # best, median or worst
    dice: float  # mean over classes


def site_pictures(
    model: nn.Module,
    cases: Sequence[PreparedCase],
    scores: Sequence[CaseScore],
    recipe: Recipe,
    site: SiteConfig,
    control: Control,
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
    stream = predict(model, slices, recipe, site, control)
    for choice, truth, (case, index), logits in zip(choices, truths, slices, stream, strict=True):
        caption = (
            f"case {choice.rank} of {ranked} ({choice.word}), slice {index + 1} of "
            f"{len(case.images)}, Dice {choice.dice:.2f}"
        )
        drawn = [number for number, name in enumerate(recipe.classes) if name in site.classes]
        predicted = foreground(logits[None], case, recipe)[drawn, 0]
        pictures.append(draw_overlay(case, index, predicted, truth[drawn, index], caption))
    return pictures


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
    prepared: PreparedCase, index: int, predicted: Mask, truth: Mask, caption: str
) -> bytes:
    """One slice in grey, true contours in blue just outside, predicted in orange just inside.

    So both stay visible where they agree. Pixels become as wide and high as they are in the body.

    Args:
        index: the slice.
        predicted, truth: (K, H, W) of that slice.
        caption: printed below; it leaves the site with the picture, so it names nobody.

    Returns:
        a PNG file without metadata.
    """
    picture = prepared.images[index]
    height, width = picture.shape[:2]
    tall, wide = height * prepared.spacing[1], width * prepared.spacing[2]
    zoom = _LONGER_SIDE / max(tall, wide)
    size = (max(1, round(wide * zoom)), max(1, round(tall * zoom)))  # columns, rows, as Pillow
    gray = Image.fromarray(picture).convert("L").resize(size, Image.Resampling.BILINEAR)
    pixels = np.array(gray.convert("RGB"))
    for mask in truth:
        large = _enlarge(mask, size)
        pixels[binary_dilation(large, iterations=_LINE) & ~large] = TRUTH_COLOUR
    for mask in predicted:
        large = _enlarge(mask, size)
        pixels[large & ~binary_erosion(large, iterations=_LINE)] = PREDICTION_COLOUR

    canvas = Image.new("RGB", (max(size[0], _LONGER_SIDE), size[1] + _CAPTION_HEIGHT))
    canvas.paste(Image.fromarray(pixels), ((canvas.width - size[0]) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(_FONT_SIZE)
    draw.text((6, size[1] + 4), caption, fill=(255, 255, 255), font=font)
    draw.text((6, size[1] + 23), "drawn by the site", fill=TRUTH_COLOUR, font=font)
    draw.text((160, size[1] + 23), "found by the model", fill=PREDICTION_COLOUR, font=font)
    stream = io.BytesIO()
    canvas.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def _enlarge(mask: Mask, size: tuple[int, int]) -> Mask:
    pixels: NDArray[np.uint8] = np.array(
        Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
    )
    return pixels > 127
