"""DICOM against its NIfTI twin, against highdicom's own reading, and every refusal by its name."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import gdcm
import highdicom as hd
import nibabel
import numpy as np
import pytest
import torch
from contourpy import contour_generator
from dicom_files import (
    Grid,
    box,
    drawing,
    ds,
    grid,
    segmentation,
    series,
    stored_values,
    structure_set,
    true_values,
    uid,
    write,
    write_case,
    write_series,
    write_twin,
)
from pydicom import Dataset, dcmread
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    MediaStorageDirectoryStorage,
    RLELossless,
)
from site_files import recipe, site_config

from fedfms.contracts.site import SiteConfig
from fedfms.data.check import check_data
from fedfms.data.content import content_sha256, read_bytes
from fedfms.data.dicom.images import read_series
from fedfms.data.dicom.labels import read_label
from fedfms.data.formats import read_image
from fedfms.data.manifest import find_cases
from fedfms.data.prepare import prepare_cases
from fedfms.data.slices import SliceDataset
from fedfms.errors import ConfigError, SiteDataError

CLASSES = {"prostate": (1, 2), "lesion": (2,)}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def dicom_site(root: Path, **changes: object) -> SiteConfig:
    values: dict = {"images": "images/*", "labels": "labels/*.dcm", "classes": CLASSES}
    return site_config(root, "dicom", **{**values, **changes})


def write_site(root: Path, cases: int = 3, label: str = "seg") -> SiteConfig:
    for number in range(cases):
        write_case(root, f"c{number}", grid("axial"), seed=number, label=label)
    return dicom_site(root)


# ------------------------------------------------------------------------------------------- twin


@pytest.mark.parametrize("label", ["seg", "rtstruct", "nifti"])
@pytest.mark.parametrize("kind", ["axial", "flipped", "sagittal", "coronal", "oblique", "steep"])
def test_a_series_is_what_its_nifti_twin_is(tmp_path, kind, label):
    for number in range(2):
        write_case(tmp_path / "dicom", f"c{number}", grid(kind), seed=number, label=label)
        write_twin(tmp_path / "nifti", f"c{number}", grid(kind), seed=number)
    plane = {"flipped": "coronal", "steep": "sagittal"}.get(kind, "axial")
    one = dicom_site(
        tmp_path / "dicom",
        plane=plane,
        channels="neighbours",
        labels="labels/*.nii.gz" if label == "nifti" else "labels/*.dcm",
    )
    other = site_config(tmp_path / "nifti", classes=CLASSES, plane=plane, channels="neighbours")
    job = recipe(classes=("prostate", "lesion"), image_size=64)
    got, wanted = (prepare_cases(find_cases(site), site) for site in (one, other))
    assert len(got) == 2
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.labels, b.labels)
        np.testing.assert_allclose(a.spacing, b.spacing, atol=1e-6)
        assert a.is_volume
        assert set(np.unique(a.labels)) == {0, 1, 2}
    first, second = (
        SliceDataset(cases, site, job) for cases, site in ((got, one), (wanted, other))
    )
    assert len(first) == len(second) > 10
    for item in range(len(first)):
        for name in ("image", "target", "annotated"):
            np.testing.assert_allclose(first[item][name], second[item][name], atol=1e-6)


@pytest.mark.parametrize("kind", ["axial", "flipped", "sagittal", "oblique"])
def test_values_and_places_are_those_of_the_scanner_and_of_highdicom(tmp_path, kind):
    g = grid(kind)
    stored = stored_values(5, g.shape)
    slices = series("a", g, stored)
    write_series(tmp_path / "images/a", slices, shuffle=3)
    site = dicom_site(tmp_path)
    got = read_series(tmp_path / "images/a", read_bytes(tmp_path / "images/a", site), site)
    np.testing.assert_array_equal(got.values, true_values(stored))
    np.testing.assert_allclose(got.affine, g.nifti_affine(), atol=1e-6)
    assert [h.SOPInstanceUID for h in got.headers] == [s.SOPInstanceUID for s in slices]
    volume = hd.get_volume_from_series(slices)  # axes: slice, row, column; LPS
    to_highdicom = np.diag([-1.0, -1, 1, 1]) @ volume.affine @ np.eye(4)[[2, 1, 0, 3]]
    values = volume.array.transpose(2, 1, 0)
    if np.linalg.det(got.affine) * np.linalg.det(to_highdicom) < 0:  # it counts slices upside down
        values = values[..., ::-1]
        to_highdicom = to_highdicom @ np.array(
            [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, g.shape[2] - 1], [0, 0, 0, 1]]
        )
    np.testing.assert_allclose(got.affine, to_highdicom, atol=1e-6)
    np.testing.assert_allclose(got.values, values, rtol=1e-6)


def test_names_of_files_mean_nothing_and_content_everything(tmp_path):
    g = grid("oblique")
    for seed, name in enumerate(("a", "b")):
        slices = write_case(tmp_path / "one", name, g, seed=seed, shuffle=1)
        write_series(tmp_path / "two" / "images" / name, slices, shuffle=2)
    shutil.copytree(tmp_path / "one/labels", tmp_path / "two/labels")  # a SEG holds its hour
    one, two = (dicom_site(tmp_path / name, cache=tmp_path / "cache") for name in ("one", "two"))
    names = [sorted(p.name for p in (s.data_root / "images/a").iterdir()) for s in (one, two)]
    assert names[0] == names[1]
    first = {n: (one.data_root / "images/a" / n).read_bytes() for n in names[0]}
    assert any((two.data_root / "images/a" / n).read_bytes() != first[n] for n in first)
    prepared = prepare_cases(find_cases(one), one)
    files = {path: path.stat().st_mtime_ns for path in one.cache.iterdir()}
    assert len(files) == 2
    again = prepare_cases(find_cases(two), two)  # from the cache: no file is new
    assert {path: path.stat().st_mtime_ns for path in one.cache.iterdir()} == files
    for a, b in zip(prepared, again, strict=True):
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.labels, b.labels)
    slice_ = dcmread(two.data_root / "images/a/IM0000")
    slice_.RescaleIntercept = 7
    before = content_sha256(read_bytes(two.data_root / "images/a", two))
    write(two.data_root / "images/a/IM0000", slice_)
    assert content_sha256(read_bytes(two.data_root / "images/a", two)) != before
    changed = prepare_cases(find_cases(two), two)
    assert not np.array_equal(changed[0].images, prepared[0].images)
    np.testing.assert_array_equal(changed[1].images, prepared[1].images)


def test_what_makes_label_values_of_segments_is_part_of_the_cache_key(tmp_path):
    write_site(tmp_path)
    names = {1: ("prostate",), 2: ("lesion",)}
    swapped = {1: ("lesion",), 2: ("prostate",)}
    one = dicom_site(tmp_path, cache=tmp_path / "cache", label_names=names)
    two = dataclasses.replace(one, label_names=swapped)
    first, second = (prepare_cases(find_cases(site), site)[0].labels for site in (one, two))
    np.testing.assert_array_equal(first == 1, second == 2)
    np.testing.assert_array_equal(first == 2, second == 1)


def test_a_single_slice_lies_as_thick_as_its_header_says(tmp_path):
    g = grid("sagittal", (14, 12, 1))
    slices = series("a", g, stored_values(1, g.shape))
    write_series(tmp_path / "images/a", slices)
    site = dicom_site(tmp_path)
    stored = read_image(tmp_path / "images/a", read_bytes(tmp_path / "images/a", site), site)
    assert stored.values.shape == (1, 12, 14)
    assert stored.spacing == pytest.approx((2.0, 0.9, 0.7))


def compress_by_gdcm(slice_: Dataset, syntax: UID, scratch: Path) -> None:
    """Into what pydicom cannot write; only the pixels are taken from GDCM's file."""
    reader, change, writer = (
        make() for make in (gdcm.ImageReader, gdcm.ImageChangeTransferSyntax, gdcm.ImageWriter)
    )
    write(scratch, slice_)
    reader.SetFileName(str(scratch))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(syntax))))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(scratch))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    written = dcmread(scratch)
    assert written.file_meta.TransferSyntaxUID == syntax
    slice_.file_meta.TransferSyntaxUID = syntax
    slice_.PixelData = written.PixelData
    slice_["PixelData"].VR = "OB"


