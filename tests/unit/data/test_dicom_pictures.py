"""Pictures in DICOM and enhanced images, against their twins as NIfTI, PNG and plain series."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import (
    enhanced,
    grid,
    picture,
    segmentation,
    series,
    stored_values,
    true_values,
    write,
    write_series,
    write_twin,
)
from PIL import Image
from pydicom.uid import ColorPaletteStorage, JPEGBaseline8Bit, RLELossless
from pydicom.valuerep import DSfloat
from site_files import disk, recipe, site_config, write_volume

from fedfms.contracts.site import Setup, SiteConfig
from fedfms.data.check import check_data
from fedfms.data.content import read_bytes
from fedfms.data.formats import read_image
from fedfms.data.manifest import find_cases
from fedfms.data.prepare import prepare_cases
from fedfms.data.slices import SliceDataset
from fedfms.errors import SiteDataError

SIZE = (40, 28)  # columns, rows


def grey(seed: int) -> np.ndarray:
    """(rows, columns), 12 bits."""
    return np.random.default_rng(seed).integers(0, 4096, SIZE[::-1])


def dicom_site(root: Path, **changes: object) -> SiteConfig:
    values: dict = {"images": "images/*.dcm", "labels": "labels/*.png"}
    return site_config(root, "dicom", **{**values, **changes})


def write_pictures(root: Path, count: int = 2, label: str = "png", turned: bool = False) -> None:
    """images/p0.dcm … with labels; MONOCHROME1 where the stored numbers are turned."""
    (root / "labels").mkdir(parents=True)
    for number in range(count):
        shown = 4095 - grey(number) if turned else grey(number)
        kind = "MONOCHROME1" if turned else "MONOCHROME2"
        one = picture(f"p{number}", shown, PhotometricInterpretation=kind)
        write(root / f"images/p{number}.dcm", one)
        drawn = disk(SIZE[::-1], 6 + number)
        if label == "png":
            Image.fromarray(drawn).save(root / f"labels/p{number}.png")
        elif label == "seg":
            write(
                root / f"labels/x{9 - number}.dcm", segmentation([one], {"a": drawn.T[..., None]})
            )
        else:
            mask = picture(f"m{number}", drawn, BitsStored=16, HighBit=15)
            write(root / f"labels/p{number}.dcm", mask)


def tensors(site: SiteConfig) -> list[dict[str, np.ndarray]]:
    dataset = SliceDataset(prepare_cases(find_cases(site), site), site, recipe(image_size=64))
    return [{key: value.numpy() for key, value in dataset[i].items()} for i in range(len(dataset))]


def require_same(one: SiteConfig, other: SiteConfig) -> None:
    got, wanted = tensors(one), tensors(other)
    assert len(got) == len(wanted) > 1
    assert any(a["target"].any() for a in got)
    for a, b in zip(got, wanted, strict=True):
        for key in b:
            np.testing.assert_allclose(a[key], b[key], atol=1e-6)


@pytest.fixture
def twin(tmp_path: Path) -> SiteConfig:
    """The same pictures as NIfTI of one slice: columns and rows grow against x and y of RAS."""
    for number in range(2):
        for part, values in (("images", grey(number)), ("labels", disk(SIZE[::-1], 6 + number))):
            volume = values.T[..., None].astype(np.int16)
            place = tmp_path / "twin" / part / f"p{number}.nii.gz"
            write_volume(place, volume, np.diag([-1.0, -1.0, 1.0, 1.0]))
    return site_config(tmp_path / "twin")


@pytest.mark.parametrize("label", ["png", "seg", "mask"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_picture_is_what_its_nifti_twin_is(tmp_path, twin, label, turned):
    write_pictures(tmp_path / "x", label=label, turned=turned)
    labels = "labels/*.png" if label == "png" else "labels/*.dcm"
    pair_by = "reference" if label == "seg" else None  # whose files have other names
    site = dicom_site(tmp_path / "x", labels=labels, pair_by=pair_by)
    require_same(site, twin)
    assert [case.patient for case in find_cases(site)] == ["ID-p0", "ID-p1"]


def test_a_folder_with_one_picture_is_that_picture(tmp_path, twin):
    write_pictures(tmp_path / "x")
    for number in range(2):
        file = tmp_path / f"x/images/p{number}.dcm"
        write(tmp_path / f"x/folders/p{number}/any", pydicom.dcmread(file))
    require_same(dicom_site(tmp_path / "x", images="folders/*"), twin)


def test_colours_are_those_of_the_png_twin(tmp_path):
    colours = np.random.default_rng(3).integers(0, 256, (*SIZE[::-1], 3)).astype(np.uint8)
    write(tmp_path / "a.dcm", picture("a", colours, "US"))
    Image.fromarray(colours).save(tmp_path / "a.png")
    for channels in ("rgb", "gray"):
        one, other = (Setup(format=kind, channels=channels) for kind in ("dicom", "image"))
        got = read_image(tmp_path / "a.dcm", read_bytes(tmp_path / "a.dcm", one), one)
        wanted = read_image(tmp_path / "a.png", read_bytes(tmp_path / "a.png", other), other)
        np.testing.assert_array_equal(got.values, wanted.values)
        assert got.spacing == wanted.spacing == (1.0, 1.0, 1.0)
        assert not got.is_volume


def test_pixels_that_are_no_squares_say_so(tmp_path):
    for name, changes in (
        ("detector", {"ImagerPixelSpacing": [DSfloat(0.2), DSfloat(0.1)]}),
        ("ratio", {"PixelAspectRatio": [2, 1]}),
    ):
        write(tmp_path / name, picture(name, grey(1), **changes))
        site = Setup(format="dicom")
        got = read_image(tmp_path / name, read_bytes(tmp_path / name, site), site)
        assert got.spacing == (1.0, 2.0, 1.0)  # rows are twice as far apart as columns


@pytest.mark.parametrize("kind", ["axial", "oblique"])
def test_an_enhanced_image_is_what_its_nifti_twin_is(tmp_path, kind):
    g = grid(kind)
    for number in range(2):
        name = f"c{number}"
        slices = series(name, g, stored_values(number, g.shape))
        write(tmp_path / f"x/images/{name}.dcm", enhanced(name, slices))
        write_twin(tmp_path / "twin", name, g, seed=number)
        (tmp_path / "x/labels").mkdir(exist_ok=True)
        label = tmp_path / f"twin/labels/{name}.nii.gz"
        (tmp_path / f"x/labels/{name}.nii.gz").write_bytes(label.read_bytes())
    classes = {"lesion": (1, 2)}
    require_same(
        dicom_site(tmp_path / "x", labels="labels/*.nii.gz", classes=classes),
        site_config(tmp_path / "twin", classes=classes),
    )


def test_small_values_are_white_in_slices_too(tmp_path):
    g = grid("axial")
    stored = stored_values(1, g.shape)
    slices = series("a", g, 4095 - stored, (2.0,) * 3, (7.0,) * 3)
    for slice_ in slices:
        slice_.PhotometricInterpretation, slice_.BitsStored, slice_.HighBit = "MONOCHROME1", 12, 11
    write_series(tmp_path / "a", slices)
    write_series(tmp_path / "b", series("a", g, stored, (2.0,) * 3, (7.0,) * 3))
    site = Setup(format="dicom")
    one, other = (
        read_image(p, read_bytes(p, site), site) for p in (tmp_path / "a", tmp_path / "b")
    )
    np.testing.assert_array_equal(one.values, other.values)
    assert one.values.max() == true_values(stored, (2.0,) * 3, (7.0,) * 3).max()


def many_frames(root: Path) -> None:
    twice = picture("p0", np.concatenate([grey(0), grey(1)]), "US", NumberOfFrames=2)
    twice.Rows //= 2
    write(root / "images/p0.dcm", twice)


def two_pictures_in_a_folder(root: Path) -> None:
    for number in range(2):
        file = root / f"images/p{number}.dcm"
        write(root / f"images/p0.dcm.d/{number}", pydicom.dcmread(file))
        file.unlink()
    (root / "images/p0.dcm.d").rename(root / "images/p0.dcm")
    (root / "labels/p1.png").unlink()


def a_slice_without_its_place(root: Path) -> None:
    slices = series("a", grid("axial"), stored_values(1, grid("axial").shape))
    del slices[0].ImagePositionPatient
    write(root / "images/p0.dcm", slices[0])


def frames_without_places(root: Path) -> None:
    """As some scanners write MR: many frames at the top level, and no functional groups."""
    one = picture("p0", np.concatenate([grey(0), grey(1)]), NumberOfFrames=2, Modality="MR")
    one.Rows //= 2
    write(root / "images/p0.dcm", one)


def a_whole_slide(root: Path) -> None:
    one = picture("p0", np.concatenate([grey(0), grey(1)]), NumberOfFrames=2, Modality="SM")
    one.Rows //= 2
    write(root / "images/p0.dcm", one)


def a_palette(root: Path) -> None:
    """A table of colours and no image, without a Modality, as pydicom comes with."""
    one = picture("p0", grey(0))
    del one.PixelData, one.Modality, one.Rows, one.Columns, one.BitsAllocated
    one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = ColorPaletteStorage
    write(root / "images/p0.dcm", one)


def floats(root: Path) -> None:
    one = picture("p0", grey(0))
    del one.PixelData
    one.DoubleFloatPixelData = grey(0).astype("<f8").tobytes()
    write(root / "images/p0.dcm", one)


def stored_in_a_new_way(root: Path) -> None:
    one = pydicom.dcmread(root / "images/p0.dcm")
    compress(one, JPEGBaseline8Bit)
    write(root / "images/p0.dcm", one)
    deflate(root / "images/p0.dcm")


def compress(one: pydicom.Dataset, syntax: str) -> None:
    """As of a transfer syntax; what stands in the frame is nothing of it."""
    one.PixelData = pydicom.encaps.encapsulate([b"\1" + bytes(65)])
    one["PixelData"].is_undefined_length = True
    one.file_meta.TransferSyntaxUID = syntax


def deflate(path: Path) -> None:
    """Deflated Image Frame Compression (PS3.5, A.4.13), too new for pydicom to write it."""
    known, new = f"{JPEGBaseline8Bit}".encode(), b"1.2.840.10008.1.2.8.1\0"
    assert path.read_bytes().count(known) == 1 and len(known) == len(new)
    path.write_bytes(path.read_bytes().replace(known, new))


def a_nifti_label(root: Path) -> None:
    write_volume(root / "labels/p0.nii.gz", disk(SIZE, 6)[..., None])
    (root / "labels/p0.png").unlink()
    (root / "labels/p1.png").unlink()
    (root / "images/p1.dcm").unlink()


def a_mask_in_colours(root: Path) -> None:
    for file in (root / "labels").iterdir():
        file.unlink()
    (root / "images/p1.dcm").unlink()
    write(root / "labels/p0.dcm", picture("m", np.zeros((*SIZE[::-1], 3)), "US"))


def units_shown_turned(root: Path) -> None:
    one = picture("p0", grey(0), PhotometricInterpretation="MONOCHROME1", RescaleType="HU")
    write(root / "images/p0.dcm", one)


def a_mask_that_was_lossy(root: Path) -> None:
    for file in (root / "labels").iterdir():
        file.unlink()
    (root / "images/p1.dcm").unlink()
    drawn = disk(SIZE[::-1], 6)
    write(root / "labels/p0.dcm", picture("m", drawn, LossyImageCompression="01"))


def no_identifiers(root: Path) -> None:
    """A picture whose UIDs are gone, and a segmentation that names one."""
    for file in (root / "labels").iterdir():
        file.unlink()
    (root / "images/p1.dcm").unlink()
    one = pydicom.dcmread(root / "images/p0.dcm")
    write(root / "labels/p0.dcm", segmentation([one], {"a": disk(SIZE, 6)[..., None]}))
    del one.SeriesInstanceUID, one.SOPInstanceUID
    one.save_as(root / "images/p0.dcm")


REFUSED = {
    many_frames: ("multi-frame", "2 frames lie nowhere", "labels/*.png"),
    two_pictures_in_a_folder: ("several-pictures", "match the files", "labels/*.png"),
    a_slice_without_its_place: ("no-position", "no ImagePositionPatient", "labels/*.png"),
    frames_without_places: ("multi-frame", "2 frames do not say where they lie", "labels/*.png"),
    a_whole_slide: ("multi-frame", "whole slide of 2 tiles; save the regions", "labels/*.png"),
    a_mask_that_was_lossy: ("lossy-labels", "LossyImageCompression is 01", "labels/*.dcm"),
    no_identifiers: ("other-series", "another series", "labels/*.dcm"),
    a_palette: ("no-dicom-images", "only: Color Palette", "labels/*.png"),
    floats: ("cannot-be-read-here", "only of floats", "labels/*.png"),
    stored_in_a_new_way: ("no-decoder", "pydicom has no decoder for it", "labels/*.png"),
    a_nifti_label: ("not-a-label", "save the label as PNG", "labels/*.nii.gz"),
    a_mask_in_colours: ("coloured-labels", "one number for each pixel", "labels/*.dcm"),
    units_shown_turned: ("monochrome1", "export the series as MONOCHROME2", "labels/*.png"),
}


@pytest.mark.parametrize("break_it", REFUSED, ids=lambda function: function.__name__)
def test_what_is_no_picture_by_itself_is_refused_by_name(tmp_path, break_it):
    write_pictures(tmp_path)
    break_it(tmp_path)
    code, says, labels = REFUSED[break_it]
    findings = check_data(dicom_site(tmp_path, labels=labels), ["lesion"])
    errors = [finding for finding in findings if finding.severity == "error"]
    told = {finding.code: f"{finding.problem}; {finding.fix}" for finding in errors}
    assert told.keys() - {"too-few-patients"} == {code}
    assert says in told[code]


def test_a_segmentation_of_a_picture_in_lossy_compression_is_read(tmp_path, twin):
    """It says LossyImageCompression of what it was drawn on, as highdicom and predict write it."""
    write_pictures(tmp_path, label="seg")
    for number in range(2):
        one = pydicom.dcmread(tmp_path / f"images/p{number}.dcm")
        one.LossyImageCompression = "01"
        one.LossyImageCompressionRatio, one.LossyImageCompressionMethod = "10", "ISO_10918_1"
        write(tmp_path / f"images/p{number}.dcm", one)
        drawn = disk(SIZE[::-1], 6 + number).T[..., None]
        write(tmp_path / f"labels/x{9 - number}.dcm", segmentation([one], {"a": drawn}))
    assert pydicom.dcmread(tmp_path / "labels/x9.dcm").LossyImageCompression == "01"
    require_same(dicom_site(tmp_path, labels="labels/*.dcm", pair_by="reference"), twin)


def tiles(label: pydicom.Dataset) -> None:
    """The frames of a segment are tiles of a slide, each a part of it."""
    label.NumberOfFrames = 2
    label.PixelData = label.PixelData * 2
    label.PerFrameFunctionalGroupsSequence.append(label.PerFrameFunctionalGroupsSequence[0])


def tiles_in_order(label: pydicom.Dataset) -> None:
    """A whole slide's, whose frames do not say of what they are (TILED_FULL)."""
    label.DimensionOrganizationType = "TILED_FULL"
    del label.PerFrameFunctionalGroupsSequence


