"""The way of a slice into the network and back: size, padding, normalisation, and their undoing.

One geometry for training, scores, predict and the exports. A slice keeps the shape that it has in
millimetres, covers a whole number of mask pixels, and has its pixel centres at half-integers
everywhere. With a recipe's `tile` the network sees square parts of slices in the place of slices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import Reading

# of SAM's training pictures, grey levels 0 to 255 (segment_anything/modeling/sam.py)
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)

TILE_OVERLAP = 0.25  # of a side, where masks are put together; as MONAI's sliding windows
_SIGMA = 0.125  # of a side: how fast a part counts less towards its edges; as theirs
_NATIVE_SLICES = 8  # resized to native size at once; bounds the memory of a large volume

Statistics = tuple[float, ...]


def pixel_statistics(recipe: Recipe) -> tuple[Statistics, Statistics]:
    """(mean, standard deviation) of each channel in grey levels, 0 to 255.

    The network's input is (grey - mean) / std. Without `normalize` that is grey / 255. A contrast
    is one grey channel: it has the mean of SAM's three.
    """
    count = len(recipe.contrasts)
    if not recipe.normalize:
        return (0.0,) * (count or 3), (255.0,) * (count or 3)
    if count:
        return (sum(PIXEL_MEAN) / 3,) * count, (sum(PIXEL_STD) / 3,) * count
    return PIXEL_MEAN, PIXEL_STD


def channels_of(site: Reading, recipe: Recipe) -> int:
    """Of a slice before it is a network's input: one of each contrast, else 1 or 3."""
    return len(recipe.contrasts) or (1 if site.channels == "gray" else 3)


class Pictured(Protocol):
    """What the way into the network and back needs: grey levels at native size.

    images: (D, H, W) uint8 grey levels, or (D, H, W, 3) with `channels: rgb`, or (D, H, W, N) of
        the N `contrasts` of site.yml.
    spacing: between slices, rows and columns; millimetres for volumes, 1 for pictures and NPY.
    """

    @property
    def images(self) -> NDArray[np.uint8]:
        """Grey levels at native size."""
        ...

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Between slices, rows and columns."""
        ...


# What an exported network computes too (export/torchscript.py compiles these five).


def pixel_aspect(rows: float, columns: float) -> float:
    """A pixel's height by its width, to five digits.

    Voxel sizes come from affines, whose rounding must not decide on which side of a half a mask
    pixel falls.
    """
    ratio = rows / columns
    digits: float = 10.0 ** (4.0 - math.floor(math.log10(ratio)))
    return math.floor(ratio * digits + 0.5) / digits


def covered(
    height: int, width: int, aspect: float, size: int, least: float = 0.0
) -> tuple[int, int]:
    """Rows and columns of a square mask that a padded slice covers, from the upper left.

    The side that is longer in millimetres covers all, the other its share, rounded to whole mask
    pixels, halves up (SAM rounds to input pixels, of which a mask pixel has 2 or 4), and at least
    2: torch 2.13 returns zeros for an antialiased width of 1.

    Args:
        height, width: of the slice, in pixels.
        aspect: a pixel's height by its width.
        size: side of the mask in its pixels.
        least: what covers all of it at least, in widths of a pixel; a smaller slice is padded.
    """
    tall, wide = height * aspect, float(width)
    longest = max(tall, wide, least)
    rows = math.floor((2.0 * tall * size + longest) / (2.0 * longest))
    columns = math.floor((2.0 * wide * size + longest) / (2.0 * longest))
    return max(2, rows), max(2, columns)


def resized(picture: Tensor, rows: int, columns: int, antialias: bool) -> Tensor:
    """(B, C, H, W) uint8 to (B, C, rows, columns) uint8, bilinear, as SAM's own preprocessing."""
    return F.interpolate(picture, size=[rows, columns], mode="bilinear", antialias=antialias)


def on_canvas(picture: Tensor, mean: Tensor, std: Tensor, side: int) -> Tensor:
    """(B, 1 or C, h, w) uint8 to (B, C, side, side) float32: (grey - mean) / std, then zeros.

    Args:
        picture: lies in the upper left corner.
        mean, std: (C,) of each channel.
        side: of the canvas, at least h and w.
    """
    canvas = torch.zeros([picture.shape[0], mean.shape[0], side, side], device=picture.device)
    part = canvas[:, :, : picture.shape[2], : picture.shape[3]]
    part.copy_(picture).sub_(mean[:, None, None]).div_(std[:, None, None])
    return canvas


