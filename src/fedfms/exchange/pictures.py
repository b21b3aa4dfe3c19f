"""What a picture may be that leaves a site: pixels and nothing else."""

from __future__ import annotations

import struct

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}  # pixels; no text, time or profile


def is_plain_png(picture: bytes) -> bool:
    """Whether these bytes are one whole PNG with chunks for pixels only (PNG specification, 5)."""
    if not picture.startswith(_SIGNATURE):
        return False
    at = len(_SIGNATURE)
    while at + 12 <= len(picture):
        length, kind = struct.unpack(">I4s", picture[at : at + 8])
        if kind not in _CHUNKS:
            return False
        at += 12 + length  # length, kind and checksum are 4 bytes each
        if kind == b"IEND":
            return bool(length == 0 and at == len(picture))
    return False
