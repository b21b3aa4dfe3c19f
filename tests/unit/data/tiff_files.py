"""TIFF files of any kind, written by hand: the code under test reads, it never writes."""

from __future__ import annotations

import io
import lzma
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, TiffImagePlugin

CODES = {
    "none": 1,
    "g3": 3,
    "g4": 4,
    "lzw": 5,
    "jpeg": 7,
    "deflate": 8,
    "old deflate": 32946,
    "packbits": 32773,
    "lzma": 34925,
    "zstd": 50000,
    "webp": 50001,
}
_PILLOW = {
    "lzw": "tiff_lzw",
    "packbits": "packbits",
    "zstd": "zstd",
    "g3": "group3",
    "g4": "group4",
}


def tiff_bytes(
    samples: np.ndarray,
    photometric: int,
    bits: int,
    compression: str = "none",
    *,
    planar: bool = False,
    tile: tuple[int, int] | None = None,
    rows_per_strip: int = 10,
    extra: Sequence[int] = (),
    predictor: int = 1,
    big_endian: bool = False,
    reversed_bits: bool = False,
    colour_map: np.ndarray | None = None,
    shared_tables: bool = False,
    tags: dict[int, tuple[str, Sequence[int]]] | None = None,
) -> bytes:
    """(H, W, S) samples as a TIFF.

    Args:
        samples: whole numbers, or floats whose type is the stored one.
        photometric: PhotometricInterpretation.
        bits: of a sample.
        compression: a name in CODES.
        planar: each sample in a plane of its own.
        tile: rows and columns; else there are strips.
        extra: ExtraSamples.
        predictor: 1 none, 2 differences, 3 that of floats.
        colour_map: (3, N) of a palette.
        shared_tables: of JPEG, stand once in the file and not in each strip or tile.
        tags: others, by number: a struct letter and values.
    """
    height, width, count = samples.shape
    planes = [samples[..., [n]] for n in range(count)] if planar else [samples]
    parts = [part for plane in planes for part in _parts(plane, tile, rows_per_strip)]
    segments = [_packed(part, bits, compression, predictor, big_endian) for part in parts]
    if reversed_bits:
        segments = [bytes(int(f"{b:08b}"[::-1], 2) for b in segment) for segment in segments]
    tables = b""
    if shared_tables:
        split = [_without_tables(segment) for segment in segments]
        tables, segments = split[0][1], [segment for segment, _ in split]
    kind = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    entries: dict[int, tuple[str, Sequence[int]]] = {
        256: ("L", [width]),
        257: ("L", [height]),
        258: ("H", [bits] * count),
        259: ("H", [CODES[compression]]),
        262: ("H", [photometric]),
        277: ("H", [count]),
        284: ("H", [2 if planar else 1]),
        339: ("H", [kind] * count),
    }
    if tile:
        entries |= {322: ("L", [tile[1]]), 323: ("L", [tile[0]])}
    else:
        entries |= {278: ("L", [rows_per_strip])}
    if extra:
        entries[338] = ("H", extra)
    if predictor != 1:
        entries[317] = ("H", [predictor])
    if reversed_bits:
        entries[266] = ("H", [2])
    if colour_map is not None:
        entries[320] = ("H", colour_map.ravel().tolist())
    if tables:
        entries[347] = ("B", tables)
    if photometric == 6:
        entries[530] = ("H", [1, 1])
    return _file(entries | (tags or {}), segments, bool(tile), ">" if big_endian else "<")


def _parts(plane: np.ndarray, tile: tuple[int, int] | None, rows: int) -> list[np.ndarray]:
    height, width, _ = plane.shape
    if tile is None:
        return [plane[start : start + rows] for start in range(0, height, rows)]
    tall, wide = tile
    padded = np.pad(plane, ((0, -height % tall), (0, -width % wide), (0, 0)), mode="edge")
    return [
        padded[y : y + tall, x : x + wide]
        for y in range(0, height, tall)
        for x in range(0, width, wide)
    ]


