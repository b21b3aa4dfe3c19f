"""DICOM slices to a volume.

Slices lie where ImagePositionPatient says, never where their names or numbers do. What cannot be
put on one even grid without inventing values is refused by name. Patient axes of DICOM (LPS) become
those of NIfTI (RAS) by turning the signs of x and y.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom.config
from pydicom import Dataset, dcmread
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_modality_lut
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID

from fedfms.contracts.site import Reading
from fedfms.data.content import (
    Content,
    cannot_read_here,
    damaged,
    files_in,
    opened,
    unreadable_file,
)
from fedfms.data.grid import Array
from fedfms.errors import SiteDataError

# pydicom's warnings about odd values quote them, a patient's name too, and logs can leave the site
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

# Modality of objects that lie beside images and are none
_NO_IMAGES = frozenset(
    ("SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "RTRECORD", "PR", "SR", "KO", "REG", "DOC", "FID")
)
# Kinds of objects (SOP classes) that hold images, though their names do not say so
_IMAGES_TOO = frozenset(
    (
        *("ParametricMapStorage", "OphthalmicThicknessMapStorage", "CornealTopographyMapStorage"),
        "EnhancedUSVolumeStorage",
    )
)
# Modality of slices through a patient, which are nothing without their places
_OF_SLICES = frozenset(("CT", "MR", "PT", "NM"))
# Of these the values are measures whatever they are shown as
_IN_UNITS = frozenset(("CT", "PT", "NM"))
_FEW_TAGS = ["PatientID", "Modality", "NumberOfFrames", "ImagePositionPatient"]
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_NEEDED = ("Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation")
_EXPORT_AGAIN = "export the series again from the archive, or convert it to NIfTI with dcm2niix"
# How far a series may be from one even, straight grid; headers round to 0.001 or 0.01 mm.
_COSINES = 1e-3  # difference of a direction cosine
UNEVEN = 0.1  # of the distance between slices, from where a slice should lie
_DRIFT = 0.25  # of a pixel, sideways, over the whole stack
_SAME_PLACE = 0.1  # of the usual distance between slices


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """One series of DICOM slices as a volume.

    values: (I, J, K) float32 after RescaleSlope and RescaleIntercept of each slice; I columns, J
        rows, K slices in the direction of the normal.
    affine: (4, 4) float64, voxel index (i, j, k) to RAS millimetres.
    headers: of the K slices, without pixels, in the order of the slices; frames of one file have
        its SOPInstanceUID.
    colours: (J, I, 3) of a picture in colours, of which `values` are the first.
    has_place: False for a picture, which lies nowhere in a patient: K is 1, and the affine says no
        more than the shape of its pixels.
    """

    values: Array
    affine: Array
    headers: tuple[Dataset, ...]
    colours: Array | None = None
    has_place: bool = True

    @property
    def kind(self) -> str:
        """In a few words what the files are, such as "DICOM CT, JPEG Lossless"."""
        syntax = UID(str(self.headers[0].file_meta.get("TransferSyntaxUID", "")))
        compression = "uncompressed"
        if syntax.is_transfer_syntax and syntax.is_compressed:
            compression = syntax.name.split(",")[0].split(" (")[0].replace(" Image Compression", "")
        return f"DICOM {self.headers[0].get('Modality') or 'image'}, {compression}"

    @property
    def series_uid(self) -> str:
        """SeriesInstanceUID; empty where the images have none."""
        return str(self.headers[0].get("SeriesInstanceUID", ""))

    @property
    def frame_of_reference_uid(self) -> str:
        """FrameOfReferenceUID; empty where the images have none."""
        return str(self.headers[0].get("FrameOfReferenceUID", ""))

    @property
    def sop_uids(self) -> frozenset[str]:
        """SOPInstanceUID of all slices."""
        return frozenset(str(header.get("SOPInstanceUID", "")) for header in self.headers)


def read_stack(path: Path, slices: Sequence[tuple[str, Dataset]]) -> Series:
    """Slices of one series, a file each, as a volume.

    Args:
        path: of the folder that they lie in.
        slices: names of the files in it, and what they hold; the pixels are taken out.

    Raises:
        SiteDataError: "multi-frame", "colour-dicom", "monochrome1", "localizer", "no-position",
            "several-pictures", "mixed-orientations", "mixed-grids", "duplicate-slices",
            "missing-slices", "uneven-spacing", "gantry-tilt", "no-decoder", "damaged-file".
    """
    for name, slice_ in slices:
        _require_plain_slice(path / name, slice_)
    ordered, affine = stacked(path, slices)
    require_one_scale(path, ordered)
    names = {id(slice_): name for name, slice_ in slices}
    planes = []
    for slice_ in ordered:
        planes.append(plane_of(path / names[id(slice_)], slice_).T)  # (I, J)
        del slice_.PixelData
    return Series(np.stack(planes, axis=2), affine, tuple(ordered))


def is_enhanced(image: Dataset) -> bool:
    """Whether a file holds slices as frames, each with what it says of itself."""
    return "PerFrameFunctionalGroupsSequence" in image


def is_picture(image: Dataset) -> bool:
    """Whether an image lies nowhere in a patient: X-ray, mammography, ultrasound, photographs.

    Slices (CT, MR, PET) that lost their places are none, so that they are not taken for such.
    """
    has_place = bool(_values(image, "ImagePositionPatient")) or is_enhanced(image)
    return not has_place and str(image.get("Modality", "")) not in _OF_SLICES


def stands_alone(header: Dataset) -> bool:
    """Whether a file is an image by itself, by its header: a picture, or many frames."""
    return has_many_frames(header) or is_picture(header)


def has_many_frames(header: Dataset) -> bool:
    """Whether a file holds more than one frame, by its header."""
    try:
        return int(header.get("NumberOfFrames") or 1) > 1
    except (ValueError, TypeError):
        return False


def images_alone(path: Path) -> list[Path]:
    """The image files of a folder where each is an image by itself, or a file that is; else none.

    Files that cannot be read say nothing here.
    """
    found = [(file, header) for file, header in _headers(path) if header is not None]
    return [file for file, _ in found] if all(stands_alone(one) for _, one in found) else []


def patient_of(path: Path) -> str | None:
    """PatientID of a folder's images, or of a file; None where it is empty or cannot be read.

    Reads the first readable header in the order of the names. The files of one series have one
    patient; whatever else is wrong with the folder, its reader says.
    """
    for _, slice_ in _headers(path):
        if slice_ is not None:
            return str(slice_.get("PatientID") or "").strip() or None
    return None


def holds_images(path: Path) -> bool:
    """Whether a folder directly holds a DICOM file that is an image, or that cannot be read.

    What is wrong with the latter its reader says.
    """
    return any(True for _ in _headers(path))


def _headers(path: Path) -> Iterator[tuple[Path, Dataset | None]]:
    """A file, or the images in a folder, with their headers as far as the little goes that is read.

    None stands for a file that cannot be read.
    """
    try:
        entries = files_in(path) if path.is_dir() else [path]
    except SiteDataError:
        return
    for entry in entries:
        try:
            header = read_header(entry, _FEW_TAGS)
        except SiteDataError:
            yield entry, None
        else:
            if header is not None and (entry == path or not is_beside_images(header)):
                yield entry, header


def read_header(path: Path, tags: list[str]) -> Dataset | None:
    """These tags of a file; None where it is no DICOM.

    Raises:
        SiteDataError: "unreadable-file", "damaged-file".
    """
    try:
        with opened(path) as file, no_warnings():
            if file.read(132)[128:] != b"DICM":
                return None
            file.seek(0)
            return dcmread(file, stop_before_pixels=True, specific_tags=tags)
    except OSError as error:
        raise unreadable_file(path, error) from None
    except SiteDataError:
        raise
    except Exception as error:  # a damaged header makes pydicom raise nearly anything
        raise damaged(path, type(error).__name__) from None


def images_in(path: Path, content: Content, site: Reading) -> list[tuple[str, Dataset]]:
    """The image files of the one series of a folder with their names, or the one file.

    Raises:
        SiteDataError: "not-dicom", "no-dicom-images", "several-series", "no-such-series",
            "damaged-file", "cannot-be-read-here".
    """
    beside: set[str] = set()
    if isinstance(content, bytes):
        images = list(_images(path.parent, [(path.name, content)], beside))
    else:
        images = list(_images(path, content.files, beside))
    if not images:
        kinds = ", ".join(sorted(beside)) or "other objects"
        raise SiteDataError(
            f"{path} holds no DICOM image, only: {kinds}",
            "let the glob images in site.yml match the images or their folders",
            code="no-dicom-images",
        )
    return _one_series(path, images, site)


def _images(
    folder: Path, files: Sequence[tuple[str, bytes]], beside: set[str]
) -> Iterator[tuple[str, Dataset]]:
    """The image files with their names; what lies beside images is passed over, and named there."""
    for name, data in files:
        parsed = parsed_dicom(folder / name, data)
        if is_beside_images(parsed):
            beside.add(_kind_of(parsed))
            continue
        if "PixelData" not in parsed:
            if "BitsAllocated" not in parsed:  # comes before the pixels: the file ends too early
                raise damaged(folder / name, "it has no pixels")
            raise cannot_read_here(
                folder / name,
                "it has no PixelData"
                + (
                    " of whole numbers, only of floats"
                    if "FloatPixelData" in parsed or "DoubleFloatPixelData" in parsed
                    else ""
                ),
                _EXPORT_AGAIN,
            )
        yield name, parsed


def parsed_dicom(path: Path, data: bytes) -> Dataset:
    """One file, pixels and all.

    Raises:
        SiteDataError: "not-dicom", "damaged-file".
    """
    if data[128:132] != b"DICM":
        raise SiteDataError(
            f"{path} is no DICOM file: the letters DICM are not at byte 128",
            "move other files out of the folder; write format: image in site.yml if images are "
            "pictures; export the series again if this should be one",
            code="not-dicom",
        )
    try:
        with no_warnings():
            return dcmread(io.BytesIO(data))
    except Exception as error:  # a damaged file makes pydicom raise nearly anything
        raise damaged(path, type(error).__name__) from None


def is_beside_images(parsed: Dataset) -> bool:
    """Whether a DICOM object is none of a series' images but something that lies beside them."""
    keyword = UID(str(parsed.file_meta.get("MediaStorageSOPClassUID", ""))).keyword
    is_of_images = not keyword or "Image" in keyword or keyword in _IMAGES_TOO
    return not is_of_images or str(parsed.get("Modality", "")) in _NO_IMAGES


