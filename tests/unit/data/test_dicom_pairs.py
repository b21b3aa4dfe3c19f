"""Folders as planning systems and archives export them: which label belongs to which series."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dicom_files import (
    drawing,
    grid,
    segmentation,
    series,
    stored_values,
    structure_set,
    uid,
    write,
    write_series,
)
from pydicom import Dataset, dcmread
from site_files import site_config

from fedfms.data.manifest import find_cases, scan
from fedfms.data.prepare import prepare_cases
from fedfms.errors import SiteDataError

CLASSES = {"prostate": (1,), "lesion": (2,)}
G = grid("axial")


def site(root: Path, images: str, labels: str, **changes: object):
    return site_config(root, "dicom", images=images, labels=labels, classes=CLASSES, **changes)


def drawn(name: str, kind: str = "rtstruct") -> tuple[list[Dataset], Dataset]:
    slices = series(name, G, stored_values(sum(name.encode()), G.shape))
    labels, outlines = drawing(G.shape)
    if kind == "rtstruct":
        return slices, structure_set(G, slices, outlines)
    return slices, segmentation(slices, {"Prostate": labels == 1, "Lesion": labels == 2})


def pairs(config) -> dict[str, str]:
    return {
        case.key: case.label.relative_to(config.data_root).as_posix() for case in find_cases(config)
    }


def planning_export(root: Path, patients: int = 3) -> None:
    """One folder a patient: CT.<uid>.dcm and RS.<uid>.dcm."""
    for n in range(patients):
        slices, label = drawn(f"pat{n}")
        for slice_ in slices:
            write(root / f"P{n}" / f"CT.{slice_.SOPInstanceUID}.dcm", slice_)
        write(root / f"P{n}" / f"RS.{label.SOPInstanceUID}.dcm", label)


def archive_export(root: Path, patients: int = 3, kind: str = "rtstruct") -> None:
    """patient/study/series/*.dcm, the label in a series of its own."""
    for n in range(patients):
        slices, label = drawn(f"pat{n}", kind)
        study = root / f"PID{n}" / uid("study", n)
        write_series(study / slices[0].SeriesInstanceUID, slices)
        write(study / label.SeriesInstanceUID / f"{label.SOPInstanceUID}.dcm", label)


@pytest.mark.parametrize(
    ("labels", "how"),
    [
        *(("*/RS.*.dcm", how) for how in (None, "reference", "folder")),
        *((labels, how) for labels in ("*/*.dcm", "*") for how in (None, "reference")),
    ],
)
def test_slices_and_structure_set_in_one_folder(tmp_path, labels, how):
    planning_export(tmp_path)
    config = site(tmp_path, "*", labels, pair_by=how)
    cases = find_cases(config)
    assert [case.key for case in cases] == ["P0", "P1", "P2"]
    assert [case.patient for case in cases] == ["ID-pat0", "ID-pat1", "ID-pat2"]
    assert all(case.label.parent == case.image for case in cases)
    expected = drawing(G.shape)[0]
    for prepared in prepare_cases(cases, config):
        counts = np.bincount(prepared.labels.ravel(), minlength=3)
        assert list(counts) == list(np.bincount(expected.ravel(), minlength=3))


@pytest.mark.parametrize("kind", ["rtstruct", "seg"])
@pytest.mark.parametrize("labels", ["*/*/*", "*/*/*/*.dcm", "**/*.dcm"])
def test_an_archive_in_which_the_label_is_a_series_of_its_own(tmp_path, kind, labels):
    archive_export(tmp_path, kind=kind)
    config = site(tmp_path, "*/*/*", labels)
    cases = find_cases(config)
    assert [case.patient for case in cases] == ["ID-pat0", "ID-pat1", "ID-pat2"]
    for case in cases:
        label = dcmread(case.label)
        assert label.Modality in ("RTSTRUCT", "SEG")
        assert case.image.name == uid(case.patient.removeprefix("ID-"), "series")
        assert case.image.parent.parent == case.label.parent.parent.parent
    assert len(prepare_cases(cases, config)) == 3


def test_a_label_that_names_no_series_is_found_by_its_frame_of_reference(tmp_path):
    for n in range(3):
        slices, label = drawn(f"pat{n}")
        for frame in label.ReferencedFrameOfReferenceSequence:
            del frame.RTReferencedStudySequence
        write_series(tmp_path / f"P{n}/ct", slices)
        write(tmp_path / f"drawn/{2 - n}.dcm", label)
    config = site(tmp_path, "*/ct", "drawn/*.dcm", pair_by="reference")
    assert pairs(config) == {f"P{n}": f"drawn/{2 - n}.dcm" for n in range(3)}
    # a second series in the same frame: which of them is meant is no more known
    write_series(tmp_path / "P1/ct2/ct", _another_series("pat1"))
    error = _only_problem(site(tmp_path, "**/ct", "drawn/*.dcm", pair_by="reference"))
    assert error.code == "several-images" and "drawn/1.dcm" in error.problem
    assert "frame of reference" in error.problem


