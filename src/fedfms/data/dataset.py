"""From a case to tensors: grey levels at native size, and slices as the network wants them.

A case is kept as 8-bit grey levels at its native size, which is what the cache holds and what the
scores are computed on. A slice is resized when it is asked for, and resizes are undone exactly:
`network_input`, the targets of `SliceDataset` and `to_native` share one geometry, in which a slice
keeps the shape that it has in millimetres, covers a whole number of mask pixels, and has its pixel
centres at half-integers everywhere.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import Reading, SiteConfig
from fedfms.control import Control
from fedfms.data.content import Content, content_sha256, read_bytes
from fedfms.data.formats import Stored, read_image, read_label
from fedfms.data.grid import largest_shift, same_grid
from fedfms.data.manifest import Case
from fedfms.data.pictures import Palette, different_palettes
from fedfms.errors import FedfmsError, SiteDataError, unexpected

log = logging.getLogger(__name__)

# of SAM's training pictures, grey levels 0 to 255 (segment_anything/modeling/sam.py)
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)

CACHE_VERSION = 2  # raise it when the same files and settings would be prepared differently
_SLICES_IN_MEMORY = 512 * 2**20  # bytes; a set whose resized slices need less is resized once


class Pictured(Protocol):
    """What the way into the network and back needs: grey levels at native size.

    images: (D, H, W) uint8 grey levels, or (D, H, W, 3) with `channels: rgb`.
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


@dataclass(frozen=True, slots=True, eq=False)
class PreparedImage:
    """An image in memory, with or without a label somewhere; values as in `PreparedCase`."""

    images: NDArray[np.uint8]
    spacing: tuple[float, float, float]
    is_volume: bool


@dataclass(frozen=True, slots=True, eq=False)
class PreparedCase:
    """A case in memory.

    images: (D, H, W) uint8 grey levels, or (D, H, W, 3) with `channels: rgb`.
    labels: (D, H, W) int16, label values as stored in the file.
    spacing: between slices, rows and columns; millimetres for volumes, 1 for pictures and NPY.
    is_volume: the slices lie one above the other (NIfTI, 3-D NPY); a picture is one slice.
    palette: of a label picture, the colours of its values; see `Stored`.
    """

    case: Case
    images: NDArray[np.uint8]
    labels: NDArray[np.int16]
    spacing: tuple[float, float, float]
    is_volume: bool
    palette: Palette | None = None


def prepare_cases(
    cases: Sequence[Case], site: SiteConfig, control: Control | None = None
) -> list[PreparedCase]:
    """Read all cases, from the cache where it has them; reports progress as phase "prepare".

    Raises:
        SiteDataError: the first file that cannot be used, or what is wrong with the files
            together: unknown label values, masks that are empty everywhere, one image on both
            sides of the split.
        TaskAborted: somebody asked to stop.
    """
    prepared = []
    for number, case in enumerate(cases):
        if control is not None:
            control.report("prepare", number, len(cases))
        prepared.append(_guarded(case, site))
    if control is not None:
        control.report("prepare", len(cases), len(cases))
    problems = problems_together([summarize(case) for case in prepared], site)
    if problems:
        raise problems[0]
    log.info(
        "prepared %d cases with %d slices", len(prepared), sum(len(p.images) for p in prepared)
    )
    return prepared


def _guarded(case: Case, site: SiteConfig) -> PreparedCase:
    """`_prepare`, and whatever a library raises at a case as this case's problem."""
    try:
        return _prepare(case, site)
    except FedfmsError:
        raise
    except Exception as error:
        raise unexpected(error, f"{case.image} cannot be prepared", SiteDataError) from None


def _prepare(case: Case, site: SiteConfig) -> PreparedCase:
    image, label = read_bytes(case.image, site), read_bytes(case.label, site)
    file = site.cache / f"{_cache_key(case, image, label, site)}.npz" if site.cache else None
    cached = _load_cached(case, file) if file else None
    if cached is not None:
        return cached
    stored = read_image(case.image, image, site)
    prepared = combine(case, stored, read_label(case.label, label, site, stored), site)
    if file:
        _save_cached(prepared, file)
    return prepared


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


