"""DICOM segmentations (SEG): binary, or one frame of labels; each frame where it says it lies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom import Dataset
from pydicom.pixels.utils import pixel_array
from pydicom.uid import JPEG2000, JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless

from fedfms.contracts.site import Labels
from fedfms.data.content import cannot_read_here, damaged
from fedfms.data.dicom.drawn import Drawn, mapped, nothing_drawn, require_same_series
from fedfms.data.dicom.series import (
    LPS_TO_RAS,
    UNEVEN,
    Series,
    known_syntax,
    no_warnings,
    only_stored_bits,
    require_decoder,
    require_whole_numbers,
    undecodable,
)
from fedfms.data.grid import Array
from fedfms.data.pictures import coloured
from fedfms.errors import SiteDataError

_LOSSY = frozenset((JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless))
_OFF_GRID = 0.1  # of a voxel: a segmentation's voxels and the image's


def read_segmentation(
    path: Path, label: Dataset, meaning: Labels, series: Series
) -> dict[int, Drawn]:
    """Masks by label value of a SEG file. Raises as `read_label`."""
    kind = str(label.get("SegmentationType", "BINARY"))
    if kind not in ("BINARY", "LABELMAP"):
        raise SiteDataError(
            f"{path} is a {kind} segmentation, which holds shares and no label values",
            "export it as BINARY or LABELMAP, with the threshold that it was drawn for",
            code="fractional-seg",
        )
    frame = {str(label.FrameOfReferenceUID)} if "FrameOfReferenceUID" in label else set()
    require_same_series(path, series, label, frame, set())
    segments = {
        int(segment.SegmentNumber): str(segment.get("SegmentLabel") or "")
        for segment in label.SegmentSequence
    }
    if kind == "LABELMAP":
        segments.pop(0, None)  # is what was not drawn
    values = mapped(path, segments, meaning, "segments")
    drawn = nothing_drawn(series, values, segments)
    frames = _frames(path, label)
    if "PerFrameFunctionalGroupsSequence" not in label:
        raise cannot_read_here(
            path,
            f"its {len(frames)} frames do not say where they lie or of which segment they are "
            "(PerFrameFunctionalGroupsSequence), as in segmentations of whole slides in tiles",
            "save the labels of a region of the slide as PNG, with the region as a picture",
        )
    described = len(label.PerFrameFunctionalGroupsSequence)
    if described != len(frames):
        raise damaged(path, f"it describes {described} frames and has {len(frames)}")
    drawn_on: set[int] = set()  # of a picture, which one frame of a segment covers
    shared = (label.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    for own, frame in zip(label.PerFrameFunctionalGroupsSequence, frames, strict=True):
        numbers = (
            np.unique(frame[frame != 0]).tolist()
            if kind == "LABELMAP"
            else [int(_group(own, shared, "SegmentIdentificationSequence").ReferencedSegmentNumber)]
        )
        for number in numbers:
            if number not in segments:
                raise damaged(path, f"a frame is of segment {number}, which it does not describe")
            if not series.has_place and number in drawn_on:
                raise _other_grid(path)
            drawn_on.add(number)
            if number in values:
                found = frame == number if kind == "LABELMAP" else frame != 0
                if series.has_place:
                    i, j, k = _on_grid(path, found, own, shared, series)
                else:
                    i, j, k = _on_picture(path, found, series)
                drawn[values[number]].mask[i, j, k] = True
    return drawn


def mask_of_picture(path: Path, label: Dataset) -> Array:
    """(I, J, 1) numbers as stored of a picture in DICOM that is the label of another one.

    Raises:
        SiteDataError: "lossy-labels", "coloured-labels", "cannot-be-read-here", "damaged-file".
    """
    require_whole_numbers(path, label)
    if (label.get("SamplesPerPixel") or 1) != 1:
        raise coloured(path)
    shown = label.get("PhotometricInterpretation")
    frames = _frames(path, label)
    if shown != "MONOCHROME2" or len(frames) != 1:
        raise cannot_read_here(
            path,
            f"it is a label of {len(frames)} frames in {shown or 'no PhotometricInterpretation'}",
            "save the label as one PNG with one number for each pixel, or as MONOCHROME2",
        )
    values: Array = frames[0].T[..., None]
    return values


def _frames(path: Path, label: Dataset) -> Array:
    """(N, rows, columns) of a segmentation as stored."""
    syntax = known_syntax(path, label)
    # once set it is never taken back: of what was drawn on a lossy image it says so of the image
    was_lossy = str(label.get("LossyImageCompression", "00")) == "01"
    is_drawn = "SegmentSequence" in label
    if syntax in _LOSSY or (was_lossy and (syntax == JPEG2000 or not is_drawn)):
        how = syntax.name if syntax in _LOSSY else "LossyImageCompression is 01"
        raise SiteDataError(
            f"{path} is or was in lossy compression ({how}), which does not keep label values",
            "export the segmentation again without compression or with RLE",
            code="lossy-labels",
        )
    if syntax.is_encapsulated:
        require_decoder(path, syntax)
    try:
        with no_warnings():
            frames = np.asarray(pixel_array(label))
            if label.BitsAllocated > 1:
                frames = only_stored_bits(frames, int(label.BitsStored))
    except Exception as error:  # a damaged file makes a decoder raise nearly anything
        if syntax.is_encapsulated:
            raise undecodable(path, syntax, error) from None
        raise damaged(path, f"{type(error).__name__}: {error}") from None
    return frames if frames.ndim == 3 else frames[None]


def _group(own: Dataset, shared: Dataset, name: str) -> Dataset:
    """A functional group of a frame: its own, else the one that all frames share."""
    sequence = own.get(name) or shared[name].value
    group: Dataset = sequence[0]
    return group


def _on_grid(
    path: Path, found: Array, own: Dataset, shared: Dataset, series: Series
) -> tuple[Array, Array, Array]:
    """Voxel indices of what was drawn in a frame (rows, columns), which may lie in any direction.

    The frame's corners and pixel steps must fall on the image's voxels; nothing is resampled.
    """
    position = _group(own, shared, "PlanePositionSequence").ImagePositionPatient
    directions = np.array(
        _group(own, shared, "PlaneOrientationSequence").ImageOrientationPatient, float
    )
    measures = _group(own, shared, "PixelMeasuresSequence")
    row_spacing, column_spacing = (float(value) for value in measures.PixelSpacing)
    frame = np.eye(4)
    frame[:3, 0] = directions[3:] * row_spacing  # from one row to the next
    frame[:3, 1] = directions[:3] * column_spacing
    frame[:3, 3] = np.array(position, float)
    to_voxels = np.linalg.inv(series.affine) @ LPS_TO_RAS @ frame
    steps = to_voxels[:3, :2]
    last = np.array(found.shape) - 1
    corners = np.array([[0, 0], [last[0], 0], [0, last[1]], last])
    exact = corners @ steps.T + to_voxels[:3, 3]
    whole = corners @ np.rint(steps).T + np.rint(to_voxels[:3, 3])
    one_voxel = (np.abs(np.rint(steps)).sum(axis=0) == 1).all()
    if not one_voxel or np.abs(exact - whole).max() > _OFF_GRID or _other_slices(measures, series):
        raise _other_grid(path)
    drawn = np.argwhere(found)
    voxels = (drawn @ np.rint(steps).T + np.rint(to_voxels[:3, 3])).astype(int)
    if len(voxels) and ((voxels < 0).any() or (voxels >= series.values.shape).any()):
        raise _other_grid(path)
    return voxels[:, 0], voxels[:, 1], voxels[:, 2]


def _on_picture(path: Path, found: Array, series: Series) -> tuple[Array, Array, Array]:
    """Columns, rows and slice of what was drawn on a picture, whose pixels a frame's must be."""
    if found.T.shape != series.values.shape[:2]:
        raise _other_grid(path)
    rows, columns = np.nonzero(found)
    return columns, rows, np.zeros_like(rows)


def _other_slices(measures: Dataset, series: Series) -> bool:
    """Whether a segmentation says that its slices lie at another distance than the image's."""
    spacing = abs(float(measures.get("SpacingBetweenSlices") or 0))
    own = float(np.linalg.norm(series.affine[:3, 2]))
    return spacing > 0 and series.values.shape[2] > 1 and abs(spacing - own) > UNEVEN * own


def _other_grid(path: Path) -> SiteDataError:
    return SiteDataError(
        f"the voxels of {path} are not those of its series: other sizes, places or directions",
        "export the segmentation on the image's own grid, without resampling or cropping beyond it",
        code="other-grid",
    )
