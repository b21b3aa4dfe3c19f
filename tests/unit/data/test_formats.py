"""Every format against nibabel, numpy and what was written; and every way a file can be bad."""

import io
import itertools
import os
import struct
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from PIL import Image
from site_files import cut, disk, gunzip, picture, site_config, write_volume

from fedfms.data.content import read_bytes
from fedfms.data.formats import Stored, read_image, read_label
from fedfms.errors import SiteDataError

# the planes of a canonical (RAS) volume as (slices, rows, columns); rows and columns are reversed
PLANES = {"axial": (2, 1, 0), "coronal": (1, 2, 0), "sagittal": (0, 2, 1)}


def image(path: Path, **changes: object) -> Stored:
    site = site_config(path.parent, **{"format": "nifti", **changes})
    return read_image(path, read_bytes(path, site), site)


def label(path: Path, **changes: object) -> Stored:
    site = site_config(path.parent, **{"format": "nifti", **changes})
    return read_label(path, read_bytes(path, site), site)


def refused(read, path: Path, **changes: object) -> SiteDataError:
    with pytest.raises(SiteDataError) as caught:
        read(path, **changes)
    assert caught.value.fix
    assert path.name not in caught.value.public
    return caught.value


def oblique(spacing: tuple[float, float, float], degrees: float = 0.0) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.diag(spacing)
    affine[:3, 3] = (12.0, -7.5, 100.25)
    return affine


# ------------------------------------------------------------------------------------------- NIfTI

ORIENTATIONS = [
    "".join(order)
    for axes in itertools.permutations(("LR", "PA", "IS"))
    for order in itertools.product(*axes)
]


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_any_stored_orientation_gives_the_same_slices(tmp_path, orientation, plane):
    canonical = nibabel.Nifti1Image(picture(1, (5, 7, 4)).astype(np.int16), oblique((1.5, 0.7, 4)))
    turn = ornt_transform(io_orientation(canonical.affine), axcodes2ornt(orientation))
    nibabel.save(canonical.as_reoriented(turn), tmp_path / "v.nii.gz")
    got = image(tmp_path / "v.nii.gz", plane=plane)
    wanted = np.asanyarray(canonical.dataobj).transpose(PLANES[plane])[:, ::-1, ::-1]
    np.testing.assert_array_equal(got.values, wanted)
    spacing = np.array([1.5, 0.7, 4])[list(PLANES[plane])]
    np.testing.assert_allclose(got.spacing, spacing, rtol=1e-5)
    assert got.is_volume


@pytest.mark.parametrize("degrees", [-40, 13, 80, 170])
def test_oblique_volumes_are_read_as_nibabel_turns_them(tmp_path, degrees):
    write_volume(tmp_path / "v.nii", picture(2, (5, 7, 4)), oblique((0.5, 0.5, 3.0), degrees))
    canonical = nibabel.as_closest_canonical(nibabel.load(tmp_path / "v.nii"))
    got = image(tmp_path / "v.nii")
    wanted = canonical.get_fdata().transpose(PLANES["axial"])[:, ::-1, ::-1]
    np.testing.assert_array_equal(got.values, wanted)
    assert got.cut is not None
    np.testing.assert_allclose(got.cut.affine, canonical.affine, atol=1e-5)


@pytest.mark.parametrize(
    "dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "f4", "f8", ">i2", ">f4"]
)
def test_any_number_type_is_read(tmp_path, dtype):
    values = np.random.default_rng(3).integers(0, 100, (5, 7, 4)).astype(dtype)
    header = nibabel.Nifti1Header(endianness=">" if dtype.startswith(">") else "<")
    header.set_data_dtype(dtype)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4), header), tmp_path / "v.nii.gz")
    got = image(tmp_path / "v.nii.gz").values
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, values.transpose(2, 1, 0)[:, ::-1, ::-1].astype("f4"))
    drawn = label(tmp_path / "v.nii.gz").values
    assert drawn.dtype == np.int16
    np.testing.assert_array_equal(drawn, got)


