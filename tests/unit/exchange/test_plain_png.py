"""Which pictures may leave a site: pixels, whole, and of a size that can be looked at."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from fedfms.exchange.pictures import is_plain_png


def png(mode: str = "RGB", size: tuple[int, int] = (37, 23), **options: object) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(data, "PNG", **options)
    return data.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def built(width: int, height: int, rows: bytes, *, bits: int = 8, interlaced: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, interlaced)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows, 9))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "RGBA", "1", "LA"])
def test_pictures_of_every_kind_pass(mode: str) -> None:
    assert is_plain_png(png(mode))
    assert is_plain_png(png(mode, (1, 1)))


def test_one_that_is_built_by_hand_passes_and_its_changes_do_not() -> None:
    rows = (b"\0" + b"\7" * 4) * 3
    right = built(4, 3, rows)
    assert is_plain_png(right)
    for wrong in (
        built(4, 3, rows + b"\0"),  # more behind the last row
        built(4, 3, rows[:-1]),
        built(4, 3, rows, interlaced=1),
        built(4, 3, rows, bits=7),
        built(0, 3, b""),
        right[:-1],
        right + b"x",
        right[:20] + b"\xff" + right[21:],  # a checksum that does not fit
        right.replace(chunk(b"IEND", b""), chunk(b"tEXt", b"a\0name") + chunk(b"IEND", b"")),
        b"\x89PNG\r\n\x1a\n" + right[33:],  # without its header
        b"",
    ):
        assert not is_plain_png(wrong)


def test_a_text_in_it_is_refused() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("PatientName", "x")
    assert not is_plain_png(png(pnginfo=info))


def test_a_picture_that_unpacks_to_gigabytes_is_refused_without_unpacking_it() -> None:
    assert not is_plain_png(built(60_000, 60_000, b"\0" * 1000))
    assert not is_plain_png(built(8192, 8192, b"\0" * 1000))
    assert not is_plain_png(built(4, 3, b"\0" * (200 << 20)))
