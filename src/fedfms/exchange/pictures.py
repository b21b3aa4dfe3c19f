"""What a picture may be that leaves a site: pixels and nothing else."""

from __future__ import annotations

import struct
import zlib

MAX_SIDE = 8192  # pixels; a browser unpacks what a report shows
MAX_UNPACKED = 64 << 20  # bytes of all rows
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}  # pixels; no text, time or profile
_VALUES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a pixel, by colour type


def is_plain_png(picture: bytes) -> bool:
    """Whether these bytes are one whole PNG with chunks for pixels only (PNG specification, 5).

    Its header comes first, each checksum fits, and its rows are those of its header, not
    interlaced: no byte more, and never more than `MAX_UNPACKED` of them.
    """
    if not picture.startswith(_SIGNATURE):
        return False
    at, expected, packed = len(_SIGNATURE), 0, []
    while at + 12 <= len(picture):
        length, kind = struct.unpack_from(">I4s", picture, at)
        content = picture[at + 8 : at + 8 + length]
        at += 12 + length  # length, kind and checksum are 4 bytes each
        if kind not in _CHUNKS or at > len(picture):
            return False
        if zlib.crc32(kind + content) != struct.unpack_from(">I", picture, at - 4)[0]:
            return False
        if (kind == b"IHDR") != (expected == 0):
            return False
        if kind == b"IHDR":
            expected = _bytes_of_rows(content)
            if not 0 < expected <= MAX_UNPACKED:
                return False
        elif kind == b"IDAT":
            packed.append(content)
        elif kind == b"IEND":
            return length == 0 and at == len(picture) and _unpacks_to(b"".join(packed), expected)
    return False


def _bytes_of_rows(header: bytes) -> int:
    """Bytes of the rows that a header promises, each with its filter's; 0 for no such header."""
    if len(header) != 13:
        return 0
    width, height, bits, colour, method, filters, interlaced = struct.unpack(">IIBBBBB", header)
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and bits in (1, 2, 4, 8, 16)):
        return 0
    if colour not in _VALUES or (method, filters, interlaced) != (0, 0, 0):
        return 0
    return int(height * (1 + (width * bits * _VALUES[colour] + 7) // 8))


def _unpacks_to(packed: bytes, expected: int) -> bool:
    """Whether packed rows have exactly so many bytes; no more than one beyond is unpacked."""
    unpacking = zlib.decompressobj()
    try:
        rows = unpacking.decompress(packed, expected + 1)
    except zlib.error:
        return False
    return len(rows) == expected and unpacking.eof and not unpacking.unused_data
