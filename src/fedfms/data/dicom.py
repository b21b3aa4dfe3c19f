"""A folder of DICOM slices to a volume, and a segmentation or structure set to label values on it.

Slices lie where ImagePositionPatient says, never where their names or numbers do. What cannot be
put on one even grid without inventing values is refused by name. Patient axes of DICOM (LPS) become
those of NIfTI (RAS) by turning the signs of x and y.

Label values: without `label_names` in site.yml the SegmentNumber of a segmentation (SEG) and the
ROINumber of a structure set (RTSTRUCT); with it, the value under which the segment's SegmentLabel
or the structure's ROIName is listed.

Outlines of a structure set are filled by the even-odd rule: a voxel belongs to it whose centre lies
inside an odd number of times, over all of its outlines in that slice. So an outline inside another
is a hole (as CLOSEDPLANAR_XOR), and so is one joined to it by a keyhole (DICOM PS3.3, C.8.8.6). Of
centres that lie exactly on an outline one side counts, which keeps areas true.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom.config
from pydicom import Dataset, dcmread
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_modality_lut
from pydicom.pixels.utils import pixel_array
from pydicom.uid import (
    UID,
    MediaStorageDirectoryStorage,
    RTStructureSetStorage,
    SegmentationStorage,
)

from fedfms.config import SiteConfig
from fedfms.data.content import Content, Folder, damaged, is_plain_file
from fedfms.data.grid import Array
from fedfms.errors import SiteDataError

# pydicom's warnings about odd values quote them, a patient's name too, and logs can leave the site
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

# Modality of objects that lie beside images and are none
_NO_IMAGES = frozenset(
    ("SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "RTRECORD", "PR", "SR", "KO", "REG", "DOC", "FID")
)
_LABEL_MAP_STORAGE = UID("1.2.840.10008.5.1.4.1.1.66.7")  # too new for pydicom's own list
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

# How far a series may be from one even, straight grid; headers round to 0.001 or 0.01 mm.
_COSINES = 1e-3  # difference of a direction cosine
_UNEVEN = 0.1  # of the distance between slices, from where a slice should lie
_DRIFT = 0.25  # of a pixel, sideways, over the whole stack
_SAME_PLACE = 0.1  # of the usual distance between slices
_OFF_GRID = 0.1  # of a voxel: a segmentation's voxels and the image's
_OFF_SLICE = 0.25  # of the distance between slices: an outline and its slice


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """One series of DICOM slices as a volume.

    values: (I, J, K) float32 after RescaleSlope and RescaleIntercept of each slice; I columns, J
        rows, K slices in the direction of the normal.
    affine: (4, 4) float64, voxel index (i, j, k) to RAS millimetres.
    headers: of the K slices, without pixels, in the order of the slices.
    """

    values: Array
    affine: Array
    headers: tuple[Dataset, ...]

    @property
    def series_uid(self) -> str:
        """SeriesInstanceUID."""
        return str(self.headers[0].SeriesInstanceUID)

    @property
    def frame_of_reference_uid(self) -> str:
        """FrameOfReferenceUID; empty where the images have none."""
        return str(self.headers[0].get("FrameOfReferenceUID", ""))

    @property
    def sop_uids(self) -> frozenset[str]:
        """SOPInstanceUID of all slices."""
        return frozenset(str(header.SOPInstanceUID) for header in self.headers)


# ---------------------------------------------------------------------------------------- series


def read_series(path: Path, folder: Folder, site: SiteConfig) -> Series:
    """The one series of a folder.

    Raises:
        SiteDataError: "not-dicom", "no-dicom-images", "several-series", "no-such-series",
            "multi-frame", "colour-dicom", "monochrome1", "localizer", "no-position",
            "mixed-orientations", "mixed-grids", "duplicate-slices", "missing-slices",
            "uneven-spacing", "gantry-tilt", "no-decoder", "damaged-file".
    """
    named = _one_series(path, list(_images(path, folder)), site)
    for name, slice_ in named:
        _require_plain_slice(path / name, slice_)
    ordered, affine = _stacked(path, [slice_ for _, slice_ in named])
    names = {id(slice_): name for name, slice_ in named}
    planes = []
    for slice_ in ordered:
        planes.append(_pixels(path / names[id(slice_)], slice_).T)  # (I, J)
        del slice_.PixelData
    return Series(np.stack(planes, axis=2), affine, tuple(ordered))


def patient_of(path: Path) -> str | None:
    """PatientID of a folder's images; None where it is empty or no image can be read.

    Reads the first readable header in the order of the names. The files of one series have one
    patient; whatever else is wrong with the folder, `read_series` says.
    """
    for slice_ in _headers(path):
        return str(slice_.get("PatientID") or "").strip() or None
    return None


def holds_images(path: Path) -> bool:
    """Whether a folder directly holds at least one DICOM file that is an image."""
    return next(_headers(path), None) is not None


def _headers(path: Path) -> Iterator[Dataset]:
    """Headers of the images in a folder, as far as the little that is read of them goes."""
    try:
        entries = sorted(entry for entry in path.iterdir() if is_plain_file(entry))
    except OSError:
        return
    tags = ["PatientID", "Modality"]
    for entry in entries:
        try:
            with entry.open("rb") as file, _no_warnings():
                if file.read(132)[128:] != b"DICM":
                    continue
                file.seek(0)
                slice_ = dcmread(file, stop_before_pixels=True, specific_tags=tags)
        except Exception:  # a damaged header makes pydicom raise nearly anything
            continue
        if not _is_beside_images(slice_):
            yield slice_


def _images(path: Path, folder: Folder) -> Iterator[tuple[str, Dataset]]:
    """The image files with their names; what lies beside images is passed over."""
    found = False
    for name, data in folder.files:
        parsed = _parsed(path / name, data)
        if _is_beside_images(parsed):
            continue
        found = True
        if "PixelData" not in parsed:
            raise damaged(path / name, "it has no pixels")
        yield name, parsed
    if not found:
        raise SiteDataError(
            f"the folder {path} holds no DICOM image, only objects such as SEG or RTSTRUCT",
            "let the glob images in site.yml match the folders of the images",
            code="no-dicom-images",
        )


def _parsed(path: Path, data: bytes) -> Dataset:
    if data[128:132] != b"DICM":
        raise SiteDataError(
            f"{path} is no DICOM file: the letters DICM are not at byte 128",
            "move other files out of the folder; export the series again if this should be one",
            code="not-dicom",
        )
    try:
        with _no_warnings():
            return dcmread(io.BytesIO(data))
    except Exception as error:  # a damaged file makes pydicom raise nearly anything
        raise damaged(path, type(error).__name__) from None


def _is_beside_images(parsed: Dataset) -> bool:
    kind = parsed.file_meta.get("MediaStorageSOPClassUID", "")
    return kind == MediaStorageDirectoryStorage or str(parsed.get("Modality", "")) in _NO_IMAGES


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """For what `IGNORE` above leaves, such as unknown character sets."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _one_series(
    path: Path, images: list[tuple[str, Dataset]], site: SiteConfig
) -> list[tuple[str, Dataset]]:
    by_uid: dict[str, list[tuple[str, Dataset]]] = {}
    for name, slice_ in images:
        by_uid.setdefault(str(slice_.get("SeriesInstanceUID", "")), []).append((name, slice_))

    def description(uid: str) -> str:
        return str(by_uid[uid][0][1].get("SeriesDescription") or "")

    chosen = list(by_uid)
    if site.series is not None:
        chosen = [uid for uid in by_uid if re.search(site.series, description(uid))]
    some = ", ".join(sorted(f"{description(uid)!r} ({len(by_uid[uid])})" for uid in by_uid)[:6])
    if not chosen:
        raise SiteDataError(
            f"series: {site.series} in site.yml matches no SeriesDescription in {path}: {some}",
            "correct the regular expression, or leave series out where a folder holds one series",
            code="no-such-series",
        )
    if len(chosen) > 1:
        raise SiteDataError(
            f"{path} holds {len(chosen)} series (description, files): {some}",
            "put each series into a folder of its own, or choose one in each folder with series: "
            "and a part of its SeriesDescription in site.yml",
            code="several-series",
        )
    return by_uid[chosen[0]]


