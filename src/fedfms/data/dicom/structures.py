"""Structure sets (RTSTRUCT): outlines filled by the even-odd rule.

A voxel belongs to a structure whose centre lies inside an odd number of times, over all of its
outlines in that slice. So an outline inside another is a hole (as CLOSEDPLANAR_XOR), and so is one
joined to it by a keyhole (DICOM PS3.3, C.8.8.6). Of centres that lie exactly on an outline one side
counts, which keeps areas true.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom import Dataset

from fedfms.contracts.site import Labels
from fedfms.data.dicom.drawn import Drawn, mapped, nothing_drawn, require_same_series
from fedfms.data.dicom.series import LPS_TO_RAS, Series
from fedfms.data.grid import Array
from fedfms.errors import SiteDataError

_OFF_SLICE = 0.25  # of the distance between slices: an outline and its slice


def read_structures(
    path: Path, label: Dataset, meaning: Labels, series: Series
) -> dict[int, Drawn]:
    """Masks by label value of an RTSTRUCT file. Raises as `read_label`."""
    outlines = {
        int(roi.ReferencedROINumber): list(roi.get("ContourSequence") or [])
        for roi in label.get("ROIContourSequence") or []
    }
    rois = {  # templates leave structures in which nothing was drawn
        int(roi.ROINumber): roi
        for roi in label.get("StructureSetROISequence") or []
        if outlines.get(int(roi.ROINumber))
    }
    names = {number: str(roi.get("ROIName") or "") for number, roi in rois.items()}
    values = mapped(path, names, meaning, "structures")
    frames = {
        str(rois[number].ReferencedFrameOfReferenceUID)
        for number in values
        if "ReferencedFrameOfReferenceUID" in rois[number]
    }
    images = {
        str(image.ReferencedSOPInstanceUID)
        for number in values
        for outline in outlines[number]
        for image in outline.get("ContourImageSequence") or []
    }
    require_same_series(path, series, label, frames, images)
    drawn = nothing_drawn(series, values, names)
    for number, value in values.items():
        filled = np.zeros(series.values.shape, bool)
        for outline in outlines[number]:
            _fill(path, names[number], outline, filled, series)
        drawn[value].mask |= filled
    return drawn


def _fill(path: Path, name: str, outline: Dataset, filled: Array, series: Series) -> None:
    """Turn over every voxel of `filled` (I, J, K) whose centre lies inside the outline."""
    from matplotlib.path import Path as Outline

    kind = str(outline.get("ContourGeometricType", ""))
    if kind not in ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR"):
        raise SiteDataError(
            f"the structure {name!r} in {path} has an outline of the kind {kind or 'unknown'}",
            "draw closed outlines in the slices; leave points and lines out by giving their "
            "structure the value 0 under label_names in site.yml",
            code="open-outline",
        )
    points = np.array(outline.get("ContourData") or [], float).reshape(-1, 3)
    if len(points) < 3:  # encloses nothing
        return
    lps = np.c_[points, np.ones(len(points))]
    voxels = lps @ (np.linalg.inv(series.affine) @ LPS_TO_RAS).T
    level = int(np.rint(voxels[:, 2].mean()))
    if np.abs(voxels[:, 2] - level).max() > _OFF_SLICE or not 0 <= level < filled.shape[2]:
        raise SiteDataError(
            f"an outline of {name!r} in {path} lies between or beyond the slices of its series, or "
            "not in their plane",
            "export the structures on the slices of this series",
            code="outline-between-slices",
        )
    low = np.maximum(np.ceil(voxels[:, :2].min(axis=0)).astype(int), 0)
    high = np.minimum(np.floor(voxels[:, :2].max(axis=0)).astype(int) + 1, filled.shape[:2])
    if (low >= high).any():
        return
    i, j = np.mgrid[low[0] : high[0], low[1] : high[1]]
    # crossings of a ray, so even-odd also where an outline meets itself (a keyhole)
    inside = Outline(voxels[:, :2]).contains_points(np.c_[i.ravel(), j.ravel()]).reshape(i.shape)
    filled[low[0] : high[0], low[1] : high[1], level] ^= inside