@pytest.mark.parametrize(
    "syntax",
    [RLELossless, JPEGLSLossless, JPEG2000Lossless, JPEGLossless, JPEGLosslessSV1],
    ids=lambda uid: uid.keyword,
)
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_compressed_slices_are_decoded_exactly(tmp_path, syntax, signed):
    g = grid("oblique")
    stored = stored_values(5, g.shape)
    if signed:
        stored = (stored.astype(np.int32) - 1000).astype(np.int16)  # as CT is often stored
    slices = series("a", g, stored)
    for slice_ in slices:
        slice_.PixelRepresentation = int(signed)
        if syntax in (RLELossless, JPEGLSLossless):
            slice_.compress(syntax, generate_instance_uid=False)
        else:
            compress_by_gdcm(slice_, syntax, tmp_path / "scratch.dcm")
    write_series(tmp_path / "images/a", slices)
    site = dicom_site(tmp_path)
    got = read_series(tmp_path / "images/a", read_bytes(tmp_path / "images/a", site), site)
    np.testing.assert_array_equal(got.values, true_values(stored))


def test_what_lies_beside_the_images_is_passed_over(tmp_path):
    g = grid("axial")
    for seed, name in enumerate(("a", "b")):
        write_case(tmp_path, name, g, seed=seed)
        shutil.copy(tmp_path / f"labels/{name}.dcm", tmp_path / f"images/{name}/seg.dcm")
        (tmp_path / f"images/{name}/.DS_Store").write_bytes(b"x")
        (tmp_path / f"images/{name}/Thumbs.db").write_bytes(b"x")
        (tmp_path / f"images/{name}/more").mkdir()
        index = dcmread(tmp_path / f"images/{name}/IM0000", stop_before_pixels=True)
        index.SOPClassUID = index.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
        write(tmp_path / f"images/{name}/DICOMDIR", index)
    site = dicom_site(tmp_path, labels="images/*/seg.dcm", images="images/*")
    assert [f.code for f in check_data(site) if f.severity == "error"] == []
    assert prepare_cases(find_cases(site), site)[0].images.shape == (7, 12, 14)


