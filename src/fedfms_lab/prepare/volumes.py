"""NIfTI volumes of a download: copied byte for byte where that is possible, else without loss.

Compressed files carry no time and no name, so the same volume gives the same bytes.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import nibabel
import numpy as np

from fedfms.errors import SiteDataError
from fedfms_lab.prepare.plan import Made
from fedfms_lab.prepare.source import read_source, truncated, unexpected_shape

ENDINGS = (".nii", ".nii.gz")


def read_volume(path: Path) -> bytes:
    """A volume as .nii.gz: a .nii.gz as it is, a .nii compressed.

    Raises:
        SiteDataError: "unreadable-file", "truncated-file".
    """
    data = read_source(path)
    return data if path.name.lower().endswith(".gz") else compress(data)


def volume_pair(image: Path, label: Path) -> Made:
    """Both as `read_volume`."""
    return Made(read_volume(image), read_volume(label))


def compress(data: bytes) -> bytes:
    """gzip without a time or a file name in its header."""
    return gzip.compress(data, compresslevel=6, mtime=0)


def read_channel(path: Path, channel: int) -> bytes:
    """One channel of a (x, y, z, channel) volume as .nii.gz; geometry and stored numbers stay.

    The stored integers are kept with their slope and intercept, so nothing is rounded.

    Raises:
        SiteDataError: "truncated-file", "unexpected-shape", "unexpected-format".
    """
    image = parse(path, read_source(path))
    shape = image.shape
    if len(shape) != 4 or channel >= shape[3]:
        size = " x ".join(map(str, shape))
        raise unexpected_shape(path, size, f"four-dimensional with at least {channel + 1} channels")
    try:
        stored = np.asanyarray(image.dataobj.get_unscaled())[..., channel]
    except (ValueError, EOFError, OSError) as error:
        raise truncated(path, str(error)) from None
    header = image.header.copy()
    slope, inter = image.dataobj.slope, image.dataobj.inter
    header.set_data_shape(stored.shape)
    header["scl_slope"], header["scl_inter"] = slope, inter
    header["vox_offset"] = header.single_vox_offset
    gap = bytes(header.single_vox_offset - len(header.binaryblock))  # "no extension"
    return compress(header.binaryblock + gap + stored.tobytes(order="F"))


def with_grid_of(image_path: Path, image: bytes, label_path: Path, label: bytes) -> bytes:
    """The label's values (whole numbers, at most 255) under the image's geometry, as .nii.gz."""
    grid = parse(image_path, image)
    values = np.asanyarray(parse(label_path, label).dataobj).astype(np.uint8)
    made = nibabel.Nifti1Image(values, grid.affine)
    made.header.set_xyzt_units(*grid.header.get_xyzt_units())
    return compress(made.to_bytes())


def label_values(path: Path) -> set[int]:
    """The values that occur in a label volume.

    Raises:
        SiteDataError: "truncated-file", "unexpected-format".
    """
    image = parse(path, read_source(path))
    try:
        return {int(value) for value in np.unique(np.asanyarray(image.dataobj))}
    except (ValueError, EOFError, OSError) as error:
        raise truncated(path, str(error)) from None


def parse(path: Path, data: bytes) -> nibabel.Nifti1Image:
    """A NIfTI-1 file, compressed or not.

    Raises:
        SiteDataError: "truncated-file", "unexpected-format".
    """
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise truncated(path, str(error)) from None
    if data[344:348] != b"n+1\0":
        raise SiteDataError(
            f"{path} is no NIfTI-1 volume",
            "download the file again; a web page or a link may have been saved in its place",
            code="unexpected-format",
        )
    try:
        return nibabel.Nifti1Image.from_bytes(data)
    except Exception as error:  # a damaged header makes nibabel raise nearly anything
        raise truncated(path, f"{type(error).__name__}: {error}") from None