def _require_plain_slice(path: Path, slice_: Dataset) -> None:
    """One grey slice with a position; anything else is refused by its name."""
    frames = slice_.get("NumberOfFrames")
    if (frames is not None and int(frames) > 1) or "PerFrameFunctionalGroupsSequence" in slice_:
        raise SiteDataError(
            f"{path} is a multi-frame (enhanced) image with {frames} frames",
            "export the series as single-frame images, or convert it to NIfTI, for example with "
            "dcm2niix",
            code="multi-frame",
        )
    photometric = str(slice_.get("PhotometricInterpretation", ""))
    if photometric == "MONOCHROME1":
        raise SiteDataError(
            f"{path} is MONOCHROME1, where small values are white",
            "export the series as MONOCHROME2; what its values mean is then no guess",
            code="monochrome1",
        )
    if photometric != "MONOCHROME2" or slice_.get("SamplesPerPixel", 1) != 1:
        raise SiteDataError(
            f"{path} holds colours ({photometric or 'no PhotometricInterpretation'})",
            "leave out screenshots and reports; export colour pictures as PNG for format: image",
            code="colour-dicom",
        )
    if any(str(value).upper() == "LOCALIZER" for value in _values(slice_, "ImageType")):
        raise SiteDataError(
            f"{path} is a localizer (scout)",
            "take the localizers out of the folder; they lie across the slices",
            code="localizer",
        )
    missing = [
        name
        for name, count in (
            ("ImagePositionPatient", 3),
            ("ImageOrientationPatient", 6),
            ("PixelSpacing", 2),
        )
        if len(_values(slice_, name)) != count
    ]
    if missing:
        raise SiteDataError(
            f"{path} has no {', '.join(missing)}, so its place in the patient is not known",
            "use series of slices (CT, MR, PET); projections and ultrasound can be exported as "
            "PNG for format: image",
            code="no-position",
        )


