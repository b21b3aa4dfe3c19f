"""From a trained network and images to written masks, one image after the other."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedfms.contracts.decode import OPTIONS, changed
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import Intensity, Setup, SiteConfig
from fedfms.control import Control
from fedfms.data.content import read_bytes
from fedfms.data.formats import Notice, Stored, read_image
from fedfms.data.grid import Array
from fedfms.data.prepared import PreparedImage, prepare_image
from fedfms.data.several import read_contrasts
from fedfms.errors import ConfigError, FedfmsError, SiteDataError, TaskAborted, unexpected
from fedfms.files import file_sha256
from fedfms.geometry import pieces
from fedfms.models.trained import Trained
from fedfms.predict.find import Item
from fedfms.predict.write import (
    Origin,
    dicom_bytes,
    nifti_bytes,
    npy_bytes,
    png_bytes,
    tiff_bytes,
    write_files,
)
from fedfms.training.device import DEVICE_CODES
from fedfms.training.evaluate import masks_of, predict, probabilities

log = logging.getLogger(__name__)

# Codes of what will not be there for the next image either: the device, memory for a single slice
# of the network's own size, room on the disk.
ENDS_THE_RUN = DEVICE_CODES | {"out-of-memory", "no-room", "read-only"}

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Predicted:
    """What became of one image."""

    item: Item
    pixels: tuple[int, ...]  # foreground of each class, overlaps counted in each; empty if failed
    millilitres: tuple[float, ...] | None  # the same as volumes; None for pictures
    overlap: int  # pixels that belong to several classes; 0 where the classes exclude each other
    error: FedfmsError | None = None
    notes: tuple[Notice, ...] = ()  # what is doubtful about the image, or was repaired


def site_for_prediction(
    trained: Trained, source: Path, site_file: Path | None, **changes: object
) -> Setup:
    """How pixels are read and where is computed.

    As a site's own `site.yml` says; else as is written in the model's file, if it is (an export
    with a site); else by the defaults of site.yml.

    Args:
        trained: the model.
        source: INPUT.
        site_file: the site.yml, or None.
        changes: values of `Setup` that go before both, as given on the command line; None: as
            it is.

    Raises:
        ConfigError: the file or a change cannot be used.
    """
    if site_file is not None:
        site = SiteConfig.from_yaml(site_file, source).part(Setup)
    else:
        site = Setup(format="nifti", **_written_reading(trained))
    given: dict[str, Any] = {key: value for key, value in changes.items() if value is not None}
    return changed(site, given, OPTIONS)


def _written_reading(trained: Trained) -> dict[str, Any]:
    """Plane, channels and intensity as far as the model's file says them."""
    facts = trained.pictures or {}
    reading = {key: facts[key] for key in ("plane", "channels") if facts.get(key)}
    if facts.get("intensity"):
        rule, (low, high) = facts["intensity"]["rule"], facts["intensity"]["bounds"]
        if rule == "window":  # whose bounds are what it leaves
            low, high = (low + high) / 2, high - low
        text = f"{rule}:{low!r}:{high!r}"
        if facts["intensity"].get("rounding") == "truncate":
            text += ":truncate"
        reading["intensity"] = Intensity.from_text(text)
    return reading


def origin_of(trained: Trained, site: Setup) -> Origin:
    """Model, recipe and reading of pixels, as they stand in the files that can say it."""
    recipe = trained.recipe
    return Origin(
        name=f"{recipe.method} {recipe.backbone}",
        classes=recipe.classes,
        parameters={
            "model_sha256": file_sha256(trained.file),
            "recipe_sha256": recipe.sha256,
            "probability_threshold": f"{recipe.probability_threshold:g}",
            "plane": site.plane,
            "channels": site.channels,
            "intensity": describe_intensity(site.intensity),
        },
    )


def describe_intensity(intensity: Intensity) -> str:
    """As `Intensity.from_text` reads it; a DICOM header takes no commas."""
    end = ":truncate" if intensity.rounding == "truncate" else ""
    if intensity.rule == "window":
        return f"window:{intensity.center:g}:{intensity.width:g}{end}"
    low, high = intensity.bounds
    return f"{intensity.rule}:{low:g}:{high:g}{end}"