def _kind_of(parsed: Dataset) -> str:
    """What an object is, in the words of the standard: Segmentation, Color Palette."""
    kind = UID(str(parsed.file_meta.get("MediaStorageSOPClassUID", "")))
    name = kind.name.removesuffix(" Storage") if kind.keyword else ""
    return name or str(parsed.get("Modality") or "an object of no known kind")


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """For what `IGNORE` above leaves, such as unknown character sets."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _one_series(
    path: Path, images: list[tuple[str, Dataset]], site: Reading
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


def require_grey(path: Path, image: Dataset) -> None:
    """Grey pixels of a form that is read here, one frame or many; or refused by name."""
    require_whole_numbers(path, image)
    photometric = str(image.get("PhotometricInterpretation", ""))
    if photometric == "MONOCHROME1" and (
        str(image.get("Modality", "")) in _IN_UNITS or image.get("RescaleType") == "HU"
    ):
        raise SiteDataError(
            f"{path} is {image.get('Modality') or 'an image in HU'} in MONOCHROME1, where small "
            "values are shown white",
            "export the series as MONOCHROME2; whether its values were turned is then no guess",
            code="monochrome1",
        )
    one_sample = (image.get("SamplesPerPixel") or 1) == 1
    if photometric not in ("MONOCHROME1", "MONOCHROME2") or not one_sample:
        raise SiteDataError(
            f"{path} holds colours ({photometric or 'no PhotometricInterpretation'})",
            "leave out screenshots and reports; export colour pictures as PNG for format: image",
            code="colour-dicom",
        )
    image.SamplesPerPixel = 1  # also where the header forgets it


def require_whole_numbers(path: Path, image: Dataset) -> None:
    """What the header says of stored numbers is there and can be read; or refused by name.

    Raises:
        SiteDataError: "cannot-be-read-here".
    """
    lacking = [name for name in _NEEDED if image.get(name) is None]
    if lacking:
        raise cannot_read_here(
            path,
            f"its header lacks {', '.join(lacking)}, which say what its pixels are",
            _EXPORT_AGAIN,
        )
    if int(image.BitsAllocated) not in (1, 8, 16, 32):
        raise cannot_read_here(
            path, f"its pixels have {image.BitsAllocated} bits (BitsAllocated)", _EXPORT_AGAIN
        )
    bits, high = int(image.BitsStored), image.get("HighBit")
    if high is not None and int(high) != bits - 1:
        raise cannot_read_here(
            path,
            f"its {bits} bits end at bit {high} (HighBit), not at bit {bits - 1}",
            _EXPORT_AGAIN,
        )


def _require_plain_slice(path: Path, slice_: Dataset) -> None:
    """One grey slice with a position; anything else is refused by its name."""
    require_whole_numbers(path, slice_)  # what says more than that it has frames or colours
    if has_many_frames(slice_) and not is_picture(slice_):
        require_frames_with_places(path, slice_)
        raise SiteDataError(
            f"{path} is a multi-frame image with {slice_.NumberOfFrames} frames among others",
            "put each multi-frame file into a folder of its own, or let images in site.yml match "
            "the files",
            code="multi-frame",
        )
    require_grey(path, slice_)
    if any(str(value).upper() == "LOCALIZER" for value in _values(slice_, "ImageType")):
        raise SiteDataError(
            f"{path} is a localizer (scout)",
            "take the localizers out of the folder; they lie across the slices",
            code="localizer",
        )
    if is_picture(slice_):
        raise SiteDataError(
            f"{path} is one of several pictures in its folder ({slice_.get('Modality')})",
            "let images in site.yml match the files, such as */*.dcm; each is an image by itself",
            code="several-pictures",
        )
    require_place(path, slice_)


def require_frames_with_places(path: Path, image: Dataset) -> None:
    """Frames of CT, MR, PET say each where it lies; or they are refused by name."""
    if not is_enhanced(image):
        raise SiteDataError(
            f"{path} is a multi-frame image whose {image.NumberOfFrames} frames do not say where "
            "they lie (PerFrameFunctionalGroupsSequence)",
            "export the series again with the places of its slices: as single-frame images, or as "
            "enhanced ones",
            code="multi-frame",
        )


def require_place(path: Path, slice_: Dataset) -> None:
    """A slice says where it lies and what its numbers mean; or it is refused by name."""
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
            "export the series again with the places of its slices, or use another one",
            code="no-position",
        )
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        _require_numbers(path, slice_, name)
    require_scale(path, slice_)


def require_scale(path: Path, image: Dataset) -> None:
    """Slope and intercept are one number each, or not there; or they are refused by name.

    Raises:
        SiteDataError: "cannot-be-read-here".
    """
    for name in ("RescaleSlope", "RescaleIntercept"):
        if not _values(image, name):
            image.pop(name, None)  # there and empty, as not there
            continue
        _require_numbers(path, image, name)
        if len(_values(image, name)) > 1 or (name == "RescaleSlope" and not image[name].value):
            raise cannot_read_here(
                path,
                f"its {name} is {image[name].value}, where one number should be",
                _EXPORT_AGAIN,
            )


def _require_numbers(path: Path, slice_: Dataset, name: str) -> None:
    """Refuse a value that is no number, such as 0,5 of a program that writes commas."""
    try:
        if np.isfinite([float(value) for value in _values(slice_, name)]).all():
            return
        reason = "is not finite"
    except (ValueError, TypeError):
        reason = "is no number"
    raise cannot_read_here(path, f"its {name} {reason}", _EXPORT_AGAIN)


def stacked(path: Path, named: Sequence[tuple[str, Dataset]]) -> tuple[list[Dataset], Array]:
    """The slices in the order of the normal, and the RAS affine of (column, row, slice)."""
    slices = [slice_ for _, slice_ in named]
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
        names = [named[number][0] for number in order]
        _require_even(path, ordered, names, positions, normal, min(row_spacing, column_spacing))
        step = (positions[-1] - positions[0]) / (len(slices) - 1)
    affine = np.eye(4)
    affine[:3, 0] = along_row * column_spacing
    affine[:3, 1] = along_column * row_spacing
    affine[:3, 2] = step
    affine[:3, 3] = positions[0]
    return ordered, LPS_TO_RAS @ affine


def _require_even(
    path: Path,
    ordered: list[Dataset],
    names: list[str],
    positions: Array,
    normal: Array,
    pixel: float,
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
            f"{path} has several slices in one place, for example {names[at]} and {names[at + 1]} "
            f"(InstanceNumber {numbers})",
            "leave one image for each place: remove copies, and put echoes, time points, phases "
            "and b-values into folders of their own",
            code="duplicate-slices",
        )
    times = np.rint(gaps / usual)
    if times.max() > 1 and np.abs(gaps / usual - times).max() <= UNEVEN:
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
    if np.abs(along - mean * np.arange(len(along))).max() > UNEVEN * mean:
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
        with contextlib.suppress(ValueError, TypeError):  # a word, or several numbers
            value = abs(float(slice_.get(name) or 0))
            if 0 < value < np.inf:
                return value
    return 1.0


def plane_of(path: Path, slice_: Dataset) -> Array:
    """(J, I) float32 of one slice, its own slope and intercept applied."""
    stored = stored_numbers(path, slice_)
    if stored.ndim != 2:
        raise damaged(path, f"it has {stored.ndim} dimensions")
    return measured(path, stored, slice_)


def stored_numbers(path: Path, image: Dataset) -> Array:
    """(J, I), (frames, J, I) or (J, I, 3) whole numbers as stored, YBR made RGB.

    Raises:
        SiteDataError: "no-decoder", "damaged-file", "cannot-be-read-here".
    """
    syntax = known_syntax(path, image)
    compressed = syntax.is_encapsulated
    if compressed:
        require_decoder(path, syntax)
    else:
        _require_no_more_pixels(path, image)
    try:
        with no_warnings():
            # the dataset's own attribute would keep a copy
            return only_stored_bits(np.asarray(pixel_array(image)), int(image.BitsStored))
    except Exception as error:  # a damaged file makes a decoder raise nearly anything
        if not compressed:
            raise damaged(path, f"{type(error).__name__}: {error}") from None
        raise undecodable(path, syntax, error) from None


def measured(path: Path, stored: Array, header: Dataset) -> Array:
    """Stored grey numbers to float32, slope and intercept applied, and white always the largest.

    MONOCHROME1 shows small values white: a value is then taken from the sum of the smallest and the
    largest that could be stored, so that the picture is that of its MONOCHROME2 twin.
    """
    if "RescaleSlope" in header and "RescaleIntercept" not in header:
        header.RescaleIntercept = 0  # else pydicom applies neither
    elif "RescaleIntercept" in header and "RescaleSlope" not in header:
        header.RescaleSlope = 1
    is_turned = header.PhotometricInterpretation == "MONOCHROME1"
    try:
        with no_warnings():
            values = np.asarray(apply_modality_lut(stored, header))
            if is_turned:
                bits, is_signed = int(header.BitsStored), bool(header.PixelRepresentation)
                least = -(2 ** (bits - 1)) if is_signed else 0
                ends = np.array([[least, least + 2**bits - 1]])
                values = float(np.asarray(apply_modality_lut(ends, header)).sum()) - values
    except Exception as error:  # a table that its header says wrongly
        raise damaged(path, f"{type(error).__name__}: {error}") from None
    return np.asarray(values, np.float32)


def require_one_scale(path: Path, slices: Sequence[Dataset]) -> None:
    """Refuse MONOCHROME1 with a scale for each slice: what would be turned about what?"""
    scales = {(str(s.get("RescaleSlope")), str(s.get("RescaleIntercept"))) for s in slices}
    shown = {str(s.PhotometricInterpretation) for s in slices}
    if "MONOCHROME1" in shown and len(scales) * len(shown) > 1:
        raise SiteDataError(
            f"slices of {path} are MONOCHROME1, where small values are shown white, and their "
            "scales (RescaleSlope, RescaleIntercept) or photometric interpretations differ",
            "export the series as MONOCHROME2; what its values mean is then no guess",
            code="monochrome1",
        )


def _require_no_more_pixels(path: Path, image: Dataset) -> None:
    """Refuse a header with too few rows or columns: with the latter a picture would be sheared."""
    rows, columns, bits = (int(image[name].value) for name in _NEEDED[:3])
    if str(image.get("PhotometricInterpretation", "")) == "YBR_FULL_422":
        return  # whose pixels share samples; pydicom asks for their number
    samples = int(image.get("SamplesPerPixel") or 1) * int(image.get("NumberOfFrames") or 1)
    pixels = len(image.PixelData) * 8 // bits // samples
    if pixels - rows * columns >= max(8, min(rows, columns)):  # less is padding
        raise cannot_read_here(
            path,
            f"it has {pixels} pixels, but {rows} x {columns} by its Rows and Columns",
            _EXPORT_AGAIN,
        )


def only_stored_bits(values: Array, bits: int) -> Array:
    """Whole numbers without what lies above their stored bits, such as an overlay, in place.

    pydicom does so for some transfer syntaxes and not for others.
    """
    above = 8 * values.dtype.itemsize - bits
    if above <= 0:
        return values
    if not values.flags.writeable:
        values = values.copy()
    np.left_shift(values, above, out=values)
    np.right_shift(values, above, out=values)  # keeps the sign
    return values


def known_syntax(path: Path, image: Dataset) -> UID:
    """How a file's pixels are stored (TransferSyntaxUID).

    Raises:
        SiteDataError: "no-decoder", "cannot-be-read-here".
    """
    syntax = UID(str(image.file_meta.get("TransferSyntaxUID", "")))
    if not syntax:
        raise cannot_read_here(
            path, "it does not say how its pixels are stored (TransferSyntaxUID)", _EXPORT_AGAIN
        )
    if not syntax.is_transfer_syntax or (syntax.is_private and not syntax.keyword):
        require_decoder(path, syntax)
    return syntax


def undecodable(path: Path, syntax: UID, error: Exception) -> SiteDataError:
    """The error for compressed pixels on which a decoder fails."""
    return SiteDataError(
        f"{path} cannot be decoded ({syntax.name}): {type(error).__name__}",
        "copy the file again; if that does not help, decompress the series, for example with: "
        "gdcmconv --raw IN OUT",
        code="no-decoder",
    )


def require_decoder(path: Path, syntax: UID) -> None:
    """Refuse a compression that cannot be undone here.

    Raises:
        SiteDataError: "no-decoder".
    """
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