def test_slope_and_intercept_are_applied(tmp_path):
    values = picture(4, (5, 7, 4)).astype(np.int16)
    stored = nibabel.Nifti1Image(values, np.eye(4))
    stored.header.set_slope_inter(0.25, -1024)
    nibabel.save(stored, tmp_path / "v.nii.gz")
    raw = nibabel.load(tmp_path / "v.nii.gz").dataobj.get_unscaled()
    got = image(tmp_path / "v.nii.gz").values
    wanted = raw.transpose(2, 1, 0)[:, ::-1, ::-1] * 0.25 - 1024
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_nifti_2_is_read(tmp_path):
    values = picture(5, (5, 7, 4))
    nibabel.save(nibabel.Nifti2Image(values, np.eye(4)), tmp_path / "v.nii.gz")
    got = image(tmp_path / "v.nii.gz").values
    np.testing.assert_array_equal(got, values.transpose(2, 1, 0)[:, ::-1, ::-1])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_single_slice_is_cut_as_it_was_taken(tmp_path, axis):
    shape = [5, 7, 9]
    shape[axis] = 1
    write_volume(tmp_path / "v.nii.gz", picture(6, tuple(shape)))
    for plane in PLANES:  # whatever site.yml says
        got = image(tmp_path / "v.nii.gz", plane=plane)
        assert len(got.values) == 1
        assert sorted(got.values.shape[1:]) == sorted(size for size in shape if size > 1)


def test_two_dimensions_and_a_trailing_fourth_are_volumes_too(tmp_path):
    flat = picture(7, (5, 7))
    write_volume(tmp_path / "flat.nii.gz", flat)
    np.testing.assert_array_equal(image(tmp_path / "flat.nii.gz").values[0], flat.T[::-1, ::-1])
    deep = picture(8, (5, 7, 4, 1))
    write_volume(tmp_path / "deep.nii.gz", deep)
    assert image(tmp_path / "deep.nii.gz").values.shape == (4, 7, 5)


def test_labels_stored_as_floats_are_read_as_whole_numbers(tmp_path):
    values = np.zeros((5, 7, 4), np.float32)
    values[1:3, 2:5, 1:] = 2
    write_volume(tmp_path / "v.nii.gz", values)
    got = label(tmp_path / "v.nii.gz").values
    assert got.dtype == np.int16
    np.testing.assert_array_equal(got, values.transpose(2, 1, 0)[:, ::-1, ::-1])


# ---------------------------------------------------------------------------------------- pictures