def frames_that_are_missing(label: pydicom.Dataset) -> None:
    label.PerFrameFunctionalGroupsSequence.append(label.PerFrameFunctionalGroupsSequence[0])


def compressed_bits(label: pydicom.Dataset) -> None:
    """RLE of single bits, which no decoder here knows."""
    compress(label, RLELossless)


@pytest.mark.parametrize(
    ("break_it", "code", "says"),
    [
        (tiles, "other-grid", "not those of its series"),
        (tiles_in_order, "cannot-be-read-here", "whole slides in tiles"),
        (frames_that_are_missing, "damaged-file", "describes 2 frames and has 1"),
        (compressed_bits, "no-decoder", "cannot be decoded (RLE Lossless)"),
    ],
)
def test_segmentations_that_do_not_cover_a_picture_say_why(tmp_path, break_it, code, says):
    write_pictures(tmp_path, label="seg")
    label = pydicom.dcmread(tmp_path / "labels/x9.dcm")
    break_it(label)
    write(tmp_path / "labels/x9.dcm", label)
    site = dicom_site(tmp_path, labels="labels/*.dcm", pair_by="reference")
    (error,) = (one for one in check_data(site, ["lesion"]) if one.severity == "error")
    assert (error.code, says in error.problem) == (code, True), error.problem


