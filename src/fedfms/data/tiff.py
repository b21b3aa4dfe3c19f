"""A TIFF's samples as they are stored, whatever its compression, bit depth and layout.

tifffile reads the tags. The strips or tiles are unpacked here or by libtiff (in Pillow), always to
the stored samples and never to a picture, so that compression cannot change what is read: what the
samples mean is decided once, in data/pictures.py.
"""

from __future__ import annotations

import io
import lzma
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image, TiffImagePlugin, WebPImagePlugin, features

from fedfms.data.content import cannot_read_here
from fedfms.data.grid import Array
from fedfms.errors import SiteDataError

MOST_PIXELS = 400_000_000  # 20,000 x 20,000; as colours in float32 that is 5 GB

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
_JPEG, _OLD_JPEG, _WEBP = 7, 6, 50001
_LOSSY = frozenset((6, 7, 33007, 34892, 50001))
_BY_LIBTIFF = {5: "tiff_lzw", 32773: "packbits", 50000: "zstd", 34926: "zstd"}
_FAX = frozenset((2, 3, 4))
_WITH_PREDICTOR = frozenset((5, 8, 32946, 34925, 34926, 50000))
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


@dataclass(frozen=True, slots=True, eq=False)
class Tiff:
    """The one picture of a TIFF file.

    samples: (H, W, S) as stored; unsigned or signed integers or floats.
    bits: of a sample.
    photometric: PhotometricInterpretation; 2 where the decoder of JPEG has made YCbCr to RGB.
    extra: of the samples beyond the colours, what each is (ExtraSamples); 1 and 2 are alpha.
    colours: (N, 3) uint8 of a palette, or None.
    compression: its name.
    is_lossy: whether the compression can change values.
    is_by_tifffile: whether the Python package tifffile wrote it.
    """

    samples: Array
    bits: int
    photometric: int
    extra: tuple[int, ...]
    colours: Array | None
    compression: str
    is_lossy: bool
    is_by_tifffile: bool