def _packed(
    part: np.ndarray, bits: int, compression: str, predictor: int, big_endian: bool
) -> bytes:
    if compression in ("jpeg", "webp"):
        return _picture(part, compression)
    if compression in ("g3", "g4"):  # of 1 bit
        return _strip(Image.fromarray(part[..., 0] == 1), compression)
    raw = _rows(part, bits, predictor, big_endian)
    if compression == "none":
        return raw
    if "deflate" in compression:
        return zlib.compress(raw)
    if compression == "lzma":
        return lzma.compress(raw)
    return _strip(Image.frombytes("L", (len(raw) // len(part), len(part)), raw), compression)


def _rows(part: np.ndarray, bits: int, predictor: int, big_endian: bool) -> bytes:
    rows = part.reshape(len(part), -1)
    order = ">" if big_endian else "<"
    if bits % 8:
        digits = [[f"{int(value):0{bits}b}" for value in row] for row in rows]
        lines = ["".join(row) for row in digits]
        lines = [line + "0" * (-len(line) % 8) for line in lines]
        return b"".join(int(line, 2).to_bytes(len(line) // 8, "big") for line in lines)
    if predictor == 3:
        shuffled = rows.astype(f">f{bits // 8}").view(np.uint8).reshape(*rows.shape, bits // 8)
        planes = shuffled.transpose(0, 2, 1).reshape(len(rows), -1).astype(np.int16)
        steps = planes.copy()
        steps[:, part.shape[2] :] -= planes[:, : -part.shape[2]]
        return (steps & 255).astype(np.uint8).tobytes()
    if predictor == 2:
        whole = part.view(f"u{bits // 8}")
        steps = whole.copy()
        steps[:, 1:] -= whole[:, :-1]
        return steps.astype(f"{order}u{bits // 8}").tobytes()
    return rows.astype(f"{order}{part.dtype.kind}{bits // 8}").tobytes()


def _picture(part: np.ndarray, compression: str) -> bytes:
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[part.shape[2]]
    picture = Image.frombytes(mode, part.shape[1::-1], np.ascontiguousarray(part).tobytes())
    buffer = io.BytesIO()
    if compression == "webp":
        picture.save(buffer, "WEBP", lossless=True, exact=True)
    else:
        picture.save(buffer, "JPEG", quality=95, subsampling=0)  # YCbCr where it has colours
    return buffer.getvalue()


def _without_tables(jpeg: bytes) -> tuple[bytes, bytes]:
    """A JPEG without its tables, and those as a JPEG of their own."""
    place, tables, others = 2, b"", b""
    while jpeg[place + 1] != 0xDA:  # until the pixels start
        length = 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
        part = jpeg[place : place + length]
        if part[1] in (0xDB, 0xC4):
            tables += part
        else:
            others += part
        place += length
    return jpeg[:2] + others + jpeg[place:], jpeg[:2] + tables + b"\xff\xd9"


def _strip(picture: Image.Image, compression: str) -> bytes:
    """What libtiff makes of a picture as one strip."""
    buffer = io.BytesIO()
    picture.save(buffer, "TIFF", compression=_PILLOW[compression], tiffinfo={278: picture.height})
    with TiffImagePlugin.TiffImageFile(io.BytesIO(buffer.getvalue())) as file:
        (offset,), (length,) = file.tag_v2[273], file.tag_v2[279]
    return buffer.getvalue()[offset : offset + length]


def _file(
    entries: dict[int, tuple[str, Sequence[int]]],
    segments: list[bytes],
    is_tiled: bool,
    order: str,
) -> bytes:
    offsets, lengths = (324, 325) if is_tiled else (273, 279)
    entries = {
        **entries,
        offsets: ("L", [0] * len(segments)),
        lengths: ("L", [len(segment) for segment in segments]),
    }
    start = 8 + 2 + 12 * len(entries) + 4
    size = sum(
        len(values) * struct.calcsize(order + letter)
        for letter, values in entries.values()
        if len(values) * struct.calcsize(order + letter) > 4
    )
    places = np.cumsum([start + size, *(len(segment) for segment in segments)])[:-1]
    entries[offsets] = ("L", places.tolist())
    directory, beyond = struct.pack(f"{order}H", len(entries)), b""
    for code in sorted(entries):
        letter, values = entries[code]
        packed = struct.pack(f"{order}{len(values)}{letter}", *values)
        kind, each = {"H": (3, 1), "L": (4, 1), "B": (7, 1)}[letter]
        directory += struct.pack(f"{order}HHL", code, kind, len(values) // each)
        if len(packed) > 4:
            packed, beyond = struct.pack(f"{order}L", start + len(beyond)), beyond + packed
        directory += packed.ljust(4, b"\0")
    magic = b"II*\0\x08\0\0\0" if order == "<" else b"MM\0*\0\0\0\x08"
    return b"".join((magic, directory, b"\0" * 4, beyond, *segments))
