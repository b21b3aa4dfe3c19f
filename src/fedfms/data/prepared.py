"""From what was read of a case to grey levels at its native size.

A case is kept as 8-bit grey levels at its native size, which is what the cache holds and what the
scores are computed on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedfms.contracts.site import Reading, SiteConfig
from fedfms.data.formats import Stored
from fedfms.data.grid import largest_shift, same_grid
from fedfms.data.manifest import Case
from fedfms.data.pictures import Palette
from fedfms.errors import SiteDataError
from fedfms.geometry import Pictured, in_place_of_missing

_AT_ONCE = 2**22  # values that become grey levels at once

# label values: uint8 where they fit, else int16 as files are read
Labels = NDArray[np.uint8] | NDArray[np.int16]


class Prepared(Pictured, Protocol):
    """A case as training and scores need it, in memory (`PreparedCase`) or on disk (data/cache.py).

    labels: (D, H, W), label values as stored in the file.
    is_volume: the slices lie one above the other (NIfTI, 3-D NPY); a picture is one slice.
    """

    @property
    def case(self) -> Case:
        """Which one."""
        ...

    @property
    def labels(self) -> Labels:
        """Label values at native size."""
        ...

    @property
    def is_volume(self) -> bool:
        """The slices lie one above the other."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class PreparedImage:
    """An image in memory, with or without a label somewhere; values as in `PreparedCase`."""

    images: NDArray[np.uint8]
    spacing: tuple[float, float, float]
    is_volume: bool


@dataclass(frozen=True, slots=True, eq=False)
class PreparedCase:
    """A case in memory, see `Prepared`.

    palette: of a label picture, the colours of its values; see `Stored`.
    """

    case: Case
    images: NDArray[np.uint8]
    labels: Labels
    spacing: tuple[float, float, float]
    is_volume: bool
    palette: Palette | None = None


def combine(case: Case, image: Stored, label: Stored, site: SiteConfig) -> PreparedCase:
    """An image and its label that were read as one case.

    Raises:
        SiteDataError: "shapes-differ", "too-small", "geometry-differs", "intensity-flat".
    """
    if image.values.shape[:3] != label.values.shape:
        shapes = [
            " x ".join(map(str, shape)) for shape in (image.values.shape[:3], label.values.shape)
        ]
        raise SiteDataError(
            f"{case.image} is {shapes[0]}, {case.label} is {shapes[1]} (slices x rows x columns)",
            "draw or export the label on the image's own grid",
            code="shapes-differ",
        )
    if image.cut is not None and label.cut is not None:
        shift = largest_shift(image.cut.affine, label.cut.affine, image.cut.shape)
        apart = f"{shift:.1f}" if shift > 0.1 else f"{shift:.2g}"
        if not same_grid(label.cut.affine, image.cut.affine, image.cut.shape):
            raise SiteDataError(
                f"{case.image} and {case.label} lie up to {apart} mm apart",
                "export the label with the image's affine (origin, direction and voxel size); if "
                "it was drawn on this very grid, copy the image's header into it",
                code="geometry-differs",
            )
    prepared = prepare_image(case.image, image, site)
    return PreparedCase(
        case,
        prepared.images,
        np.ascontiguousarray(label.values),
        prepared.spacing,
        prepared.is_volume,
        label.palette,
    )


def prepare_image(path: Path, image: Stored, site: Reading) -> PreparedImage:
    """An image that was read as the network's side wants it, as it is in training.

    Raises:
        SiteDataError: "too-small", "intensity-flat".
    """
    if image.present is not None:
        return _prepare_contrasts(path, image, image.present, site)
    if min(image.values.shape[1:3]) < 2:
        raise SiteDataError(
            f"the slices of {path} have a side of 1 pixel",
            "leave the file out; a slice needs at least 2 x 2 pixels",
            code="too-small",
        )
    grey = to_grey_levels(image.values, site)
    if grey.min() == grey.max():
        raise SiteDataError(
            f"the intensity rule in site.yml makes every pixel of {path} {grey.flat[0]}; its "
            f"values go from {image.values.min():g} to {image.values.max():g}",
            "set low and high, or center and width, under intensity to values the images have",
            code="intensity-flat",
        )
    return PreparedImage(grey, image.spacing, image.is_volume)


def _prepare_contrasts(
    path: Path, image: Stored, present: Sequence[bool], site: Reading
) -> PreparedImage:
    """Each contrast by the intensity rule on its own values; a missing one as site.yml says."""
    there = [number for number, is_there in enumerate(present) if is_there]
    grey = np.zeros(image.values.shape, np.uint8)
    for number in there:
        one = dataclasses.replace(image, values=image.values[..., number], present=None)
        grey[..., number] = prepare_image(path, one, site).images
    if len(there) < len(present):
        levels = in_place_of_missing(grey[..., there], site)
        grey[..., [n for n, is_there in enumerate(present) if not is_there]] = levels[..., None]
    return PreparedImage(grey, image.spacing, image.is_volume)


def to_grey_levels(
    values: NDArray[np.float32] | NDArray[np.uint8], site: Reading
) -> NDArray[np.uint8]:
    """Stored values to grey levels 0 to 255 by the site's intensity rule, over the whole case.

    Where the two percentiles are the same value, as in a picture that is nearly all background, the
    smallest and largest value take their place. A constant image becomes 0. `rounding: truncate`
    takes the level below, as FedFMS's cast to 8 bits does.
    """
    low, high = site.intensity.bounds
    if site.intensity.rule == "percentile":
        low, high = np.percentile(values, (low, high))
        if low == high:
            low, high = float(values.min()), float(values.max())
    if low == high:
        return np.zeros(values.shape, np.uint8)
    by_value = None
    if values.dtype == np.uint8:
        by_value = _levels(np.arange(256, dtype=np.float32), low, high, site)
    grey = np.empty(values.shape, np.uint8)
    # not all at once: of a large picture the steps between would be several times its size
    rows = values.reshape(-1, *values.shape[2:])
    into = grey.reshape(rows.shape)
    at_once = max(1, _AT_ONCE // max(1, rows[:1].size))
    for start in range(0, len(rows), at_once):
        part = rows[start : start + at_once]
        levels = by_value[part] if by_value is not None else _levels(part, low, high, site)
        into[start : start + at_once] = levels
    return grey


def _levels(values: NDArray[Any], low: float, high: float, site: Reading) -> NDArray[np.uint8]:
    if site.intensity.rounding == "truncate":  # in fp64: one rounding error is one level here
        exact = np.clip(values.astype(np.float64), low, high)
        return np.asarray((exact - low) / (high - low) * 255.0).astype(np.uint8)
    share = np.clip((values - np.float32(low)) / np.float32(high - low), 0.0, 1.0)
    grey: NDArray[np.uint8] = np.rint(share * 255.0).astype(np.uint8)
    return grey


def smallest(labels: Labels) -> Labels:
    """The same values as uint8 where they fit, else as they are."""
    if labels.size and labels.min() >= 0 and labels.max() <= 255:
        return np.ascontiguousarray(labels, np.uint8)
    return np.ascontiguousarray(labels, np.int16)


def values_of(labels: Labels) -> list[int]:
    """The values that occur, ascending."""
    low = -32768 if labels.dtype == np.int16 else 0
    counts = np.bincount(labels.ravel().astype(np.int32) - low)
    found: list[int] = (np.flatnonzero(counts) + low).tolist()
    return found