def _stacked(path: Path, slices: list[Dataset]) -> tuple[list[Dataset], Array]:
    """The slices in the order of the normal, and the RAS affine of (column, row, slice)."""
    first = slices[0]
    for name in ("Rows", "Columns", "PixelSpacing"):
        found = sorted({tuple(map(float, _values(slice_, name))) for slice_ in slices})
        if not np.allclose(found, found[0], rtol=1e-4, atol=0):
            raise _mixed(path, "mixed-grids", f"{name} has the values {found[0]} and {found[-1]}")
    cosines = np.array([_values(slice_, "ImageOrientationPatient") for slice_ in slices], float)
    if np.abs(cosines - cosines[0]).max() > _COSINES:
        raise _mixed(path, "mixed-orientations", "their directions differ, as with localizers")
    if len({str(slice_.get("FrameOfReferenceUID", "")) for slice_ in slices}) > 1:
        raise _mixed(path, "mixed-orientations", "they have several FrameOfReferenceUID")
    along_row, along_column = cosines[0, :3], cosines[0, 3:]
    lengths = np.linalg.norm([along_row, along_column], axis=1)
    if np.abs(lengths - 1).max() > _COSINES or abs(along_row @ along_column) > _COSINES:
        raise _mixed(path, "mixed-orientations", "ImageOrientationPatient is no pair of directions")
    row_spacing, column_spacing = (float(value) for value in first.PixelSpacing)
    if min(row_spacing, column_spacing) <= 0:
        raise _mixed(path, "mixed-grids", "PixelSpacing is not above 0")
    normal = np.cross(along_row, along_column)
    positions = np.array([_values(slice_, "ImagePositionPatient") for slice_ in slices], float)
    if not np.isfinite(positions).all():
        raise _mixed(path, "mixed-grids", "ImagePositionPatient is no number")
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    ordered = [slices[number] for number in order]
    step = normal * _thickness(first)
    if len(slices) > 1:
        _require_even(path, ordered, positions, normal, min(row_spacing, column_spacing))
        step = (positions[-1] - positions[0]) / (len(slices) - 1)
    affine = np.eye(4)
    affine[:3, 0] = along_row * column_spacing
    affine[:3, 1] = along_column * row_spacing
    affine[:3, 2] = step
    affine[:3, 3] = positions[0]
    return ordered, _LPS_TO_RAS @ affine


