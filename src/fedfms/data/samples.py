"""PNG, JPEG and TIFF to samples as they are stored, whatever compression, bit depth and layout.

Nothing is made of them, but that a decoder of JPEG makes YCbCr to RGB. What samples mean is decided
once, in data/pictures.py.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import imagecodecs
import numpy as np
import tifffile
from PIL import JpegImagePlugin, PngImagePlugin

from fedfms.data.content import cannot_read_here, damaged
from fedfms.data.grid import Array
from fedfms.errors import SiteDataError

MOST_PIXELS = 400_000_000  # 20,000 x 20,000; as colours in float32 that is 5 GB

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
_NAMES = {
    1: "uncompressed",
    2: "CCITT RLE",
    3: "CCITT G3",
    4: "CCITT G4",
    5: "LZW",
    6: "old JPEG",
    7: "JPEG",
    8: "deflate",
    32773: "PackBits",
    32946: "deflate",
    33003: "JPEG 2000",
    33004: "JPEG 2000",
    33005: "JPEG 2000",
    33007: "JPEG",
    34712: "JPEG 2000",
    34887: "LERC",
    34892: "lossy JPEG of DNG",
    34925: "LZMA",
    34926: "Zstandard",
    34933: "PNG",
    34934: "JPEG XR",
    22610: "JPEG XR",
    50000: "Zstandard",
    50001: "WebP",
    50002: "JPEG XL",
    52546: "JPEG XL",
}
_JPEG, _WEBP = 7, 50001
_FAX = frozenset((2, 3, 4))
_WITH_PREDICTOR = frozenset((5, 8, 32946, 34925, 34926, 50000))
_DECODED = _FAX | _WITH_PREDICTOR | {1, 32773, _JPEG, _WEBP}


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


def varies(alpha: Array | None) -> bool:
    """Whether a picture is more transparent here than there."""
    return alpha is not None and bool(alpha.min() != alpha.max())


def _require_size(path: Path, width: int, height: int) -> None:
    """Refuse a picture that is too large to be held as a whole."""
    if width * height > MOST_PIXELS:
        raise SiteDataError(
            f"{path} is {width} x {height} pixels, {width * height / 1e6:.0f} million; a picture "
            f"is held as a whole and may have {MOST_PIXELS / 1e6:.0f} million",
            "save it as several pictures (tiles), or scaled down; labels alike",
            code="picture-too-large",
        )


def _require_upright(path: Path, orientation: int) -> None:
    """Refuse a picture whose metadata says that it is to be turned: readers disagree on it."""
    if orientation not in (0, 1):
        raise SiteDataError(
            f"{path} says in its metadata that it is to be turned (orientation {orientation})",
            "save the pictures upright, for example with: mogrify -auto-orient FILE",
            code="turned-picture",
        )


def _opaque(colours: Array) -> Array:
    return np.column_stack([colours, np.full(len(colours), 255, np.uint8)])


# ------------------------------------------------------------------------------------------ TIFF


def _tiff(path: Path, data: bytes) -> Picture:
    """The one picture of a TIFF file.

    tifffile and imagecodecs unpack strips and tiles to the stored samples, but for YCbCr in JPEG.
    What they would guess or pass over is refused here.
    """
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        pages = len(file.pages)
        if pages == 1 and (file.is_imagej or file.is_shaped):  # may hold a stack behind one page
            pages = max(1, file.series[0].size // max(1, file.pages[0].size))
        if pages != 1:
            raise SiteDataError(
                f"{path} has {pages} pages",
                "save one picture for each file, or the stack as NIfTI with format: nifti",
                code="many-pages",
            )
        return _read_page(path, data, file.pages[0])


def _read_page(path: Path, data: bytes, page: Any) -> Picture:
    def tag(code: int, default: Any) -> Any:
        found = page.tags.get(code)
        return default if found is None else found.value

    _require_upright(path, int(tag(274, 1)))
    count = int(page.samplesperpixel)
    _require_size(path, int(page.imagewidth), int(page.imagelength))
    photometric = tag(262, None)
    if photometric is None:
        raise cannot_read_here(
            path, "it has no PhotometricInterpretation, so whether 0 is black is not known"
        )
    photometric, compression = int(photometric), int(tag(259, 1))
    name = _NAMES.get(compression, f"compression {compression}")
    bits_of_all, formats = _all(tag(258, 1)), _all(tag(339, 1))
    if len(set(bits_of_all)) > 1 or len(set(formats)) > 1:
        raise cannot_read_here(path, f"its channels differ in depth: {bits_of_all} bits")
    bits, sample_format = bits_of_all[0], formats[0]
    kind = {1: "u", 2: "i", 3: "f", 4: "u"}.get(sample_format)
    depths = {"u": (*range(1, 17), 32, 64), "i": (8, 16, 32, 64), "f": (16, 32, 64)}
    if kind is None or bits not in depths[kind]:
        what = {"u": "whole", "i": "signed", "f": "floating-point"}.get(kind or "", "complex")
        raise cannot_read_here(path, f"it holds {what} numbers of {bits} bits")
    if bits < 8 and count > 1:  # programs disagree on how these are packed
        raise cannot_read_here(path, f"it has {count} channels of {bits} bits")
    if int(tag(32997, 1)) > 1:
        raise cannot_read_here(path, "it is a volume in one page (ImageDepth)")
    _require_all_segments(path, page, len(data))
    planes = count if int(page.planarconfig or 1) == 2 else 1
    if compression == _JPEG:
        plain = {1: (0, 1), 3: (2, 6), 4: (2, 5)}  # by channels
        if bits != 8 or kind != "u" or (planes > 1 and photometric == 6):
            raise cannot_read_here(path, f"it holds JPEG of {bits} bits or in separate planes")
        if planes == 1 and photometric not in plain.get(count, ()):
            raise cannot_read_here(
                path,
                f"it holds JPEG of {count} channels with PhotometricInterpretation {photometric}",
            )
        for offset, length in zip(page.dataoffsets, page.databytecounts, strict=True):
            _require_size(path, *_frame_of_jpeg(data[offset : offset + length])[2:])
        # all but YCbCr stays as stored, as with libtiff, whatever else the JPEG says
        page.is_jfif, page.extrasamples = False, ()
        page.photometric = 1 if planes > 1 else {4: 5}.get(count, photometric)
    elif compression == _WEBP and (planes > 1 or count not in (3, 4)):
        raise cannot_read_here(path, "it holds WebP in a form that Pillow does not read")
    elif compression in _FAX and (bits, count) != (1, 1):
        raise cannot_read_here(path, f"{name} packs pictures of 1 bit, and this has more")
    elif compression not in _DECODED:
        raise cannot_read_here(path, f"it is compressed as {name}, which is not decoded here")
    elif compression != _WEBP:
        if photometric == 6 and _all(tag(530, (2, 2))) != (1, 1):
            raise cannot_read_here(path, f"it is YCbCr with fewer colours than pixels ({name})")
        _require_plain_predictor(path, page, compression, kind, bits)
    stored = page.asarray(squeeze=False)[:, 0]  # planes of (H, W, S)
    samples = np.concatenate(stored, axis=2) if planes > 1 else stored[0]
    samples = samples.astype(f"{kind}{samples.dtype.itemsize}", copy=False)
    if photometric == 6 and compression == _JPEG:
        photometric = 2  # the decoder has made it so
    _require_plain_colours(path, photometric, tag)
    palette = _colour_map(path, tag(320, None), bits) if photometric == 3 else None
    space = _OF_TIFF.get(photometric)
    if space is None:
        raise cannot_read_here(
            path, f"it has the PhotometricInterpretation {photometric}, no plain colours"
        )
    if samples.shape[2] < _CHANNELS[space]:
        raise damaged(path, f"{space} with {samples.shape[2]} channels")
    extra = _all(tag(338, ()))
    described = f"{space} and alpha" if set(extra) & {1, 2} else space
    number = {"f": " float", "i": " signed"}.get(kind, "")
    picture = Picture(
        samples[..., : _CHANNELS[space]],
        space,
        bits,
        f"TIFF, {described}, {bits} bit{number}, {name}",
        palette=palette,
        is_lossy=compression == _JPEG or (compression == _WEBP and not _is_lossless(page, data)),
        is_by_tifffile=str(tag(305, "")).startswith("tifffile"),
    )
    return _with_alpha(path, picture, samples, extra)


def _with_alpha(path: Path, picture: Picture, samples: Array, extra: Sequence[int]) -> Picture:
    """The picture with its alpha, of (H, W, S) samples; what else is not a colour says nothing."""
    count = _CHANNELS[picture.space]
    for channel in range(count, samples.shape[2]):
        meaning = [*extra, *[0] * samples.shape[2]][channel - count]  # 0: not said
        other = samples[..., channel]
        if meaning in (1, 2) and picture.alpha is None:
            picture = replace(picture, alpha=other, is_premultiplied=meaning == 1)
        elif varies(other):
            raise SiteDataError(
                f"{path} has {samples.shape[2]} channels where {picture.space} has {count}, and "
                "the file does not say what the rest is",
                "save the channel that matters as a gray picture, or three of them as RGB",
                code="several-channels",
            )
    return picture


def _all(value: Any) -> tuple[int, ...]:
    return tuple(int(one) for one in value) if isinstance(value, Sequence) else (int(value),)


def _require_all_segments(path: Path, page: Any, size: int) -> None:
    """Refuse a file of `size` bytes without some of its strips or tiles, which would be 0."""
    wanted = int(np.prod(page.chunked))
    places = list(zip(page.dataoffsets, page.databytecounts, strict=True))[:wanted]
    if len(places) < wanted:
        raise ValueError(f"{len(places)} of {wanted} strips or tiles")
    if not all(offset and length for offset, length in places):
        raise cannot_read_here(path, "it leaves out empty strips or tiles")
    if any(offset + length > size for offset, length in places):
        raise ValueError("it ends before its pixels do")


def _require_plain_predictor(path: Path, page: Any, compression: int, kind: str, bits: int) -> None:
    if compression not in _WITH_PREDICTOR:
        page.predictor = 1  # the tag means nothing there
    if page.predictor != 1 and bits % 8:
        raise cannot_read_here(path, f"it has a predictor with samples of {bits} bits")
    if page.predictor == 3 and kind != "f":
        raise cannot_read_here(path, "it has a predictor for floats and holds none")
    if page.predictor not in (1, 2, 3):
        raise cannot_read_here(path, f"it has the predictor {page.predictor}")


def _require_plain_colours(path: Path, photometric: int, tag: Any) -> None:
    """CMYK and YCbCr with the inks and coefficients that everybody assumes."""
    if photometric == 5 and int(tag(332, 1)) != 1:
        raise cannot_read_here(path, "its inks are others than CMYK (InkSet)")
    if photometric != 6:
        return
    for code, usual, tolerance in (
        (532, (0, 255, 128, 255, 128, 255), 1),
        (529, (0.299, 0.587, 0.114), 1e-3),
    ):
        above, below = np.reshape(tag(code, ()), (-1, 2)).T
        if len(above) and not np.allclose(above / below, usual, atol=tolerance):
            raise cannot_read_here(path, "it is YCbCr with its own coefficients or black and white")


def _colour_map(path: Path, value: Any, bits: int) -> Array:
    """(N, 4) uint8 of a palette."""
    if value is None:
        raise cannot_read_here(path, "it says palette and has none (ColorMap)")
    colours = np.asarray(value, np.uint16).reshape(3, -1).T
    if len(colours) != 2**bits:
        raise cannot_read_here(path, f"its palette has {len(colours)} colours for {bits} bits")
    # 16 bits by the standard; old programs wrote 8, which libtiff takes as such too
    return _opaque(np.asarray(colours if colours.max() < 256 else colours >> 8, np.uint8))


def _is_lossless(page: Any, data: bytes) -> bool:
    """Of WebP."""
    return all(data[offset + 12 : offset + 16] == b"VP8L" for offset in page.dataoffsets)


# ------------------------------------------------------------------------------------------- PNG


def _png(path: Path, data: bytes) -> Picture:
    if data[12:16] != b"IHDR":
        raise ValueError("no header")
    width, height, bits, colour_type = struct.unpack(">LLBB", data[16:26])
    _require_size(path, width, height)
    with PngImagePlugin.PngImageFile(io.BytesIO(data)) as image:  # not open(): it warns of size
        if getattr(image, "n_frames", 1) > 1:
            raise SiteDataError(
                f"{path} has {image.n_frames} pictures one after the other (animated)",
                "save one picture for each file",
                code="many-pages",
            )
        _require_upright(path, image.getexif().get(_ORIENTATION_TAG, 1))
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
    bits, coding, width, height = _frame_of_jpeg(data)
    if bits != 8 or coding not in (0xC0, 0xC1, 0xC2, 0xC9, 0xCA):
        raise cannot_read_here(path, f"it is a JPEG of {bits} bits or of a rare coding")
    _require_size(path, width, height)
    with JpegImagePlugin.JpegImageFile(io.BytesIO(data)) as image:
        _require_upright(path, image.getexif().get(_ORIENTATION_TAG, 1))
        image.load()
        space: Space = "gray" if image.mode == "L" else "RGB"
        name = {"L": "gray"}.get(image.mode, image.mode)
        samples = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    samples = samples[..., None] if samples.ndim == 2 else samples
    return Picture(samples, space, 8, f"JPEG, {name}, 8 bit", is_lossy=True)


def _frame_of_jpeg(data: bytes) -> tuple[int, int, int, int]:
    """Bits, coding (the marker), width and height of a JPEG."""
    place = 2
    while place + 9 < len(data):
        if data[place] != 0xFF:
            raise ValueError("no marker where one should be")
        marker = data[place + 1]
        if marker == 0xFF:  # fill byte
            place += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # without length
            place += 2
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height = int.from_bytes(data[place + 5 : place + 7], "big")
            width = int.from_bytes(data[place + 7 : place + 9], "big")
            return data[place + 4], marker, width, height
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    raise ValueError("it ends before its pixels begin")