def test_a_label_may_be_a_folder_with_one_file(tmp_path):
    write_site(tmp_path)
    for name in ("c0", "c1", "c2"):
        (tmp_path / "data" / name / "SEG").mkdir(parents=True)
        (tmp_path / f"labels/{name}.dcm").rename(tmp_path / "data" / name / "SEG/1-1.dcm")
        (tmp_path / f"images/{name}").rename(tmp_path / "data" / name / "T2")
    site = dicom_site(tmp_path, images="data/*/T2/", labels="data/*/SEG")
    cases = prepare_cases(find_cases(site), site)
    assert [case.case.key for case in cases] == ["c0", "c1", "c2"]
    assert all((case.labels == 1).sum() == 7 * 7 * 4 - 2 * 2 * 2 for case in cases)
    (tmp_path / "data/c0/SEG/1-2.dcm").write_bytes(b"x")
    assert error_of(site).code == "several-labels"


@pytest.mark.parametrize("label", ["seg", "rtstruct"])
def test_real_volumes_written_as_dicom_are_read_as_their_nifti_files(tmp_path, shared_data, label):
    """Three volumes of the hippocampus; contourpy draws the outlines around their real labels."""
    folder = shared_data / "hippocampus" / "scanner-a"
    files = sorted((folder / "images").glob("*.nii.gz"))[:3]
    assert len(files) == 3
    for path in files:
        image = nibabel.load(path)
        drawn = np.asanyarray(nibabel.load(folder / "labels" / path.name).dataobj)
        np.testing.assert_array_equal(np.abs(image.affine[:3, :3]), np.eye(3))
        name, origin = path.name[:-7], image.affine[:3, 3] * [-1, -1, 1]
        right, back = np.array([-1.0, 0, 0]), np.array([0.0, -1, 0])  # RAS axes in LPS
        g = Grid(image.shape, right, back, 1.0, 1.0, 1.0, tuple(origin))
        values = np.asanyarray(image.dataobj).astype(np.uint16)
        slices = series(name, g, values, slopes=(1, 1, 1), intercepts=(0, 0, 0))
        write_series(tmp_path / "images" / name, slices)
        masks = {"anterior": drawn == 1, "posterior": drawn == 2}
        if label == "seg":
            write(tmp_path / f"labels/{name}.dcm", segmentation(slices, masks))
        else:
            outlines = {
                (number, part): [
                    (k, line - 1)
                    for k in range(g.shape[2])
                    for line in contour_generator(z=np.pad(mask[..., k], 1).T.astype(float)).lines(
                        0.5
                    )
                ]
                for number, (part, mask) in enumerate(masks.items(), start=1)
            }
            write(tmp_path / f"labels/{name}.dcm", structure_set(g, slices, outlines))
    classes = {"hippocampus": (1, 2)}
    one = dicom_site(tmp_path, classes=classes, plane="sagittal")
    other = site_config(folder, classes=classes, plane="sagittal")
    wanted = {case.key: case for case in find_cases(other)}
    got = prepare_cases(find_cases(one), one)
    assert len(got) == 3
    for case in got:
        (twin,) = prepare_cases([wanted[case.case.key]], other)
        np.testing.assert_array_equal(case.images, twin.images)
        np.testing.assert_array_equal(case.labels, twin.labels)
        assert (case.labels > 0).sum() > 1000
        assert case.spacing == twin.spacing


# ----------------------------------------------------------------------------------------- labels


def label_of(root: Path, site: SiteConfig, name: str = "a") -> np.ndarray:
    """(columns, rows, slices) as the code under test reads it."""
    image, label = root / "images" / name, root / "labels" / f"{name}.dcm"
    one = read_series(image, read_bytes(image, site), site)
    return read_label(label, read_bytes(label, site), site, one)[0]


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_a_segmentation_is_what_highdicom_reads(tmp_path, kind):
    g = grid("oblique")
    slices = write_case(tmp_path, "a", g)
    labels, _ = drawing(g.shape)
    seg = segmentation(slices, {"one": labels == 1, "two": labels == 2}, kind)
    write(tmp_path / "labels/a.dcm", seg)
    got = label_of(tmp_path, dicom_site(tmp_path))
    np.testing.assert_array_equal(got, labels)
    read = hd.seg.segread(tmp_path / "labels/a.dcm").get_pixels_by_source_instance(
        [slice_.SOPInstanceUID for slice_ in slices],
        combine_segments=True,
        assert_missing_frames_are_empty=True,
    )
    np.testing.assert_array_equal(got, read.transpose(2, 1, 0))


