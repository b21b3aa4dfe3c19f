"""Samples of PNG files with 16 bits, of whose colours Pillow keeps only the high byte."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fedfms.data.grid import Array

GRAY, RGB, PALETTE, GRAY_ALPHA, RGBA = 0, 2, 3, 4, 6  # colour types of the standard
_CHANNELS = {GRAY: 1, RGB: 3, PALETTE: 1, GRAY_ALPHA: 2, RGBA: 4}
# first column and row, then steps, of the seven passes of an interlaced picture
_PASSES = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)


@dataclass(frozen=True, slots=True)
class Header:
    """What the chunk IHDR says."""

    width: int
    height: int
    bits: int
    colour_type: int
    is_interlaced: bool


def read_header(data: bytes) -> Header:
    """The header of a PNG file; nonsense raises struct.error or ValueError."""
    if data[12:16] != b"IHDR":
        raise ValueError("no header")
    width, height, bits, colour_type, _, _, interlace = struct.unpack(">LLBBBBB", data[16:29])
    return Header(width, height, bits, colour_type, bool(interlace))


def read_16_bits(data: bytes) -> Array:
    """(H, W, channels) uint16 of a PNG with 16 bits a sample.

    Raises:
        Exception: of any kind, from files that are cut off or hold nonsense. Checksums are the
            caller's to look at.
    """
    header = read_header(data)
    channels = _CHANNELS[header.colour_type]
    packed = b"".join(chunk for name, chunk in _chunks(data) if name == b"IDAT")
    stream = np.frombuffer(zlib.decompress(packed), np.uint8)
    values = np.zeros((header.height, header.width, channels), np.uint16)
    start = 0
    for column, row, across, down in _PASSES if header.is_interlaced else ((0, 0, 1, 1),):
        part = values[row::down, column::across]
        rows, columns = part.shape[:2]
        if not rows or not columns:
            continue
        size = 1 + columns * channels * 2
        filtered = stream[start : start + rows * size].reshape(rows, size)
        start += rows * size
        raw = _unfiltered(filtered[:, 0], filtered[:, 1:].reshape(rows, columns, channels * 2))
        part[:] = raw.view(">u2")
    return values


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = 8
    while place + 8 <= len(data):
        (length,) = struct.unpack(">L", data[place : place + 4])
        yield data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        place += 12 + length


def _unfiltered(filters: Array, filtered: Array) -> Array:
    """Undo the filter of each row: (H,) filter types and (H, W, bytes) uint8 to the same shape.

    A byte needs its neighbours to the left, above, and above left. So all of a diagonal can be
    undone at once, one diagonal after the other.
    """
    if filters.max() > 4:
        raise ValueError("unknown filter")
    height, width, _ = filtered.shape
    raw = np.zeros((height + 1, width + 1, filtered.shape[2]), np.int16)  # a border of zeros
    for diagonal in range(height + width - 1):
        rows = np.arange(max(0, diagonal - width + 1), min(height, diagonal + 1))
        columns = diagonal - rows
        left, above = raw[rows + 1, columns], raw[rows, columns + 1]
        corner = raw[rows, columns]
        kind = filters[rows][:, None]
        estimate = left + above - corner
        by_left, by_above = np.abs(estimate - left), np.abs(estimate - above)
        by_corner = np.abs(estimate - corner)
        paeth = np.where(
            (by_left <= by_above) & (by_left <= by_corner),
            left,
            np.where(by_above <= by_corner, above, corner),
        )
        guess = np.select(
            [kind == 1, kind == 2, kind == 3, kind == 4],
            [left, above, (left + above) // 2, paeth],
            0,
        )
        raw[rows + 1, columns + 1] = (filtered[rows, columns] + guess) & 255
    return np.ascontiguousarray(raw[1:, 1:].astype(np.uint8))