def test_a_segmentation_stored_in_a_new_way_says_so(tmp_path):
    write_pictures(tmp_path, label="seg")
    label = pydicom.dcmread(tmp_path / "labels/x9.dcm")
    compress(label, JPEGBaseline8Bit)
    write(tmp_path / "labels/x9.dcm", label)
    deflate(tmp_path / "labels/x9.dcm")
    site = dicom_site(tmp_path, labels="labels/*.dcm", pair_by="reference")
    (error,) = (one for one in check_data(site, ["lesion"]) if one.severity == "error")
    assert error.code == "no-decoder" and "pydicom has no decoder for it" in error.problem


def test_a_text_beside_pictures_is_no_image(tmp_path, twin):
    write_pictures(tmp_path / "x")
    for file in (tmp_path / "x/images").iterdir():
        file.rename(file.with_suffix(""))
    (tmp_path / "x/images/notes.txt").write_text("notes")
    require_same(dicom_site(tmp_path / "x", images="images/*"), twin)


def test_public_files_are_read_or_refused_by_name():
    """Those that pydicom comes with: no error names another cause than the true one."""
    folder = Path(pydicom.__file__).parent / "data/test_files"
    site = Setup(format="dicom")
    told: dict[str, str] = {}
    for path in sorted(folder.glob("*.dcm")):
        try:
            told[path.name] = read_image(path, read_bytes(path, site), site).kind
        except SiteDataError as error:
            told[path.name] = error.code
    assert told["examples_palette.dcm"] == told["examples_rgb_color.dcm"]
    assert told["examples_rgb_color.dcm"] == told["ExplVR_BigEnd.dcm"] == "DICOM US, uncompressed"
    assert told["examples_jpeg2k.dcm"] == "DICOM US, JPEG 2000"
    assert told["examples_ybr_color.dcm"] == "multi-frame"
    assert told["CT_small.dcm"] == told["693_J2KI.dcm"] == "not-a-folder"
    assert sum(kind.startswith("DICOM") for kind in told.values()) >= 30
    # without pixels: the headers of tests
    damaged = {name for name, code in told.items() if code == "damaged-file"}
    assert damaged == {
        *("UN_sequence.dcm", "empty_charset_LEI.dcm", "no_meta_group_length.dcm", "priv_SQ.dcm"),
    }
    assert told["waveform_ecg.dcm"] == "no-dicom-images"