def test_a_segmentation_stored_the_other_way_round_lands_where_it_belongs(tmp_path):
    """Frames with rows and columns turned, as programs write that resample to their own axes."""
    g = grid("oblique")
    slices = write_case(tmp_path, "a", g)
    labels, _ = drawing(g.shape)
    columns, rows, _ = g.shape
    turned = segmentation(slices, {"one": labels == 1, "two": labels == 2})
    shared = turned.SharedFunctionalGroupsSequence[0]
    orientation = shared.PlaneOrientationSequence[0]
    orientation.ImageOrientationPatient = ds([*-g.along_column, *g.along_row])
    shared.PixelMeasuresSequence[0].PixelSpacing = ds([g.column_spacing, g.row_spacing])
    frames = turned.pixel_array
    first = {str(slice_.SOPInstanceUID): k for k, slice_ in enumerate(slices)}
    new = []
    for frame, own in zip(frames, turned.PerFrameFunctionalGroupsSequence, strict=True):
        source = own.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        place = g.place(0, rows - 1, first[str(source)])
        own.PlanePositionSequence[0].ImagePositionPatient = ds(place)
        new.append(frame.T[:, ::-1])  # (columns, rows), rows from the last to the first
    turned.Rows, turned.Columns = columns, rows
    turned.PixelData = np.packbits(np.stack(new).ravel(), bitorder="little").tobytes() + b"\0"
    turned.PixelData = turned.PixelData[: len(turned.PixelData) // 2 * 2]
    write(tmp_path / "labels/a.dcm", turned)
    np.testing.assert_array_equal(label_of(tmp_path, dicom_site(tmp_path)), labels)


def test_outlines_are_filled_by_centres_and_even_odd(tmp_path):
    g = grid("oblique", (20, 20, 4))
    slices = write_case(tmp_path, "a", g)
    angles = np.linspace(0, 2 * np.pi, 721)[:-1]
    ellipse = np.c_[9.3 + 6.2 * np.cos(angles), 10.1 + 4.4 * np.sin(angles)]
    outer, inner = box((2, 12), (2, 12)), box((5, 8), (5, 8))
    keyhole = np.vstack([outer, outer[:1], inner[:1], inner[::-1], outer[:1]])
    through_centres = np.array([[1, 1], [4, 1], [4, 4], [1, 4]])
    write(
        tmp_path / "labels/a.dcm",
        structure_set(
            g,
            slices,
            {
                (1, "x"): [
                    *((0, ellipse), (1, outer), (1, inner), (2, keyhole), (3, through_centres))
                ]
            },
        ),
    )
    got = label_of(tmp_path, dicom_site(tmp_path)) == 1
    i, j = np.mgrid[:20, :20]
    distance = ((i - 9.3) / 6.2) ** 2 + ((j - 10.1) / 4.4) ** 2
    clear = np.abs(distance - 1) > 1e-3  # the polygon differs from the ellipse by less
    np.testing.assert_array_equal(got[..., 0][clear], (distance < 1)[clear])
    ring = np.zeros((20, 20), bool)
    ring[2:12, 2:12], ring[5:8, 5:8] = True, False
    np.testing.assert_array_equal(got[..., 1], ring)
    np.testing.assert_array_equal(got[..., 2], ring)
    assert got[..., 3].sum() == 9  # the true area, where counting all edges gives 16 and none 4


def test_names_give_values_and_a_star_leaves_the_rest_out(tmp_path):
    g = grid("axial")
    slices = write_case(tmp_path, "a", g, label="rtstruct")
    labels, outlines = drawing(g.shape)
    named = {
        (41, "BODY"): [(k, box((0, 14), (0, 12))) for k in range(7)],
        (7, " prostate "): outlines[1, "Prostate"],
        (12, "GTV"): outlines[2, "Lesion"],
        (3, "empty"): [],
    }
    write(tmp_path / "labels/a.dcm", structure_set(g, slices, named))
    names = {1: ("Prostate",), 2: ("GTV", "gtvp"), 0: ("*",)}
    got = label_of(tmp_path, dicom_site(tmp_path, label_names=names))
    np.testing.assert_array_equal(got, labels)
    with pytest.raises(SiteDataError, match="under label_names") as error:
        label_of(tmp_path, dicom_site(tmp_path, label_names={1: ("Prostate",)}))
    assert error.value.code == "unknown-segments"
    assert "41 'BODY'" in error.value.problem
    assert "BODY" not in error.value.public
    with pytest.raises(SiteDataError, match="7 ' prostate'") as error:  # numbers, without names
        label_of(tmp_path, dicom_site(tmp_path))
    by_number = dicom_site(
        tmp_path, classes={"prostate": (7, 12), "lesion": (12,)}, background=(0, 41)
    )
    got = label_of(tmp_path, by_number)
    np.testing.assert_array_equal(got, np.choose(labels, [0, 7, 12]))


def test_segments_that_meet_are_refused_or_the_larger_value_stands(tmp_path):
    g = grid("axial")
    slices = write_case(tmp_path, "a", g)
    labels, _ = drawing(g.shape)
    whole = labels > 0
    for masks in ({"whole": whole, "part": labels == 2}, {"part": labels == 2, "whole": whole}):
        write(tmp_path / "labels/a.dcm", segmentation(slices, masks))
        names = {1: ("whole",), 2: ("part",)}
        site = dicom_site(tmp_path, label_names=names)
        with pytest.raises(SiteDataError, match="overlap: highest") as error:
            label_of(tmp_path, site)
        assert error.value.code == "segments-overlap"
        assert f"share {(labels == 2).sum()} voxels" in error.value.problem
        got = label_of(tmp_path, dataclasses.replace(site, overlap="highest"))
        np.testing.assert_array_equal(got, labels)
        # of one value they may meet
        alike = dataclasses.replace(site, label_names={1: ("whole", "part")})
        np.testing.assert_array_equal(label_of(tmp_path, alike), whole)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"label_names": {1: ("a",), 2: ("A ",)}}, "gives 'A ' the values 1 and 2"),
        ({"label_names": {9: ("a",)}}, "the value 9, which has no class"),
        ({"label_names": {1: ("a",)}, "format": "nifti"}, "format: nifti has no names"),
        ({"label_names": {"x": ("a",)}}, "label_names has the key 'x'"),
        ({"label_names": {1: "a"}}, "write a list"),
        ({"overlap": "first"}, "refuse, highest"),
        ({"series": "("}, "no regular expression"),
    ],
)
def test_a_mistake_in_the_keys_for_dicom_is_named(tmp_path, changes, says):
    import yaml

    values = {
        "format": "dicom",
        "images": "*/T2",
        "labels": "*/seg.dcm",
        "classes": {"prostate": [1, 2]},
        **changes,
    }
    plain = {
        key: {n: list(names) if isinstance(names, tuple) else names for n, names in value.items()}
        if key == "label_names"
        else value
        for key, value in values.items()
    }
    (tmp_path / "site.yml").write_text(yaml.safe_dump(plain))
    with pytest.raises(ConfigError) as error:
        SiteConfig.from_yaml(tmp_path / "site.yml", tmp_path)
    assert says in str(error.value)


