"""One file's bytes to an array with geometry. Every way in which a file can be bad ends here.

All formats come out alike: slices first, rows from the top of the picture, columns from its left.
Volumes (NIfTI, DICOM) are reoriented to RAS and then turned as radiologists look at them: anterior
or superior at the top, the patient's right (sagittal: anterior) at the left of the picture
(data/grid.py). What only DICOM has stands in data/dicom.py: there an image is a folder.

NPY has no geometry and is taken as it is: (H, W) is a picture, (D, H, W) a volume of D slices; with
`channels: rgb` it is (H, W, 3) or (D, H, W, 3), a fourth channel (alpha) being dropped. What the
samples of PNG, JPEG and TIFF mean is decided in data/pictures.py.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError

from fedfms.contracts.site import Labels, Reading, SiteConfig
from fedfms.data.content import (
    EXTENSIONS,
    Content,
    cannot_read_here,
    damaged,
    is_nifti,
    wrong_magic,
)
from fedfms.data.grid import Array, Cut
from fedfms.data.pictures import Palette, image_values, in_channels, label_values, lossy
from fedfms.data.samples import read_picture, varies
from fedfms.errors import SiteDataError

if TYPE_CHECKING:
    from fedfms.data.dicom.series import Series


_LARGEST_BODY = 3000.0  # mm


@dataclass(frozen=True, slots=True)
class Notice:
    """What a person should know of a file that is read all the same; may name it."""

    code: str
    problem: str
    fix: str


@dataclass(frozen=True, slots=True)
class Stored:
    """A file's content.

    values: (D, H, W), or (D, H, W, 3) for an image with colours, (D, H, W, N) for N contrasts.
    spacing: millimetres between slices, rows and columns; 1 where the format has no geometry.
    cut: of a volume, how its voxels became slices; None where there is no geometry.
    series: of an image in DICOM, to which its label refers.
    unit: millimetres in one unit of length of a NIfTI file; `cut` and `spacing` are in mm.
    kind: in a few words what the file was, such as "PNG, gray, 8 bit" or "NIfTI-1, int16".
    notices: what is doubtful about the file though it was read.
    palette: of a label picture, the colours (red, green, blue, alpha) of its values from 0 on as
        far as the file names them.
    present: of contrasts, which of them there are; None where there are none.
    """

    values: Array
    spacing: tuple[float, float, float]
    is_volume: bool
    cut: Cut | None = None
    series: Series | None = None
    unit: float = 1.0
    kind: str = ""
    notices: tuple[Notice, ...] = ()
    palette: Palette | None = None
    present: tuple[bool, ...] | None = None


def read_image(path: Path, data: Content, site: Reading) -> Stored:
    """An image as float32, or uint8 as it is: (D, H, W), or (D, H, W, 3) with `channels: rgb`.

    Raises:
        SiteDataError: "damaged-file", "cannot-be-read-here", "non-finite", "constant-image" and
            what the format can do wrong (data/pictures.py, data/samples.py, data/dicom/series.py).
    """
    stored = _read(path, data, site)
    values = stored.values  # a large picture as floats would be most of the memory needed
    if values.dtype != np.uint8:
        values = _as_float32(path, values)
    values = np.ascontiguousarray(values)
    if values.size == 0:
        raise damaged(path, "it has no pixels")
    _require_finite(path, values)
    if values.min() == values.max():
        raise SiteDataError(
            f"{path} is constant: every value is {values.flat[0]:g}",
            "leave the case out, or replace the file with the real image",
            code="constant-image",
        )
    return dataclasses.replace(stored, values=values)


def read_label(path: Path, data: Content, site: SiteConfig, image: Stored | None = None) -> Stored:
    """A label as int16 (D, H, W), its values as stored; float files must hold whole numbers.

    Args:
        image: the label's image; a label in DICOM has its place and size from it, one in NIfTI
            its unit of length and the order of its axes, where its own header leaves them open.

    Raises:
        SiteDataError: "damaged-file", "cannot-be-read-here", "non-finite", "fractional-labels",
            "label-value-too-large", "coloured-labels", "lossy-labels", "label-in-alpha" and what
            the format can do wrong.
    """
    if path.suffix.lower() in (".jpg", ".jpeg"):
        raise lossy(path, "JPEG")
    stored = _read(path, data, site, site, image)
    values = stored.values
    if values.size == 0:
        raise damaged(path, "it has no pixels")
    _require_finite(path, values)
    if values.dtype.kind == "f" and not _is_whole(values):
        raise SiteDataError(
            f"{path} holds label values that are no whole numbers",
            "export the labels again without interpolation (nearest neighbour), or threshold them; "
            "if these are grey values, correct images and labels in site.yml",
            code="fractional-labels",
        )
    if values.min() < -32768 or values.max() > 32767:
        raise SiteDataError(
            f"{path} holds label value {max(values.min(), values.max(), key=abs):g}",
            "use label values of at most 32767",
            code="label-value-too-large",
        )
    if values.dtype.kind == "f":
        values = np.rint(values)
    return dataclasses.replace(stored, values=np.ascontiguousarray(values, dtype=np.int16))


def _as_float32(path: Path, values: Array) -> Array:
    """Values of an image in 32 bits, if that keeps their differences.

    Raises:
        SiteDataError: "non-finite", "cannot-be-read-here".
    """
    if values.dtype.itemsize < 4 or values.dtype == np.float32 or not values.size:
        return values.astype(np.float32, copy=False)
    _require_finite(path, values)
    low, high = float(values.min()), float(values.max())
    largest = max(abs(low), abs(high))
    if largest > float(np.finfo(np.float32).max) or 0 < high - low < largest * 2.0**-14:
        raise cannot_read_here(
            path,
            f"its values, {low:.10g} to {high:.10g}, need more digits than are kept",
            "subtract what all values have in common, or scale them, and save the file again",
        )
    return values.astype(np.float32)


def _read(
    path: Path,
    data: Content,
    site: Reading,
    meaning: Labels | None = None,
    image: Stored | None = None,
) -> Stored:
    """An image, or a label where the meaning of its values is given."""
    label = meaning is not None
    try:
        other = site.format == "dicom" and label and _is_of_a_picture(path, image)
        if site.format == "dicom" and not other and not (label and is_nifti(path)):
            return _read_dicom(path, data, site, meaning, image)
        assert isinstance(data, bytes)  # only DICOM has folders
        if other:
            return _read_picture(path, data, site, label=True)
        if site.format in ("nifti", "dicom"):
            return _read_nifti(path, data, site, label=label, image=image)
        if site.format == "npy":
            return _read_npy(path, data, site, label=label, image=image)
        return _read_picture(path, data, site, label=label)
    except SiteDataError:
        raise
    except MemoryError:
        raise cannot_read_here(
            path, "there is not enough memory for it", "use a machine with more memory"
        ) from None
    except (AttributeError, KeyError) as error:
        if site.format != "dicom":
            raise damaged(path, f"{type(error).__name__}: {error}") from None
        raise cannot_read_here(
            path,
            f"its header lacks something that is needed ({error})",
            "export it again from the program that made it",
        ) from None
    except HeaderDataError as error:
        raise cannot_read_here(path, str(error), "convert the file again from its source") from None
    except Exception as error:  # a damaged file makes a decoder raise nearly anything
        raise damaged(path, f"{type(error).__name__}: {error}") from None


# ------------------------------------------------------------------------------------------ NIfTI


def _require_grey_channels(site: Reading, what: str) -> None:
    if site.channels == "rgb":
        raise SiteDataError(
            f"site.yml says channels: rgb, but {what} have one grey channel",
            "use channels: gray or channels: neighbours",
            code="rgb-of-a-volume",
        )


def _read_nifti(
    path: Path, data: bytes, site: Reading, *, label: bool, image: Stored | None
) -> Stored:
    _require_grey_channels(site, "NIfTI volumes")
    volume = nifti_image(path, data)
    header = volume.header
    dtype = volume.get_data_dtype()
    if dtype.fields is not None or dtype.kind == "c":
        raise SiteDataError(
            f"{path} holds colours or complex numbers",
            "save the volume with one real number for each voxel",
            code="not-one-number-a-voxel",
        )
    values = np.asanyarray(volume.dataobj)  # scl_slope and scl_inter applied
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim > 3 or values.ndim < 2:
        raise SiteDataError(
            f"{path} has {values.ndim} dimensions: {_times(values.shape)}",
            "save one 3-D volume for each file (one time point, one modality)",
            code="not-3d",
        )
    if values.ndim == 2:
        values = values[..., None]
    unit = _millimetres(header)
    if unit is None:  # a label that does not say lies on its image's grid
        unit = image.unit if image is not None else 1.0
    affine = np.diag([unit, unit, unit, 1.0]) @ np.asarray(volume.affine, np.float64)
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not sizes.all() or _is_flat(affine[:3, :3] / sizes):
        raise SiteDataError(
            f"{path} has no usable position in space: its affine cannot be inverted",
            "convert the file again from its source; voxel sizes must be larger than 0",
            code="bad-geometry",
        )
    if label and values.dtype.kind == "f":
        _require_whole_numbers(path, values, volume.dataobj)
    if not label:  # labels stay exact, in the type that they have
        values = _as_float32(path, values)
    notices = () if label else _notices(path, header, affine)
    cut = None
    if image is not None and image.cut is not None:
        cut = Cut.onto(affine, values.shape, image.cut)
    stored = _volume(values, cut or Cut.of(affine, values.shape, site.plane))
    name = f"NIfTI-{2 if isinstance(volume, nibabel.Nifti2Image) else 1}, {dtype.name}"
    return dataclasses.replace(stored, unit=unit, kind=name, notices=notices)


def _millimetres(header: Any) -> float | None:
    """What one unit of length of a NIfTI file is; None where the header does not say."""
    return {1: 1000.0, 2: 1.0, 3: 0.001}.get(int(header["xyzt_units"]) & 7)


def _is_flat(directions: Array) -> bool:
    """Whether three directions of length 1 lie in a plane, as far as numbers can tell."""
    return bool(abs(np.linalg.det(directions)) < 1e-6)


def _notices(path: Path, header: Any, affine: Array) -> tuple[Notice, ...]:
    notices = []
    if int(header["qform_code"]) == 0 and int(header["sform_code"]) == 0:
        axes = "".join(nibabel.aff2axcodes(affine))
        notices.append(
            Notice(
                "no-orientation",
                f"{path} does not say how it lies (qform and sform codes are 0); read as {axes}",
                "compare a slice with the patient; if it is turned or mirrored, convert the file "
                "again from its source (dcm2niix writes the codes)",
            )
        )
    elif int(header["qform_code"]) > 0 and int(header["sform_code"]) > 0:
        by_qform = nibabel.aff2axcodes(header.get_qform())
        by_sform = nibabel.aff2axcodes(header.get_sform())
        if by_qform != by_sform:
            notices.append(
                Notice(
                    "two-orientations",
                    f"{path} lies as {''.join(by_sform)} by its sform and as {''.join(by_qform)} "
                    f"by its qform; read as {''.join(by_sform)}",
                    "compare a slice with the patient: programs differ in which of the two they "
                    "go by; convert the file again from its source",
                )
            )
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    extent = (sizes * header.get_data_shape()[:3]).max() if header.get_data_shape()[2:] else 0
    if sizes.max() > 100 or sizes.min() < 1e-5 or extent > _LARGEST_BODY:
        notices.append(
            Notice(
                "odd-voxel-size",
                f"{path} has voxels of {sizes[0]:.3g} x {sizes[1]:.3g} x {sizes[2]:.3g} mm by its "
                f"header{f', {extent / 1000:.3g} m in all' if extent > _LARGEST_BODY else ''}",
                "correct the voxel size (pixdim) or the unit of length (xyzt_units) in the header; "
                "volumes and distances follow from it",
            )
        )
    return tuple(notices)


def _require_whole_numbers(path: Path, values: Array, stored: Any) -> None:
    """Labels that a header scales to fractions are refused with their cause."""
    slope = float(stored.slope)
    is_scaled = (slope, float(stored.inter)) != (1.0, 0.0)
    if is_scaled and np.isfinite(values).all() and not _is_whole(values):
        raise SiteDataError(
            f"{path} holds label values that are no whole numbers, because its header multiplies "
            f"the stored numbers by {slope:.6g} (scl_slope)",
            "save the labels with a whole-number type and no scaling; in nibabel make the array "
            "whole numbers first, such as labels.round().astype('uint8'), and give it no header "
            "of another type",
            code="fractional-labels",
        )


def _is_whole(values: Array) -> bool:
    """Whether all are whole numbers, but for what 32 bits of a number or of a slope round off."""
    return all(  # slice by slice: a large volume several times over would be the most memory needed
        bool((np.abs(part - np.rint(part)) <= 2**-22 * np.maximum(1, np.abs(part))).all())
        for part in values
    )


def nifti_image(path: Path, data: bytes) -> Any:
    """nibabel's image of a NIfTI-1 or NIfTI-2 file's bytes, gzip or not.

    Raises:
        SiteDataError: "damaged-file", "wrong-magic", "cannot-be-read-here".
    """
    if path.name.lower().endswith(".gz"):
        try:
            data = gzip.decompress(data)  # to its end: the checksum is there
        except (EOFError, OSError, zlib.error) as error:
            raise damaged(path, str(error)) from None
    if data[344:348] == b"n+1\0":
        image, least = nibabel.Nifti1Image.from_bytes(data), 352
    elif data[4:8] == b"n+2\0":
        image, least = nibabel.Nifti2Image.from_bytes(data), 544
    else:
        raise wrong_magic(path, data)
    start = image.dataobj.offset
    if start < least:  # nibabel takes 0 at its word, and the header for voxels
        raise cannot_read_here(
            path,
            f"its voxels begin at byte {start} (vox_offset), within the header",
            "convert the file again from its source",
        )
    return image


def _volume(voxels: Array, cut: Cut, series: Series | None = None) -> Stored:
    return Stored(cut.slices(voxels), cut.spacing, True, cut, series)


# ------------------------------------------------------------------------------------------ DICOM


def _is_of_a_picture(path: Path, image: Stored | None) -> bool:
    """Whether a label is a PNG or TIFF of a picture in DICOM.

    Raises:
        SiteDataError: "not-a-label"; it is NIfTI, whose voxels lie somewhere.
    """
    if image is None or image.series is None or image.series.has_place:
        return False
    if is_nifti(path):
        raise SiteDataError(
            f"{path} is NIfTI, whose voxels have a place, and its image is a picture without one",
            "save the label as PNG, or as a DICOM segmentation (SEG) of the picture",
            code="not-a-label",
        )
    return path.name.lower().endswith(EXTENSIONS["image"])


def _read_dicom(
    path: Path, data: Content, site: Reading, meaning: Labels | None, image: Stored | None
) -> Stored:
    """An image, or the label of the image `image`."""
    from fedfms.data.dicom.images import read_series  # pydicom takes a second to import
    from fedfms.data.dicom.labels import read_label

    if meaning is not None and image is not None:
        assert image.series is not None and image.cut is not None  # from this function
        values, kind = read_label(path, data, meaning, image.series)
        return dataclasses.replace(_volume(values, image.cut), is_volume=image.is_volume, kind=kind)
    series = read_series(path, data, site)
    if series.has_place:
        _require_grey_channels(site, "series of DICOM slices")
        cut = Cut.of(series.affine, series.values.shape, site.plane)
        return dataclasses.replace(_volume(series.values, cut, series), kind=series.kind)
    cut = Cut.of_picture(series.affine, series.values.shape)
    values = cut.slices(series.values)
    if series.colours is not None:
        values = in_channels(series.colours, colours=site.channels == "rgb")[None]
    elif site.channels == "rgb":
        values = np.repeat(values[..., None], 3, axis=3)
    return Stored(values, cut.spacing, False, cut, series, kind=series.kind)


# -------------------------------------------------------------------------------------------- NPY


def _read_npy(
    path: Path, data: bytes, site: Reading, *, label: bool, image: Stored | None
) -> Stored:
    try:
        stream = io.BytesIO(data)
        values = np.load(stream, allow_pickle=False)
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise _no_plain_numbers(path, "Python objects") from None
    if values.dtype.kind not in "biuf":
        raise _no_plain_numbers(path, str(values.dtype))
    if stream.read(1):
        raise cannot_read_here(
            path, "behind its array stands something else", "save one array in each file"
        )
    colours = site.channels == "rgb" and not label
    wanted = "(H, W, 3) or (D, H, W, 3)" if colours else "(H, W) or (D, H, W)"
    depth = values.ndim - 1 if colours else values.ndim
    if depth not in (2, 3) or (colours and values.shape[-1] not in (3, 4)):
        raise _wrong_shape(path, values, f"save {wanted}, as channels: {site.channels} asks for")
    if not colours and depth == 3 and values.shape[2] <= 4 and min(values.shape[:2]) > 4 * 4:
        # a picture with channels; nobody's volume has slices that are so narrow
        if values.shape[2] >= 3 and not label:
            fix = "write channels: rgb in site.yml; its last axis looks like colours"
        else:
            fix = f"save {wanted}; its last axis looks like channels"
        raise _wrong_shape(path, values, fix)
    if label and image is not None and depth == 2:
        slices, *size = image.values.shape
        if slices in (3, 4) and tuple(size) == values.shape:
            raise SiteDataError(
                f"{path} is one picture, but its image has {slices} of that size",
                "if they are colours, put them last, (H, W, 3), and write channels: rgb in "
                "site.yml; if they are slices, save a label for each",
                code="wrong-array-shape",
            )
    notices: tuple[Notice, ...] = ()
    if colours:
        if varies(values[..., 3:] if values.shape[-1] == 4 else None):
            notices = (_transparent_in_places(path),)
        values = values[..., :3]
    kind = f"NPY, {values.dtype.name}"
    values = values if depth == 3 else values[None]
    return Stored(values, (1.0, 1.0, 1.0), depth == 3, kind=kind, notices=notices)


def _no_plain_numbers(path: Path, what: str) -> SiteDataError:
    return SiteDataError(
        f"{path} holds {what}, not plain numbers",
        "save an array of bool, integers or floats",
        code="not-one-number-a-voxel",
    )


def _wrong_shape(path: Path, values: Array, fix: str) -> SiteDataError:
    return SiteDataError(f"{path} has the shape {values.shape}", fix, code="wrong-array-shape")


# --------------------------------------------------------------------------------------- pictures


def _read_picture(path: Path, data: bytes, site: Reading, *, label: bool) -> Stored:
    picture = read_picture(path, data)
    palette, notices = None, []
    if label:
        values = label_values(path, picture)
        # a gray label is compared with palettes as one in which 0 is black
        colours = [(0, 0, 0, 255)] if picture.palette is None else picture.palette.tolist()
        palette = tuple(map(tuple, colours))
    else:
        values = image_values(path, picture, colours=site.channels == "rgb")
        if varies(picture.alpha):
            notices.append(_transparent_in_places(path))
    return Stored(
        values[None],
        (1.0, 1.0, 1.0),
        False,
        kind=picture.kind,
        notices=tuple(notices),
        palette=palette,
    )


def _transparent_in_places(path: Path) -> Notice:
    """What to say of an image whose alpha is not the same everywhere."""
    return Notice(
        "alpha-not-constant",
        f"{path} is transparent in places; its colours were read as if it were not",
        "if the transparency hides something, flatten the picture in the program that made it",
    )


# ----------------------------------------------------------------------------------------- errors


def _require_finite(path: Path, values: Array) -> None:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        count = int(values.size - np.isfinite(values).sum())
        raise SiteDataError(
            f"{path} holds {count} values that are NaN or infinite",
            "replace them, usually with 0 outside the body, and save the file again",
            code="non-finite",
        )


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)