def to_grey_levels(values: NDArray[np.float32], site: Reading) -> NDArray[np.uint8]:
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
    if site.intensity.rounding == "truncate":  # in fp64: one rounding error is one level here
        exact = np.clip(values.astype(np.float64), low, high)
        return np.asarray((exact - low) / (high - low) * 255.0).astype(np.uint8)
    share = np.clip((values - np.float32(low)) / np.float32(high - low), 0.0, 1.0)
    grey: NDArray[np.uint8] = np.rint(share * 255.0).astype(np.uint8)
    return grey


# ------------------------------------------------------------------------ all cases of a site


class Summary(NamedTuple):
    """What of a case is needed to judge all cases together."""

    case: Case
    values: frozenset[int]  # label values that occur
    digest: bytes  # of the grey levels: alike exactly where the prepared images are alike
    palette: Palette | None = None  # of a label picture


def summarize(prepared: PreparedCase) -> Summary:
    """The case's label values and the SHA-256 of its grey levels."""
    digest = hashlib.sha256(str(prepared.images.shape).encode())
    digest.update(prepared.images.tobytes())
    values = np.flatnonzero(np.bincount(prepared.labels.ravel().astype(np.int32) + 32768)) - 32768
    found = frozenset(map(int, values))
    return Summary(prepared.case, found, digest.digest(), prepared.palette)


def problems_together(summaries: Sequence[Summary], site: SiteConfig) -> list[SiteDataError]:
    """What is wrong with cases that are fine one by one; empty if nothing is."""
    problems = _label_problems(summaries, site)
    differ = different_palettes([(s.case.label, s.values, s.palette) for s in summaries])
    if differ is not None:
        problems.insert(0, differ)  # values that mean several things explain what follows
    twins: dict[bytes, Summary] = {}
    for summary in summaries:
        twin = twins.setdefault(summary.digest, summary)
        if twin.case.split != summary.case.split:
            problems.append(
                SiteDataError(
                    f"{twin.case.image} and {summary.case.image} show the same image, once under "
                    f"patient {twin.case.patient} and once under {summary.case.patient}, and the "
                    "split puts them on both sides",
                    "remove one of them, or correct patient in site.yml so that both are one",
                    code="patient-on-both-sides",
                )
            )
            break
    return problems


def _label_problems(summaries: Sequence[Summary], site: SiteConfig) -> list[SiteDataError]:
    mapped = {value for values in site.classes.values() for value in values}
    found = {value for summary in summaries for value in summary.values}
    unknown = sorted(found - mapped - set(site.background))
    if unknown:
        where = [s.case.label for s in summaries if not s.values.isdisjoint(unknown)]
        twin = {255: 1, 1: 255}.get(unknown[0])
        names = [name for name, values in site.classes.items() if twin in values]
        if len(unknown) == 1 and names and twin not in found:
            return [
                SiteDataError(
                    f"the foreground of {len(where)} label files is {unknown[0]}, but site.yml "
                    f"says {names[0]}: [{twin}]; the first is {where[0]}",
                    f"write {names[0]}: [{unknown[0]}] under classes in site.yml",
                    code=f"foreground-is-{unknown[0]}",
                )
            ]
        some = ", ".join(map(str, unknown[:8])) + (" and more" if len(unknown) > 8 else "")
        hint = (
            "; numbered objects are a range such as [1-167], or nonzero; grey levels need a "
            "threshold first"
            if len(unknown) > 16
            else ""
        )
        return [
            SiteDataError(
                f"{len(where)} label files hold values that site.yml does not know: {some}; the "
                f"first is {where[0]}",
                f"list each value under its class, or under background, in site.yml{hint}",
                code="unknown-label-values",
            )
        ]
    if any(s.case.split == "train" for s in summaries) and not found & mapped:
        return [
            SiteDataError(
                f"all {len(summaries)} label files are empty: no value of any class occurs in them",
                "check that labels in site.yml points at the label files, and classes at the "
                "values in them",
                code="empty-masks",
            )
        ]
    return []


# ----------------------------------------------------------------------------------------- cache