def unpadded(
    logits: Tensor, rows: int, columns: int, height: int, width: int, antialias: bool
) -> Tensor:
    """(B, K, M, M) logits to (B, K, height, width) float32 of the rows and columns covered."""
    part = logits[..., :rows, :columns].float()
    return F.interpolate(part, size=[height, width], mode="bilinear", antialias=antialias)


class Frame(NamedTuple):
    """A slice's size, and the shape of its pixels."""

    height: int  # pixels
    width: int  # pixels
    aspect: float = 1.0  # a pixel's height by its width, as they lie in the body; 1 in a picture

    @classmethod
    def of(cls, image: Pictured) -> Frame:
        """The frame of an image's slices."""
        height, width = image.images.shape[1:3]
        _, rows, columns = image.spacing
        return cls(height, width, pixel_aspect(rows, columns))

    def covered(self, recipe: Recipe) -> tuple[int, int]:
        """Rows and columns of the mask that the slice covers, from the upper left.

        pad: see `covered`; the slice keeps its shape. stretch: both sides cover all.
        """
        size = recipe.mask_size
        if recipe.resize == "stretch":
            return size, size
        # a part at an edge of its slice, or a small picture, is seen as large as all others
        least = 0.0 if recipe.tile is None else recipe.tile * max(1.0, self.aspect)
        return covered(self.height, self.width, self.aspect, size, least)

    def input_size(self, recipe: Recipe) -> tuple[int, int]:
        """Rows and columns of the network's input that the slice covers, from the upper left."""
        rows, columns = self.covered(recipe)
        patch = recipe.image_size // recipe.mask_size  # input pixels a side of one mask pixel
        return rows * patch, columns * patch


class Tile(NamedTuple):
    """A part of a slice, in its pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def rows(self) -> slice:
        """Of the slice."""
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        """Of the slice."""
        return slice(self.left, self.left + self.width)


@dataclass(frozen=True, slots=True)
class Part:
    """The same part of all slices of an image, as an image; nothing is copied."""

    whole: Pictured
    tile: Tile

    @property
    def images(self) -> NDArray[np.uint8]:
        """Grey levels at native size."""
        return self.whole.images[:, self.tile.rows, self.tile.columns]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Between slices, rows and columns."""
        return self.whole.spacing


def tiles(height: int, width: int, side: int, overlap: float = 0.0) -> list[Tile]:
    """Squares that cover a slice, row after row; the last ones of a row and a column end with it.

    All are alike: where the slice is smaller than a square, as high or wide as the slice.

    Args:
        height, width: of the slice, in pixels.
        side: of a square.
        overlap: share of a side that neighbours have in common at least.
    """
    step = max(1, int(side * (1 - overlap)))
    tops, lefts = (
        [min(start, max(0, size - side)) for start in range(0, max(1, size - side + step), step)]
        for size in (height, width)
    )
    return [Tile(top, left, min(side, height), min(side, width)) for top in tops for left in lefts]


def pieces(image: Pictured, recipe: Recipe, only: int | None = None) -> list[tuple[Pictured, int]]:
    """What a network is asked of an image, in turn: its slices, or parts of them that overlap.

    Args:
        only: the one slice of which; None: all of them.
    """
    slices = range(len(image.images)) if only is None else [only]
    if recipe.tile is None:
        return [(image, index) for index in slices]
    parts = [Part(image, tile) for tile in _overlapping(image, recipe.tile)]
    return [(part, index) for index in slices for part in parts]


def _overlapping(image: Pictured, side: int) -> list[Tile]:
    height, width = image.images.shape[1:3]
    return tiles(height, width, side, TILE_OVERLAP)


def whole_of(image: Pictured) -> Pictured:
    """The image that a part is of; else the image itself."""
    return image.whole if isinstance(image, Part) else image


def network_input(prepared: Pictured, index: int, site: Reading, recipe: Recipe) -> Tensor:
    """Slice `index` as (C, S, S) float32, normalised; S is `recipe.image_size`, C the number of
    `recipe.contrasts`, or 3.

    Bilinear with antialiasing (without under `paper_compat`), as SAM's own preprocessing; padding
    is right and below, with zeros, after normalisation.
    """
    return normalised(resized_slice(prepared, index, site, recipe), recipe)


def native_slice(
    prepared: Pictured, index: int, site: Reading, recipe: Recipe | None = None
) -> Tensor:
    """(1 or 3, H, W) uint8, or (C, H, W) of a recipe's C contrasts: at its own size, a copy.

    A contrast that the site never has is what its `missing_contrast` says.
    """
    if recipe is not None and recipe.contrasts:
        return torch.from_numpy(_contrasts(prepared.images[index], site, recipe))
    if prepared.images.ndim == 4:
        picture = prepared.images[index].transpose(2, 0, 1)
    elif site.channels == "neighbours":  # 2.5-D: the slice between its neighbours
        last = len(prepared.images) - 1
        picture = prepared.images[[max(index - 1, 0), index, min(index + 1, last)]]
    else:
        picture = prepared.images[index : index + 1]
    return torch.from_numpy(np.array(picture, order="C"))  # a copy: a map is read-only


