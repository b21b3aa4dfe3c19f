"""PNG, JPEG and TIFF: what the stored samples mean, decided once for images and labels alike.

A file gives its samples as stored and says what they are: gray, colours, a palette, with or without
alpha. Compression and layout have no part in the decision. Then

- 0 is black in all that leaves here, also where a TIFF says that it is white.
- Samples of 1, 2 and 4 bits are shares of white in an image (programs that pack pictures turn 8
  bits into fewer), and numbers in a label. From 8 bits on they are numbers in both.
- An image's alpha is not looked at, but named where it is not the same everywhere. A label's alpha
  must say nothing that its values do not say.
- A channel that is neither a colour nor called alpha is refused, unless it is one value.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fedfms.data.content import cannot_read_here
from fedfms.data.grid import Array
from fedfms.data.samples import Picture, varies
from fedfms.errors import SiteDataError

_GRAY_WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)  # luma of ITU-R BT.601, as Pillow's "L"


def image_values(path: Path, picture: Picture, *, colours: bool) -> Array:
    """(H, W) gray values of an image, or (H, W, 3) with `colours`, of any number type.

    Raises:
        SiteDataError: "cannot-be-read-here".
    """
    if picture.is_premultiplied and varies(picture.alpha):
        raise cannot_read_here(path, "its colours are multiplied by a transparency (alpha)")
    return in_channels(_shown(path, picture), colours=colours)


def in_channels(values: Array, *, colours: bool) -> Array:
    """(H, W, 1 or 3) as shown to (H, W) gray values, or (H, W, 3) with `colours`."""
    if colours:
        return values if values.shape[2] == 3 else np.repeat(values, 3, axis=2)
    if values.shape[2] == 1:
        return values[..., 0]
    grey = np.empty(values.shape[:2], np.float32)
    for row, colours_of_row in zip(grey, values, strict=True):  # as floats all would be large
        row[:] = colours_of_row.astype(np.float32) @ _GRAY_WEIGHTS
    return grey


def label_values(path: Path, picture: Picture) -> Array:
    """(H, W) of a label: gray values, or indices of a palette.

    Raises:
        SiteDataError: "lossy-labels", "coloured-labels", "label-in-alpha", "white-is-zero",
            "cannot-be-read-here".
    """
    if picture.is_lossy:
        raise lossy(path, picture.kind.split(", ")[-1])
    if picture.space in ("CMYK", "YCbCr", "CIELab"):
        raise coloured(path)
    if picture.space == "gray, 0 is white" and picture.bits == 1 and picture.is_by_tifffile:
        # tifffile says so of every bool array; viewers show True black, tifffile reads it as True
        raise SiteDataError(
            f"{path} is a label of 1 bit by tifffile, which says of such files that 0 is white: "
            "whether 0 or 1 is the background is not known",
            "save the labels as whole numbers, such as tifffile.imwrite(name, "
            "mask.astype('uint8')), or as PNG",
            code="white-is-zero",
        )
    values: Array = picture.samples
    if picture.space != "palette":
        values = _black_is_zero(path, picture)
    if values.shape[2] == 3 and not (values == values[..., :1]).all():
        raise coloured(path)
    values = values[..., 0]
    alpha = picture.alpha if picture.palette is None else None  # an index says its alpha by itself
    if alpha is not None and varies(alpha):
        seen = alpha != 0
        if not np.array_equal(seen, values != 0) or varies(alpha[seen]):
            raise SiteDataError(
                f"{path} is a label with an alpha channel that differs over the picture: is the "
                "mask in the colour or in the transparency?",
                "save labels with one number for each pixel and no alpha channel, for example "
                "with: mogrify -alpha extract FILE (the mask is the transparency) or "
                "mogrify -alpha off FILE (it is the colour)",
                code="label-in-alpha",
            )
    return values


Palette = tuple[tuple[int, ...], ...]  # red, green, blue, alpha of the values from 0 on


def different_palettes(
    labels: Sequence[tuple[Path, Collection[int], Palette | None]],
) -> SiteDataError | None:
    """An error if a value means one colour in one label file and another in the next.

    Programs that save a picture anew may order its palette anew; then the numbers say nothing.
    Alpha counts where it is all that tells two values of a file apart.

    Args:
        labels: file, the values that occur in it, and its palette.
    """
    known = [
        (path, [value for value in sorted(values) if value < len(palette)], palette)
        for path, values, palette in labels
        if palette is not None
    ]
    channels = 3
    if any(len({palette[value][:3] for value in used}) < len(used) for _, used, palette in known):
        channels = 4
    by_value: dict[int, tuple[Path, tuple[int, ...]]] = {}
    by_colour: dict[tuple[int, ...], tuple[Path, int, Palette]] = {}
    for path, used, palette in known:
        for value in used:
            colour = palette[value][:channels]
            other, its_colour = by_value.setdefault(value, (path, colour))
            if its_colour != colour:
                return _palettes_differ(
                    f"{value} is {_named(its_colour)} in {other} and {_named(colour)} in {path}"
                )
            other, its_value, its_palette = by_colour.setdefault(colour, (path, value, palette))
            may_be_both = any(
                max(value, its_value) < len(one)
                and one[value][:channels] == one[its_value][:channels]
                for one in (palette, its_palette)
            )
            if its_value != value and not may_be_both:
                return _palettes_differ(
                    f"{_named(colour)} is {its_value} in {other} and {value} in {path}"
                )
    return None


def _named(colour: tuple[int, ...]) -> str:
    name = "the colour #" + "".join(f"{number:02x}" for number in colour[:3])
    return name + (" (transparent)" if colour[3:] == (0,) else "")


def _palettes_differ(example: str) -> SiteDataError:
    return SiteDataError(
        f"the palettes of the label files differ: {example}",
        "save all labels with one palette, or as gray pictures with one number for each class; "
        "mogrify -colorspace Gray -define png:color-type=0 FILES makes each colour one number",
        code="palettes-differ",
    )


def lossy(path: Path, compression: str) -> SiteDataError:
    """The error for a label whose compression changes values."""
    return SiteDataError(
        f"{path} is a label in {compression}, which does not keep label values",
        "export the labels as PNG, or as TIFF with LZW or no compression, from the program in "
        "which they were drawn",
        code="lossy-labels",
    )


def coloured(path: Path) -> SiteDataError:
    """The error for a label whose pixels are colours."""
    return SiteDataError(
        f"{path} is a label with colours",
        "save labels with one number for each pixel: a gray PNG or TIFF, or a PNG with a palette "
        "that is the same in all label files",
        code="coloured-labels",
    )


# --------------------------------------------------------------------------- samples to values


def _shown(path: Path, picture: Picture) -> Array:
    """(H, W, 1 or 3) as an eye would have it."""
    samples = picture.samples
    if picture.palette is not None:
        return np.asarray(picture.palette[:, :3][samples[..., 0]])
    if picture.space in ("CMYK", "YCbCr", "CIELab"):
        if picture.bits != 8:
            raise cannot_read_here(path, f"it is {picture.space} with {picture.bits} bits")
        mode = {"CMYK": "CMYK", "YCbCr": "YCbCr", "CIELab": "LAB"}[picture.space]
        height, width = samples.shape[:2]
        stored = np.ascontiguousarray(samples).tobytes()
        with Image.frombytes(mode, (width, height), stored, "raw", mode) as converted:
            return np.asarray(converted.convert("RGB"))
    values = _black_is_zero(path, picture)
    if picture.bits < 8:
        values = np.asarray(np.rint(values * (255 / (2**picture.bits - 1))), np.uint8)
    return values


def _black_is_zero(path: Path, picture: Picture) -> Array:
    if picture.space != "gray, 0 is white":
        return picture.samples
    if picture.samples.dtype.kind != "u":
        raise cannot_read_here(path, "it says that 0 is white and holds no plain whole numbers")
    return np.asarray(2**picture.bits - 1 - picture.samples, picture.samples.dtype)