def test_names_from_yaml_are_read_as_they_stand(tmp_path):
    (tmp_path / "site.yml").write_text(
        "format: dicom\nimages: '*/T2'\nlabels: '*/seg.dcm'\nclasses: {prostate: [1]}\n"
        "label_names:\n  1: [Prostate]\n  0: ['*']\noverlap: highest\n"
    )
    site = SiteConfig.from_yaml(tmp_path / "site.yml", tmp_path)
    assert site.label_names == {1: ("Prostate",), 0: ("*",)}
    assert site.overlap == "highest"


def test_a_nifti_label_in_the_axes_of_dicom_lies_elsewhere(tmp_path):
    """The usual mistake of a script: LPS written as if it were RAS."""
    for number in range(2):
        write_case(tmp_path, f"c{number}", grid("oblique"), seed=number, label="nifti")
    path = tmp_path / "labels/c1.nii.gz"
    image = nibabel.load(path)
    turned = np.diag([-1.0, -1, 1, 1]) @ image.affine
    nibabel.save(nibabel.Nifti1Image(np.asanyarray(image.dataobj), turned), path)
    site = dicom_site(tmp_path, labels="labels/*.nii.gz")
    assert error_of(site).code == "geometry-differs"


def test_colours_are_not_asked_of_a_series(tmp_path):
    site = dataclasses.replace(write_site(tmp_path), channels="rgb")
    (finding,) = check_data(site)
    assert finding.code == "rgb-of-a-volume"
    assert "DICOM slices have one grey channel" in finding.problem


# --------------------------------------------------------------------------------------- patients


def test_the_patient_is_the_patient_id_and_the_split_keeps_it_whole(tmp_path):
    g = grid("axial")
    for number in range(8):
        slices = series(f"visit{number}", g, stored_values(number, g.shape))
        for slice_ in slices:
            slice_.PatientID = f"0815-{number // 2}" if number < 6 else ""
        write_series(tmp_path / f"images/v{number}", slices)
        write(
            tmp_path / f"labels/v{number}.dcm",
            segmentation(slices, {"a": stored_values(1, g.shape) > 1500}),
        )
    site = dicom_site(tmp_path, validation_fraction=0.4)
    cases = find_cases(site)
    assert [case.patient for case in cases] == [
        *("0815-0", "0815-0", "0815-1", "0815-1", "0815-2", "0815-2"),
        *("v6", "v7"),
    ]
    for patient in ("0815-0", "0815-1", "0815-2"):
        assert len({case.split for case in cases if case.patient == patient}) == 1
    named = dicom_site(tmp_path, patient=r"^(v\d)")
    assert {case.patient for case in find_cases(named)} == {f"v{number}" for number in range(8)}


# --------------------------------------------------------------------------------------- refusals


def images(root: Path) -> list[Path]:
    """The files of case c1, in the order of their places."""
    files = list((root / "images/c1").iterdir())
    return sorted(files, key=lambda path: float(dcmread(path).ImagePositionPatient[2]))


def change(path: Path, **values: object) -> None:
    slice_ = dcmread(path)
    for name, value in values.items():
        if value is None:
            delattr(slice_, name)
        else:
            setattr(slice_, name, value)
    write(path, slice_)


def all_of(root: Path, **values: object) -> None:
    for path in images(root):
        change(path, **values)


def moved(path: Path, by: np.ndarray) -> None:
    place = np.array(dcmread(path).ImagePositionPatient, float) + by
    change(path, ImagePositionPatient=ds(place))


def several_series(root):
    change(images(root)[2], SeriesInstanceUID=uid("other"), SeriesDescription="adc")


def a_large_gap(root):
    for path in images(root)[4:]:
        moved(path, np.array([0, 0, 20 * 3.5]))


def missing_slice(root):
    images(root)[3].unlink()


def duplicate_slice(root):
    path = images(root)[3]
    shutil.copy(path, path.with_name("again"))


def two_time_points(root):
    for k, path in enumerate(images(root)):
        slice_ = dcmread(path)
        slice_.SOPInstanceUID = uid("later", k)
        slice_.file_meta.MediaStorageSOPInstanceUID = slice_.SOPInstanceUID
        write(path.with_name(f"later{k}"), slice_)


def uneven(root):
    moved(images(root)[3], np.array([0, 0, 0.8]))


def tilted(root):
    for k, path in enumerate(images(root)):
        moved(path, np.array([0, 0.6 * k, 0]))
        change(path, GantryDetectorTilt=9.7)


def crossing_orientation(root):
    change(images(root)[0], ImageOrientationPatient=ds([0, 1, 0, 0, 0, -1]))


def no_directions(root):
    all_of(root, ImageOrientationPatient=ds([1, 0, 0, 1, 0, 0]))


def localizer(root):
    change(images(root)[0], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])