def predict_items(
    trained: Trained,
    items: Sequence[Item],
    site: Setup,
    *,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> Iterator[Predicted]:
    """Predict and write each image; one that cannot be used is told and the next one comes.

    What is written are the masks that `training.evaluate` scores: as a label map with the numbers
    of the recipe's classes, from 1, or, where classes may overlap, as a mask for each class.

    Args:
        trained: the network with its recipe; moved to the site's device.
        items: from `find_items`.
        site: says how pixels are read, and the device.
        overwrite: write over files that are there.
        on_progress: told ("image 2 of 9", slices done, slices).

    Raises:
        FedfmsError: with a code of `ENDS_THE_RUN`.
        TaskAborted: somebody asked to stop.
    """
    if len(trained.recipe.classes) > 255:
        raise ConfigError("the model has more than 255 classes", "label maps hold 8-bit numbers")
    origin = origin_of(trained, site)
    for number, item in enumerate(items, start=1):
        title = f"image {number} of {len(items)}"

        def tell(phase: str, done: int, total: int, title: str = title) -> None:
            if on_progress is not None:
                on_progress(title, done, total)

        try:
            predicted = _predict_one(trained, item, site, origin, overwrite, Control(tell))
        except FedfmsError as error:
            if isinstance(error, TaskAborted) or error.code in ENDS_THE_RUN:
                raise
            predicted = Predicted(item, (), None, 0, error)
        except Exception as error:  # of a decoder, of a writer, of ours: the others go on
            told = unexpected(error, f"{item.source} cannot be predicted", FedfmsError)
            predicted = Predicted(item, (), None, 0, told)
        yield predicted


def _predict_one(
    trained: Trained,
    item: Item,
    site: Setup,
    origin: Origin,
    overwrite: bool,
    control: Control,
) -> Predicted:
    there = [path for path in item.outputs if path.exists()]
    if there and not overwrite:
        raise ConfigError(
            f"{there[0]} is there already",
            "add --overwrite, or name another OUTPUT",
            code="output-exists",
        )
    site = dataclasses.replace(site, format=item.format)
    if item.contrasts:  # in the recipe's order, whatever site.yml has beside them
        site = dataclasses.replace(site, contrasts=_globs_of(site, trained.recipe))
        _require_contrasts(item, site, trained.recipe)
    data = read_bytes(item.source, site)
    with warnings.catch_warnings(record=True) as warned:  # otherwise lines of code on the terminal
        warnings.simplefilter("default")
        if item.contrasts:
            paths = item.contrasts
            contents = tuple(None if p is None else read_bytes(p, site) for p in paths)
            stored = read_contrasts(paths, contents, site)
        else:
            stored = read_image(item.source, data, site)
        image = prepare_image(item.source, stored, site)
    notes = (*stored.notices, *_warning_notes(item, warned), *_header_notes(item, stored))
    result = _masks(trained, image, site, control, keep_probabilities=bool(item.probabilities))
    content = data if isinstance(data, bytes) else b""  # the files of a series are not needed again
    write_files(dict(_files(item, stored, content, result, origin)))
    pixels = tuple(int(mask.sum()) for mask in result.masks)
    spacing = float(np.prod(stored.spacing))
    has_size = stored.cut is not None and stored.is_volume  # pictures and NPY have none
    millilitres = tuple(count * spacing / 1000 for count in pixels) if has_size else None
    overlap = int((result.masks.sum(axis=0, dtype=np.uint8) > 1).sum())
    log.info("predicted an image of %d slices", len(image.images))
    return Predicted(item, pixels, millilitres, overlap, notes=notes)


def _globs_of(site: Setup, recipe: Recipe) -> dict[str, str]:
    """The recipe's contrasts with their globs; where site.yml has none, with one that means it."""
    return {
        name: site.contrasts.get(name, f"*_{number:04d}.*")
        for number, name in enumerate(recipe.contrasts)
    }


def _require_contrasts(item: Item, site: Setup, recipe: Recipe) -> None:
    missing = [
        name for name, path in zip(recipe.contrasts, item.contrasts, strict=True) if path is None
    ]
    if missing and site.missing_contrast == "refuse":
        raise SiteDataError(
            f"{item.name} has no {', '.join(missing)}",
            "add the image, or give --site a site.yml with missing_contrast: mean (or black)",
            code="missing-contrast",
        )


def _warning_notes(item: Item, warned: Sequence[warnings.WarningMessage]) -> tuple[Notice, ...]:
    """What libraries warned of while they read an image, each once."""
    lines = {str(one.message).strip().partition("\n")[0][:300]: None for one in warned}
    return tuple(
        Notice("library-warning", f"reading {item.name}: {line}", "look at its mask with care")
        for line in lines
    )


def _header_notes(item: Item, stored: Stored) -> tuple[Notice, ...]:
    """What a segmentation cannot take over as it stands in the headers of a series."""
    if stored.series is None:
        return ()
    from fedfms.predict.headers import sources_of  # pydicom takes a second to import

    said = sources_of(stored.series).said
    if not said:
        return ()
    return (
        Notice(
            "header-repaired",
            f"in the headers of {item.name}: {'; '.join(said)}",
            "nothing, if a program for removing names wrote them so; the mask is not touched by it",
        ),
    )


class _Result(NamedTuple):
    masks: Array  # (K, D, H, W) bool
    probabilities: Array | None  # (K, D, H, W) float32

    def labels(self) -> Array:
        """(D, H, W) uint8: the number of the class, from 1; of masks that do not overlap."""
        labels: Array = np.zeros(self.masks.shape[1:], np.uint8)
        for number, mask in enumerate(self.masks, start=1):
            labels[mask] = number
        return labels


def _masks(
    trained: Trained,
    image: PreparedImage,
    site: Setup,
    control: Control,
    *,
    keep_probabilities: bool,
) -> _Result:
    recipe = trained.recipe
    logits = predict(trained.model, pieces(image, recipe), recipe, site, control)
    shape = (len(recipe.classes), *image.images.shape[:3])
    masks = np.empty(shape, bool)
    kept = np.empty(shape, np.float32) if keep_probabilities else None
    for (slices, rows), part in probabilities(logits, image, recipe, len(image.images)):
        masks[:, slices, rows] = masks_of(part, recipe).transpose(0, 1).numpy()
        if kept is not None:
            kept[:, slices, rows] = part.transpose(0, 1).numpy()
    return _Result(masks, kept)


def _files(
    item: Item, stored: Stored, data: bytes, result: _Result, origin: Origin
) -> list[tuple[Path, bytes]]:
    """All that an image gives, as bytes."""
    maps = [] if result.probabilities is None else list(result.probabilities)
    if item.format == "dicom":
        assert stored.cut is not None and stored.series is not None  # of every series
        assert item.labels is not None  # a segmentation keeps classes that overlap apart
        from fedfms.predict.headers import sources_of

        cut, series = stored.cut, sources_of(stored.series)
        files = [(item.labels, dicom_bytes(result.masks, cut, series, origin))]
        for path in item.probabilities:
            assert result.probabilities is not None  # kept where item asks for them
            files.append((path, dicom_bytes(result.probabilities, cut, series, origin)))
        for number, path in enumerate(item.separate):
            one = dataclasses.replace(origin, classes=origin.classes[number : number + 1])
            mask = result.masks[number : number + 1]
            files.append((path, dicom_bytes(mask, cut, series, one)))
        return files
    masks = list(zip(item.separate, result.masks.astype(np.uint8), strict=False))  # or none
    if item.labels is not None:
        masks.insert(0, (item.labels, result.labels()))
    shares = list(zip(item.probabilities, maps, strict=True))
    if item.format == "npy":
        shape = slice(None) if stored.is_volume else 0  # a picture has no axis of slices
        return [(path, npy_bytes(values[shape])) for path, values in [*masks, *shares]]
    if item.format == "nifti":
        assert stored.cut is not None  # of every volume
        return [
            (path, nifti_bytes(values, stored.cut, item.source, data, origin))
            for path, values in [*masks, *shares]
        ]
    return [
        *((path, png_bytes(mask[0])) for path, mask in masks),
        *((path, tiff_bytes(share[0])) for path, share in shares),
    ]
