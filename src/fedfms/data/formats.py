"""One file's bytes to an array with geometry. Every way in which a file can be bad ends here.

All formats come out alike: slices first, rows from the top of the picture, columns from its left.
Volumes (NIfTI, DICOM) are reoriented to RAS and then turned as radiologists look at them: anterior
or superior at the top, the patient's right (sagittal: anterior) at the left of the picture
(data/grid.py). What only DICOM has stands in data/dicom.py: there an image is a folder.

NPY has no geometry and is taken as it is: (H, W) is a picture, (D, H, W) a volume of D slices; with
`channels: rgb` it is (H, W, 3) or (D, H, W, 3), a fourth channel (alpha) being dropped.
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
import tifffile
from PIL import Image, ImageFile

from fedfms.config import SiteConfig
from fedfms.data.content import Content, damaged, is_nifti, wrong_magic
from fedfms.data.grid import Array, Cut
from fedfms.errors import SiteDataError

if TYPE_CHECKING:
    from fedfms.data.dicom.series import Series

_ORIENTATION_TAG = 274  # of EXIF and TIFF
_GRAY_WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)  # luma of ITU-R BT.601, as Pillow's "L"


@dataclass(frozen=True, slots=True)
class Notice:
    """What a person should know of a file that is read all the same; may name it."""

    code: str
    problem: str
    fix: str


@dataclass(frozen=True, slots=True)
class Stored:
    """A file's content.

    values: (D, H, W), or (D, H, W, 3) for an image with colours.
    spacing: millimetres between slices, rows and columns; 1 where the format has no geometry.
    cut: of a volume, how its voxels became slices; None where there is no geometry.
    series: of an image in DICOM, to which its label refers.
    kind: in a few words what the file was, such as "PNG, gray, 8 bit" or "NIfTI-1, int16".
    notices: what is doubtful about the file though it was read.
    palette: of a label picture with a palette, its colours by label value.
    """

    values: Array
    spacing: tuple[float, float, float]
    is_volume: bool
    cut: Cut | None = None
    series: Series | None = None
    kind: str = ""
    notices: tuple[Notice, ...] = ()
    palette: tuple[tuple[int, int, int], ...] | None = None


def read_image(path: Path, data: Content, site: SiteConfig) -> Stored:
    """An image as float32: (D, H, W), or (D, H, W, 3) with `channels: rgb`.

    Raises:
        SiteDataError: "damaged-file", "non-finite", "constant-image" and what the format can do
            wrong.
    """
    stored = _read(path, data, site, label=False)
    values = np.ascontiguousarray(stored.values, dtype=np.float32)
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
        image: the label's image; a label in DICOM has its place and size from it.

    Raises:
        SiteDataError: "damaged-file", "non-finite", "fractional-labels", "label-value-too-large",
            "coloured-labels", "lossy-labels" and what the format can do wrong.
    """
    if path.suffix.lower() in (".jpg", ".jpeg"):
        raise SiteDataError(
            f"{path} is a label in JPEG, which does not keep label values",
            "export the labels as PNG or TIFF from the program in which they were drawn",
            code="lossy-labels",
        )
    stored = _read(path, data, site, label=True, image=image)
    values = stored.values
    if values.size == 0:
        raise damaged(path, "it has no pixels")
    _require_finite(path, values)
    if values.dtype.kind == "f" and not np.array_equal(values, np.rint(values)):
        raise SiteDataError(
            f"{path} holds label values that are no whole numbers",
            "export the labels again without interpolation (nearest neighbour), or threshold them",
            code="fractional-labels",
        )
    if values.min() < -32768 or values.max() > 32767:
        raise SiteDataError(
            f"{path} holds label value {max(values.min(), values.max(), key=abs):g}",
            "use label values of at most 32767",
            code="label-value-too-large",
        )
    return dataclasses.replace(stored, values=np.ascontiguousarray(values, dtype=np.int16))


