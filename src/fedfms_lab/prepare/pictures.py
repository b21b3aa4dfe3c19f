"""Pictures of a download: read as the provider means them, written as plain 8-bit PNG."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.path import Path as Outline
from numpy.typing import NDArray
from PIL import Image

from fedfms.data.pictures import label_values
from fedfms.data.samples import read_picture
from fedfms.errors import SiteDataError
from fedfms_lab.prepare.source import read_source, truncated, unexpected_shape

Array = NDArray[Any]
Gray = NDArray[np.uint8]

_KINDS = ["PNG", "JPEG", "TIFF", "BMP"]
_FIRST_BYTES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"BM")
_ORIENTATION_TAG = 274  # of EXIF
_PLAIN = ("1", "L", "P", "RGB", "RGBA", "LA", "I", "I;16")


def read_rgb(path: Path) -> Gray:
    """(H, W, 3) uint8; alpha is dropped, gray becomes three equal channels.

    Raises:
        SiteDataError: "truncated-file", "unexpected-format", "unreadable-file".
    """
    image = _load(path)
    if image.mode not in ("L", "P", "RGB", "RGBA", "LA"):
        raise _unexpected(path, f"its pixels are {image.mode}, not 8-bit gray or RGB")
    return np.asarray(image.convert("RGB"))  # which does not blend with alpha, it drops that


def read_gray(path: Path) -> Gray:
    """(H, W) uint8 of a gray picture, or of an RGB one whose channels are the same.

    Raises:
        SiteDataError: as `read_rgb`; colours are an "unexpected-format".
    """
    rgb = read_rgb(path)
    if (rgb.max(axis=2).astype(int) - rgb.min(axis=2) > 2).any():  # JPEG may be off by one
        raise _unexpected(path, "it has colours, a gray picture was expected")
    return np.ascontiguousarray(rgb[..., 0])


def read_numbers(path: Path) -> Array:
    """(H, W) numbers of a mask: PNG, BMP, TIFF or NPY, of any depth; a palette gives its indices.

    A mask with three equal channels is one of a channel. Nothing is cast, so that object 256 of an
    instance mask stays 256. PNG and TIFF are read as a site's labels are.

    Raises:
        SiteDataError: "truncated-file", "unexpected-format", "unexpected-shape", and what a label
            cannot be.
    """
    suffix = path.suffix.lower()
    if suffix == ".npy":
        values = _load_npy(path)
    else:
        image = None if suffix in (".tif", ".tiff") else _load(path)
        if image is None or (image.format == "PNG" and suffix == ".png"):
            return _read_label(path)
        if image.mode not in _PLAIN:
            raise _unexpected(path, f"its pixels are {image.mode}")
        values = np.asarray(image)
    if values.ndim == 3 and values.shape[2] in (2, 4):
        values = values[..., :-1]
    if values.ndim == 3 and (values == values[..., :1]).all():
        values = values[..., 0]
    if values.ndim != 2:
        raise unexpected_shape(
            path, " x ".join(map(str, values.shape)), "a mask with one number a pixel"
        )
    return values


def _read_label(path: Path) -> Array:
    try:
        return label_values(path, read_picture(path, read_source(path)))
    except SiteDataError as error:
        if error.code != "coloured-labels":
            raise
        raise unexpected_shape(
            path, "a picture with 3 different channels", "a mask with one number a pixel"
        ) from None
    except Exception as error:  # a damaged file makes a decoder raise nearly anything
        raise truncated(path, f"{type(error).__name__}: {error}") from None


def read_channel_of_mask(path: Path, channel: int) -> Gray:
    """(H, W) uint8: one channel of an RGB mask; 0 is red, 2 is blue.

    Raises:
        SiteDataError: as `read_rgb`; a mask with foreground but without colours is an
            "unexpected-format".
    """
    image = _load(path)
    values = np.asarray(image)
    if image.mode == "L" and values.max() < 100:  # nothing is drawn: which channel is no question
        return values
    if image.mode != "RGB":
        raise _unexpected(path, f"its pixels are {image.mode}, an RGB mask was expected")
    return np.ascontiguousarray(values[..., channel])


def png(values: Gray) -> bytes:
    """(H, W) or (H, W, 3) uint8 as PNG without a time, a profile or any other extra."""
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(values)).save(stream, "PNG", compress_level=6)
    return stream.getvalue()


def objects_to_255(numbers: Array) -> Gray:
    """(H, W) uint8 of 0 and 255: wherever any object is, whatever its number, 256 included."""
    return np.where(numbers != 0, np.uint8(255), np.uint8(0))


def fill(mask: Gray, outlines: Iterable[Array], value: int) -> None:
    """Write `value` into `mask` wherever a pixel's index lies inside an outline (even-odd rule).

    Args:
        mask: (H, W), changed in place.
        outlines: (N, 2) of x (column) and y (row); N at least 3. Pixel (r, c) is inside where the
            point (c, r) is: the provider's own scripts (skimage.draw.polygon) count so.
    """
    rows, columns = mask.shape
    for outline in outlines:
        low = np.maximum(np.floor(outline.min(axis=0)), 0).astype(int)
        high = np.minimum(np.ceil(outline.max(axis=0)), (columns - 1, rows - 1)).astype(int)
        if (high < low).any():  # wholly outside the picture
            continue
        y, x = np.mgrid[low[1] : high[1] + 1, low[0] : high[0] + 1]
        inside = Outline(outline).contains_points(np.column_stack([x.ravel(), y.ravel()]))
        mask[low[1] : high[1] + 1, low[0] : high[0] + 1][inside.reshape(x.shape)] = value


def require_same_size(image_path: Path, image: Array, label_path: Path, label: Array) -> None:
    """Raises SiteDataError ("unexpected-shape") where the label does not lie on its picture."""
    if image.shape[:2] != label.shape[:2]:
        raise unexpected_shape(
            label_path,
            " x ".join(map(str, label.shape[:2])) + " pixels (rows x columns)",
            " x ".join(map(str, image.shape[:2])) + f" as {image_path.name}",
        )


def _load(path: Path) -> Image.Image:
    data = read_source(path)
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_KINDS)
    except Exception:  # no decoder knows its first bytes, or its header ends too early
        if data.startswith(_FIRST_BYTES):
            raise truncated(path, "its header is not whole") from None
        raise _unexpected(path, "it is no PNG, JPEG, TIFF or BMP") from None
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
        image.load()
    except Exception as error:  # a damaged file makes a decoder raise nearly anything
        raise truncated(path, f"{type(error).__name__}: {error}") from None
    if orientation not in (0, 1):
        raise _unexpected(path, "its metadata says that it is to be turned")
    return image


def _load_npy(path: Path) -> Array:
    try:
        values: Array = np.load(io.BytesIO(read_source(path)), allow_pickle=False)
    except SiteDataError:
        raise
    except (ValueError, EOFError, OSError) as error:
        raise truncated(path, str(error)) from None
    if values.dtype.kind not in "biuf":
        raise _unexpected(path, f"it holds {values.dtype}, not numbers")
    return values


def _unexpected(path: Path, reason: str) -> SiteDataError:
    return SiteDataError(
        f"{path}: {reason}",
        "compare with the provider's file; download it again if a web page was saved in its place",
        code="unexpected-format",
    )