def _require_even(
    path: Path, ordered: list[Dataset], positions: Array, normal: Array, pixel: float
) -> None:
    """Slices one above the other at one distance; positions (K, 3) in their order, mm."""
    along = (positions - positions[0]) @ normal
    gaps = np.diff(along)
    apart = gaps[gaps > 1e-3 * gaps.max()]
    usual = float(np.median(apart)) if len(apart) else 0.0
    if gaps.min() <= _SAME_PLACE * usual:
        at = int(np.argmin(gaps))
        numbers = " and ".join(str(s.get("InstanceNumber", "?")) for s in ordered[at : at + 2])
        raise SiteDataError(
            f"{path} has several slices in one place, for example InstanceNumber {numbers}",
            "leave one image for each place: remove copies, and put echoes, time points, phases "
            "and b-values into folders of their own",
            code="duplicate-slices",
        )
    times = np.rint(gaps / usual)
    if times.max() > 1 and np.abs(gaps / usual - times).max() <= _UNEVEN:
        at = int(np.argmax(times))
        raise SiteDataError(
            f"{path} lacks {int(times.sum()) - len(gaps)} slices: they lie {usual:.4g} mm apart, "
            f"but {gaps[at]:.4g} mm between InstanceNumber "
            f"{ordered[at].get('InstanceNumber', '?')} and "
            f"{ordered[at + 1].get('InstanceNumber', '?')}",
            "export the series again, and compare the number of files with the archive's",
            code="missing-slices",
        )
    mean = along[-1] / len(gaps)
    if np.abs(along - mean * np.arange(len(along))).max() > _UNEVEN * mean:
        raise SiteDataError(
            f"the slices of {path} lie unevenly, {gaps.min():.4g} to {gaps.max():.4g} mm apart",
            "use a reconstruction with even spacing, or resample the series to NIfTI",
            code="uneven-spacing",
        )
    sideways = positions - positions[0] - np.outer(along, normal)
    drift = float(np.linalg.norm(sideways, axis=1).max())
    if drift > _DRIFT * pixel:
        degrees = np.degrees(np.arctan2(np.linalg.norm(sideways[-1]), along[-1]))
        raise SiteDataError(
            f"the slices of {path} are not one above the other but sheared by {degrees:.1f} "
            f"degrees (gantry tilt); GantryDetectorTilt says "
            f"{ordered[0].get('GantryDetectorTilt', 'nothing')}",
            "use an untilted reconstruction, or correct the tilt while converting to NIfTI, as "
            "dcm2niix does for CT",
            code="gantry-tilt",
        )


def _thickness(slice_: Dataset) -> float:
    """Of a single slice, which has no neighbour: what its header says, else 1 mm."""
    for name in ("SpacingBetweenSlices", "SliceThickness"):
        value = abs(float(slice_.get(name) or 0))
        if value > 0:
            return value
    return 1.0


def _pixels(path: Path, slice_: Dataset) -> Array:
    """(J, I) float32 of one slice, its own slope and intercept applied."""
    syntax = UID(str(slice_.file_meta.get("TransferSyntaxUID", "")))
    compressed = syntax.is_encapsulated if syntax.is_transfer_syntax else False
    if compressed:
        _require_decoder(path, syntax)
    try:
        with _no_warnings():
            stored = pixel_array(slice_)  # the dataset's own attribute would keep a copy
            values: Array = np.asarray(apply_modality_lut(stored, slice_))
    except Exception as error:  # a damaged file makes a decoder raise nearly anything
        if not compressed:
            raise damaged(path, f"{type(error).__name__}: {error}") from None
        raise SiteDataError(
            f"{path} cannot be decoded ({syntax.name}): {type(error).__name__}",
            "copy the file again; if that does not help, decompress the series, for example with: "
            "gdcmconv --raw IN OUT",
            code="no-decoder",
        ) from None
    if values.ndim != 2:
        raise damaged(path, f"it has {values.ndim} dimensions")
    return values.astype(np.float32)


def _require_decoder(path: Path, syntax: UID) -> None:
    try:
        decoder = get_decoder(syntax)
        if decoder.is_available:
            return
        packages = " or ".join(text.split(" - ")[0] for text in decoder.missing_dependencies)
        needs = f"pydicom decodes it with {packages}, which is not installed"
    except NotImplementedError:
        needs = "pydicom has no decoder for it"
    raise SiteDataError(
        f"{path} is compressed as {syntax.name}: {needs}",
        "decompress the series, for example with: gdcmconv --raw IN OUT (or dcmdjpeg of DCMTK), or "
        "let the archive export it as Explicit VR Little Endian",
        code="no-decoder",
    )