def _another_series(name: str, description: str = "localizer") -> list[Dataset]:
    slices = drawn(name)[0]
    for k, slice_ in enumerate(slices):
        slice_.SeriesInstanceUID = uid(name, description)
        slice_.SOPInstanceUID = uid(name, description, k)
        slice_.file_meta.MediaStorageSOPInstanceUID = slice_.SOPInstanceUID
        slice_.SeriesDescription = description
    return slices


def _only_problem(config) -> SiteDataError:
    found = scan(config)
    assert len(found.problems) == 1, found.problems
    assert found.problems[0].fix
    return found.problems[0]


def test_two_labels_of_one_series_are_refused_by_name(tmp_path):
    archive_export(tmp_path)
    again = drawn("pat1")[1]
    again.SeriesInstanceUID = uid("second drawing")
    write(tmp_path / "PID1/again/series/rs2.dcm", again)
    error = _only_problem(site(tmp_path, "*/*/*", "*/*/*"))
    assert error.code == "several-labels"
    assert "PID1/again/series/rs2.dcm" in error.problem and uid("pat1", "series") in error.problem


def test_one_series_in_two_folders_is_refused_by_name(tmp_path):
    archive_export(tmp_path)
    write_series(tmp_path / "PID2/copy/ct", drawn("pat2")[0])
    error = _only_problem(site(tmp_path, "*/*/*", "*/*/*"))
    assert error.code == "several-images" and "PID2/copy/ct" in error.problem


def test_a_series_without_a_label_is_named_and_series_chooses(tmp_path):
    archive_export(tmp_path)
    write_series(tmp_path / "PID0/study/scout", _another_series("pat0"))
    error = _only_problem(site(tmp_path, "*/*/*", "*/*/*"))
    assert error.code == "unpaired-files"
    assert "1 of 4 images have no label: PID0/study/scout" in error.problem
    assert "series:" in error.fix
    assert len(find_cases(site(tmp_path, "*/*/*", "*/*/*", series="t2_tse"))) == 3


def test_a_label_of_a_series_that_is_not_there_is_named(tmp_path):
    archive_export(tmp_path)
    write(tmp_path / "PID0/study/rs/rs.dcm", drawn("other")[1])
    error = _only_problem(site(tmp_path, "*/*/*", "*/*/*"))
    assert error.code == "unpaired-files"
    assert "1 of 4 labels have no image: PID0/study/rs/rs.dcm" in error.problem
    assert "UIDs" in error.fix


def test_globs_that_match_no_label_or_no_image_say_so(tmp_path):
    archive_export(tmp_path)
    error = _only_problem(site(tmp_path, "*/*/*", "*/*/*/IM*"))
    assert error.code == "no-labels" and "SEG" in error.problem and "wildcards" in error.fix
    error = _only_problem(site(tmp_path, "*/*", "*/*/*/*.dcm"))
    assert error.code == "no-images" and "directly holds" in error.problem
    error = _only_problem(site(tmp_path, "*/*/*", "*/*/*", series="flair"))
    assert error.code == "no-images" and "flair" in error.problem


def test_a_damaged_label_is_named_and_not_left_out(tmp_path):
    planning_export(tmp_path)
    (label,) = (tmp_path / "P1").glob("RS.*.dcm")
    label.write_bytes(label.read_bytes()[:400])
    codes = [problem.code for problem in scan(site(tmp_path, "*", "*/RS.*.dcm")).problems]
    assert codes in (["damaged-file"], ["unpaired-files"])


def test_patients_of_dicom_pair_by_their_patient_id(tmp_path):
    for n in range(3):
        slices, label = drawn(f"pat{n}")
        write_series(tmp_path / f"images/{n}/x{n}", slices)
        write(tmp_path / f"labels/{9 - n}.dcm", label)
    config = site(tmp_path, "images/*/*", "labels/*.dcm", pair_by="patient")
    assert pairs(config) == {f"ID-pat{n}": f"labels/{9 - n}.dcm" for n in range(3)}


def test_names_pair_dicom_as_before_where_the_wildcards_are_alike(tmp_path):
    for n in range(3):
        slices, label = drawn(f"pat{n}")
        write_series(tmp_path / f"p{n}/T2", slices)
        write(tmp_path / f"p{n}/seg.dcm", label)
        write(tmp_path / f"p{n}/old.dcm", label)  # which refers to T2 too
    assert pairs(site(tmp_path, "*/T2", "*/seg.dcm")) == {
        f"p{n}": f"p{n}/seg.dcm" for n in range(3)
    }