def other_size(root):
    change(images(root)[0], PixelSpacing=ds([0.9, 0.8]))


def colour(root):
    path = images(root)[2]
    pixels = bytes(3 * 14 * 12)
    change(path, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0,
           BitsAllocated=8, BitsStored=8, HighBit=7, PixelData=pixels)  # fmt: skip


def white_is_small(root):
    all_of(root, PhotometricInterpretation="MONOCHROME1")


def multi_frame(root):
    change(images(root)[2], NumberOfFrames=2, PixelData=bytes(2 * 2 * 14 * 12))


def no_position(root):
    change(images(root)[2], ImagePositionPatient=None)


def high_throughput_jpeg(root):
    path = images(root)[2]
    slice_ = dcmread(path)
    slice_.compress(RLELossless, generate_instance_uid=False)
    slice_.file_meta.TransferSyntaxUID = HTJ2KLossless
    write(path, slice_)


def cut_off(root):
    path = images(root)[2]
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_its_header(root):
    path = images(root)[2]
    path.write_bytes(path.read_bytes()[:400])


def empty_file(root):
    images(root)[2].write_bytes(b"")


def file_without_ending(root):
    (root / "images/c1/IM9999").write_text("exported on Monday")


def empty_folder(root):
    for path in images(root):
        path.unlink()


def label_in_place_of_images(root):
    empty_folder(root)
    shutil.copy(root / "labels/c0.dcm", root / "images/c1/seg.dcm")


def file_in_place_of_folder(root):
    shutil.rmtree(root / "images")
    (root / "images").mkdir()
    for name in ("c0", "c1", "c2"):
        shutil.copy(root / f"labels/{name}.dcm", root / f"images/{name}")


def label_of_another_series(root):
    shutil.copy(root / "labels/c0.dcm", root / "labels/c1.dcm")


def label_of_another_frame(root):
    change(root / "labels/c1.dcm", FrameOfReferenceUID=uid("elsewhere"))


def slice_missing_at_the_end(root):
    images(root)[-1].unlink()


def shifted(place: Dataset, by: list[float]) -> list:
    return ds(np.array(place.ImagePositionPatient, float) + np.array(by))


def label_shifted(root):
    seg = dcmread(root / "labels/c1.dcm")
    for own in seg.PerFrameFunctionalGroupsSequence:
        place = own.PlanePositionSequence[0]
        place.ImagePositionPatient = shifted(place, [0.3, 0, 0])
    write(root / "labels/c1.dcm", seg)


def label_between_slices(root):
    seg = dcmread(root / "labels/c1.dcm")
    for own in seg.PerFrameFunctionalGroupsSequence:
        place = own.PlanePositionSequence[0]
        place.ImagePositionPatient = shifted(place, [0, 0, 1.7])
    write(root / "labels/c1.dcm", seg)


def label_with_thicker_slices(root):
    seg = dcmread(root / "labels/c1.dcm")
    seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices = 7.0
    write(root / "labels/c1.dcm", seg)


def label_with_larger_pixels(root):
    seg = dcmread(root / "labels/c1.dcm")
    measures = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    measures.PixelSpacing = ds([1.8, 1.4])
    write(root / "labels/c1.dcm", seg)


def label_beyond_the_image(root):
    seg = dcmread(root / "labels/c1.dcm")
    for own in seg.PerFrameFunctionalGroupsSequence:
        place = own.PlanePositionSequence[0]
        place.ImagePositionPatient = shifted(place, [7 * 0.7, 0, 0])
    write(root / "labels/c1.dcm", seg)


def fractional(root):
    slices = [dcmread(path) for path in images(root)]
    labels, _ = drawing((14, 12, 7))
    write(root / "labels/c1.dcm", segmentation(slices, {"a": labels == 1}, "FRACTIONAL"))


def unknown_segment(root):
    slices = [dcmread(path) for path in images(root)]
    labels, _ = drawing((14, 12, 7))
    masks = {"a": labels == 1, "b": labels == 2, "Mr Smith's cyst": labels == 3}
    write(root / "labels/c1.dcm", segmentation(slices, masks))


def no_label_at_all(root):
    shutil.copy(images(root)[0], root / "labels/c1.dcm")


def structures(root, outlines, **values) -> None:
    slices = [dcmread(path) for path in images(root)]
    write(root / "labels/c1.dcm", structure_set(grid("axial"), slices, outlines, **values))


def outline_between_slices(root):
    structures(root, {(1, "a"): [(1.5, box((2, 5), (2, 5)))]})


def outline_beyond_the_slices(root):
    structures(root, {(1, "a"): [(9, box((2, 5), (2, 5)))]})


def points_for_an_outline(root):
    structures(root, {(1, "a"): [(1, box((2, 5), (2, 5)))]}, kind="POINT")


def no_letters_dicm(root):
    (root / "labels/c1.dcm").write_bytes(b"\0" * 1000)


def as_bytes(path, tag, vr, value):
    """A value that pydicom would not write."""
    slice_ = dcmread(path)
    slice_[tag] = RawDataElement(Tag(tag), vr, len(value), value, 0, False, True)
    write(path, slice_)


def slope_with_a_comma(root):
    as_bytes(images(root)[1], 0x00281053, "DS", b"1,5 ")


def position_with_commas(root):
    as_bytes(images(root)[1], 0x00200032, "DS", b"1,5\\2,5\\3,5 ")