def _values(slice_: Dataset, name: str) -> Sequence[Any]:
    """A header's values as a list, whether it has one, several or none."""
    value = slice_.get(name)
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _mixed(path: Path, code: str, reason: str) -> SiteDataError:
    return SiteDataError(
        f"the slices of {path} do not belong to one stack: {reason}",
        "leave one stack of slices in the folder; localizers and other orientations go elsewhere",
        code=code,
    )


# ---------------------------------------------------------------------------------------- labels


def read_label(path: Path, data: Content, site: SiteConfig, series: Series) -> Array:
    """Label values (I, J, K) int16 on the series' own grid, 0 where nothing was drawn.

    Args:
        path: of a SEG or RTSTRUCT file, or of a folder that holds one.
        data: its content.
        site: says which segment has which value, and what happens where two meet.
        series: that the label was drawn on.

    Raises:
        SiteDataError: "not-dicom", "not-a-label", "several-labels", "fractional-seg",
            "other-series", "other-frame-of-reference", "label-of-other-slices", "other-grid",
            "unknown-segments", "segments-overlap", "open-outline", "outline-between-slices",
            "damaged-file".
    """
    name, content = _one_file(path, data)
    label = _parsed(name, content)
    kind = label.file_meta.get("MediaStorageSOPClassUID", "")
    if kind == RTStructureSetStorage:
        masks = _structures(name, label, site, series)
    elif kind in (SegmentationStorage, _LABEL_MAP_STORAGE):
        masks = _segments(name, label, site, series)
    else:
        raise SiteDataError(
            f"{name} is neither a segmentation (SEG) nor a structure set (RTSTRUCT) but "
            f"{UID(str(kind)).name or 'of no kind'}",
            "let the glob labels in site.yml match the SEG, RTSTRUCT or NIfTI files",
            code="not-a-label",
        )
    return _label_values(name, masks, site)


def _one_file(path: Path, data: Content) -> tuple[Path, bytes]:
    if isinstance(data, bytes):
        return path, data
    if len(data.files) != 1:
        raise SiteDataError(
            f"the label folder {path} holds {len(data.files)} files",
            "leave the one SEG or RTSTRUCT in it, or let labels in site.yml match the file",
            code="several-labels",
        )
    name, content = data.files[0]
    return path / name, content


@dataclass(slots=True, eq=False)
class _Drawn:
    """All that was drawn with one label value."""

    names: list[str]
    mask: Array  # (I, J, K) bool


def _value_of(number: int, name: str, site: SiteConfig) -> int | None:
    """The label value of a segment or structure; None where site.yml does not know it."""
    known = {value for values in site.classes.values() for value in values} | set(site.background)
    if site.label_names is None:
        return number if number in known else None
    values = {n.strip().casefold(): value for value, ns in site.label_names.items() for n in ns}
    return values.get(name.strip().casefold(), values.get("*"))


def _mapped(path: Path, segments: Mapping[int, str], site: SiteConfig, what: str) -> dict[int, int]:
    """Number -> label value of the segments that mean a class; those of the background are left."""
    values = {number: _value_of(number, name, site) for number, name in segments.items()}
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
        if value is not None and value not in site.background
    }


def _label_values(path: Path, masks: Mapping[int, _Drawn], site: SiteConfig) -> Array:
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
        if site.overlap == "refuse" and (met := np.unique(labels[drawn.mask])).any():
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


def _start(
    series: Series, values: Mapping[int, int], segments: Mapping[int, str]
) -> dict[int, _Drawn]:
    drawn: dict[int, _Drawn] = {}
    for number, value in values.items():
        if value not in drawn:
            drawn[value] = _Drawn([], np.zeros(series.values.shape, bool))
        drawn[value].names.append(repr(segments[number]))
    # a label in which nothing of any class was drawn is an empty one
    return drawn or {0: _Drawn([], np.zeros(series.values.shape, bool))}


def _require_same_series(
    path: Path, series: Series, series_uids: set[str], frame_uids: set[str], sop_uids: set[str]
) -> None:
    """What a label says that it was drawn on is this series, all of it; silence is accepted."""
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
    absent = sop_uids - series.sop_uids
    if absent:
        raise SiteDataError(
            f"{path} refers to {len(absent)} slices that are not in the folder of its series",
            "export the series again in full; slices are missing, perhaps at its end",
            code="label-of-other-slices",
        )


