"""What headers say, and do not say, is heard: units, orientation, scaling, stored bits, endings."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_files import (
    drawing,
    grid,
    segmentation,
    series,
    stored_values,
    uid,
    write,
    write_series,
)
from nibabel.orientations import axcodes2ornt, ornt_transform
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, JPEGLSLossless
from site_files import disk, picture, site_config, write_volume

from fedfms.data.content import read_bytes
from fedfms.data.formats import Stored, read_image, read_label
from fedfms.data.grid import largest_shift
from fedfms.data.manifest import Case
from fedfms.data.prepared import combine
from fedfms.errors import SiteDataError
from fedfms.predict.write import Origin, nifti_bytes


def image(path: Path, format: str = "nifti", **changes: object) -> Stored:
    site = site_config(path.parent, format, **changes)
    return read_image(path, read_bytes(path, site), site)


def label(path: Path, of: Stored | None = None, format: str = "nifti", **changes: object) -> Stored:
    site = site_config(path.parent, format, **changes)
    return read_label(path, read_bytes(path, site), site, of)


def refusal(read, *arguments: object, **changes: object) -> SiteDataError:
    with pytest.raises(SiteDataError) as caught:
        read(*arguments, **changes)
    assert caught.value.fix
    return caught.value


# ---------------------------------------------------------------------------------- NIfTI: lengths

SIZES = (0.8, 1.2, 2.5)  # mm


def in_units(path: Path, code: int, scale: float, shape=(6, 8, 5)) -> None:
    """A volume with voxels of SIZES, written in another unit."""
    affine = np.diag([*(size * scale for size in SIZES), 1.0])
    affine[:3, 3] = np.array([-10.0, 20.0, 30.0]) * scale
    stored = nibabel.Nifti1Image(picture(1, shape), affine)
    stored.header["xyzt_units"] = code
    nibabel.save(stored, path)


@pytest.mark.parametrize(
    ("code", "scale"),
    [(0, 1), (1, 1e-3), (2, 1), (3, 1e3), (2 + 8, 1), (3 + 16, 1e3), (7, 1)],
    ids=["unknown", "metre", "mm", "micron", "mm and s", "micron and ms", "nonsense"],
)
def test_lengths_are_millimetres_whatever_the_unit_of_the_file(tmp_path, code, scale):
    in_units(tmp_path / "v.nii.gz", code, scale)
    got = image(tmp_path / "v.nii.gz")
    np.testing.assert_allclose(got.spacing, SIZES[::-1], rtol=1e-5)
    assert got.cut is not None
    np.testing.assert_allclose(np.linalg.norm(got.cut.affine[:3, :3], axis=0), SIZES, rtol=1e-5)
    assert not got.notices


def test_a_mask_lies_where_the_file_says_in_the_files_own_unit(tmp_path):
    path = tmp_path / "v.nii.gz"
    in_units(path, 3, 1e3)
    stored = image(path)
    assert stored.cut is not None
    origin = Origin("fedmsa", ("lesion",), {"model_sha256": "0" * 64})
    mask = np.zeros(stored.values.shape, np.uint8)
    data = nifti_bytes(mask, stored.cut, path, path.read_bytes(), origin)
    (tmp_path / "m.nii.gz").write_bytes(data)
    written, given = nibabel.load(tmp_path / "m.nii.gz"), nibabel.load(path)
    np.testing.assert_array_equal(written.affine, given.affine)
    assert written.header.get_xyzt_units()[0] == "micron"


def test_a_label_without_a_unit_lies_on_its_images_grid(tmp_path):
    in_units(tmp_path / "v.nii.gz", 3, 1e3)
    in_units(tmp_path / "m.nii.gz", 0, 1e3)
    of = image(tmp_path / "v.nii.gz")
    drawn = label(tmp_path / "m.nii.gz", of)
    assert drawn.cut is not None
    assert of.cut is not None
    np.testing.assert_allclose(drawn.cut.affine, of.cut.affine)


def test_a_voxel_of_a_metre_is_worth_a_word(tmp_path):
    in_units(tmp_path / "v.nii.gz", 1, 1)  # a wrong unit: voxels of 0.8 x 1.2 x 2.5 m
    (notice,) = image(tmp_path / "v.nii.gz").notices
    assert notice.code == "odd-voxel-size"
    assert "800 x 1.2e+03 x 2.5e+03 mm" in notice.problem


# ----------------------------------------------------------------------------- NIfTI: orientation


@pytest.mark.parametrize(("qform", "sform"), [(0, 0), (1, 0), (0, 2), (1, 1)])
def test_a_volume_without_orientation_is_read_and_said_to_have_none(tmp_path, qform, sform):
    stored = nibabel.Nifti1Image(picture(1, (6, 8, 5)), np.diag([-0.8, 1.2, 2.5, 1.0]))
    stored.header.set_qform(stored.affine, qform)
    stored.header.set_sform(stored.affine, sform)
    data = bytearray(stored.to_bytes())
    data[252:256] = struct.pack("<hh", qform, sform)
    (tmp_path / "v.nii").write_bytes(bytes(data))
    got = image(tmp_path / "v.nii")
    if qform or sform:
        assert not got.notices
        return
    (notice,) = got.notices
    assert notice.code == "no-orientation"
    assert "read as LAS" in notice.problem
    assert not label(tmp_path / "v.nii").notices  # said once, of the image


@pytest.mark.parametrize(("kind", "least"), [("1", 352), ("2", 544)])
def test_voxels_that_begin_within_the_header_are_refused(tmp_path, kind, least):
    stored = getattr(nibabel, f"Nifti{kind}Image")(picture(1, (60, 8, 5)), np.eye(4))
    data = bytearray(stored.to_bytes())
    place, form = {"1": (108, "<f"), "2": (168, "<q")}[kind]
    assert struct.unpack_from(form, data, place) == (least,)
    struct.pack_into(form, data, place, 0)  # nibabel gives the header's bytes as voxels
    (tmp_path / "v.nii").write_bytes(bytes(data))
    error = refusal(image, tmp_path / "v.nii")
    assert error.code == "cannot-be-read-here"
    assert "within the header" in error.problem


@pytest.mark.parametrize("flipped", [False, True])
def test_a_volume_that_lies_in_two_ways_is_read_and_said_to(tmp_path, flipped):
    stored = nibabel.Nifti1Image(picture(1, (6, 8, 5)), np.eye(4))
    stored.header.set_sform(np.eye(4), 4)
    stored.header.set_qform(np.diag([-1.0 if flipped else 1.0, 1.1, 1.0, 1.0]), 1)
    (tmp_path / "v.nii").write_bytes(
        nibabel.Nifti1Image(picture(1, (6, 8, 5)), None, stored.header).to_bytes()
    )
    notices = image(tmp_path / "v.nii").notices
    assert [notice.code for notice in notices] == ["two-orientations"] * flipped
    if flipped:
        assert "RAS by its sform and as LAS by its qform; read as RAS" in notices[0].problem


def turned(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    affine[:3, 3] = (5, -9, 3)
    return affine


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("by", [1e-5, -1e-5])
@pytest.mark.parametrize("axes", ["RAS", "LPS", "SPR"])
def test_at_45_degrees_a_label_goes_with_its_image_however_headers_round(tmp_path, by, axes, plane):
    values = picture(1, (9, 8, 7))
    write_volume(tmp_path / "v.nii", values, turned(45 - by))
    of = image(tmp_path / "v.nii", plane=plane)
    drawn = nibabel.Nifti1Image((values > 128).astype(np.uint8), turned(45 + by))
    start = np.array([[0, 1], [1, 1], [2, 1]])
    drawn = drawn.as_reoriented(ornt_transform(start, axcodes2ornt(axes)))
    nibabel.save(drawn, tmp_path / "m.nii")
    got = label(tmp_path / "m.nii", of, plane=plane)
    np.testing.assert_array_equal(got.values, of.values > 128)
    assert got.cut is not None
    assert of.cut is not None
    np.testing.assert_allclose(got.cut.affine, of.cut.affine, atol=1e-4)


def test_a_label_elsewhere_is_refused_as_before(tmp_path):
    write_volume(tmp_path / "v.nii", picture(1, (9, 8, 7)), turned(20))
    of = image(tmp_path / "v.nii")
    case = Case("v", "v", tmp_path / "v.nii", tmp_path / "m.nii", "train")
    site = site_config(tmp_path)
    for shift, fits in ((0.4, True), (0.6, False)):
        affine = turned(20)
        affine[0, 3] += shift
        write_volume(tmp_path / "m.nii", picture(2, (9, 8, 7)), affine)
        drawn = label(tmp_path / "m.nii", of)
        assert drawn.cut is not None
        assert of.cut is not None
        assert largest_shift(drawn.cut.affine, of.cut.affine, of.cut.shape) == pytest.approx(shift)
        if fits:
            combine(case, of, drawn, site)
        else:
            error = refusal(combine, case, of, drawn, site)
            assert error.code == "geometry-differs"
            assert "0.6 mm apart" in error.problem


# ---------------------------------------------------------------------------------- NIfTI: scaling


def scaled(path: Path, raw: np.ndarray, slope: float, intercept: float = 0.0) -> None:
    stored = nibabel.Nifti1Image(raw, np.eye(4))
    data = bytearray(stored.to_bytes())
    data[112:120] = struct.pack("<ff", slope, intercept)
    path.write_bytes(bytes(data))


LABELS = np.zeros((6, 8, 5), np.uint8)
LABELS[1:4, 2:6, 1:4] = 1
LABELS[2, 3, 2] = 2


@pytest.mark.parametrize(
    ("factor", "slope"), [(255, 1 / 255), (100, 0.01), (3, 1 / 3), (7, 1 / 7), (1, 1.0)]
)
def test_a_slope_that_rounds_gives_the_whole_numbers_that_were_meant(tmp_path, factor, slope):
    scaled(tmp_path / "m.nii", LABELS.astype(np.int16) * factor, slope)
    wanted = LABELS.transpose(2, 1, 0)[:, ::-1, ::-1]
    got = label(tmp_path / "m.nii")
    np.testing.assert_array_equal(got.values, wanted)
    assert got.values.dtype == np.int16
    floats = LABELS * np.float32(1 / 255) * np.float32(255)  # another program's rounding
    write_volume(tmp_path / "f.nii", np.nextafter(floats, np.float32(9), dtype=np.float32))
    np.testing.assert_array_equal(label(tmp_path / "f.nii").values, wanted)


def test_labels_that_a_header_scales_to_fractions_name_the_header(tmp_path):
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(LABELS.astype(float), np.eye(4), header), tmp_path / "m.nii")
    error = refusal(label, tmp_path / "m.nii")
    assert error.code == "fractional-labels"
    assert "0.00784314 (scl_slope)" in error.problem
    assert "no scaling" in error.fix
    write_volume(tmp_path / "i.nii", LABELS * np.float32(0.4))
    assert "interpolation" in refusal(label, tmp_path / "i.nii").fix


def test_a_header_that_nibabel_does_not_know_is_no_damage(tmp_path):
    write_volume(tmp_path / "v.nii", picture(1, (6, 8, 5)))
    data = bytearray((tmp_path / "v.nii").read_bytes())
    data[70:72] = struct.pack("<h", 1)  # one bit a voxel
    (tmp_path / "v.nii").write_bytes(bytes(data))
    assert refusal(image, tmp_path / "v.nii").code == "cannot-be-read-here"


# ---------------------------------------------------------------------------------- names and kinds


@pytest.mark.parametrize(
    ("name", "format", "says"),
    [
        ("a.nrrd", "nifti", "3D Slicer"),
        ("a.seg.nrrd", "nifti", "export it as NIfTI"),
        ("a.mha", "nifti", "SimpleITK"),
        ("a.mhd", "nifti", "SimpleITK"),
        ("a.mgz", "nifti", "mri_convert"),
        ("a.hdr", "nifti", "nibabel"),
        ("a.img", "nifti", "nibabel"),
        ("a.IMG.GZ", "nifti", "nibabel"),
        ("a.dcm", "nifti", "format: dicom"),
        ("a.png", "nifti", "format: image"),
        ("a.bmp", "image", "magick"),
        ("a.webp", "image", "magick"),
        ("a.GIF", "image", "magick"),
        ("a.svs", "image", "QuPath"),
        ("a.czi", "image", "Fiji"),
        ("a.h5", "image", "numpy.save"),
        ("a.npz", "npy", "numpy.save"),
        ("a.nii.gz", "image", "format: nifti"),
        ("a.npy", "image", "format: npy"),
        ("a.xyz", "image", "correct the globs"),
    ],
)
def test_another_kind_of_file_is_told_what_makes_it_readable(tmp_path, name, format, says):
    (tmp_path / name).write_bytes(b"x")
    error = refusal(image, tmp_path / name, format)
    assert error.code == "wrong-extension"
    assert says in error.fix


def test_a_label_of_3d_slicer_beside_dicom_is_told_what_makes_it_readable(tmp_path):
    stored = dicom_case(tmp_path, series("a", grid("axial"), stored_values(1, (14, 12, 7))))
    (tmp_path / "a.seg.nrrd").write_bytes(b"NRRD0004\n" + bytes(200))
    error = refusal(label, tmp_path / "a.seg.nrrd", stored, "dicom", images="images/*", labels="*")
    assert (error.code, "3D Slicer" in error.fix) == ("wrong-extension", True)


def test_a_volume_under_the_wrong_ending_is_told_the_right_one(tmp_path):
    write_volume(tmp_path / "v.nii", picture(1, (6, 8, 5)))
    plain = (tmp_path / "v.nii").read_bytes()
    (tmp_path / "packed.nii").write_bytes(gzip.compress(plain))
    (tmp_path / "plain.nii.gz").write_bytes(plain)
    (tmp_path / "text.nii").write_bytes(gzip.compress(b"text " * 200))
    error = refusal(image, tmp_path / "packed.nii")
    assert (error.code, "ends in .nii.gz" in error.fix) == ("wrong-magic", True)
    error = refusal(image, tmp_path / "plain.nii.gz")
    assert (error.code, "ends in .nii," in error.fix) == ("wrong-magic", True)
    assert "renaming does not convert it" in refusal(image, tmp_path / "text.nii").fix


def test_a_picture_under_the_wrong_ending_is_told_the_right_one(tmp_path):
    Image.fromarray(picture(1)).save(tmp_path / "p.png", format="TIFF")
    error = refusal(image, tmp_path / "p.png", "image")
    assert "those of TIFF" in error.problem
    assert "ends in .tif" in error.fix
    Image.fromarray(picture(1)).save(tmp_path / "q.png", format="BMP")
    error = refusal(image, tmp_path / "q.png", "image")
    assert "those of BMP" in error.problem
    assert "renaming does not convert it" in error.fix


# ---------------------------------------------------------------------------------------------- NPY


@pytest.mark.parametrize("channels", [3, 4])
def test_pictures_with_colours_in_npy_are_told_of_channels_rgb(tmp_path, channels):
    np.save(tmp_path / "a.npy", picture(1, (64, 48, channels)))
    error = refusal(image, tmp_path / "a.npy", "npy")
    assert error.code == "wrong-array-shape"
    assert "channels: rgb" in error.fix
    assert image(tmp_path / "a.npy", "npy", channels="rgb").values.shape == (1, 64, 48, 3)


def test_colours_that_come_first_in_npy_are_told_to_come_last(tmp_path):
    np.save(tmp_path / "a.npy", picture(1, (3, 64, 48)))
    np.save(tmp_path / "m.npy", disk((64, 48), 9))
    of = image(tmp_path / "a.npy", "npy")  # might be three slices
    error = refusal(label, tmp_path / "m.npy", of, "npy")
    assert error.code == "wrong-array-shape"
    assert "(H, W, 3)" in error.fix
    np.save(tmp_path / "n.npy", disk((64, 48), 9)[..., None])
    assert "channels" in refusal(label, tmp_path / "n.npy", None, "npy").fix


def test_objects_in_npy_are_named_and_never_called_damage(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}, None], dtype=object), allow_pickle=True)
    error = refusal(image, tmp_path / "a.npy", "npy")
    assert error.code == "not-one-number-a-voxel"
    assert "Python objects" in error.problem


def test_files_say_what_they_were(tmp_path):
    write_volume(tmp_path / "v.nii.gz", picture(1, (6, 8, 5)).astype(np.int16))
    assert image(tmp_path / "v.nii.gz").kind == "NIfTI-1, int16"
    nibabel.save(nibabel.Nifti2Image(picture(1, (6, 8, 5)), np.eye(4)), tmp_path / "w.nii")
    assert image(tmp_path / "w.nii").kind == "NIfTI-2, uint8"
    np.save(tmp_path / "a.npy", picture(1).astype(np.float32))
    assert image(tmp_path / "a.npy", "npy").kind == "NPY, float32"
    Image.fromarray(picture(1)).save(tmp_path / "p.jpg")
    assert image(tmp_path / "p.jpg", "image").kind == "JPEG, gray, 8 bit"


# -------------------------------------------------------------------------------------------- DICOM


def dicom_case(root: Path, slices: list[Dataset]) -> Stored:
    write_series(root / "images/a", slices)
    site = site_config(root, "dicom", images="images/*", labels="labels/*.dcm")
    return read_image(root / "images/a", read_bytes(root / "images/a", site), site)


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("compressed", [False, True], ids=["raw", "JPEG-LS"])
@pytest.mark.parametrize("bits", [12, 10, 16])
def test_values_are_those_of_the_stored_bits_whatever_lies_above(
    tmp_path, bits, compressed, signed
):
    g = grid("axial")
    random = np.random.default_rng(4)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    meant = random.integers(low, high, g.shape)
    above = random.integers(0, 2 ** (16 - bits), g.shape) << bits  # an overlay, say
    stored = ((meant & (2**bits - 1)) | above).astype(np.uint16)
    slices = series("a", g, stored, slopes=(1, 1, 1), intercepts=(-1024, -1024, -1024))
    for slice_ in slices:
        slice_.PixelRepresentation = int(signed)
        slice_.BitsStored, slice_.HighBit = (16, 15) if compressed else (bits, bits - 1)
        if compressed:  # all 16 bits, as GDCM writes them
            slice_.PixelRepresentation = 0
            slice_.compress(JPEGLSLossless, generate_instance_uid=False)
            slice_.PixelRepresentation = int(signed)
            slice_.BitsStored, slice_.HighBit = bits, bits - 1
    got = dicom_case(tmp_path, slices)
    assert got.series is not None
    np.testing.assert_array_equal(got.series.values, meant - 1024)


@pytest.mark.parametrize(
    "lacking", ["PixelRepresentation", "BitsAllocated", "BitsStored", "Rows", "PixelData"]
)
def test_a_series_that_does_not_say_what_its_pixels_are_is_no_damage(tmp_path, lacking):
    slices = series("a", grid("axial"), stored_values(1, grid("axial").shape))
    for slice_ in slices:
        slice_["PixelData"].VR = "OW"
        delattr(slice_, lacking)
    error = refusal(dicom_case, tmp_path, slices)
    assert error.code == "cannot-be-read-here"
    assert lacking in error.problem


def test_a_high_bit_elsewhere_is_refused(tmp_path):
    slices = series("a", grid("axial"), stored_values(1, grid("axial").shape))
    for slice_ in slices:
        slice_.BitsStored = 12
    assert "HighBit" in refusal(dicom_case, tmp_path, slices).problem


@pytest.mark.parametrize("left", ["RescaleSlope", "RescaleIntercept"])
def test_a_slope_without_an_intercept_counts_and_the_reverse(tmp_path, left):
    stored = stored_values(1, grid("axial").shape)
    slices = series("a", grid("axial"), stored, slopes=(2, 2, 2), intercepts=(-9, -9, -9))
    for slice_ in slices:
        delattr(slice_, "RescaleIntercept" if left == "RescaleSlope" else "RescaleSlope")
    got = dicom_case(tmp_path, slices)
    wanted = stored * 2.0 if left == "RescaleSlope" else stored - 9.0
    assert got.series is not None
    np.testing.assert_array_equal(got.series.values, wanted)
    assert got.kind == "DICOM MR, uncompressed"


def test_copies_of_a_slice_are_named(tmp_path):
    slices = series("a", grid("axial"), stored_values(1, grid("axial").shape))
    write_series(tmp_path / "images/a", slices)
    copy = dcmread(tmp_path / "images/a/IM0003")
    copy.SOPInstanceUID = uid("a copy")
    write(tmp_path / "images/a/IM0003 (copy)", copy)
    site = site_config(tmp_path, "dicom", images="images/*", labels="labels/*.dcm")
    path = tmp_path / "images/a"
    error = refusal(read_image, path, read_bytes(path, site), site)
    assert error.code == "duplicate-slices"
    assert "IM0003 (copy)" in error.problem
    assert error.problem.count("IM0003") == 2


def test_a_segmentation_in_lossy_compression_is_refused(tmp_path):
    g = grid("axial")
    slices = series("a", g, stored_values(1, g.shape))
    stored = dicom_case(tmp_path, slices)
    labels, _ = drawing(g.shape)
    seg = segmentation(slices, {"Prostate": labels == 1}, "LABELMAP")
    seg.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    seg.PixelData = encapsulate([b"\xff\xd8\xff\xd9"] * int(seg.NumberOfFrames))
    seg["PixelData"].VR = "OB"
    write(tmp_path / "labels/a.dcm", seg)
    error = refusal(
        label, tmp_path / "labels/a.dcm", stored, "dicom", images="images/*", labels="labels/*.dcm"
    )
    assert error.code == "lossy-labels"
