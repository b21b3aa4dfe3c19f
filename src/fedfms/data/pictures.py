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

import io
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import imagecodecs
import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin

from fedfms.data.content import cannot_read_here, damaged
from fedfms.data.grid import Array
from fedfms.data.tiff import frame_of_jpeg, read_tiff, require_size, require_upright
from fedfms.errors import SiteDataError

_GRAY_WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)  # luma of ITU-R BT.601, as Pillow's "L"

Space = Literal["gray", "gray, 0 is white", "RGB", "palette", "CMYK", "YCbCr", "CIELab"]
_CHANNELS: dict[Space, int] = {
    "gray": 1,
    "gray, 0 is white": 1,
    "RGB": 3,
    "palette": 1,
    "CMYK": 4,
    "YCbCr": 3,
    "CIELab": 3,
}
_OF_TIFF: dict[int, Space] = {
    0: "gray, 0 is white",
    1: "gray",
    2: "RGB",
    3: "palette",
    5: "CMYK",
    6: "YCbCr",
    8: "CIELab",
}
_OF_PNG: dict[int, tuple[Space, str]] = {  # by colour type
    0: ("gray", "gray"),
    2: ("RGB", "RGB"),
    3: ("palette", "palette"),
    4: ("gray", "gray and alpha"),
    6: ("RGB", "RGB and alpha"),
}
_ORIENTATION_TAG = 274  # of EXIF


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A picture as it is stored.

    samples: (H, W, S), one for each channel of `space`.
    bits: of a sample.
    alpha: (H, W), or None.
    is_premultiplied: the samples are already multiplied by alpha.
    palette: (N, 4) uint8, red, green, blue and alpha of each index.
    kind: such as "PNG, palette, 8 bit".
    is_lossy: the compression can change values.
    is_by_tifffile: the Python package tifffile wrote it.
    """

    samples: Array
    space: Space
    bits: int
    kind: str
    alpha: Array | None = None
    is_premultiplied: bool = False
    palette: Array | None = None
    is_lossy: bool = False
    is_by_tifffile: bool = False


def read_picture(path: Path, data: bytes) -> Picture:
    """A PNG, JPEG or TIFF by the ending of its name.

    Raises:
        SiteDataError: "many-pages", "picture-too-large", "turned-picture", "several-channels",
            "cannot-be-read-here".
        Exception: of any kind, from files that are cut off or hold nonsense.
    """
    suffix = path.suffix.lower()
    if suffix in (".tif", ".tiff"):
        return _tiff(path, data)
    return _png(path, data) if suffix == ".png" else _jpeg(path, data)


def image_values(path: Path, picture: Picture, *, colours: bool) -> Array:
    """(H, W) gray values of an image, or (H, W, 3) with `colours`, of any number type.

    Raises:
        SiteDataError: "cannot-be-read-here".
    """
    if picture.is_premultiplied and varies(picture.alpha):
        raise cannot_read_here(path, "its colours are multiplied by a transparency (alpha)")
    values = _shown(path, picture)
    if colours:
        return values if values.shape[2] == 3 else np.repeat(values, 3, axis=2)
    if values.shape[2] == 1:
        return values[..., 0]
    grey: Array = values.astype(np.float32) @ _GRAY_WEIGHTS
    return grey


def varies(alpha: Array | None) -> bool:
    """Whether a picture is more transparent here than there."""
    return alpha is not None and bool(alpha.min() != alpha.max())


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


# ------------------------------------------------------------------------------------------ TIFF


def _tiff(path: Path, data: bytes) -> Picture:
    stored = read_tiff(path, data)
    space = _OF_TIFF.get(stored.photometric)
    if space is None:
        raise cannot_read_here(
            path, f"it has the PhotometricInterpretation {stored.photometric}, no plain colours"
        )
    count = _CHANNELS[space]
    name = f"{space} and alpha" if set(stored.extra) & {1, 2} else space
    kind = f"TIFF, {_described(name, stored.bits, stored.samples.dtype)}, {stored.compression}"
    if stored.samples.shape[2] < count:
        raise damaged(path, f"{space} with {stored.samples.shape[2]} channels")
    colours, others = stored.samples[..., :count], stored.samples[..., count:]
    picture = Picture(
        colours,
        space,
        stored.bits,
        kind,
        palette=None if stored.colours is None else _opaque(stored.colours),
        is_lossy=stored.is_lossy,
        is_by_tifffile=stored.is_by_tifffile,
    )
    meant = [*stored.extra, *[0] * others.shape[2]][: others.shape[2]]  # 0: not said
    for number, meaning in enumerate(meant):
        other = others[..., number]
        if meaning in (1, 2) and picture.alpha is None:
            picture = replace(picture, alpha=other, is_premultiplied=meaning == 1)
        elif varies(other):
            raise SiteDataError(
                f"{path} has {stored.samples.shape[2]} channels where {space} has {count}, and the "
                "file does not say what the rest is",
                "save the channel that matters as a gray picture, or three of them as RGB",
                code="several-channels",
            )
    return picture


def _described(name: str, bits: int, dtype: np.dtype) -> str:
    number = {"f": "float", "i": "signed"}.get(dtype.kind, "bit")
    return f"{name}, {bits} bit" if number == "bit" else f"{name}, {bits} bit {number}"


def _opaque(colours: Array) -> Array:
    return np.column_stack([colours, np.full(len(colours), 255, np.uint8)])


# ------------------------------------------------------------------------------------------- PNG


def _png(path: Path, data: bytes) -> Picture:
    width, height, bits, colour_type = struct.unpack(">LLBB", data[16:26])
    require_size(path, width, height)
    with PngImagePlugin.PngImageFile(io.BytesIO(data)) as image:  # not open(): it warns of size
        if getattr(image, "n_frames", 1) > 1:
            raise SiteDataError(
                f"{path} has {image.n_frames} pictures one after the other (animated)",
                "save one picture for each file",
                code="many-pages",
            )
        require_upright(path, image.getexif().get(_ORIENTATION_TAG, 1))
        image.load()  # looks at all checksums
        transparent, colours = image.info.get("transparency"), image.getpalette("RGB")
        if image.mode == "1" and transparent is not None:
            transparent = int(transparent != 0)  # Pillow says 255 for 1
        samples = np.asarray(image)
    if bits == 16:  # of colours Pillow keeps only the high byte
        samples = imagecodecs.png_decode(data)
    elif bits < 8 and colour_type == 0:  # Pillow spreads 2 and 4 bits over 0 to 255
        samples = samples.astype(np.uint8) // {1: 1, 2: 85, 4: 17}[bits]
    samples = samples[..., None] if samples.ndim == 2 else samples
    space, name = _OF_PNG[colour_type]
    count = _CHANNELS[space]
    alpha = samples[..., count] if samples.shape[2] > count else None
    samples = samples[..., :count]
    palette = None
    if space == "palette":
        palette = _opaque(np.array(colours, np.uint8).reshape(-1, 3))
        if isinstance(transparent, bytes):
            palette[: len(transparent), 3] = np.frombuffer(transparent, np.uint8)[: len(palette)]
        elif transparent is not None:
            palette[int(transparent), 3] = 0
        if samples.max() >= len(palette):
            raise damaged(path, "a pixel has an index beyond the palette")
        alpha = palette[:, 3][samples[..., 0]]
    elif transparent is not None:  # one value or colour is
        alpha = np.where((samples == np.array(transparent)).all(axis=2), 0, 255)
    return Picture(samples, space, bits, f"PNG, {name}, {bits} bit", alpha, palette=palette)


# ------------------------------------------------------------------------------------------ JPEG


def _jpeg(path: Path, data: bytes) -> Picture:
    bits, coding, width, height = frame_of_jpeg(data)
    if bits != 8 or coding not in (0xC0, 0xC1, 0xC2, 0xC9, 0xCA):
        raise cannot_read_here(path, f"it is a JPEG of {bits} bits or of a rare coding")
    require_size(path, width, height)
    with JpegImagePlugin.JpegImageFile(io.BytesIO(data)) as image:
        require_upright(path, image.getexif().get(_ORIENTATION_TAG, 1))
        image.load()
        space: Space = "gray" if image.mode == "L" else "RGB"
        name = {"L": "gray"}.get(image.mode, image.mode)
        samples = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    samples = samples[..., None] if samples.ndim == 2 else samples
    return Picture(samples, space, 8, f"JPEG, {name}, 8 bit", is_lossy=True)
