"""A picture is what was stored, or refused by name; compression and layout change nothing.

The files are written by hand (tiff_files.py) or by Pillow; what should come out is computed here
from what was written.
"""

import io
import itertools
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from site_files import disk, picture, site_config
from tiff_files import tiff_bytes

from fedfms.data.check import check_data
from fedfms.data.content import read_bytes
from fedfms.data.formats import Stored, read_image, read_label
from fedfms.data.manifest import find_cases
from fedfms.data.prepare import prepare_cases
from fedfms.errors import SiteDataError

HEIGHT, WIDTH = 21, 37
RANDOM = np.random.default_rng(5)
COLOURS = RANDOM.integers(0, 256, (3, 256)).astype(np.uint16) * 257
LOSSLESS = ["none", "lzw", "deflate", "old deflate", "packbits", "lzma", "zstd"]
WHITE_IS_ZERO, GRAY, RGB, PALETTE, CMYK, YCBCR, LAB = 0, 1, 2, 3, 5, 6, 8
MASK = disk((HEIGHT, WIDTH), 7, 1)


def read(path: Path, data: bytes, *, label: bool = False, rgb: bool = False) -> Stored:
    path.write_bytes(data)
    site = site_config(path.parent, "image", channels="rgb" if rgb else "gray")
    reader = read_label if label else read_image
    return reader(path, read_bytes(path, site), site)


def refused(path: Path, data: bytes, **options: bool) -> SiteDataError:
    with pytest.raises(SiteDataError) as caught:
        read(path, data, **options)
    assert caught.value.fix
    assert path.name in caught.value.problem
    return caught.value


def stored(bits: int, channels: int, kind: str = "u", seed: int = 1) -> np.ndarray:
    """(H, W, channels) of any values that so many bits hold."""
    random = np.random.default_rng(seed)
    if kind == "f":
        return random.normal(0, 100, (HEIGHT, WIDTH, channels)).astype(f"f{bits // 8}")
    low, high = (0, 2**bits) if kind == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    values = random.integers(low, high, (HEIGHT, WIDTH, channels), dtype=np.int64)
    return values.astype(f"{kind}{(bits + 7) // 8 if bits <= 16 else 4}")


def as_pillow(mode: str, samples: np.ndarray) -> np.ndarray:
    """RGB of 8-bit samples in another colour space, by Pillow."""
    return np.asarray(Image.fromarray(samples, mode).convert("RGB"))


