"""Whatever is an image in DICOM: a folder of slices, many frames in one file, or one picture."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydicom import Dataset
from pydicom.pixels.processing import apply_color_lut

from fedfms.contracts.site import Reading
from fedfms.data.content import SLIDE, Content, cannot_read_here, damaged
from fedfms.data.dicom.series import (
    LPS_TO_RAS,
    Series,
    has_many_frames,
    images_in,
    is_enhanced,
    is_picture,
    measured,
    no_warnings,
    read_stack,
    require_frames_with_places,
    require_grey,
    require_one_scale,
    require_place,
    require_scale,
    require_whole_numbers,
    stacked,
    stored_numbers,
)
from fedfms.errors import SiteDataError

# Where a picture says how far apart its pixels lie: in the patient, at the detector, in the scan
_SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio")
# What frames of an enhanced image say in functional groups, and slices at their top level
_OF_A_FRAME = {
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept", "RescaleType"),
}


def read_series(path: Path, content: Content, site: Reading) -> Series:
    """The one series of a folder, or of a file that is an image by itself.

    Raises:
        SiteDataError: "not-dicom", "no-dicom-images", "several-series", "no-such-series",
            "not-a-folder" and what `read_stack` raises.
    """
    found = images_in(path, content, site)
    folder = path.parent if isinstance(content, bytes) else path
    name, first = found[0]
    if len(found) == 1 and is_enhanced(first):
        return _of_frames(folder / name, first)
    if len(found) == 1 and is_picture(first):
        return _of_picture(folder / name, first)
    if isinstance(content, bytes):
        require_whole_numbers(path, first)
        if has_many_frames(first):
            require_frames_with_places(path, first)
        require_place(path, first)
        raise SiteDataError(
            f"{path} is a file with one slice, and an image in DICOM is a folder with the slices "
            "of one series",
            "let the glob images in site.yml match folders, such as images/*",
            code="not-a-folder",
        )
    return read_stack(path, found)


def _of_frames(path: Path, image: Dataset) -> Series:
    """An enhanced image, whose frames are slices, as a volume."""
    require_grey(path, image)
    frames = list(_frames(path, image))
    for _, frame in frames:
        require_place(path, frame)
    ordered, affine = stacked(path, frames)
    require_one_scale(path, ordered)
    pixels = stored_numbers(path, image)
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or len(pixels) != len(frames):
        raise damaged(path, f"it describes {len(frames)} frames and has {len(pixels)}")
    planes = [measured(path, pixels[int(f.InstanceNumber) - 1], f).T for f in ordered]
    return Series(np.stack(planes, axis=2), affine, tuple(ordered))


def _frames(path: Path, image: Dataset) -> Iterator[tuple[str, Dataset]]:
    """Each frame as the header of a slice, with a name for errors; InstanceNumber is from 1."""
    own_alone = ("PixelData", "NumberOfFrames", "InstanceNumber")
    whole = Dataset()  # whose elements all frames share: none of them is changed
    whole.update({e.tag: e for e in image if e.VR != "SQ" and e.keyword not in own_alone})
    shared = (image.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    for number, own in enumerate(image.PerFrameFunctionalGroupsSequence, start=1):
        frame = Dataset()
        frame.update(whole)
        frame.file_meta = image.file_meta
        for group, keywords in _OF_A_FRAME.items():
            said = own.get(group) or shared.get(group)
            for keyword in keywords if said else ():
                if keyword in said[0]:
                    frame[keyword] = said[0][keyword]
        frame.InstanceNumber = number
        yield f"frame {number}", frame


def _of_picture(path: Path, image: Dataset) -> Series:
    """X-ray, mammography, ultrasound and the like: one picture, without a place in the patient."""
    require_whole_numbers(path, image)
    frames = int(image.get("NumberOfFrames") or 1)
    if frames > 1 and image.get("Modality") == "SM":
        raise SiteDataError(
            f"{path} is a whole slide of {frames} tiles",
            SLIDE,
            code="multi-frame",
        )
    if frames > 1:
        raise SiteDataError(
            f"{path} is a multi-frame image whose {frames} frames lie nowhere in a patient",
            "export single frames as DICOM or PNG (format: image), each an image by itself",
            code="multi-frame",
        )
    colours = None
    if int(image.get("SamplesPerPixel") or 1) == 3:
        values = colours = stored_numbers(path, image)
    elif str(image.get("PhotometricInterpretation")) == "PALETTE COLOR":
        values = colours = _by_palette(path, image)
    else:
        require_grey(path, image)
        require_scale(path, image)
        values = measured(path, stored_numbers(path, image), image)
    if values.ndim != (2 if colours is None else 3):
        raise damaged(path, f"it has {values.ndim} dimensions")
    first = values if colours is None else colours[..., 0]
    affine = LPS_TO_RAS @ np.diag([1.0, _aspect(path, image), 1.0, 1.0])
    del image.PixelData
    grey = np.asarray(first, np.float32).T[..., None]
    return Series(grey, affine, (image,), colours, has_place=False)


def _by_palette(path: Path, image: Dataset) -> np.ndarray:
    """(J, I, 3) of indices of colours."""
    stored = stored_numbers(path, image)
    try:
        with no_warnings():
            return np.asarray(apply_color_lut(stored, image))[..., :3]
    except Exception as error:  # a table that its header says wrongly
        raise damaged(path, f"{type(error).__name__}: {error}") from None


def _aspect(path: Path, image: Dataset) -> float:
    """A pixel's height by its width, as far as the header says."""
    for keyword in _SPACINGS:
        with contextlib.suppress(ValueError, TypeError, IndexError):
            height, width = (float(value) for value in image.get(keyword) or ())
            if height > 0 and width > 0 and np.isfinite(height / width):
                return height / width
    regions = image.get("SequenceOfUltrasoundRegions") or []
    ratios = {
        round(abs(float(one.PhysicalDeltaY) / float(one.PhysicalDeltaX)), 3)
        for one in regions
        if one.get("PhysicalDeltaX")
        and one.get("PhysicalDeltaY")
        and one.get("PhysicalUnitsXDirection") == one.get("PhysicalUnitsYDirection") == 3  # cm
    }
    if len(ratios) > 1:
        raise cannot_read_here(
            path,
            "its regions have pixels of several shapes",
            "cut out the region that is drawn on, and save it as PNG for format: image",
        )
    return ratios.pop() if ratios else 1.0