def write_png16(path: Path, values: np.ndarray) -> None:
    """A 16-bit RGB PNG, which Pillow cannot write; (H, W, 3) uint16."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


GRAY8 = picture(10)
GRAY16 = np.random.default_rng(11).integers(0, 65536, (24, 32)).astype(np.uint16)
RGB = picture(12, (24, 32, 3))
RGBA = np.dstack([RGB, picture(13)])
LUMA = RGB.astype(np.float64) @ [0.299, 0.587, 0.114]


def write_picture(path: Path, values: np.ndarray, **options: object) -> None:
    if path.suffix == ".tif":
        tifffile.imwrite(path, values, **options)
    else:
        Image.fromarray(values).save(path, **options)


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize(
    ("stored", "gray", "rgb"),
    [
        (GRAY8, GRAY8, np.dstack([GRAY8] * 3)),
        (GRAY16, GRAY16, np.dstack([GRAY16] * 3)),
        (RGB, LUMA, RGB),
        (RGBA, LUMA, RGB),
    ],
    ids=["gray8", "gray16", "rgb", "rgba"],
)
def test_png_and_tiff_of_any_depth_and_colour(tmp_path, ending, stored, gray, rgb):
    path = tmp_path / f"p.{ending}"
    options = {}
    if ending == "tif":
        options = {"photometric": "rgb" if stored.ndim == 3 else "minisblack"}
    write_picture(path, stored, **options)
    got = image(path, format="image")
    kept = np.uint8 if gray.dtype == np.uint8 else np.float32  # as small as the levels allow
    assert (got.values.dtype, got.spacing, got.is_volume) == (kept, (1.0, 1.0, 1.0), False)
    np.testing.assert_allclose(got.values[0], gray, atol=0.01)
    np.testing.assert_array_equal(image(path, format="image", channels="rgb").values[0], rgb)


def test_jpeg_is_close_to_what_was_stored(tmp_path):
    smooth = np.add.outer(np.arange(24) * 4, np.arange(32) * 4).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "p.jpg", quality=98)
    got = image(tmp_path / "p.jpg", format="image").values[0]
    np.testing.assert_allclose(got, smooth, atol=4)


def test_sixteen_bit_colours(tmp_path):
    values = np.random.default_rng(14).integers(0, 65536, (24, 32, 3)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "p.tif", values, photometric="rgb")
    write_png16(tmp_path / "p.png", values)
    exact = image(tmp_path / "p.tif", format="image", channels="rgb").values[0]
    np.testing.assert_array_equal(exact, values)
    close = image(tmp_path / "p.png", format="image", channels="rgb").values[0]
    np.testing.assert_allclose(close, values, atol=256)  # Pillow keeps the high byte


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "packbits", None])
def test_compressed_tiff_of_pillow(tmp_path, compression):
    Image.fromarray(RGB).save(tmp_path / "p.tif", compression=compression)
    got = image(tmp_path / "p.tif", format="image", channels="rgb").values[0]
    np.testing.assert_array_equal(got, RGB)


def test_tiff_with_planes_with_white_zero_with_palette_and_with_floats(tmp_path):
    def read(**options):
        tifffile.imwrite(tmp_path / "p.tif", **options)
        return image(tmp_path / "p.tif", format="image", channels="rgb").values[0]

    planar = read(data=np.moveaxis(RGB, 2, 0), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(planar, RGB)
    white = read(data=GRAY8, photometric="miniswhite")
    np.testing.assert_array_equal(white[..., 0], 255 - GRAY8)
    colours = np.random.default_rng(15).integers(0, 256, (3, 256)).astype(np.uint16) * 257
    palette = read(data=GRAY8, photometric="palette", colormap=colours)
    np.testing.assert_array_equal(palette, np.moveaxis(colours[:, GRAY8] // 257, 0, -1))
    floats = read(data=GRAY8.astype(np.float32) / 8, photometric="minisblack")
    np.testing.assert_array_equal(floats[..., 0], GRAY8.astype(np.float32) / 8)


def test_a_palette_picture_is_read_as_its_colours(tmp_path):
    quantized = Image.fromarray(RGB).quantize(64)
    quantized.save(tmp_path / "p.png")
    got = image(tmp_path / "p.png", format="image", channels="rgb").values[0]
    np.testing.assert_array_equal(got, np.asarray(quantized.convert("RGB")))


MASK = disk((24, 32), 8, 3)


@pytest.mark.parametrize("kind", ["gray", "gray16", "rgb", "rgba", "la", "palette", "bits"])
def test_label_pictures_keep_their_values(tmp_path, kind):
    path = tmp_path / "m.png"
    wanted = MASK
    if kind == "gray":
        Image.fromarray(MASK).save(path)
    elif kind == "gray16":
        wanted = MASK.astype(np.uint16) * 1000
        Image.fromarray(wanted).save(path)
    elif kind == "rgb":
        Image.fromarray(np.dstack([MASK] * 3)).save(path)
    elif kind == "rgba":
        Image.fromarray(np.dstack([MASK, MASK, MASK, np.full_like(MASK, 255)])).save(path)
    elif kind == "la":
        Image.fromarray(np.dstack([MASK, np.full_like(MASK, 255)]), "LA").save(path)
    elif kind == "palette":
        stored = Image.fromarray(MASK, "P")
        stored.putpalette([250, 10, 10, 20, 200, 0, 0, 0, 90, 7, 7, 7])
        stored.save(path)
    else:
        wanted = (MASK > 0).astype(np.uint8)
        Image.fromarray(wanted * 255).convert("1").save(path)
    np.testing.assert_array_equal(label(path, format="image").values[0], wanted)


@pytest.mark.parametrize("bits", [2, 4])
def test_gray_labels_of_two_and_four_bits_are_not_stretched(tmp_path, bits):
    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    values = np.arange(32).reshape(4, 8) % 2**bits
    each = 8 // bits
    packed = sum(values[:, i::each] << (8 - bits * (i + 1)) for i in range(each)).astype(np.uint8)
    header = struct.pack(">IIBBBBB", 8, 4, bits, 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    (tmp_path / "m.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    np.testing.assert_array_equal(label(tmp_path / "m.png", format="image").values[0], values)


def test_labels_of_negative_values_and_label_tiffs_keep_their_values(tmp_path):
    values = MASK.astype(np.int16) - 2
    tifffile.imwrite(tmp_path / "m.tif", values)
    np.testing.assert_array_equal(label(tmp_path / "m.tif", format="image").values[0], values)


# --------------------------------------------------------------------------------------------- NPY


def test_npy_shapes(tmp_path):
    def read(values, **changes):
        np.save(tmp_path / "a.npy", values)
        return image(tmp_path / "a.npy", format="npy", **changes)

    flat = read(GRAY16)
    np.testing.assert_array_equal(flat.values, GRAY16[None])
    assert not flat.is_volume
    volume = read(picture(1, (4, 24, 3)))
    assert volume.values.shape == (4, 24, 3)
    assert volume.is_volume
    np.testing.assert_array_equal(read(RGB, channels="rgb").values, RGB[None])
    np.testing.assert_array_equal(read(RGBA, channels="rgb").values, RGB[None])
    assert read(picture(2, (4, 24, 32, 3)), channels="rgb").values.shape == (4, 24, 32, 3)


def test_npy_labels_may_be_bool(tmp_path):
    np.save(tmp_path / "m.npy", MASK > 0)
    np.testing.assert_array_equal(label(tmp_path / "m.npy", format="npy").values[0], MASK > 0)


# ---------------------------------------------------------------------------------------- bad files


def good_file(folder: Path, ending: str) -> tuple[Path, str]:
    """A good image of any supported ending, and its format."""
    path = folder / f"x.{ending}"
    if ending.startswith("nii"):
        write_volume(folder / "x.nii.gz", picture(1, (12, 14, 9)).astype(np.int16))
        return (path if ending == "nii.gz" else gunzip(folder / "x.nii.gz")), "nifti"
    if ending == "npy":
        np.save(path, GRAY8)
        return path, "npy"
    Image.fromarray(RGB).save(path)
    return path, "image"


ENDINGS = ["nii.gz", "nii", "png", "jpg", "jpeg", "tif", "tiff", "npy"]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("read", [image, label])
def test_zero_bytes(tmp_path, read, ending):
    path, format = good_file(tmp_path, ending)
    path.write_bytes(b"")
    assert refused(read, path, format=format).code == "empty-file"


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("read", [image, label])
def test_truncated(tmp_path, read, ending):
    path, format = good_file(tmp_path, ending)
    cut(path)
    code = refused(read, path, format=format).code
    assert code == ("lossy-labels" if read is label and "jp" in ending else "damaged-file")


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("content", ["text", "another format", "gzip of text"])
def test_wrong_magic(tmp_path, ending, content):
    path, format = good_file(tmp_path, ending)
    if content == "text":
        path.write_bytes(b"<html>404 not found</html>" * 40)
    elif content == "gzip of text":
        with path.open("wb") as file:
            compressor = zlib.compressobj(wbits=31)
            file.write(compressor.compress(b"plain text " * 100) + compressor.flush())
    else:
        other = io.BytesIO()
        Image.fromarray(GRAY8).save(other, "BMP")
        path.write_bytes(other.getvalue())
    assert refused(image, path, format=format).code == "wrong-magic"


@pytest.mark.parametrize("ending", ["png", "jpg", "tif"])
def test_a_renamed_picture_is_not_taken_for_what_its_name_says(tmp_path, ending):
    other = {"png": "JPEG", "jpg": "TIFF", "tif": "PNG"}[ending]
    Image.fromarray(GRAY8).save(tmp_path / f"x.{ending}", format=other)
    assert refused(image, tmp_path / f"x.{ending}", format="image").code == "wrong-magic"


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_cut_and_no_flipped_byte_gets_through_as_another_error(tmp_path, ending):
    # whatever is wrong with the bytes, it is a SiteDataError or still a picture, never a traceback
    path, format = good_file(tmp_path, ending)
    whole = path.read_bytes()
    random = np.random.default_rng(20)
    for trial in range(60):
        data = bytearray(whole)
        if trial % 2:
            data = data[: random.integers(1, len(data))]
        else:
            for place in random.integers(0, min(len(data), 400), 4):
                data[place] = random.integers(0, 256)
        path.write_bytes(bytes(data))
        try:
            read = image(path, format=format)
        except SiteDataError as error:
            assert error.fix
        else:
            assert read.values.ndim == 3


def test_a_damaged_gzip_of_the_right_length_is_noticed(tmp_path):
    path, _ = good_file(tmp_path, "nii.gz")
    data = bytearray(path.read_bytes())
    data[-6] ^= 0xFF  # in the checksum
    path.write_bytes(bytes(data))
    assert refused(image, path).code == "damaged-file"


@pytest.mark.parametrize(
    ("values", "read", "code"),
    [
        (np.full((5, 7, 4), 7, np.int16), image, "constant-image"),
        (np.where(np.arange(140).reshape(5, 7, 4) == 9, np.nan, 1.0), image, "non-finite"),
        (np.where(np.arange(140).reshape(5, 7, 4) == 9, np.inf, 1.0), image, "non-finite"),
        (np.where(np.arange(140).reshape(5, 7, 4) == 9, np.nan, 1.0), label, "non-finite"),
        (np.linspace(0, 1, 140).reshape(5, 7, 4), label, "fractional-labels"),
        (np.arange(140).reshape(5, 7, 4).astype(np.int32) * 1000, label, "label-value-too-large"),
        (picture(1, (5, 7, 4, 2)), image, "not-3d"),
    ],
)
def test_values_that_cannot_be_meant(tmp_path, values, read, code):
    write_volume(tmp_path / "v.nii.gz", values)
    assert refused(read, tmp_path / "v.nii.gz").code == code


def test_an_affine_that_cannot_be_inverted(tmp_path):
    volume = nibabel.Nifti1Image(picture(1, (5, 7, 4)), None)
    volume.header["sform_code"] = 1
    volume.header["srow_x"] = volume.header["srow_y"] = volume.header["srow_z"] = 0
    (tmp_path / "v.nii").write_bytes(volume.to_bytes())
    assert refused(image, tmp_path / "v.nii").code == "bad-geometry"


def test_colour_volumes_are_refused(tmp_path):
    values = np.zeros((5, 7, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "v.nii.gz")
    assert refused(image, tmp_path / "v.nii.gz").code == "not-one-number-a-voxel"
    write_volume(tmp_path / "g.nii.gz", picture(1, (5, 7, 4)))
    assert refused(image, tmp_path / "g.nii.gz", channels="rgb").code == "rgb-of-a-volume"


def test_labels_in_jpeg_and_in_colours_are_refused(tmp_path):
    Image.fromarray(MASK).save(tmp_path / "m.jpg")
    assert refused(label, tmp_path / "m.jpg", format="image").code == "lossy-labels"
    Image.fromarray(RGB).save(tmp_path / "m.png")
    assert refused(label, tmp_path / "m.png", format="image").code == "coloured-labels"


@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
def test_a_picture_to_be_turned_is_refused(tmp_path, ending):
    path = tmp_path / f"p.{ending}"
    stored = Image.fromarray(RGB)
    exif = stored.getexif()
    exif[274] = 6
    stored.save(path, exif=exif)
    assert refused(image, path, format="image").code == "turned-picture"


def test_tiff_with_several_pages_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "p.tif", picture(1, (5, 24, 32)), photometric="minisblack")
    assert refused(image, tmp_path / "p.tif", format="image").code == "many-pages"


@pytest.mark.parametrize(
    ("values", "changes", "code"),
    [
        (np.array(["a", "b"]), {}, "not-one-number-a-voxel"),
        (np.ones((2, 3), complex), {}, "not-one-number-a-voxel"),
        (np.zeros(5), {}, "wrong-array-shape"),
        (np.zeros((2, 3, 4, 5)), {}, "wrong-array-shape"),
        (GRAY8, {"channels": "rgb"}, "wrong-array-shape"),
        (np.zeros((0, 4)), {}, "damaged-file"),
    ],
)
def test_arrays_that_are_no_image(tmp_path, values, changes, code):
    np.save(tmp_path / "a.npy", values)
    assert refused(image, tmp_path / "a.npy", format="npy", **changes).code == code


def test_pickled_arrays_are_never_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert refused(image, tmp_path / "a.npy", format="npy").code == "not-one-number-a-voxel"


@pytest.mark.parametrize("read", [image, label])
@pytest.mark.parametrize("format", ["nifti", "dicom"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, read, format):
    os.mkfifo(tmp_path / "v.nii")
    error = refused(read, tmp_path / "v.nii", format=format)
    assert error.code == "unreadable-file"
    assert "a pipe" in error.problem


def test_two_arrays_in_one_file_are_not_taken_for_one(tmp_path):
    with (tmp_path / "v.npy").open("wb") as file:
        np.save(file, picture(1))
        np.save(file, picture(2))
    error = refused(image, tmp_path / "v.npy", format="npy")
    assert error.code == "cannot-be-read-here"
    assert "one array in each file" in error.fix


@pytest.mark.parametrize(
    ("shape", "values"),
    [("f8", (1.0, 1e39)), ("i4", (2**30, 2**30 + 900)), ("f8", (1e9, 1e9 + 255))],
)
@pytest.mark.parametrize("ending", ["nii", "npy"])
def test_values_that_32_bits_would_make_alike_are_refused(tmp_path, ending, shape, values, recwarn):
    grey = np.linspace(*values, 60).reshape(5, 4, 3).astype(shape)
    if ending == "nii":
        write_volume(tmp_path / "v.nii", grey, dtype=shape)
    else:
        np.save(tmp_path / "v.npy", grey)
    error = refused(image, tmp_path / f"v.{ending}", format={"nii": "nifti"}.get(ending, ending))
    assert error.code == "cannot-be-read-here"
    assert "more digits than are kept" in error.problem
    assert not recwarn.list


def test_a_file_that_is_gone_and_a_wrong_ending(tmp_path):
    assert refused(image, tmp_path / "no.nii.gz").code == "unreadable-file"
    (tmp_path / "x.mha").write_bytes(b"x")
    assert refused(image, tmp_path / "x.mha").code == "wrong-extension"