def _read(
    path: Path, data: Content, site: SiteConfig, *, label: bool, image: Stored | None = None
) -> Stored:
    try:
        if site.format == "dicom" and not (label and is_nifti(path)):
            return _read_dicom(path, data, site, image if label else None)
        assert isinstance(data, bytes)  # only DICOM has folders
        if site.format in ("nifti", "dicom"):
            return _read_nifti(path, data, site, label=label)
        if site.format == "npy":
            return _read_npy(path, data, site, label=label)
        return _read_picture(path, data, site, label=label)
    except SiteDataError:
        raise
    except Exception as error:  # a damaged file makes a decoder raise nearly anything
        raise damaged(path, f"{type(error).__name__}: {error}") from None


# ------------------------------------------------------------------------------------------ NIfTI


def _require_grey_channels(site: SiteConfig, what: str) -> None:
    if site.channels == "rgb":
        raise SiteDataError(
            f"site.yml says channels: rgb, but {what} have one grey channel",
            "use channels: gray or channels: neighbours",
            code="rgb-of-a-volume",
        )


def _read_nifti(path: Path, data: bytes, site: SiteConfig, *, label: bool) -> Stored:
    _require_grey_channels(site, "NIfTI volumes")
    image = nifti_image(path, data)
    if image.get_data_dtype().fields is not None or image.get_data_dtype().kind == "c":
        raise SiteDataError(
            f"{path} holds colours or complex numbers",
            "save the volume with one real number for each voxel",
            code="not-one-number-a-voxel",
        )
    values = np.asanyarray(image.dataobj)  # scl_slope and scl_inter applied
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
    affine = np.asarray(image.affine, np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise SiteDataError(
            f"{path} has no usable position in space: its affine cannot be inverted",
            "convert the file again from its source; voxel sizes must be larger than 0",
            code="bad-geometry",
        )
    values = values.astype(np.float64 if label else np.float32, copy=False)  # labels stay exact
    return _volume(values, Cut.of(affine, values.shape, site.plane))


def nifti_image(path: Path, data: bytes) -> Any:
    """nibabel's image of a NIfTI-1 or NIfTI-2 file's bytes, gzip or not.

    Raises:
        SiteDataError: "damaged-file", "wrong-magic".
    """
    if path.name.lower().endswith(".gz"):
        try:
            data = gzip.decompress(data)  # to its end: the checksum is there
        except (EOFError, OSError, zlib.error) as error:
            raise damaged(path, str(error)) from None
    if data[344:348] == b"n+1\0":
        return nibabel.Nifti1Image.from_bytes(data)
    if data[4:8] == b"n+2\0":
        return nibabel.Nifti2Image.from_bytes(data)
    raise wrong_magic(path)


def _volume(voxels: Array, cut: Cut, series: Series | None = None) -> Stored:
    return Stored(cut.slices(voxels), cut.spacing, True, cut, series)


# ------------------------------------------------------------------------------------------ DICOM


def _read_dicom(path: Path, data: Content, site: SiteConfig, image: Stored | None) -> Stored:
    """A series, or the label of the series `image`."""
    _require_grey_channels(site, "series of DICOM slices")
    from fedfms.data.dicom.labels import read_label  # pydicom takes a second to import
    from fedfms.data.dicom.series import read_series

    if image is not None:
        assert image.series is not None and image.cut is not None  # from this function
        return _volume(read_label(path, data, site, image.series), image.cut)
    if isinstance(data, bytes):
        raise SiteDataError(
            f"{path} is a file, but an image in DICOM is a folder with the files of one series",
            "let the glob images in site.yml match folders, such as images/*",
            code="not-a-folder",
        )
    series = read_series(path, data, site)
    return _volume(series.values, Cut.of(series.affine, series.values.shape, site.plane), series)


# -------------------------------------------------------------------------------------------- NPY


def _read_npy(path: Path, data: bytes, site: SiteConfig, *, label: bool) -> Stored:
    values = np.load(io.BytesIO(data), allow_pickle=False)
    if values.dtype.kind not in "biuf":
        raise SiteDataError(
            f"{path} holds {values.dtype}, not plain numbers",
            "save an array of bool, integers or floats",
            code="not-one-number-a-voxel",
        )
    colours = site.channels == "rgb" and not label
    wanted = "(H, W, 3) or (D, H, W, 3)" if colours else "(H, W) or (D, H, W)"
    depth = values.ndim - 1 if colours else values.ndim
    if depth not in (2, 3) or (colours and values.shape[-1] not in (3, 4)):
        raise SiteDataError(
            f"{path} has the shape {values.shape}",
            f"save {wanted}, as channels: {site.channels} in site.yml asks for",
            code="wrong-array-shape",
        )
    if colours:
        values = values[..., :3]
    return Stored(values if depth == 3 else values[None], (1.0, 1.0, 1.0), depth == 3)


# --------------------------------------------------------------------------------------- pictures


def _read_picture(path: Path, data: bytes, site: SiteConfig, *, label: bool) -> Stored:
    suffix = path.suffix.lower()
    if suffix in (".tif", ".tiff"):
        values = _decode_tiff(path, data, label=label)
    else:
        values = _decode_with_pillow(path, data, "PNG" if suffix == ".png" else "JPEG", label=label)
    if values.ndim == 3 and values.shape[2] in (2, 4):
        values = values[..., :-1]  # alpha
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] != 3):
        raise damaged(path, f"it has the shape {_times(values.shape)}")
    if label:
        values = _one_channel(path, values)
    elif site.channels == "rgb":
        values = values if values.ndim == 3 else np.repeat(values[..., None], 3, axis=2)
    elif values.ndim == 3:
        values = values.astype(np.float32) @ _GRAY_WEIGHTS
    return Stored(values[None], (1.0, 1.0, 1.0), False)