def _contrasts(levels: NDArray[np.uint8], site: Reading, recipe: Recipe) -> NDArray[np.uint8]:
    """(H, W, N) of the site's contrasts to (C, H, W) of the recipe's."""
    place = {name: number for number, name in enumerate(site.contrasts)}
    chosen = np.empty((len(recipe.contrasts), *levels.shape[:2]), np.uint8)
    for number, name in enumerate(recipe.contrasts):
        if name in place:
            chosen[number] = levels[..., place[name]]
        else:
            chosen[number] = in_place_of_missing(levels, site)
    return chosen


def in_place_of_missing(levels: NDArray[np.uint8], site: Reading) -> NDArray[np.uint8]:
    """(..., N) grey levels of the contrasts that are there to (...) of one that is not.

    By `missing_contrast`: black, or their mean, rounded.
    """
    if site.missing_contrast == "mean" and levels.shape[-1]:
        mean: NDArray[np.uint8] = np.rint(levels.mean(axis=-1, dtype=np.float32)).astype(np.uint8)
        return mean
    return np.zeros(levels.shape[:-1], np.uint8)


def resized_slice(prepared: Pictured, index: int, site: Reading, recipe: Recipe) -> Tensor:
    """(1 or 3, h, w) uint8, or of each contrast: over the part of the input that it covers."""
    rows, columns = Frame.of(prepared).input_size(recipe)
    levels = native_slice(prepared, index, site, recipe)
    return resized(levels[None], rows, columns, not recipe.paper_compat)[0]


def input_of(
    pictures: Sequence[Tensor],
    covered: Sequence[tuple[int, int]],
    recipe: Recipe,
    device: torch.device,
    out: Tensor | None = None,
) -> Tensor:
    """Slices of any sizes to a network's input, (B, C, S, S) float32 on the device; C is 3, or
    the number of the recipe's contrasts.

    On a processor the same as `network_input` to the last bit. Elsewhere, where torch resizes no
    8-bit levels, they are resized as fp32 and rounded: at most one level from the processor's.

    Args:
        pictures: (1 or C, h, w) uint8 each, on the device; of any size.
        covered: rows and columns of the input that each covers, from the upper left.
        out: (B or more, C, S, S) float32 there, whose first B are overwritten and returned: new
            memory of that size costs a processor more than all that is written to it.
    """
    size = recipe.image_size
    mean, std = _statistics_on(device, *pixel_statistics(recipe))
    if out is None or out.shape[0] < len(pictures):
        out = torch.empty(len(pictures), len(mean), size, size, device=device)
    canvas = out[: len(pictures)]
    for image, picture, (rows, columns) in zip(canvas, pictures, covered, strict=True):
        if picture.shape[1:] != (rows, columns):
            picture = resized_anywhere(picture, rows, columns, not recipe.paper_compat)
        image[:, rows:].zero_()
        image[:, :rows, columns:].zero_()
        image[:, :rows, :columns].copy_(picture).sub_(mean).div_(std)
    return canvas


@functools.cache  # a copy to a GPU waits for it
def _statistics_on(
    device: torch.device, mean: Statistics, std: Statistics
) -> tuple[Tensor, Tensor]:
    """(C, 1, 1) float32 each."""
    with torch.inference_mode(False):
        on_device = [torch.tensor(one).to(device)[:, None, None] for one in (mean, std)]
    return on_device[0], on_device[1]


def resized_anywhere(picture: Tensor, rows: int, columns: int, antialias: bool) -> Tensor:
    """(C, H, W) uint8 to (C, rows, columns) uint8, on any device; see `input_of`."""
    if picture.device.type == "cpu":
        return resized(picture[None], rows, columns, antialias)[0]
    return resized_in_floats(picture, rows, columns, antialias)


def resized_in_floats(picture: Tensor, rows: int, columns: int, antialias: bool) -> Tensor:
    """As `resized` of one picture, by torch's arithmetic of floats and one rounding."""
    exact = F.interpolate(
        picture[None].float(), size=[rows, columns], mode="bilinear", antialias=antialias
    )
    return exact[0].round_().clamp_(0, 255).to(torch.uint8)