def read_tiff(path: Path, data: bytes) -> Tiff:
    """The one picture of a TIFF file.

    Raises:
        SiteDataError: "many-pages", "picture-too-large", "turned-picture", "cannot-be-read-here".
        Exception: of any kind, from files that are cut off or hold nonsense.
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
        return _read_page(path, data, file.pages[0], file.byteorder)


def require_size(path: Path, width: int, height: int) -> None:
    """Refuse a picture that is too large to be held as a whole."""
    if width * height > MOST_PIXELS:
        raise SiteDataError(
            f"{path} is {width} x {height} pixels, {width * height / 1e6:.0f} million; a picture "
            f"is held as a whole and may have {MOST_PIXELS / 1e6:.0f} million",
            "save it as several pictures (tiles), or scaled down; labels alike",
            code="picture-too-large",
        )


def require_upright(path: Path, orientation: int) -> None:
    """Refuse a picture whose metadata says that it is to be turned: readers disagree on it."""
    if orientation not in (0, 1):
        raise SiteDataError(
            f"{path} says in its metadata that it is to be turned (orientation {orientation})",
            "save the pictures upright, for example with: mogrify -auto-orient FILE",
            code="turned-picture",
        )


def _read_page(path: Path, data: bytes, page: Any, byteorder: str) -> Tiff:
    def tag(code: int, default: Any) -> Any:
        found = page.tags.get(code)
        return default if found is None else found.value

    require_upright(path, int(tag(274, 1)))
    width, height, count = int(page.imagewidth), int(page.imagelength), int(page.samplesperpixel)
    require_size(path, width, height)
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
    layout = _Layout.of(path, data, page, width, height, count, bits)
    if compression == _OLD_JPEG:
        samples = _by_pillow(path, data, photometric, bits)
        photometric, count = (2 if samples.shape[2] == 3 else photometric), samples.shape[2]
    elif compression == _JPEG:
        plain = {1: (0, 1), 3: (2, 6), 4: (2, 5)}  # by channels
        if bits != 8 or kind != "u" or (layout.planes > 1 and photometric == 6):
            raise cannot_read_here(path, f"it holds JPEG of {bits} bits or in separate planes")
        if layout.planes == 1 and photometric not in plain.get(layout.samples, ()):
            raise cannot_read_here(
                path,
                f"it holds JPEG of {count} channels with PhotometricInterpretation {photometric}",
            )
        tables = tag(347, None)
        samples = layout.assembled(
            [_jpeg(plane, layout, photometric, tables) for plane in layout.segments]
        )
        photometric = 2 if photometric == 6 else photometric
    elif compression == _WEBP:
        if not features.check("webp") or layout.planes > 1 or layout.samples not in (3, 4):
            raise cannot_read_here(path, "it holds WebP in a form that Pillow does not read")
        samples = layout.assembled([_webp(path, plane, layout) for plane in layout.segments])
    else:
        if photometric == 6 and _all(tag(530, (2, 2))) != (1, 1):
            raise cannot_read_here(path, f"it is YCbCr with fewer colours than pixels ({name})")
        predictor = int(tag(317, 1)) if compression in _WITH_PREDICTOR else 1
        options = {code: int(tag(code, 0)) for code in (292, 293)}
        fill_order = int(tag(266, 1))
        rows = []
        for plane in layout.segments:
            if fill_order == 2:
                plane = [segment.translate(_REVERSED) for segment in plane]
            unpacked = _unpacked(path, plane, layout, compression, name, options)
            rows.append(_numbers(path, unpacked, layout, kind, bits, predictor, byteorder))
        samples = layout.assembled(rows)
    _require_plain_colours(path, photometric, tag)
    lossless_webp = compression == _WEBP and all(s[12:16] == b"VP8L" for s in layout.segments[0])
    return Tiff(
        samples,
        bits,
        photometric,
        _all(tag(338, ())),
        _colour_map(path, tag(320, None), bits) if photometric == 3 else None,
        name,
        compression in _LOSSY and not lossless_webp,
        str(tag(305, "")).startswith("tifffile"),
    )


def _all(value: Any) -> tuple[int, ...]:
    return tuple(int(one) for one in value) if isinstance(value, Sequence) else (int(value),)


def _require_plain_colours(path: Path, photometric: int, tag: Any) -> None:
    """CMYK and YCbCr with the inks and coefficients that everybody assumes."""
    if photometric == 5 and int(tag(332, 1)) != 1:
        raise cannot_read_here(path, "its inks are others than CMYK (InkSet)")
    reference = _fractions(tag(532, None))
    luma = _fractions(tag(529, None))
    if photometric == 6 and (
        (reference and not np.allclose(reference, (0, 255, 128, 255, 128, 255), atol=1))
        or (luma and not np.allclose(luma, (0.299, 0.587, 0.114), atol=1e-3))
    ):
        raise cannot_read_here(path, "it is YCbCr with its own coefficients or black and white")


def _fractions(value: Any) -> list[float]:
    if value is None:
        return []
    flat = [float(number) for number in value]
    return [above / below for above, below in zip(flat[::2], flat[1::2], strict=True)]


def _colour_map(path: Path, value: Any, bits: int) -> Array:
    if value is None:
        raise cannot_read_here(path, "it says palette and has none (ColorMap)")
    colours = np.asarray(value, np.uint16).reshape(3, -1).T
    if len(colours) != 2**bits:
        raise cannot_read_here(path, f"its palette has {len(colours)} colours for {bits} bits")
    # 16 bits by the standard; old programs wrote 8, which libtiff takes as such too
    return np.asarray(colours if colours.max() < 256 else colours >> 8, np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class _Layout:
    """How the strips or tiles of a picture lie; each plane's are stacked to rows of one length."""

    width: int
    height: int
    samples: int  # in each plane
    planes: int
    bits: int
    columns: int  # pixels in a row of a strip or tile
    rows: int  # of a whole strip or tile
    is_tiled: bool
    segments: list[list[bytes]]  # as stored, by plane

    @classmethod
    def of(
        cls, path: Path, data: bytes, page: Any, width: int, height: int, count: int, bits: int
    ) -> _Layout:
        planes = count if int(page.planarconfig or 1) == 2 and count > 1 else 1
        is_tiled = bool(page.is_tiled)
        columns = int(page.tilewidth) if is_tiled else width
        rows = int(page.tilelength) if is_tiled else min(int(page.rowsperstrip), height)
        down, across = -(-height // rows), -(-width // columns)
        places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
        each = down * across
        if len(places) < each * planes:
            raise ValueError(f"{len(places)} of {each * planes} strips or tiles")
        if any(length == 0 for _, length in places[: each * planes]):
            raise cannot_read_here(path, "it leaves out empty strips or tiles")
        if any(offset + length > len(data) for offset, length in places[: each * planes]):
            raise ValueError("it ends before its pixels do")
        segments = [data[offset : offset + length] for offset, length in places]
        return cls(
            width,
            height,
            count // planes,
            planes,
            bits,
            columns,
            rows,
            is_tiled,
            [segments[plane * each : (plane + 1) * each] for plane in range(planes)],
        )

    @property
    def row_bytes(self) -> int:
        return (self.columns * self.samples * self.bits + 7) // 8

    def rows_of(self, number: int) -> int:
        """Rows of a strip, of which the last may be shorter, or tile."""
        if self.is_tiled:
            return self.rows
        return min(self.rows, self.height - number * self.rows)

    @property
    def stacked(self) -> int:
        """Rows of all strips or tiles of a plane, one below the other."""
        return len(self.segments[0]) * self.rows if self.is_tiled else self.height

    def assembled(self, planes: list[Array]) -> Array:
        """Planes of (stacked, columns, samples) to (H, W, S)."""
        whole = []
        for plane in planes:
            plane = plane.reshape(self.stacked, self.columns, self.samples)
            if self.is_tiled:
                across = -(-self.width // self.columns)
                tiles = plane.reshape(-1, across, self.rows, self.columns, self.samples)
                joined = tiles.transpose(0, 2, 1, 3, 4)
                plane = joined.reshape(-1, across * self.columns, self.samples)
            whole.append(plane[: self.height, : self.width])
        return whole[0] if len(whole) == 1 else np.concatenate(whole, axis=2)


# ------------------------------------------------------------------------------------ compression


def _unpacked(
    path: Path,
    segments: list[bytes],
    layout: _Layout,
    compression: int,
    name: str,
    options: dict[int, int],
) -> Array:
    """(stacked, bytes of a row) uint8 of a plane."""
    if compression in _FAX:
        if layout.bits != 1 or layout.samples != 1:
            raise cannot_read_here(path, f"{name} packs pictures of 1 bit, and this has more")
        picture = _libtiff(segments, layout, compression, layout.columns, bits=1, options=options)
        return np.packbits(picture, axis=1)
    if compression in _BY_LIBTIFF:
        _require_codec(path, compression, name)
        code = 50000 if compression == 34926 else compression
        return _libtiff(segments, layout, code, layout.row_bytes)
    if compression == 1:
        unpacked = segments
    elif compression in (8, 32946):
        unpacked = [zlib.decompressobj().decompress(segment) for segment in segments]
    elif compression == 34925:
        unpacked = [lzma.decompress(segment) for segment in segments]
    else:
        raise cannot_read_here(path, f"it is compressed as {name}, which is not decoded here")
    parts = []
    for number, segment in enumerate(unpacked):
        size = layout.rows_of(number) * layout.row_bytes
        if len(segment) < size:
            raise ValueError(f"a strip or tile has {len(segment)} bytes of {size}")
        parts.append(np.frombuffer(segment, np.uint8, size))
    return np.concatenate(parts).reshape(layout.stacked, layout.row_bytes)


def _require_codec(path: Path, compression: int, name: str) -> None:
    try:
        Image.new("L", (8, 8)).save(io.BytesIO(), "TIFF", compression=_BY_LIBTIFF[compression])
    except Exception:
        raise cannot_read_here(
            path, f"it is compressed as {name}, which this Pillow's libtiff does not decode"
        ) from None


def _libtiff(
    segments: list[bytes],
    layout: _Layout,
    compression: int,
    width: int,
    *,
    bits: int = 8,
    samples: int = 1,
    photometric: int = 1,
    tables: bytes | None = None,
    options: dict[int, int] | None = None,
) -> Array:
    """The strips or tiles of a plane decoded as one picture of strips: (stacked, width, …)."""
    short, long, undefined = "H", "L", "B"
    entries: dict[int, tuple[str, Sequence[int]]] = {
        256: (long, [width]),
        257: (long, [layout.stacked]),
        258: (short, [bits] * samples),
        259: (short, [compression]),
        262: (short, [photometric]),
        277: (short, [samples]),
        278: (long, [layout.rows]),
        273: (long, [0] * len(segments)),
        279: (long, [len(segment) for segment in segments]),
    }
    for code, value in (options or {}).items():
        entries[code] = (long, [value])
    if tables is not None:
        entries[347] = (undefined, tables)
    start = 8 + 2 + 12 * len(entries) + 4
    sizes = {code: len(values) * struct.calcsize("<" + t) for code, (t, values) in entries.items()}
    offset = start + sum(size for size in sizes.values() if size > 4)
    places = np.cumsum([offset, *(len(segment) for segment in segments)])[:-1]
    entries[273] = (long, places.tolist())
    directory, beyond = struct.pack("<H", len(entries)), b""
    for code in sorted(entries):
        letter, values = entries[code]
        packed = struct.pack(f"<{len(values)}{letter}", *values)
        kind = {short: 3, long: 4, undefined: 7}[letter]
        directory += struct.pack("<HHL", code, kind, len(values))
        if len(packed) > 4:
            directory += struct.pack("<L", start + len(beyond))
            beyond += packed
        else:
            directory += packed.ljust(4, b"\0")
    whole = b"".join((b"II*\0\x08\0\0\0", directory, b"\0" * 4, beyond, *segments))
    return _loaded(TiffImagePlugin.TiffImageFile(io.BytesIO(whole)))


def _loaded(picture: Image.Image) -> Array:
    with picture:
        picture.load()
        return np.asarray(picture)


def _jpeg(segments: list[bytes], layout: _Layout, photometric: int, tables: Any) -> Array:
    """Samples as libtiff gives them: YCbCr as RGB, all others as stored."""
    space = {1: 1, 3: 6 if photometric == 6 else 2, 4: 5}[layout.samples]
    tables = None if tables is None else bytes(tables)
    return _libtiff(
        segments,
        layout,
        _JPEG,
        layout.columns,
        samples=layout.samples,
        photometric=space,
        tables=tables,
    )


def _webp(path: Path, segments: list[bytes], layout: _Layout) -> Array:
    parts = []
    for number, segment in enumerate(segments):
        part = _loaded(WebPImagePlugin.WebPImageFile(io.BytesIO(segment)))
        if layout.samples == 4 and part.shape[2] == 3:  # an opaque alpha is left out
            part = np.dstack([part, np.full(part.shape[:2], 255, np.uint8)])
        if part.shape != (layout.rows_of(number), layout.columns, layout.samples):
            raise ValueError(f"a strip or tile is {part.shape}")
        parts.append(part)
    return np.concatenate(parts)


def _by_pillow(path: Path, data: bytes, photometric: int, bits: int) -> Array:
    """(H, W, 1 or 3) of old JPEG, which only libtiff takes apart."""
    if photometric not in (1, 2, 6) or bits != 8:
        raise cannot_read_here(path, "it holds old JPEG other than gray, RGB or YCbCr of 8 bits")
    try:
        values = _loaded(TiffImagePlugin.TiffImageFile(io.BytesIO(data)))
    except Exception:
        raise cannot_read_here(
            path, "it is compressed as old JPEG, of which libtiff reads only some kinds"
        ) from None
    values = values[..., None] if values.ndim == 2 else values
    if values.shape[2] not in (1, 3):
        raise cannot_read_here(path, f"it holds old JPEG with {values.shape[2]} channels")
    return values


# ---------------------------------------------------------------------------------------- numbers


def _numbers(
    path: Path,
    rows: Array,
    layout: _Layout,
    kind: str,
    bits: int,
    predictor: int,
    byteorder: str,
) -> Array:
    """(stacked, bytes) uint8 to (stacked, columns x samples) numbers, the predictor undone."""
    if bits % 8:
        if predictor != 1:
            raise cannot_read_here(path, f"it has a predictor with samples of {bits} bits")
        return _unpacked_bits(rows, layout.columns * layout.samples, bits)
    stored = np.dtype(f"{byteorder}{kind}{bits // 8}")
    native = stored.newbyteorder("=")
    if predictor == 2:
        unsigned = np.dtype(f"{byteorder}u{bits // 8}")
        steps = np.ascontiguousarray(rows).view(unsigned).astype(unsigned.newbyteorder("="))
        steps = steps.reshape(len(rows), layout.columns, layout.samples)
        return np.cumsum(steps, axis=1, dtype=steps.dtype).view(native)
    if predictor == 3:
        if kind != "f":
            raise cannot_read_here(path, "it has a predictor for floats and holds none")
        sums = np.cumsum(rows.reshape(len(rows), -1, layout.samples), axis=1, dtype=np.uint8)
        planes = sums.reshape(len(rows), bits // 8, -1)  # the highest bytes first
        big = np.ascontiguousarray(planes.transpose(0, 2, 1)).view(f">f{bits // 8}")
        return big[..., 0].astype(native)
    if predictor != 1:
        raise cannot_read_here(path, f"it has the predictor {predictor}")
    return np.ascontiguousarray(rows).view(stored).astype(native)


def _unpacked_bits(rows: Array, count: int, bits: int) -> Array:
    """(R, bytes) uint8 to (R, count) of numbers of so many bits, the highest bit first."""
    each = np.unpackbits(rows, axis=1, count=count * bits).reshape(len(rows), count, bits)
    numbers = np.zeros((len(rows), count), np.uint8 if bits < 8 else np.uint16)
    for place in range(bits):
        numbers = (numbers << 1) | each[:, :, place]
    return numbers