def _cache_key(case: Case, image: Content, label: Content, site: SiteConfig) -> str:
    """SHA-256 over all that decides the result: all files' bytes and the settings used."""
    settings: dict[str, Any] = {
        "version": CACHE_VERSION,
        "format": site.format,
        "names": [case.image.suffixes[-1:], case.label.suffixes[-1:]],
        "plane": site.plane,
        "rgb": site.channels == "rgb",
        "intensity": asdict(site.intensity),
        "image": content_sha256(image),
        "label": content_sha256(label),
    }
    if site.format == "dicom":  # segments become label values by these, and names mean nothing
        values = {value for values in site.classes.values() for value in values}
        settings["names"] = []
        settings["values"] = [sorted(values), sorted(site.background)]
        settings["label_names"] = sorted((site.label_names or {}).items())
        settings["overlap"], settings["series"] = site.overlap, site.series
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _load_cached(case: Case, file: Path) -> PreparedCase | None:
    """The case from the cache; None if it is not there or not whole (the zip's CRC tells)."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            images, labels = stored["images"], stored["labels"]
            spacing, is_volume = stored["spacing"], stored["is_volume"]
            colours = stored["palette"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        log.warning("a cached case is damaged and is prepared anew")
        return None
    if (
        images.dtype != np.uint8
        or labels.dtype != np.int16
        or images.shape[:3] != labels.shape
        or spacing.shape != (3,)
    ):
        return None
    rows, columns, slices = float(spacing[1]), float(spacing[2]), float(spacing[0])
    palette = tuple(map(tuple, colours.tolist())) or None
    return PreparedCase(case, images, labels, (slices, rows, columns), bool(is_volume), palette)


def _save_cached(prepared: PreparedCase, file: Path) -> None:
    """Write beside the final name, then rename: a reader sees the whole file or none."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as stream:
                np.savez(
                    stream,
                    images=prepared.images,
                    labels=prepared.labels,
                    spacing=np.array(prepared.spacing),
                    is_volume=np.array(prepared.is_volume),
                    palette=np.array(prepared.palette or (), np.uint8),
                )
            Path(temporary).replace(file)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            raise
    except OSError as error:
        log.warning("the cache cannot be written (%s); going on without it", error.strerror)


# --------------------------------------------------------------------------------------- classes


def unknown_classes(site: SiteConfig, classes: Sequence[str]) -> list[SiteDataError]:
    """One problem for each class of a recipe on which `site.yml` is silent."""
    known = [*site.classes, *site.not_annotated]
    problems = []
    for name in classes:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            problems.append(
                SiteDataError(
                    f"the job's class {name} is not in site.yml"
                    + (f"; did you mean {close[0]}?" if close else ""),
                    f"write {name}: [its label values] under classes in site.yml, or list it under "
                    "not_annotated if nobody drew it here",
                    code="unknown-class",
                )
            )
    return problems


def shared_values(site: SiteConfig, classes: Sequence[str]) -> list[SiteDataError]:
    """One problem for each two of these classes that a label value of the site means both.

    For recipes whose classes exclude each other.
    """
    problems = []
    for one, other in itertools.combinations(classes, 2):
        shared = sorted(set(site.classes.get(one, ())) & set(site.classes.get(other, ())))
        if shared:
            problems.append(
                SiteDataError(
                    f"in site.yml the label value {shared[0]} means {one} and {other}, and the "
                    "job's classes exclude each other (exclusive_classes)",
                    f"list {shared[0]} under one of them; if they do overlap, as a whole and its "
                    "part, the job needs exclusive_classes: false",
                    code="classes-share-values",
                )
            )
    return problems


def annotated(site: SiteConfig, recipe: Recipe) -> Tensor:
    """(K,) bool: which of the recipe's classes were drawn at this site.

    Raises:
        SiteDataError: a class that `site.yml` neither maps nor lists as not annotated
            ("unknown-class"), or two that share a label value though they exclude each other
            ("classes-share-values").
    """
    problems = unknown_classes(site, recipe.classes)
    if recipe.exclusive_classes:
        problems += shared_values(site, recipe.classes)
    if problems:
        raise problems[0]
    return torch.tensor([name in site.classes for name in recipe.classes])


def class_masks(prepared: PreparedCase, site: SiteConfig, recipe: Recipe) -> Tensor:
    """(K, D, H, W) bool at native size, in the order of `recipe.classes`.

    A class that is not annotated here is empty. Classes may overlap (a whole and its parts), unless
    the recipe's exclude each other.
    """
    annotated(site, recipe)
    return _masks(torch.from_numpy(prepared.labels), site, recipe)


