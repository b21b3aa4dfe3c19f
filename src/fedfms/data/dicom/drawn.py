"""What was drawn in a segmentation or structure set, by the label values of site.yml.

Label values: without `label_names` in site.yml the SegmentNumber of a segmentation (SEG) and the
ROINumber of a structure set (RTSTRUCT); with it, the value under which the segment's SegmentLabel
or the structure's ROIName is listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom import Dataset

from fedfms.contracts.site import Labels
from fedfms.data.dicom.series import Series
from fedfms.data.grid import Array
from fedfms.errors import SiteDataError


@dataclass(slots=True, eq=False)
class Drawn:
    """All that was drawn with one label value."""

    names: list[str]
    mask: Array  # (I, J, K) bool


def mapped(path: Path, segments: Mapping[int, str], meaning: Labels, what: str) -> dict[int, int]:
    """Number -> label value of the segments that mean a class; those of the background are left."""
    values = {number: _value_of(number, name, meaning) for number, name in segments.items()}
    unknown = [
        f"{number} {segments[number]!r}" for number in sorted(values) if values[number] is None
    ]
    if unknown:
        some = ", ".join(unknown[:8]) + (" and more" if len(unknown) > 8 else "")
        raise SiteDataError(
            f"{path} holds {what} that site.yml does not know: {some}",
            "list each name under label_names, or each number under its class or background, in "
            'site.yml; 0: ["*"] under label_names leaves all other names out',
            code="unknown-segments",
        )
    return {
        number: value
        for number, value in values.items()
        if value is not None and value not in meaning.background
    }


def _value_of(number: int, name: str, meaning: Labels) -> int | None:
    """The label value of a segment or structure; None where site.yml does not know it."""
    of_classes = {value for values in meaning.classes.values() for value in values}
    known = of_classes | {*meaning.background, *meaning.void}
    if meaning.label_names is None:
        return number if number in known else None
    values = {n.strip().casefold(): value for value, ns in meaning.label_names.items() for n in ns}
    return values.get(name.strip().casefold(), values.get("*"))


def nothing_drawn(
    series: Series, values: Mapping[int, int], segments: Mapping[int, str]
) -> dict[int, Drawn]:
    """By label value an empty mask and the names of all segments that are to be drawn in it."""
    drawn: dict[int, Drawn] = {}
    for number, value in values.items():
        if value not in drawn:
            drawn[value] = Drawn([], np.zeros(series.values.shape, bool))
        drawn[value].names.append(repr(segments[number]))
    # a label in which nothing of any class was drawn is an empty one
    return drawn or {0: Drawn([], np.zeros(series.values.shape, bool))}


def referenced_series(label: Dataset) -> list[Dataset]:
    """What a segmentation or structure set says of the series that it was drawn on."""
    return [
        *(label.get("ReferencedSeriesSequence") or []),
        *(
            series
            for frame in label.get("ReferencedFrameOfReferenceSequence") or []
            for study in frame.get("RTReferencedStudySequence") or []
            for series in study.get("RTReferencedSeriesSequence") or []
        ),
    ]


def require_same_series(
    path: Path, series: Series, label: Dataset, frame_uids: set[str], sop_uids: set[str]
) -> None:
    """What a label says that it was drawn on is this series, all of it; silence is accepted.

    It says frames of reference and slices (`sop_uids`) in its own way, beside what is common.
    """
    listed = referenced_series(label)
    series_uids = {str(one.SeriesInstanceUID) for one in listed}
    named = {
        str(image.ReferencedSOPInstanceUID)
        for one in listed
        if str(one.SeriesInstanceUID) == series.series_uid
        for images in ("ReferencedInstanceSequence", "ContourImageSequence")
        for image in one.get(images) or []
    }
    if series_uids and series.series_uid not in series_uids:
        raise SiteDataError(
            f"{path} was drawn on another series than the one beside it (SeriesInstanceUID)",
            "pair each label with the series that it was drawn on; if a program for removing names "
            "changed the UIDs, run it over images and labels together",
            code="other-series",
        )
    frame = series.frame_of_reference_uid
    if frame and frame_uids and frame not in frame_uids:
        raise SiteDataError(
            f"{path} lies in another frame of reference than the series beside it",
            "pair each label with the series that it was drawn on, or draw it on this series",
            code="other-frame-of-reference",
        )
    absent = (sop_uids | named) - series.sop_uids
    if absent:
        raise SiteDataError(
            f"{path} refers to {len(absent)} slices that are not in the folder of its series",
            "export the series again in full; slices are missing, perhaps at its end",
            code="label-of-other-slices",
        )


def label_values(path: Path, masks: Mapping[int, Drawn], meaning: Labels) -> Array:
    """One volume of label values; the larger value stands above the smaller, if they may meet."""
    shape = next(iter(masks.values())).mask.shape
    labels = np.zeros(shape, np.int16)
    for value in sorted(masks):
        drawn = masks[value]
        if not -32768 <= value <= 32767:
            raise SiteDataError(
                f"{path} has the label value {value}",
                "give its name a value of at most 32767 under label_names in site.yml",
                code="label-value-too-large",
            )
        if meaning.overlap == "refuse" and (met := np.unique(labels[drawn.mask])).any():
            below = masks[int(met[met != 0][0])]
            count = int(np.count_nonzero(labels[drawn.mask]))
            raise SiteDataError(
                f"in {path} {', '.join(drawn.names)} and {', '.join(below.names)} share {count} "
                "voxels, and a voxel has one label value",
                "set overlap: highest in site.yml, so that the larger value stands there (a part "
                "above its whole: prostate: [1, 2], lesion: [2]), or correct the drawing",
                code="segments-overlap",
            )
        labels[drawn.mask] = value
    return labels