def _one_channel(path: Path, values: Array) -> Array:
    if values.ndim == 2:
        return values
    if (values == values[..., :1]).all():
        return values[..., 0]
    raise _coloured(path)


def _decode_with_pillow(path: Path, data: bytes, kind: str, *, label: bool) -> Array:
    with Image.open(io.BytesIO(data), formats=[kind]) as image:
        raw_mode = _raw_mode(image)
        _require_upright(path, image.getexif().get(_ORIENTATION_TAG, 1))
        image.load()
        if image.mode == "P" and not label:
            return np.asarray(image.convert("RGB"))
        if image.mode in ("CMYK", "YCbCr", "HSV", "LAB", "PA"):
            return np.asarray(image.convert("RGB"))
        values = np.asarray(image)
    if label and raw_mode in ("L;2", "L;4"):
        return values // (85 if raw_mode == "L;2" else 17)  # Pillow stretches them to 0..255
    if raw_mode in ("RGB;16B", "RGBA;16B", "LA;16B"):  # Pillow keeps the high byte of these
        if label:
            raise _coloured(path)
        return values.astype(np.uint16) * 257
    return values


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """Pillow's name for the pixels as stored, such as "L;4"; known only before they are loaded."""
    arguments: object = image.tile[0][3] if image.tile else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return str(first)


def _decode_tiff(path: Path, data: bytes, *, label: bool) -> Array:
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        if len(file.pages) != 1:
            raise SiteDataError(
                f"{path} has {len(file.pages)} pages",
                "save one picture for each file, or the stack as NIfTI with format: nifti",
                code="many-pages",
            )
        page = file.pages[0]
        tag = page.tags.get(_ORIENTATION_TAG)
        _require_upright(path, 1 if tag is None else int(tag.value))
        try:
            values = np.asarray(page.asarray())
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            return _decode_with_pillow(path, data, "TIFF", label=label)  # LZW, JPEG
        if page.planarconfig == 2 and values.ndim == 3:  # one plane for each colour
            values = np.moveaxis(values, 0, -1)
        if page.photometric == 0 and not label and values.dtype.kind in "bu":  # 0 is white
            values = ~values if values.dtype.kind == "b" else np.iinfo(values.dtype).max - values
        if page.photometric == 3 and not label:
            values = np.moveaxis(page.colormap[:, values] // 257, 0, -1)
        return values


def _require_upright(path: Path, orientation: int) -> None:
    if orientation not in (0, 1):  # readers disagree whether to turn it, so nobody should have to
        raise SiteDataError(
            f"{path} says in its metadata that it is to be turned (orientation {orientation})",
            "save the pictures upright, for example with: mogrify -auto-orient FILE",
            code="turned-picture",
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


def _coloured(path: Path) -> SiteDataError:
    return SiteDataError(
        f"{path} is a label with colours",
        "save labels with one number for each pixel: a gray or palette PNG, or a gray TIFF",
        code="coloured-labels",
    )


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)