def normalised(picture: Tensor, recipe: Recipe) -> Tensor:
    """(1 or C, h, w) uint8 to (C, S, S) float32."""
    mean, std = pixel_statistics(recipe)
    return on_canvas(picture[None], torch.tensor(mean), torch.tensor(std), recipe.image_size)[0]


def mask_target(masks: Tensor, frame: Frame, recipe: Recipe) -> Tensor:
    """(K, H, W) bool of a slice to (K, M, M) bool, M = `recipe.mask_size`.

    A mask pixel is foreground where the class covers at least half of it. Where that would keep
    less than half of the class's area (thin vessels, small nuclei), half of the best cover is
    enough, so that what is there stays to be learnt. `paper_compat`: nearest neighbour.
    """
    size = recipe.mask_size
    rows, columns = frame.covered(recipe)
    target = torch.zeros(len(masks), size, size, dtype=torch.bool)
    if recipe.paper_compat:
        near = F.interpolate(masks[None].float(), size=(rows, columns), mode="nearest")[0]
        target[:, :rows, :columns] = near > 0.5
        return target
    cover = F.interpolate(
        masks[None].float(), size=(rows, columns), mode="bilinear", antialias=True
    )[0]
    target[:, :rows, :columns] = mask_of_cover(cover)
    return target


def mask_of_cover(cover: Tensor) -> Tensor:
    """(K, h, w) share of each mask pixel that a class covers, to (K, h, w) bool; `mask_target`."""
    kept = cover >= 0.5
    if cover.numel() == 0:
        return kept
    # no branch asks a value, for which the host would wait for a GPU
    of_a_class = cover.flatten(1)
    lost = kept.flatten(1).sum(dim=1) < 0.5 * of_a_class.sum(dim=1)
    half_of_best = 0.5 * of_a_class.amax(dim=1)
    return kept | (lost[:, None, None] & (cover >= half_of_best[:, None, None]))


def to_native(logits: Tensor, frame: Frame, recipe: Recipe) -> Tensor:
    """Undo the resize: (D, K, M, M) logits to (D, K, H, W) of the frame, float32, bilinear.

    The padding is cut off first. Antialiased where the native picture is smaller than the mask.
    """
    rows, columns = frame.covered(recipe)
    return unpadded(logits, rows, columns, frame.height, frame.width, not recipe.paper_compat)


class Region(NamedTuple):
    """Slices of an image, and rows of them in full width."""

    slices: slice
    rows: slice


def native_logits(
    logits: Iterator[Tensor], image: Pictured, recipe: Recipe, count: int
) -> Iterator[tuple[Region, Tensor]]:
    """Logits of an image's `pieces` at its native size, region after region, each pixel once.

    Where parts overlap their logits are averaged, each with a Gaussian weight of its distance from
    the part's middle (importance maps of nnU-Net and MONAI). No more than a few slices, or one row
    of parts, are in memory.

    Args:
        logits: (K, M, M) of each of `pieces`, in their order.
        count: of how many slices these are.

    Yields:
        where among these, and (slices, K, rows, width) float32.
    """
    height, width = image.images.shape[1:3]
    if recipe.tile is None:
        frame, start = Frame.of(image), 0
        while start < count:
            some = [next(logits) for _ in range(min(_NATIVE_SLICES, count - start))]
            where = Region(slice(start, start + len(some)), slice(0, height))
            yield where, to_native(torch.stack(some), frame, recipe)
            start += len(some)
        return
    parts = _overlapping(image, recipe.tile)
    high, wide = parts[0].height, parts[0].width
    frame = Frame(high, wide, Frame.of(image).aspect)
    weight = _gaussian(high)[:, None] * _gaussian(wide)
    weight = weight.clamp(min=max(float(weight.min()), 1e-3))
    tops = sorted({part.top for part in parts})
    for index in range(count):
        total, weights = torch.zeros(1, high, width), torch.zeros(high, width)
        for top, following in zip(tops, [*tops[1:], height], strict=True):
            for part in parts:
                if part.top != top:
                    continue
                found = to_native(next(logits)[None], frame, recipe)[0]
                if len(total) != len(found):
                    total = total.repeat(len(found), 1, 1)
                total[..., part.columns] += weight * found
                weights[:, part.columns] += weight
            done = following - top  # rows to which no later part adds
            where = Region(slice(index, index + 1), slice(top, following))
            yield where, (total[:, :done] / weights[:done])[None]
            total = torch.cat([total[:, done:], torch.zeros(len(total), done, width)], dim=1)
            weights = torch.cat([weights[done:], torch.zeros(done, width)])


def _gaussian(size: int) -> Tensor:
    """(size,) weights, 1 in the middle."""
    away = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    return torch.exp(-(away**2) / (2 * (size * _SIGMA) ** 2))