# -------------------------------------------------------------------------------- segmentations


def _segments(path: Path, label: Dataset, site: SiteConfig, series: Series) -> dict[int, _Drawn]:
    kind = str(label.get("SegmentationType", "BINARY"))
    if kind not in ("BINARY", "LABELMAP"):
        raise SiteDataError(
            f"{path} is a {kind} segmentation, which holds shares and no label values",
            "export it as BINARY or LABELMAP, with the threshold that it was drawn for",
            code="fractional-seg",
        )
    references = list(label.get("ReferencedSeriesSequence") or [])
    _require_same_series(
        path,
        series,
        {str(reference.SeriesInstanceUID) for reference in references},
        {str(label.FrameOfReferenceUID)} if "FrameOfReferenceUID" in label else set(),
        {
            str(image.ReferencedSOPInstanceUID)
            for reference in references
            if str(reference.SeriesInstanceUID) == series.series_uid
            for image in reference.get("ReferencedInstanceSequence") or []
        },
    )
    segments = {
        int(segment.SegmentNumber): str(segment.get("SegmentLabel") or "")
        for segment in label.SegmentSequence
    }
    if kind == "LABELMAP":
        segments.pop(0, None)  # is what was not drawn
    values = _mapped(path, segments, site, "segments")
    drawn = _start(series, values, segments)
    frames = _frames(path, label)
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
            if number in values:
                found = frame == number if kind == "LABELMAP" else frame != 0
                i, j, k = _on_grid(path, found, own, shared, series)
                drawn[values[number]].mask[i, j, k] = True
    return drawn


def _frames(path: Path, label: Dataset) -> Array:
    """(N, rows, columns) of a segmentation as stored."""
    syntax = UID(str(label.file_meta.get("TransferSyntaxUID", "")))
    if syntax.is_encapsulated:
        _require_decoder(path, syntax)
    try:
        with _no_warnings():
            frames = np.asarray(pixel_array(label))
    except Exception as error:  # a damaged file makes a decoder raise nearly anything
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
    to_voxels = np.linalg.inv(series.affine) @ _LPS_TO_RAS @ frame
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


def _other_slices(measures: Dataset, series: Series) -> bool:
    """Whether a segmentation says that its slices lie at another distance than the image's."""
    spacing = abs(float(measures.get("SpacingBetweenSlices") or 0))
    own = float(np.linalg.norm(series.affine[:3, 2]))
    return spacing > 0 and series.values.shape[2] > 1 and abs(spacing - own) > _UNEVEN * own


def _other_grid(path: Path) -> SiteDataError:
    return SiteDataError(
        f"the voxels of {path} are not those of its series: other sizes, places or directions",
        "export the segmentation on the image's own grid, without resampling or cropping beyond it",
        code="other-grid",
    )


# ------------------------------------------------------------------------------- structure sets


def _structures(path: Path, label: Dataset, site: SiteConfig, series: Series) -> dict[int, _Drawn]:
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
    values = _mapped(path, names, site, "structures")
    frames = {
        str(rois[number].ReferencedFrameOfReferenceUID)
        for number in values
        if "ReferencedFrameOfReferenceUID" in rois[number]
    }
    referenced = [
        image_series
        for frame in label.get("ReferencedFrameOfReferenceSequence") or []
        for study in frame.get("RTReferencedStudySequence") or []
        for image_series in study.get("RTReferencedSeriesSequence") or []
    ]
    images = {
        str(image.ReferencedSOPInstanceUID)
        for number in values
        for outline in outlines[number]
        for image in outline.get("ContourImageSequence") or []
    }
    for image_series in referenced:
        if str(image_series.SeriesInstanceUID) == series.series_uid:
            listed = image_series.get("ContourImageSequence") or []
            images |= {str(image.ReferencedSOPInstanceUID) for image in listed}
    uids = {str(image_series.SeriesInstanceUID) for image_series in referenced}
    _require_same_series(path, series, uids, frames, images)
    drawn = _start(series, values, names)
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
    voxels = lps @ (np.linalg.inv(series.affine) @ _LPS_TO_RAS).T
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