def seen(photometric: int, bits: int, samples: np.ndarray) -> np.ndarray:
    """(H, W, 1 or 3) that an image with these samples is."""
    if photometric == PALETTE:
        return np.moveaxis(COLOURS[:, : 2**bits][:, samples[..., 0]] // 257, 0, 2)
    modes = {CMYK: "CMYK", YCBCR: "YCbCr", LAB: "LAB"}
    if photometric in modes:
        return as_pillow(modes[photometric], samples)
    white = 2**bits - 1
    values = white - samples.astype(np.int64) if photometric == WHITE_IS_ZERO else samples
    return np.rint(values * 255.0 / white) if bits < 8 else values


KINDS = [
    *((GRAY, bits, "u", 1) for bits in (1, 2, 4, 8, 12, 16, 32)),
    *((GRAY, bits, "i", 1) for bits in (8, 16, 32)),
    *((GRAY, bits, "f", 1) for bits in (16, 32, 64)),
    *((WHITE_IS_ZERO, bits, "u", 1) for bits in (1, 2, 4, 8, 12, 16)),
    *((PALETTE, bits, "u", 1) for bits in (1, 2, 4, 8)),
    *((RGB, bits, kind, 3) for bits, kind in ((8, "u"), (12, "u"), (16, "u"), (32, "f"))),
    *((photometric, 8, "u", 3) for photometric in (YCBCR, LAB)),
    (CMYK, 8, "u", 4),
]
LAYOUTS = [
    {"tile": tile, "planar": planar, "big_endian": big}
    for tile, planar, big in itertools.product((None, (16, 32)), (False, True), (False, True))
]


@pytest.mark.parametrize("compression", LOSSLESS)
@pytest.mark.parametrize(
    ("photometric", "bits", "kind", "channels"),
    KINDS,
    ids=lambda value: str(value),
)
def test_a_tiff_is_its_samples_whatever_the_layout_and_compression(
    tmp_path, photometric, bits, kind, channels, compression
):
    samples = stored(bits, channels, kind)
    wanted = seen(photometric, bits, samples).astype(np.float32)
    options = {"colour_map": COLOURS[:, : 2**bits]} if photometric == PALETTE else {}
    for layout in LAYOUTS:
        data = tiff_bytes(samples, photometric, bits, compression, **layout, **options)
        got = read(tmp_path / "p.tif", data, rgb=True)
        np.testing.assert_array_equal(got.values[0], np.broadcast_to(wanted, got.values[0].shape))
        assert not got.notices
    assert f"{bits} bit" in got.kind


@pytest.mark.parametrize(
    ("photometric", "sample", "colour"),
    [  # of CIE 1976 L*a*b* with D50 (L in 255ths), of ITU-R BT.601, and of plain subtraction
        (LAB, (131, 30, 37), (180, 100, 60)),
        (LAB, (100, 9, 256 - 47), (60, 90, 170)),
        (LAB, (153, 256 - 35, 34), (90, 160, 80)),
        (LAB, (137, 0, 0), (128, 128, 128)),
        (YCBCR, (76, 85, 255), (254, 0, 0)),
        (YCBCR, (200, 128, 128), (200, 200, 200)),
        (CMYK, (215, 40, 235, 0), (40, 215, 20)),
        (CMYK, (0, 0, 255, 128), (127, 127, 0)),
    ],
)
def test_colour_spaces_are_those_of_the_standards(tmp_path, photometric, sample, colour):
    samples = np.broadcast_to(np.array(sample, np.uint8), (9, 9, len(sample))).copy()
    samples[0] = 0  # not one colour all over
    got = read(tmp_path / "p.tif", tiff_bytes(samples, photometric, 8), rgb=True).values[0]
    np.testing.assert_allclose(got[5, 5], colour, atol=3)


@pytest.mark.parametrize(
    ("photometric", "bits", "compression"),
    [
        *itertools.product((WHITE_IS_ZERO, GRAY, PALETTE), (1, 4, 8), LOSSLESS),
        *itertools.product((WHITE_IS_ZERO, GRAY), (1,), ("g3", "g4")),
    ],
)
def test_a_label_is_the_same_whatever_the_compression(tmp_path, photometric, bits, compression):
    values = MASK * (2**bits - 1 if photometric == WHITE_IS_ZERO else 1)
    samples = 2**bits - 1 - values if photometric == WHITE_IS_ZERO else values
    options = {"colour_map": COLOURS[:, : 2**bits]} if photometric == PALETTE else {}
    data = tiff_bytes(
        samples[..., None].astype(np.uint8), photometric, bits, compression, **options
    )
    got = read(tmp_path / "m.tif", data, label=True)
    np.testing.assert_array_equal(got.values[0], values)  # white is foreground, black is 0
    np.testing.assert_array_equal(got.values[0] > 0, MASK > 0)


def test_a_bool_label_of_tifffile_is_refused_since_it_may_mean_both(tmp_path):
    # tifffile marks every bool array "0 is white" and leaves it as it is: for viewers it is turned
    tifffile.imwrite(tmp_path / "m.tif", MASK > 0)
    error = refused(tmp_path / "m.tif", (tmp_path / "m.tif").read_bytes(), label=True)
    assert error.code == "white-is-zero"
    assert "astype('uint8')" in error.fix
    tifffile.imwrite(tmp_path / "n.tif", MASK)
    got = read(tmp_path / "n.tif", (tmp_path / "n.tif").read_bytes(), label=True)
    np.testing.assert_array_equal(got.values[0], MASK)


@pytest.mark.parametrize("compression", ["lzw", "deflate", "lzma", "zstd"])
@pytest.mark.parametrize(
    ("bits", "kind", "predictor"),
    [(8, "u", 2), (16, "u", 2), (16, "i", 2), (32, "u", 2), (16, "f", 3), (32, "f", 3)],
)
def test_predictors_are_undone(tmp_path, compression, bits, kind, predictor):
    for channels, layout in itertools.product((1, 3), LAYOUTS):
        samples = stored(bits, channels, kind)
        data = tiff_bytes(
            samples,
            RGB if channels == 3 else GRAY,
            bits,
            compression,
            predictor=predictor,
            **layout,
        )
        got = read(tmp_path / "p.tif", data, rgb=True).values[0]
        np.testing.assert_array_equal(got, np.broadcast_to(samples.astype(np.float32), got.shape))


def test_reversed_bits_are_turned(tmp_path):
    for bits, compression in itertools.product((1, 4, 8), ("none", "lzw", "deflate", "packbits")):
        samples = stored(bits, 1)
        data = tiff_bytes(samples, GRAY, bits, compression, reversed_bits=True)
        got = read(tmp_path / "p.tif", data).values[0]
        np.testing.assert_array_equal(got, seen(GRAY, bits, samples)[..., 0])
    data = tiff_bytes(MASK[..., None], GRAY, 1, "g4", reversed_bits=True)
    np.testing.assert_array_equal(read(tmp_path / "m.tif", data, label=True).values[0], MASK)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_jpeg_in_tiff_is_what_pillow_decodes(tmp_path, mode):
    channels = {"L": (), "RGBA": (4,), "CMYK": (4,)}.get(mode, (3,))
    buffer = io.BytesIO()
    Image.fromarray(picture(1, (60, 70, *channels)), mode).save(buffer, "TIFF", compression="jpeg")
    wanted = np.asarray(Image.open(buffer).convert("RGB"))
    got = read(tmp_path / "p.tif", buffer.getvalue(), rgb=True).values[0]
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("shared_tables", [False, True])
@pytest.mark.parametrize("tile", [None, (32, 48)])
def test_jpeg_and_webp_in_strips_and_tiles(tmp_path, tile, shared_tables):
    smooth = np.add.outer(np.arange(60) * 2, np.arange(70))[..., None] + np.array([0, 9, 30])
    samples = smooth.astype(np.uint8)
    layout = {"tile": tile, "rows_per_strip": 16}
    data = tiff_bytes(samples, YCBCR, 8, "jpeg", shared_tables=shared_tables, **layout)
    got = read(tmp_path / "p.tif", data, rgb=True)
    np.testing.assert_allclose(got.values[0], samples, atol=6)
    assert got.kind == "TIFF, RGB, 8 bit, JPEG"
    np.testing.assert_array_equal(got.values[0], np.asarray(Image.open(tmp_path / "p.tif")))
    data = tiff_bytes(samples, RGB, 8, "webp", **layout)
    np.testing.assert_array_equal(read(tmp_path / "p.tif", data, rgb=True).values[0], samples)


def test_labels_in_lossy_compressions_are_refused_and_lossless_webp_is_not(tmp_path):
    path = tmp_path / "m.tif"
    jpeg = tiff_bytes(MASK[..., None] * np.uint8(255), GRAY, 8, "jpeg")
    assert refused(path, jpeg, label=True).code == "lossy-labels"
    read(path, jpeg)  # an image may be
    flat = np.repeat(MASK[..., None], 3, axis=2)
    lossless = tiff_bytes(flat, RGB, 8, "webp")
    np.testing.assert_array_equal(read(path, lossless, label=True).values[0], MASK)
    lossy = lossless.replace(b"VP8L", b"VP8 ")
    assert refused(path, lossy, label=True).code in ("lossy-labels", "damaged-file")


# ------------------------------------------------------------------------- channels beyond colours

CONSTANT = np.full((HEIGHT, WIDTH, 1), 200, np.uint8)
VARYING = np.repeat(stored(8, 1, seed=9), 1, axis=2)


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("photometric", [GRAY, RGB, CMYK])
def test_a_channel_that_nobody_calls_alpha_is_refused_unless_it_says_nothing(
    tmp_path, photometric, planar
):
    colours = stored(8, {GRAY: 1, RGB: 3, CMYK: 4}[photometric])
    wanted = seen(photometric, 8, colours)

    def file(other: np.ndarray, *extra: int) -> bytes:
        samples = np.concatenate([colours, other], axis=2)
        return tiff_bytes(samples, photometric, 8, "lzw", extra=extra, planar=planar)

    path = tmp_path / "p.tif"
    for extra in ((), (0,)):  # not said, or said to be unspecified
        error = refused(path, file(VARYING, *extra))
        assert error.code == "several-channels"
        assert f"has {colours.shape[2] + 1} channels" in error.problem
        assert f"has {colours.shape[2]}, and" in error.problem
        got = read(path, file(CONSTANT, *extra), rgb=True)
        np.testing.assert_array_equal(got.values[0], np.broadcast_to(wanted, got.values[0].shape))
        assert not got.notices
    two = np.concatenate([VARYING, VARYING], axis=2)
    assert refused(path, file(two, 2, 0)).code == "several-channels"
    opaque = read(path, file(CONSTANT, 2), rgb=True)
    assert not opaque.notices
    transparent = read(path, file(VARYING, 2), rgb=True)
    np.testing.assert_array_equal(transparent.values, opaque.values)
    assert [notice.code for notice in transparent.notices] == ["alpha-not-constant"]
    assert refused(path, file(VARYING, 1)).code == "cannot-be-read-here"  # multiplied by alpha


def png_file(header: tuple[int, ...], rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of a header, filtered rows, and chunks that stand before the pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", *header))
        + b"".join(chunk(*one) for one in chunks)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def png_bytes(values: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("alpha", ["constant", "the mask", "as the values", "soft"])
def test_the_alpha_of_a_label_must_say_nothing_of_its_own(tmp_path, ending, alpha):
    values = np.full_like(MASK, 255) if alpha == "the mask" else MASK * np.uint8(255)
    transparency = {
        "constant": np.full_like(MASK, 255),
        "the mask": MASK * np.uint8(255),
        "as the values": MASK * np.uint8(255),
        "soft": np.where(MASK, picture(3, MASK.shape) | 1, 0).astype(np.uint8),
    }[alpha]
    for channels in (1, 3):
        samples = np.dstack([*[values] * channels, transparency])
        data = (
            png_bytes(samples)
            if ending == "png"
            else tiff_bytes(samples, GRAY if channels == 1 else RGB, 8, "deflate", extra=(2,))
        )
        path = tmp_path / f"m.{ending}"
        if alpha in ("the mask", "soft"):
            error = refused(path, data, label=True)
            assert error.code == "label-in-alpha"
            assert "alpha extract" in error.fix
        else:
            np.testing.assert_array_equal(read(path, data, label=True).values[0], values)


# ---------------------------------------------------------------------------------------------- PNG


def filtered(values: np.ndarray, filters: list[int]) -> bytes:
    """(H, W, S) uint16 as PNG rows, each with its own filter, byte by byte as the standard says."""
    raw = values.astype(">u2").view(np.uint8).reshape(len(values), -1).astype(int)
    step = 2 * values.shape[2]
    rows = b""
    for y, kind in zip(range(len(raw)), itertools.cycle(filters), strict=False):
        line = bytearray([kind])
        for x in range(raw.shape[1]):
            left = raw[y, x - step] if x >= step else 0
            above = raw[y - 1, x] if y else 0
            corner = raw[y - 1, x - step] if y and x >= step else 0
            near = min((left, above, corner), key=lambda v: abs(left + above - corner - v))
            guess = [0, left, above, (left + above) // 2, near][kind]
            line.append((raw[y, x] - guess) & 255)
        rows += bytes(line)
    return rows


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
@pytest.mark.parametrize("filters", [[0], [1], [2], [3], [4], [4, 2, 0, 3, 1]])
def test_no_byte_of_a_16_bit_png_is_lost(tmp_path, colour_type, channels, filters):
    smooth = np.add.outer(np.arange(HEIGHT) * 900, np.arange(WIDTH) * 700)[..., None]
    values = (smooth + RANDOM.integers(0, 999, (HEIGHT, WIDTH, channels))).astype(np.uint16)
    header = (WIDTH, HEIGHT, 16, colour_type, 0, 0, 0)
    got = read(tmp_path / "p.png", png_file(header, filtered(values, filters)), rgb=True)
    colours = values[..., :3] if channels > 2 else values[..., :1]
    np.testing.assert_array_equal(got.values[0], np.broadcast_to(colours, got.values[0].shape))
    assert bool(got.notices) == (channels in (2, 4))  # its alpha varies


def test_interlaced_16_bit_png(tmp_path):
    values = stored(16, 3)
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2)]
    parts = [values[y::down, x::across] for x, y, across, down in [*passes, (0, 1, 1, 2)]]
    rows = b"".join(filtered(part, [4, 1]) for part in parts)
    header = (WIDTH, HEIGHT, 16, 2, 0, 0, 1)
    got = read(tmp_path / "p.png", png_file(header, rows), rgb=True)
    np.testing.assert_array_equal(got.values[0], values)
    one = png_file((1, 1, 16, 2, 0, 0, 1), filtered(values[:1, :1], [1]))  # six empty passes
    assert refused(tmp_path / "p.png", one).code == "constant-image"


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_gray_png_of_any_depth_is_a_share_of_white_in_images_and_a_number_in_labels(tmp_path, bits):
    values = np.arange(32).reshape(4, 8) % 2**bits
    if bits == 16:
        values = values * 1000
    rows = b"".join(
        b"\0" + int("".join(f"{value:0{bits}b}" for value in row), 2).to_bytes(bits, "big")
        for row in values
    )
    data = png_file((8, 4, bits, 0, 0, 0, 0), rows)
    drawn = read(tmp_path / "m.png", data, label=True)
    np.testing.assert_array_equal(drawn.values[0], values)
    assert drawn.kind == f"PNG, gray, {bits} bit"
    share = values * 255 // (2**bits - 1) if bits < 8 else values
    np.testing.assert_array_equal(read(tmp_path / "p.png", data).values[0], share)


def test_a_transparent_value_or_index_says_nothing_that_the_value_does_not(tmp_path):
    gray = png_bytes(MASK, transparency=0)
    drawn = read(tmp_path / "m.png", gray, label=True)
    np.testing.assert_array_equal(drawn.values[0], MASK)
    got = read(tmp_path / "p.png", gray)
    np.testing.assert_array_equal(got.values[0], MASK)
    assert [notice.code for notice in got.notices] == ["alpha-not-constant"]


def test_what_png_says_of_screens_changes_no_value(tmp_path):
    values = picture(4, (4, 8))
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    extras = [(b"gAMA", struct.pack(">I", 20000)), (b"sBIT", b"\x05"), (b"bKGD", b"\0\x07")]
    got = read(tmp_path / "p.png", png_file((8, 4, 8, 0, 0, 0, 0), rows, *extras))
    np.testing.assert_array_equal(got.values[0], values)


def test_animated_png_is_refused(tmp_path):
    buffer = io.BytesIO()
    frames = [Image.fromarray(picture(seed)) for seed in (1, 2)]
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    assert refused(tmp_path / "p.png", buffer.getvalue()).code == "many-pages"


# ---------------------------------------------------------------------------------------- palettes


def palette_png(
    indices: np.ndarray, colours: list[tuple[int, int, int]], **options: object
) -> bytes:
    stored = Image.fromarray(indices.astype(np.uint8), "P")
    stored.putpalette([number for colour in colours for number in colour])
    buffer = io.BytesIO()
    stored.save(buffer, "PNG", **options)
    return buffer.getvalue()


BLACK, WHITE, RED, GREEN = (0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0)


@pytest.mark.parametrize(
    ("first", "other", "differ"),
    [
        ((MASK, [BLACK, RED], {}), (MASK, [BLACK, RED], {}), False),
        ((MASK, [BLACK, RED], {}), (1 - MASK, [RED, BLACK], {}), True),
        ((MASK, [BLACK, RED], {}), (MASK, [BLACK, RED, GREEN], {}), False),  # one more, not used
        ((MASK, [BLACK, RED], {}), (MASK * 0, [RED], {}), True),  # red all over
        ((MASK, [BLACK, RED, RED], {}), (MASK * 2, [BLACK, RED, RED], {}), False),
        ((MASK, [BLACK, RED, GREEN], {}), (MASK * 2, [BLACK, GREEN, RED], {}), True),
        ((MASK, [BLACK, RED], {}), (MASK, [BLACK, RED], {"transparency": 0}), False),
        (
            (MASK, [WHITE, WHITE], {"transparency": b"\0\xff"}),
            (1 - MASK, [WHITE, WHITE], {"transparency": b"\xff\0"}),
            True,
        ),
    ],
)
def test_palettes_of_label_files_must_agree(tmp_path, first, other, differ):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for number in range(4):
        Image.fromarray(picture(number, MASK.shape)).save(tmp_path / f"images/{number}.png")
        indices, colours, options = first if number != 2 else other
        path = tmp_path / f"labels/{number}.png"
        path.write_bytes(palette_png(indices, colours, **options))
    site = site_config(tmp_path, "image", classes={"lesion": (1, 2)}, cache=tmp_path / "cache")
    found = [finding for finding in check_data(site) if finding.code == "palettes-differ"]
    assert bool(found) == differ
    if not differ:
        assert len(prepare_cases(find_cases(site), site)) == 4
        return
    assert "labels/2.png" in found[0].problem  # and the other file
    assert found[0].problem.count("labels/") == 2
    for _ in range(2):  # read anew, and from the cache
        with pytest.raises(SiteDataError, match="one palette") as caught:
            prepare_cases(find_cases(site), site)
        assert caught.value.code == "palettes-differ"


def test_a_gray_label_is_compared_with_palettes_by_its_black(tmp_path):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for number in range(4):
        Image.fromarray(picture(number, MASK.shape)).save(tmp_path / f"images/{number}.png")
        Image.fromarray(MASK).save(tmp_path / f"labels/{number}.png")
    turned = palette_png(1 - MASK, [WHITE, BLACK])
    (tmp_path / "labels/3.png").write_bytes(turned)
    site = site_config(tmp_path, "image")
    assert "palettes-differ" in [finding.code for finding in check_data(site)]
    (tmp_path / "labels/3.png").write_bytes(palette_png(MASK, [BLACK, RED]))
    assert "palettes-differ" not in [finding.code for finding in check_data(site)]


# ----------------------------------------------------------------------- whole files, and cut ones


def unread(**changes: object) -> bytes:
    values: dict[str, object] = {"samples": stored(8, 1), "photometric": GRAY, "bits": 8}
    return tiff_bytes(**{**values, **changes})


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (unread(tags={259: ("H", [34887])}), "LERC"),
        (unread(tags={259: ("H", [33005])}), "JPEG 2000"),
        (unread(tags={259: ("H", [12345])}), "compression 12345"),
        (unread(tags={262: ("H", [32803])}), "PhotometricInterpretation 32803"),
        (unread(tags={339: ("H", [6])}), "complex numbers"),
        (unread(samples=stored(4, 3), photometric=RGB, bits=4), "3 channels of 4 bits"),
        (unread(samples=stored(16, 4), photometric=CMYK, bits=16), "CMYK with 16 bits"),
        (unread(samples=stored(8, 3), photometric=9), "PhotometricInterpretation 9"),
        (unread(samples=stored(8, 4), photometric=CMYK, tags={332: ("H", [2])}), "inks"),
        (
            unread(samples=stored(8, 3), photometric=YCBCR, tags={530: ("H", [2, 2])}),
            "fewer colours than pixels",
        ),
        (unread(samples=stored(8, 3), photometric=RGB, tags={258: ("H", [8, 8, 4])}), "depth"),
        (unread(samples=stored(16, 1, "i"), photometric=WHITE_IS_ZERO, bits=16), "0 is white"),
        (unread(compression="lzw", predictor=1, tags={317: ("H", [3])}), "predictor for floats"),
        (unread(photometric=PALETTE), "has none (ColorMap)"),
    ],
)
def test_a_whole_tiff_that_is_not_read_is_told_so_and_not_called_damaged(tmp_path, data, says):
    error = refused(tmp_path / "p.tif", data)
    assert error.code == "cannot-be-read-here"
    assert says in error.problem


