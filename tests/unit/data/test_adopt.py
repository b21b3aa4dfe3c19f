"""`fedfms adopt`: layouts built from their specifications, read back by the code that trains."""

from __future__ import annotations

import hashlib
from pathlib import Path

import layouts
import pytest
from dicom_files import (
    box,
    series,
    stored_values,
    structure_set,
    uid,
    write,
    write_case,
    write_series,
)
from test_dicom_pairs import G, drawn

from fedfms.contracts.site import SiteConfig
from fedfms.data.adopt.propose import propose
from fedfms.data.adopt.write import site_yml, write_site
from fedfms.data.check import check_data
from fedfms.data.manifest import find_cases
from fedfms.data.prepare import prepare_cases
from fedfms.errors import ConfigError, SiteDataError


def tree_sum(root: Path) -> str:
    """Of all files below, with their names and times."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        digest.update(f"{path.relative_to(root)} {path.stat().st_mtime_ns}".encode())
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def adopted(root: Path, file: Path, **options: object) -> SiteConfig:
    """Adopt a folder, write its site.yml and read that; nothing in the folder changes."""
    before = tree_sum(root)
    found = propose(root, **options)
    assert found.needs == []
    write_site(found, file)
    assert tree_sum(root) == before
    return SiteConfig.from_yaml(file)


def pairs_of(site: SiteConfig) -> dict[str, str]:
    return {
        case.image.relative_to(site.data_root).as_posix(): case.label.relative_to(
            site.data_root
        ).as_posix()
        for case in find_cases(site)
    }


LAYOUTS = {
    "nnU-Net raw": (layouts.nnunet_raw, {"central_gland": (1,), "pz": (2,)}),
    "Decathlon": (layouts.decathlon, {"anterior": (1,), "posterior": (2,)}),
    "BIDS": (layouts.bids, {"lesion": (1,)}),
    "a folder a patient": (layouts.folder_a_patient, {"foreground": (1,)}),
    "FeTS": (
        layouts.fets,
        {"necrotic_core": (1,), "oedema": (2,), "enhancing_tumour": (4,)},
    ),
    "BraTS 2023": (
        layouts.brats_2023,
        {"necrotic_core": (1,), "oedema": (2,), "enhancing_tumour": (3,)},
    ),
    "TotalSegmentator": (
        layouts.totalsegmentator,
        {"heart": (1,), "kidney_left": (2,), "kidney_right": (3,), "liver": (4,)},
    ),
    "masks beside pictures": (layouts.pictures_beside, {"foreground": (255,)}),
    "masks in another folder": (layouts.pictures_elsewhere, {"foreground": (255,)}),
    "train, val, test": (layouts.train_val_test, {"foreground": (1,)}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_read_without_an_edit_and_its_pairs_are_right(tmp_path, name):
    build, classes = LAYOUTS[name]
    root = tmp_path / "Daten äöü"
    root.mkdir()
    expected = build(root)
    site = adopted(root, tmp_path / "site.yml")
    assert pairs_of(site) == expected
    assert site.classes == classes
    assert [f for f in check_data(site) if f.severity == "error"] == []


def test_a_site_yml_that_is_there_is_never_written_over(tmp_path):
    layouts.decathlon(tmp_path / "d")
    file = tmp_path / "site.yml"
    file.write_text("mine")
    with pytest.raises(ConfigError) as refused:
        write_site(propose(tmp_path / "d"), file)
    assert refused.value.code == "output-exists"
    assert file.read_text() == "mine"


def test_a_second_series_on_another_grid_is_not_taken_and_said(tmp_path):
    layouts.folder_a_patient(tmp_path)
    found = propose(tmp_path)
    assert dict(found.seen)["not taken"] == "5 .nii.gz"
    assert "T2w" not in site_yml(found)


def test_four_contrasts_and_their_names(tmp_path):
    layouts.fets(tmp_path, missing=(2,))
    site = adopted(tmp_path, tmp_path.parent / f"{tmp_path.name}.yml")
    assert list(site.contrasts) == ["t1", "t1ce", "t2", "flair"]
    assert site.missing_contrast == "mean"
    cases = find_cases(site)
    assert [case.contrasts.count(None) for case in cases] == [0, 0, 1, 0, 0]
    assert {len(case.image_files) for case in cases} == {3, 4}


def test_two_visits_of_a_patient_stay_together(tmp_path):
    layouts.brats_2023(tmp_path, cases=8)
    site = adopted(tmp_path, tmp_path.parent / f"{tmp_path.name}.yml")
    cases = find_cases(site)
    assert len({case.patient for case in cases}) == 4
    assert all(
        len({case.split for case in cases if case.patient == patient}) == 1
        for patient in {case.patient for case in cases}
    )


def test_the_folders_of_a_split_become_the_split(tmp_path):
    layouts.train_val_test(tmp_path)
    site = adopted(tmp_path, tmp_path.parent / f"{tmp_path.name}.yml")
    cases = find_cases(site)
    assert {case.key.split("/")[0] for case in cases if case.split == "validation"} == {"val"}
    assert {case.key.split("/")[0] for case in cases if case.split == "train"} == {"train"}


def test_what_cannot_be_seen_is_said_with_what_is_there(tmp_path):
    for n in range(3):
        layouts.picture(tmp_path / f"{n}.jpg", n)
    with pytest.raises(SiteDataError) as refused:
        propose(tmp_path)
    assert refused.value.code == "layout-not-seen"
    assert "3 pictures" in refused.value.problem


# ------------------------------------------------------------------------------------------ DICOM


def eclipse(root: Path) -> dict[str, str]:
    """CT.<uid>.dcm, RS.<uid>.dcm and a dose in one folder a patient, as Eclipse exports them."""
    pairs = {}
    for n in range(4):
        slices, label = drawn(f"pat{n}")
        folder = root / f"Pat {n} Größe"
        for slice_ in slices:
            write(folder / f"CT.{slice_.SOPInstanceUID}.dcm", slice_)
        write(folder / f"RS.{label.SOPInstanceUID}.dcm", label)
        pairs[folder.name] = f"{folder.name}/RS.{label.SOPInstanceUID}.dcm"
    layouts.junk(root)
    return pairs


def archive(root: Path, kind: str = "seg") -> dict[str, str]:
    """patient/study/series of UIDs; the label in a series of its own, and a series without one."""
    pairs = {}
    for n in range(4):
        slices, label = drawn(f"pat{n}", kind)
        study = root / f"PID{n:03d}" / uid("study", n)
        write_series(study / slices[0].SeriesInstanceUID, slices)
        others = series(f"other{n}", G, stored_values(n + 90, G.shape))
        for slice_ in others:
            slice_.SeriesDescription = "localizer of nobody"
            slice_.PatientID = slices[0].PatientID
        write_series(study / others[0].SeriesInstanceUID, others)
        write(study / label.SeriesInstanceUID / "000001.dcm", label)
        place = study.relative_to(root).as_posix()
        pairs[f"{place}/{slices[0].SeriesInstanceUID}"] = (
            f"{place}/{label.SeriesInstanceUID}/000001.dcm"
        )
    return pairs


@pytest.mark.parametrize(("build", "kind"), [(eclipse, None), (archive, "seg")])
def test_dicom_as_it_is_exported(tmp_path, build, kind):
    root = tmp_path / "PACS export"
    root.mkdir()
    expected = build(root) if kind is None else build(root, kind)
    site = adopted(root, tmp_path / "site.yml")
    assert pairs_of(site) == expected
    assert set(site.classes) == {"prostate", "lesion"}
    assert [f for f in check_data(site) if f.severity == "error"] == []


def with_nifti_labels(root: Path) -> dict[str, str]:
    for n in range(3):
        write_case(root, f"p{n}", G, seed=n, label="nifti")
    return {f"images/p{n}": f"labels/p{n}.nii.gz" for n in range(3)}


def test_dicom_with_labels_in_nifti(tmp_path):
    expected = with_nifti_labels(tmp_path / "d")
    site = adopted(tmp_path / "d", tmp_path / "site.yml")
    assert pairs_of(site) == expected
    assert [f for f in check_data(site) if f.severity == "error"] == []


def test_structures_that_lie_in_each_other_and_the_outline_of_the_body(tmp_path):
    for n in range(3):
        name = f"pat{n}"
        slices = series(name, G, stored_values(n, G.shape))
        outlines = {
            (1, "BODY"): [(k, box((0, 14), (0, 12))) for k in range(7)],
            (2, "GTV1" if n else "GTV"): [(k, box((5, 8), (5, 8))) for k in range(2, 4)],
            (3, "PTV"): [(k, box((3, 10), (3, 10))) for k in range(1, 5)],
        }
        label = structure_set(G, slices, outlines)
        write_series(tmp_path / "d" / name, slices)
        write(tmp_path / "d" / name / "RS.1.dcm", label)
    site = adopted(tmp_path / "d", tmp_path / "site.yml")
    assert site.classes == {"ptv": (1, 2), "gtv": (2,)}
    assert site.overlap == "highest"
    assert site.label_names == {1: ("PTV",), 2: ("GTV", "GTV1"), 0: ("BODY",)}
    assert [f for f in check_data(site) if f.severity == "error"] == []
    prepared = prepare_cases(find_cases(site), site)[0]
    assert {v: int((prepared.labels == v).sum()) for v in (1, 2)} == {1: 4 * 49 - 18, 2: 18}


OTHERS = {
    "LiTS": layouts.lits,
    "ACDC": layouts.acdc,
    "KiTS": layouts.kits,
    "DRIVE": layouts.drive,
    "same names": layouts.same_names,
    "no words": layouts.no_words,
    "visits": layouts.visits,
    "a folder a contrast": layouts.folder_a_contrast,
    "some unlabelled": layouts.some_unlabelled,
}


@pytest.mark.parametrize("name", OTHERS)
def test_layouts_that_are_in_no_list(tmp_path, name):
    root = tmp_path / "Daten äöü"
    root.mkdir()
    expected = OTHERS[name](root)
    layouts.junk(root)
    site = adopted(root, tmp_path / "site.yml")
    assert pairs_of(site) == expected
    assert [f for f in check_data(site) if f.severity == "error"] == []


def test_volumes_of_several_channels_say_what_they_need(tmp_path):
    layouts.decathlon(tmp_path)
    for path in (tmp_path / "imagesTr").glob("hippo*"):
        layouts.volume(path, 1, (*layouts.SHAPE, 4), (1.0, 1.0, 3.0))
    (need,) = propose(tmp_path).needs
    assert need.code == "not-3d" and "fedfms prepare decathlon --channel" in need.fix


def test_names_of_classes_may_be_given_in_the_order_of_their_values(tmp_path):
    layouts.lits(tmp_path)
    found = propose(tmp_path, ["liver", "tumour"])
    assert found.site.classes == {"liver": (1,), "tumour": (2,)}
    assert not any("names of classes" in one for one in found.unsure)