def direction_that_is_no_number(root):
    as_bytes(images(root)[1], 0x00200037, "DS", b"nan\\0\\0\\0\\1\\0 ")


def slope_of_nothing(root):
    change(images(root)[1], RescaleSlope=0)


def two_slopes(root):
    change(images(root)[1], RescaleSlope=[1, 2])


def twelve_bits_packed(root):
    change(images(root)[1], BitsAllocated=12, BitsStored=12, HighBit=11)


def a_column_too_few(root):
    for path in images(root):
        change(path, Columns=13)


BROKEN = {
    several_series: ("several-series", "'adc' (1), 't2_tse_tra' (6)"),
    a_large_gap: ("missing-slices", "lacks 20 slices"),
    missing_slice: ("missing-slices", "lacks 1 slices: they lie 3.5 mm apart, but 7 mm"),
    duplicate_slice: ("duplicate-slices", "InstanceNumber 4 and 4"),
    two_time_points: ("duplicate-slices", "several slices in one place"),
    uneven: ("uneven-spacing", "2.7 to 4.3 mm apart"),
    tilted: ("gantry-tilt", "sheared by 9.7 degrees"),
    crossing_orientation: ("mixed-orientations", "their directions differ"),
    no_directions: ("mixed-orientations", "no pair of directions"),
    localizer: ("localizer", "is a localizer"),
    other_size: ("mixed-grids", "PixelSpacing has the values (0.9, 0.7) and (0.9, 0.8)"),
    colour: ("colour-dicom", "holds colours (RGB)"),
    white_is_small: ("monochrome1", "small values are shown white"),
    multi_frame: ("multi-frame", "2 frames do not say where they lie"),
    no_position: ("no-position", "no ImagePositionPatient"),
    high_throughput_jpeg: ("no-decoder", "pylibjpeg"),
    cut_off: ("damaged-file", "damaged or cut off"),
    cut_in_its_header: ("damaged-file", "damaged or cut off"),
    empty_file: ("empty-file", "0 bytes"),
    file_without_ending: ("not-dicom", "IM9999 is no DICOM file"),
    empty_folder: ("no-files", "no file of a series in the folder"),
    label_in_place_of_images: ("no-dicom-images", "only: Segmentation"),
    file_in_place_of_folder: ("no-dicom-images", "only: Segmentation"),
    label_of_another_series: ("other-series", "another series"),
    label_of_another_frame: ("other-frame-of-reference", "frame of reference"),
    slice_missing_at_the_end: ("label-of-other-slices", "1 slices that are not in the folder"),
    label_shifted: ("other-grid", "not those of its series"),
    label_between_slices: ("other-grid", "not those of its series"),
    label_with_thicker_slices: ("other-grid", "not those of its series"),
    label_with_larger_pixels: ("other-grid", "not those of its series"),
    label_beyond_the_image: ("other-grid", "not those of its series"),
    fractional: ("fractional-seg", "holds shares"),
    unknown_segment: ("unknown-segments", '3 "Mr Smith\'s cyst"'),
    no_label_at_all: ("not-a-label", "MR Image Storage"),
    outline_between_slices: ("outline-between-slices", "between or beyond"),
    outline_beyond_the_slices: ("outline-between-slices", "between or beyond"),
    points_for_an_outline: ("open-outline", "the kind POINT"),
    no_letters_dicm: ("not-dicom", "no DICOM file"),
    slope_with_a_comma: ("cannot-be-read-here", "RescaleSlope is no number"),
    position_with_commas: ("cannot-be-read-here", "ImagePositionPatient is no number"),
    direction_that_is_no_number: ("cannot-be-read-here", "ImageOrientationPatient is not finite"),
    slope_of_nothing: ("cannot-be-read-here", "its RescaleSlope is 0"),
    two_slopes: ("cannot-be-read-here", "its RescaleSlope is [1.0, 2.0]"),
    twelve_bits_packed: ("cannot-be-read-here", "12 bits (BitsAllocated)"),
    a_column_too_few: ("cannot-be-read-here", "168 pixels, but 12 x 13"),
}


def error_of(site: SiteConfig) -> SiteDataError:
    with pytest.raises(SiteDataError) as caught:
        prepare_cases(find_cases(site), site)
    return caught.value


@pytest.mark.parametrize("break_it", BROKEN, ids=lambda function: function.__name__)
def test_what_cannot_be_read_rightly_is_refused_by_name(tmp_path, break_it, caplog, recwarn):
    site = write_site(tmp_path)
    break_it(tmp_path)
    code, says = BROKEN[break_it]
    findings = check_data(site, ["prostate"])
    assert [(finding.code, finding.severity) for finding in findings] == [(code, "error")]
    assert says in findings[0].problem
    assert len(findings[0].fix) > 20
    error = error_of(site)  # training stops at the same
    assert error.code == code
    for name in ("c1", "Secret", "ID-c", "Smith", str(tmp_path)):
        assert name not in error.public
        assert name not in caplog.text
        assert not any(name in str(warning.message) for warning in recwarn)


def test_texts_tables_and_pictures_beside_slices_change_nothing(tmp_path):
    site = write_site(tmp_path)
    before = [case.labels[:].copy() for case in prepare_cases(find_cases(site), site)]
    for name in ("README.txt", "patients.csv", "Preview 1.JPG", "report.pdf", "empty.html"):
        (tmp_path / "images/c1" / name).write_text("" if name == "empty.html" else "exported" * 99)
    assert not [one for one in check_data(site, ["prostate"]) if one.severity == "error"]
    after = [case.labels[:] for case in prepare_cases(find_cases(site), site)]
    assert all(np.array_equal(*pair) for pair in zip(before, after, strict=True))