@pytest.mark.parametrize("compression", LOSSLESS)
def test_a_cut_tiff_is_damaged(tmp_path, compression):
    data = tiff_bytes(stored(8, 3), RGB, 8, compression)
    assert refused(tmp_path / "p.tif", data[: len(data) // 2]).code == "damaged-file"


def test_strips_that_lie_nowhere_are_not_read_as_black(tmp_path):
    data = bytearray(unread(compression="lzw"))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        offsets = file.pages[0].tags["StripOffsets"].valueoffset
    data[offsets : offsets + 4] = bytes(4)
    error = refused(tmp_path / "p.tif", bytes(data))
    assert (error.code, "empty strips" in error.problem) == ("cannot-be-read-here", True)


@pytest.mark.parametrize("tile", [None, (32, 48)])
def test_planes_in_jpeg_are_what_was_stored(tmp_path, tile):
    smooth = np.add.outer(np.arange(60) * 2, np.arange(70))[..., None] + np.array([0, 9, 30])
    samples = smooth.astype(np.uint8)
    data = tiff_bytes(samples, RGB, 8, "jpeg", tile=tile, planar=True, rows_per_strip=16)
    got = read(tmp_path / "p.tif", data, rgb=True).values[0]
    np.testing.assert_allclose(got, samples, atol=6)


def test_nonsense_ends_in_one_sentence(tmp_path):
    random = np.random.default_rng(7)
    smooth = np.add.outer(np.arange(HEIGHT), np.arange(WIDTH))[..., None].astype(np.uint8)
    whole = [
        *(tiff_bytes(stored(8, 3), RGB, 8, compression) for compression in LOSSLESS),
        tiff_bytes(MASK[..., None], GRAY, 1, "g4"),
        tiff_bytes(np.repeat(smooth, 3, 2), YCBCR, 8, "jpeg", tile=(16, 32)),
        tiff_bytes(np.repeat(smooth, 3, 2), RGB, 8, "webp"),
        png_file((WIDTH, HEIGHT, 16, 2, 0, 0, 0), filtered(stored(16, 3), [4])),
    ]
    for data, _ in itertools.product(whole, range(20)):
        nonsense = bytearray(data[: random.integers(8, len(data) + 1)])
        for place in random.integers(8, len(nonsense), 3) if len(nonsense) > 8 else ():
            nonsense[place] ^= 1 << random.integers(8)
        path = tmp_path / ("p.png" if data.startswith(b"\x89PNG") else "p.tif")
        try:
            read(path, bytes(nonsense))
        except SiteDataError as error:
            assert path.name in error.problem


@pytest.mark.parametrize(
    "options", [{"imagej": True}, {"truncate": True}], ids=["ImageJ", "shaped"]
)
def test_a_stack_behind_one_page_is_refused(tmp_path, options):
    values = picture(1, (3, 24, 32))
    tifffile.imwrite(tmp_path / "p.tif", values, photometric="minisblack", **options)
    error = refused(tmp_path / "p.tif", (tmp_path / "p.tif").read_bytes())
    assert (error.code, "has 3 pages" in error.problem) == ("many-pages", True)
    tifffile.imwrite(tmp_path / "p.tif", values[0], photometric="minisblack", **options)
    got = read(tmp_path / "p.tif", (tmp_path / "p.tif").read_bytes())
    np.testing.assert_array_equal(got.values[0], values[0])


@pytest.mark.parametrize("ending", ["png", "jpg", "tif"])
def test_large_pictures_are_read_without_a_warning_and_huge_ones_refused_by_size(tmp_path, ending):
    values = np.zeros((2000, 2000), np.uint8)
    values[500:900, 300:700] = 200
    path = tmp_path / f"p.{ending}"
    Image.fromarray(values).save(path)
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = 1000  # of which Pillow warns; twice that it refuses
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = read(path, path.read_bytes()).values[0]
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    np.testing.assert_allclose(got, values, atol=40)  # JPEG rings at the edges
    data = bytearray(path.read_bytes())
    if ending == "png":
        data[16:24] = struct.pack(">II", 30000, 20000)
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    elif ending == "jpg":
        frame = data.index(b"\xff\xc0")
        data[frame + 5 : frame + 9] = struct.pack(">HH", 20000, 30000)
    else:
        data = bytearray(unread(tags={256: ("L", [30000]), 257: ("L", [20000])}))
    error = refused(path, bytes(data))
    assert error.code == "picture-too-large"
    assert "30000 x 20000 pixels, 600 million" in error.problem


def test_a_12_bit_jpeg_is_not_called_damaged(tmp_path):
    Image.fromarray(picture(1)).save(tmp_path / "p.jpg")
    data = bytearray((tmp_path / "p.jpg").read_bytes())
    data[data.index(b"\xff\xc0") + 4] = 12
    assert refused(tmp_path / "p.jpg", bytes(data)).code == "cannot-be-read-here"


@pytest.mark.parametrize("transparent", [0, 1])
def test_in_a_label_of_1_bit_the_mask_may_not_be_what_cannot_be_seen(tmp_path, transparent):
    path = tmp_path / "m.png"
    Image.fromarray(MASK.astype(bool)).save(path, transparency=transparent)
    if transparent == 0:
        assert np.array_equal(read(path, path.read_bytes(), label=True).values[0], MASK)
    else:
        assert refused(path, path.read_bytes(), label=True).code == "label-in-alpha"