def _masks(labels: Tensor, site: SiteConfig, recipe: Recipe) -> Tensor:
    return torch.stack([_holding(labels, site.classes.get(name, ())) for name in recipe.classes])


def _holding(labels: Tensor, values: tuple[int, ...]) -> Tensor:
    """Where a label is one of the values; a long range costs no more than one value."""
    runs = _runs(values)
    if len(runs) > 16:
        return torch.isin(labels, torch.tensor(values, dtype=labels.dtype))
    mask = torch.zeros(labels.shape, dtype=torch.bool)
    for first, last in runs:
        mask |= (labels >= first) & (labels <= last)
    return mask


@functools.lru_cache(maxsize=64)  # asked for each slice, with up to 65535 values
def _runs(values: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """The first and the last of values that follow each other, as (1, 3) and (7, 7) of 1 2 3 7."""
    runs: list[tuple[int, int]] = []
    for value in sorted(set(values)):
        if runs and runs[-1][1] == value - 1:
            runs[-1] = (runs[-1][0], value)
        else:
            runs.append((value, value))
    return tuple(runs)


# -------------------------------------------------------------------------------------- geometry


# These two are what an exported network computes too (export/torchscript.py compiles them).


def pixel_aspect(rows: float, columns: float) -> float:
    """A pixel's height by its width, to five digits.

    Voxel sizes come from affines, whose rounding must not decide on which side of a half a mask
    pixel falls.
    """
    ratio = rows / columns
    digits: float = 10.0 ** (4.0 - math.floor(math.log10(ratio)))
    return math.floor(ratio * digits + 0.5) / digits


def covered(height: int, width: int, aspect: float, size: int) -> tuple[int, int]:
    """Rows and columns of a square mask that a padded slice covers, from the upper left.

    The side that is longer in millimetres covers all, the other its share, rounded to whole mask
    pixels, halves up (SAM rounds to input pixels, of which a mask pixel has 2 or 4), and at least
    2: torch 2.13 returns zeros for an antialiased width of 1.

    Args:
        height, width: of the slice, in pixels.
        aspect: a pixel's height by its width.
        size: side of the mask in its pixels.
    """
    tall, wide = height * aspect, float(width)
    longest = max(tall, wide)
    rows = math.floor((2.0 * tall * size + longest) / (2.0 * longest))
    columns = math.floor((2.0 * wide * size + longest) / (2.0 * longest))
    return max(2, rows), max(2, columns)


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
        return covered(self.height, self.width, self.aspect, size)


def network_input(prepared: Pictured, index: int, site: Reading, recipe: Recipe) -> Tensor:
    """Slice `index` as (3, S, S) float32, normalised; S is `recipe.image_size`.

    Bilinear with antialiasing (without under `paper_compat`), as SAM's own preprocessing; padding
    is right and below, with zeros, after normalisation.
    """
    return _normalised(_resized_slice(prepared, index, site, recipe), recipe)


def _resized_slice(prepared: Pictured, index: int, site: Reading, recipe: Recipe) -> Tensor:
    """(1 or 3, h, w) uint8: the slice over the part of the input that it covers."""
    if prepared.images.ndim == 4:
        picture = prepared.images[index].transpose(2, 0, 1)
    elif site.channels == "neighbours":  # 2.5-D: the slice between its neighbours
        last = len(prepared.images) - 1
        picture = prepared.images[[max(index - 1, 0), index, min(index + 1, last)]]
    else:
        picture = prepared.images[index : index + 1]
    rows, columns = Frame.of(prepared).covered(recipe)
    patch = recipe.image_size // recipe.mask_size  # input pixels a side of one mask pixel
    resized: Tensor = F.interpolate(
        torch.from_numpy(np.ascontiguousarray(picture))[None],
        size=(rows * patch, columns * patch),
        mode="bilinear",
        antialias=not recipe.paper_compat,
    )
    return resized[0]


def _normalised(picture: Tensor, recipe: Recipe) -> Tensor:
    """(1 or 3, h, w) uint8 to (3, S, S) float32."""
    size = recipe.image_size
    canvas = torch.zeros(3, size, size)
    covered = canvas[:, : picture.shape[1], : picture.shape[2]].copy_(picture)
    if recipe.normalize:
        mean, std = torch.tensor(PIXEL_MEAN), torch.tensor(PIXEL_STD)
        covered.sub_(mean[:, None, None]).div_(std[:, None, None])
    else:
        covered.div_(255.0)
    return canvas


def _target(masks: Tensor, frame: Frame, recipe: Recipe) -> Tensor:
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
    kept = cover >= 0.5
    for one_cover, one_kept in zip(cover, kept, strict=True):
        if one_kept.sum() < 0.5 * one_cover.sum():
            one_kept |= one_cover >= 0.5 * one_cover.max()
    target[:, :rows, :columns] = kept
    return target


def to_native(logits: Tensor, frame: Frame, recipe: Recipe) -> Tensor:
    """Undo the resize: (D, K, M, M) logits to (D, K, H, W) of the frame, float32, bilinear.

    The padding is cut off first. Antialiased where the native picture is smaller than the mask.
    """
    rows, columns = frame.covered(recipe)
    native: Tensor = F.interpolate(
        logits[..., :rows, :columns].float(),
        size=(frame.height, frame.width),
        mode="bilinear",
        antialias=not recipe.paper_compat,
    )
    return native


# --------------------------------------------------------------------------------------- dataset


class SliceDataset(Dataset[dict[str, Tensor]]):
    """The slices of prepared cases for training, in the order of the cases.

    Of slices without foreground of any of the recipe's classes every `keep_empty_every`-th is
    kept, counted over the whole site. An item is a dict of float32 tensors: "image" (3, S, S)
    normalised, "target" (K, M, M) of 0 and 1, "annotated" (K,) of 0 and 1.

    Args:
        prepared: the cases to train on; the caller chooses them by `case.split`.
        site: the site's configuration.
        recipe: the recipe.

    Raises:
        SiteDataError: a class of the recipe is unknown here ("unknown-class"), or no slice is
            left ("no-training-slices").
    """

    def __init__(self, prepared: Sequence[PreparedCase], site: SiteConfig, recipe: Recipe) -> None:
        self.prepared = list(prepared)
        self.site = site
        self.recipe = recipe
        self._annotated = annotated(site, recipe).float()
        values = {value for name in recipe.classes for value in site.classes.get(name, ())}
        self.slices: list[tuple[int, int]] = []  # (case, slice) of each item
        empty = 0
        for number, case in enumerate(self.prepared):
            for index, has_foreground in enumerate(_slices_with(case.labels, values)):
                if not has_foreground:
                    empty += 1
                    every = site.keep_empty_every
                    if every == 0 or (empty - 1) % every != 0:
                        continue
                self.slices.append((number, index))
        if not self.slices:
            raise SiteDataError(
                "the training cases have no slice with one of the job's classes",
                "check the label values under classes in site.yml, and keep_empty_every",
                code="no-training-slices",
            )
        self._keep = stay_in_memory(
            len(self.slices), recipe.image_size, recipe.mask_size, len(recipe.classes)
        )
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        kept = self._kept.get(item)
        if kept is None:
            number, index = self.slices[item]
            case = self.prepared[number]
            labels = torch.from_numpy(case.labels[index])
            kept = (
                _resized_slice(case, index, self.site, self.recipe),
                _target(_masks(labels, self.site, self.recipe), Frame.of(case), self.recipe),
            )
            if self._keep:
                self._kept[item] = kept
        picture, target = kept
        return {
            "image": _normalised(picture, self.recipe),
            "target": target.float(),
            "annotated": self._annotated.clone(),
        }


def stay_in_memory(slices: int, image_size: int, mask_size: int, classes: int) -> bool:
    """Whether a `SliceDataset` of so many slices resizes each of them once and keeps it."""
    return slices * (3 * image_size**2 + classes * mask_size**2) <= _SLICES_IN_MEMORY


def _slices_with(labels: NDArray[np.int16], values: set[int]) -> NDArray[np.bool_]:
    """(D,) bool: the slices in which one of the values occurs."""
    return np.array([bool(np.isin(picture, sorted(values)).any()) for picture in labels])