def test_one_series_of_several_is_chosen_by_its_description(tmp_path):
    site = write_site(tmp_path)
    for path in list((tmp_path / "images").glob("*/IM*")):
        slice_ = dcmread(path)
        slice_.SeriesInstanceUID = uid(slice_.SeriesInstanceUID, "adc")
        slice_.SeriesDescription, slice_.PixelData = "adc", bytes(2 * 14 * 12)
        write(path.with_name(f"adc{path.name}"), slice_)
    assert error_of(site).code == "several-series"
    chosen = dataclasses.replace(site, series="^t2_")
    assert len(prepare_cases(find_cases(chosen), chosen)) == 3
    assert error_of(dataclasses.replace(site, series="flair")).code == "no-such-series"


def test_problems_of_several_folders_with_one_name_are_told_apart(tmp_path):
    write_site(tmp_path)
    for name in ("c0", "c1", "c2"):
        (tmp_path / f"images/{name}").rename(tmp_path / "T2")
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "T2").rename(tmp_path / "data" / name / "T2")
        for path in (tmp_path / "data" / name / "T2").iterdir():
            path.write_bytes(b"")
    site = dicom_site(tmp_path, images="data/*/T2", labels="labels/*.dcm")
    (finding,) = check_data(site)
    assert "2 more with the same problem: data/c1/T2, data/c2/T2" in finding.problem


def test_odd_headers_are_read_without_a_word_about_the_patient(tmp_path, caplog, recwarn):
    site = write_site(tmp_path)
    for path in (tmp_path / "images").glob("*/IM*"):
        data = path.read_bytes()
        assert b"19500102" in data
        data = data.replace(b"19500102", b"Jan 1950")  # no date
        data = data.replace(b"20260101", b"Secret^J")
        path.write_bytes(data)
    assert len(prepare_cases(find_cases(site), site)) == 3
    assert not [str(w.message) for w in recwarn.list]
    assert "Secret" not in caplog.text


def test_a_header_that_leaves_out_what_is_certain_is_read_as_with_it(tmp_path):
    site = write_site(tmp_path)
    before = prepare_cases(find_cases(site), site)
    for path in (tmp_path / "images").glob("*/IM*"):
        change(path, SamplesPerPixel=None)
        if dcmread(path).RescaleIntercept == 0 and dcmread(path).RescaleSlope == 1:
            change(path, RescaleSlope="", RescaleIntercept="")
    for one, other in zip(before, prepare_cases(find_cases(site), site), strict=True):
        assert np.array_equal(one.images, other.images)


# ------------------------------------------------------------------------ in a trainer, to its end


TRAIN = """
import logging, socket, sys
from pathlib import Path
logging.basicConfig(level=logging.INFO)
from fedfms.trainer.__main__ import refuse_networks
refuse_networks()
from fedfms.contracts.recipe import BACKBONES, Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.check import check_data
from fedfms.training.pooled import train_pooled
recipe = Recipe(method="fedmsa", backbone="vit_demo", rounds=1, image_size=64,
                backbone_sha256=BACKBONES["vit_demo"].sha256, classes=("prostate", "lesion"))
def show(done):
    print(done.rounds_trained, done.loss, [m.mean for m in done.metrics["a"] if m.metric == "dice"])
for name in sys.argv[1:]:
    site = SiteConfig.from_yaml(Path(name))
    assert not [f for f in check_data(site, ["prostate", "lesion"]) if f.severity == "error"]
    train_pooled(recipe, {"a": site}, checkpoints=None, control=Control(), on_round=show)
try:
    socket.socket()
except PermissionError:
    print("no sockets")
"""


def test_a_round_from_dicom_in_a_process_without_sockets_is_that_of_its_nifti_twin(tmp_path):
    kinds = ("seg", "rtstruct", "twin")
    for kind in kinds:
        for number in range(4):
            name, g = f"c{number}", grid("oblique")
            if kind == "twin":
                write_twin(tmp_path / kind, name, g, seed=number)
            else:
                write_case(tmp_path / kind, name, g, seed=number, label=kind)
        ending = ".nii.gz" if kind == "twin" else ""
        (tmp_path / kind / "site.yml").write_text(
            f"data_root: .\nformat: {'nifti' if kind == 'twin' else 'dicom'}\n"
            f"images: images/*{ending}\nlabels: labels/*{ending or '.dcm'}\n"
            "classes: {prostate: [1, 2], lesion: [2]}\nmin_cases: 1\ndevice: cpu\nthreads: 1\n"
            "patient: (c.)\n"
        )
    run = subprocess.run(
        [sys.executable, "-c", TRAIN, *(str(tmp_path / kind / "site.yml") for kind in kinds)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    for name in ("Secret", "ID-c", "c1"):
        assert name not in run.stderr
    *rounds, last = run.stdout.splitlines()
    assert last == "no sockets"
    assert len(rounds) == 6
    assert rounds[:2] == rounds[2:4] == rounds[4:]
    before, after = (float(line.split()[2].strip("[],")) for line in rounds[:2])
    assert after > before  # Dice of the prostate; there is something to learn from
