"""`fedfms adopt` where a folder is not as one would have it: right, or said, not silently wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_files import (
    segmentation,
    series,
    stored_values,
    write,
    write_case,
    write_series,
)
from PIL import Image
from test_dicom_pairs import G, drawn

from fedfms.contracts.site import Intensity, SiteConfig
from fedfms.data.adopt.propose import Proposal, propose
from fedfms.data.check import check_data
from fedfms.data.manifest import Case, find_cases
from fedfms.errors import SiteDataError

OTHER = dataclasses.replace(G, shape=(G.shape[0] + 3, *G.shape[1:]))
SHAPE = (20, 18, 6)  # of volumes; pictures are as large as their slices


def volume(path: Path, seed: int, shape=SHAPE, low=0, high=800) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(low, high, shape).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([1.0, 1.0, 3.0, 1.0])), path)


def mask(path: Path, *values: int, shape=SHAPE, at: int = 4) -> None:
    """A box a value, side by side; `at` moves all of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.zeros(shape, np.uint8)
    for number, value in enumerate(values or (1,)):
        labels[4 + 3 * number : 7 + 3 * number, at : at + 8, 1:4] = value
    nibabel.save(nibabel.Nifti1Image(labels, np.diag([1.0, 1.0, 3.0, 1.0])), path)


def picture(path: Path, seed: int, colours: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    size = (*SHAPE[:2], 3) if colours else SHAPE[:2]
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8)).save(path)


def drawing(path: Path, *values: int, at: int = 4) -> None:
    """A label picture: a box a value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.zeros(SHAPE[:2], np.uint8)
    for number, value in enumerate(values or (255,)):
        labels[4 + 3 * number : 7 + 3 * number, at : at + 8] = value
    Image.fromarray(labels).save(path)


def cases_of(found: Proposal) -> dict[str, Case]:
    """By the image's path."""
    root = found.root
    return {case.image.relative_to(root).as_posix(): case for case in find_cases(found.site)}


def label_of(found: Proposal, image: str) -> str:
    return cases_of(found)[image].label.relative_to(found.root).as_posix()


def said(found: Proposal) -> str:
    return " | ".join(found.unsure)


def warnings(site: SiteConfig) -> list[str]:
    return [finding.code for finding in check_data(site)]


# ------------------------------------------------------------------------------------ grey levels


def fractions(root: Path) -> None:
    """NPY of numbers from 0 to 1."""
    for n in range(5):
        for folder in ("images", "labels"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(n).random(SHAPE[:2]).astype(np.float32)
        np.save(root / "images" / f"{n}.npy", values)
        np.save(root / "labels" / f"{n}.npy", (values > 0.9).astype(np.uint8))


def fractions_in_tiff(root: Path) -> None:
    for n in range(5):
        drawing(root / "labels" / f"{n}.png")
        (root / "images").mkdir(exist_ok=True)
        values = np.random.default_rng(n).random(SHAPE[:2]).astype(np.float32)
        Image.fromarray(values).save(root / "images" / f"{n}.tif")


def few_of_sixteen_bits(root: Path) -> None:
    for n in range(5):
        drawing(root / "labels" / f"{n}.png")
        (root / "images").mkdir(exist_ok=True)
        values = np.random.default_rng(n).integers(0, 16, SHAPE[:2]).astype(np.uint16)
        Image.fromarray(values).save(root / "images" / f"{n}.tif")


@pytest.mark.parametrize("build", [fractions, fractions_in_tiff, few_of_sixteen_bits])
def test_numbers_of_more_than_8_bits_are_not_read_as_0_to_255(tmp_path, build):
    build(tmp_path)
    site = propose(tmp_path).site
    assert site.intensity.rule == "percentile"
    assert "few-grey-levels" not in warnings(site)


def test_a_range_that_makes_images_black_is_a_warning(tmp_path):
    fractions(tmp_path)
    found = propose(tmp_path)
    found.values["intensity"] = Intensity(rule="range", low=0, high=255)
    assert "few-grey-levels" in warnings(SiteConfig(**{**found.values, "data_root": tmp_path}))


# ----------------------------------------------------------------- one file that is not as it was


def test_one_label_on_another_grid_takes_no_class_away(tmp_path):
    for n in range(6):
        volume(tmp_path / f"s{n}/ct.nii.gz", n)
        for at, name in enumerate(("liver", "spleen")):
            is_odd = (n, name) == (1, "liver")
            shape = (20, 18, 8) if is_odd else SHAPE
            mask(tmp_path / f"s{n}/segmentations/{name}.nii.gz", shape=shape, at=1 + 8 * at)
    found = propose(tmp_path)
    assert set(found.values["label_files"]) == {"liver", "spleen"}
    assert "s1/segmentations/liver.nii.gz" in said(found)


@pytest.mark.parametrize("odd", ["t1ce", "seg"])
def test_one_file_on_another_grid_takes_no_contrast_away(tmp_path, odd):
    for n in range(6):
        for name in ("t1", "t1ce", "t2", "flair"):
            shape = (20, 18, 8) if (n, name) == (1, odd) else SHAPE
            volume(tmp_path / f"B{n}/B{n}_{name}.nii.gz", 9 * n + len(name), shape)
        shape = (20, 18, 8) if (n, odd) == (1, "seg") else SHAPE
        mask(tmp_path / f"B{n}/B{n}_seg.nii.gz", 1, 2, 4, shape=shape)
    found = propose(tmp_path)
    assert list(found.values["contrasts"]) == ["t1", "t1ce", "t2", "flair"]
    assert "oedema" in found.values["classes"]
    assert "B1/B1_seg.nii.gz" in said(found)


def test_a_class_that_few_cases_have_is_said(tmp_path):
    for n in range(9):
        volume(tmp_path / f"p{n}/ct.nii.gz", n)
        for at, name in enumerate(("liver", "spleen", "tumor")):
            if name != "tumor" or n < 4:
                mask(tmp_path / f"p{n}/masks/{name}.nii.gz", at=1 + 5 * at)
    found = propose(tmp_path)
    assert "4 of 9 cases" in said(found)
    assert "counts as background" in said(found)


def test_a_folder_of_a_class_that_few_cases_have_is_said(tmp_path):
    for n in range(9):
        picture(tmp_path / f"images/p{n}.png", n)
        drawing(tmp_path / f"masks/disc/p{n}.png")
        if n < 4:
            drawing(tmp_path / f"masks/cup/p{n}.png", at=9)
    assert "masks/cup/*.png (4 of 9 cases)" in said(propose(tmp_path))


def test_labels_in_nifti_of_a_series_are_a_class_each(tmp_path):
    for n in range(3):
        write_series(tmp_path / f"p{n}/DICOM", series(f"p{n}", G, stored_values(n, G.shape)))
        for at, name in enumerate(("liver", "tumor")):
            labels = np.zeros(G.shape, np.uint8)
            labels[2:6, 1 + 4 * at : 4 + 4 * at, 1:3] = 1
            nibabel.save(
                nibabel.Nifti1Image(labels, G.nifti_affine()), tmp_path / f"p{n}/{name}.nii.gz"
            )
    found = propose(tmp_path)
    assert found.values["label_files"] == {"liver": "*/liver.nii.gz", "tumor": "*/tumor.nii.gz"}
    assert [f for f in check_data(found.site) if f.severity == "error"] == []


def test_the_series_on_the_grid_of_a_label_in_nifti_is_taken(tmp_path):
    for n in range(3):
        write_series(tmp_path / f"p{n}/T1", series(f"a{n}", G, stored_values(n, G.shape)))
        write_series(tmp_path / f"p{n}/T2", series(f"b{n}", OTHER, stored_values(n, OTHER.shape)))
        labels = np.zeros(OTHER.shape, np.uint8)
        labels[2:6, 2:5, 1:3] = 1
        nibabel.save(
            nibabel.Nifti1Image(labels, OTHER.nifti_affine()), tmp_path / f"p{n}/seg.nii.gz"
        )
    found = propose(tmp_path)
    assert found.values["images"] == "*/T2"
    assert "*/T1 (on another grid)" in said(found)


def test_an_image_on_another_grid_than_the_label_is_said(tmp_path):
    for n in range(5):
        volume(tmp_path / f"p{n}/T2.nii.gz", n)
        volume(tmp_path / f"p{n}/ADC.nii.gz", n, (10, 9, 6))
        mask(tmp_path / f"p{n}/T2_seg.nii.gz")
    found = propose(tmp_path)
    assert found.values["images"] == "*/T2.nii.gz"
    assert "*/ADC.nii.gz (on another grid)" in said(found)


def test_pt_at_the_end_of_a_name_is_pet_and_before_it_a_patient(tmp_path):
    for n in range(5):
        volume(tmp_path / f"h/imagesTr/C-{n}__CT.nii.gz", n)
        volume(tmp_path / f"h/imagesTr/C-{n}__PT.nii.gz", n + 50)
        mask(tmp_path / f"h/labelsTr/C-{n}.nii.gz")
        volume(tmp_path / f"p/pt_{n}/t1.nii.gz", n)
        mask(tmp_path / f"p/pt_{n}/seg.nii.gz")
    assert set(propose(tmp_path / "h").values["contrasts"]) == {"ct", "pet"}
    assert propose(tmp_path / "p").values["images"] in ("*/t1.nii.gz", "pt_*/t1.nii.gz")


# ------------------------------------------------------------------------------ two cases, not one


def visits_in_names(root: Path, n: int, t: str) -> tuple[Path, Path]:
    return root / f"images/P{n:02d}_{t}.nii.gz", root / f"labels/P{n:02d}_{t}.nii.gz"


def visits_in_a_folder(root: Path, n: int, t: str) -> tuple[Path, Path]:
    return root / f"P{n:02d}/P{n:02d}_{t}.nii.gz", root / f"P{n:02d}/P{n:02d}_{t}_seg.nii.gz"


def visits_in_folders(root: Path, n: int, t: str) -> tuple[Path, Path]:
    return root / f"P{n:02d}/{t}/image.nii.gz", root / f"P{n:02d}/{t}/mask.nii.gz"


@pytest.mark.parametrize("words", [("t1", "t2"), ("T2", "ADC"), ("baseline", "followup")])
@pytest.mark.parametrize("place", [visits_in_names, visits_in_a_folder, visits_in_folders])
def test_images_that_have_a_label_each_are_cases_of_a_patient(tmp_path, place, words):
    expected = {}
    for n in range(1, 7):
        for number, word in enumerate(words):
            image, label = place(tmp_path, n, word)
            volume(image, 10 * n + number)
            mask(label, at=4 + number)
            expected[image.relative_to(tmp_path).as_posix()] = label.relative_to(tmp_path)
    found = propose(tmp_path)
    cases = cases_of(found)
    assert {image: case.label.relative_to(tmp_path) for image, case in cases.items()} == expected
    assert len({case.patient for case in cases.values()}) == 6
    if words[0] != "baseline":
        assert "cases by themselves" in said(found)


def test_two_kinds_of_patients_in_folders_of_their_own_are_cases(tmp_path):
    """As MM-WHS has CT and MR."""
    for kind in ("ct", "mr"):
        for n in range(1001, 1006):
            volume(tmp_path / f"{kind}_train/{kind}_train_{n}_image.nii.gz", n)
            mask(tmp_path / f"{kind}_train/{kind}_train_{n}_label.nii.gz", 1, 2)
    cases = cases_of(propose(tmp_path))
    assert len(cases) == 10
    assert len({case.patient for case in cases.values()}) == 10


@pytest.mark.parametrize(
    ("one", "other"), [("seg_auto", "seg_manual"), ("seg_MK", "seg_JS"), ("seg", "seg_2")]
)
def test_what_two_people_drew_of_one_thing_is_one_class_and_said(tmp_path, one, other):
    for n in range(6):
        volume(tmp_path / f"c{n}/ct.nii.gz", n)
        mask(tmp_path / f"c{n}/{one}.nii.gz")
        mask(tmp_path / f"c{n}/{other}.nii.gz", at=5)
    found = propose(tmp_path)
    assert "label_files" not in found.values
    assert "auto" not in found.values["labels"]
    assert "mostly coincide" in said(found)


def test_a_class_within_another_is_a_class(tmp_path):
    for n in range(6):
        volume(tmp_path / f"c{n}/ct.nii.gz", n)
        mask(tmp_path / f"c{n}/gtv.nii.gz")
        mask(tmp_path / f"c{n}/ptv.nii.gz", 1, 1, 1)
    assert set(propose(tmp_path).values["label_files"]) == {"gtv", "ptv"}


# -------------------------------------------------------------------------------- which is meant


def drive(root: Path, with_field_of_view: bool, ending: str = "png") -> None:
    """As DRIVE has them: a photograph, its vessels, and where the retina is."""
    for part, word, start in (("training", "training", 21), ("test", "test", 1)):
        for n in range(start, start + 6):
            picture(root / part / f"images/{n:02d}_{word}.tif", n)
            drawing(root / part / f"1st_manual/{n:02d}_manual1.{ending}")
            if part == "test":
                drawing(root / part / f"2nd_manual/{n:02d}_manual2.{ending}", at=5)
            if with_field_of_view:
                drawing(root / part / f"mask/{n:02d}_{word}_mask.png", *[255] * 4, at=2)


@pytest.mark.parametrize("with_field_of_view", [True, False])
def test_vessels_are_taken_and_not_the_field_of_view(tmp_path, with_field_of_view):
    drive(tmp_path, with_field_of_view)
    found = propose(tmp_path)
    label = label_of(found, "training/images/21_training.tif")
    assert label == "training/1st_manual/21_manual1.png"
    assert len(cases_of(found)) == 6
    assert "only those to train on" in said(found)
    assert ("mask/*_mask.png" in said(found)) == with_field_of_view


def test_labels_that_are_not_read_here_are_not_replaced_by_the_field_of_view(tmp_path):
    drive(tmp_path, True, "gif")
    (need, *_) = propose(tmp_path).needs
    assert "1st_manual" in need.problem and "GIF" in need.problem


def test_parts_of_a_split_whose_files_end_differently_pair(tmp_path):
    for part, word in (("train", "tr"), ("val", "va")):
        for n in range(4):
            picture(tmp_path / part / f"images/{n:02d}_{word}img.png", n)
            drawing(tmp_path / part / f"masks/{n:02d}_{word}lab.png")
    found = propose(tmp_path)
    assert len(cases_of(found)) == 8
    assert found.values["split"] == {"validation": ["val/*"]}


@pytest.mark.parametrize(
    ("image", "other", "label"),
    [
        ("images/c{}.nii.gz", "pred/c{}.nii.gz", "labels/c{}.nii.gz"),
        ("c{}/image.nii.gz", "c{}/ai.nii.gz", "c{}/seg.nii.gz"),
    ],
)
def test_a_prediction_is_no_image(tmp_path, image, other, label):
    for n in range(5):
        volume(tmp_path / image.format(n), n)
        mask(tmp_path / other.format(n), at=5)
        mask(tmp_path / label.format(n))
    found = propose(tmp_path)
    assert label_of(found, image.format(0)) == label.format(0)
    assert "few values, as labels have" in said(found)


@pytest.mark.parametrize("of_labels", ["a", "b"])
def test_of_two_folders_of_images_the_one_whose_images_all_have_labels_is_taken(
    tmp_path, of_labels
):
    for folder in "ab":
        for n in range(4 if folder == of_labels else 6):
            volume(tmp_path / f"{folder}/c{n}.nii.gz", n)
    for n in range(4):
        mask(tmp_path / f"labels/c{n}.nii.gz")
    found = propose(tmp_path)
    assert found.values["images"] == f"{of_labels}/*.nii.gz"
    assert "other images pair with the labels too" in said(found)


# -------------------------------------------------------------------------------------- patients

PATIENTS = {  # names of images, and how many patients they are of
    "a few second visits": (
        [*(f"GLI-{n:05d}-000" for n in range(12)), *(f"GLI-{n:05d}-001" for n in range(3))],
        12,
    ),
    "a few without a number": ([*(f"P{n:03d}" for n in range(12)), "P003_2", "P007_2"], 12),
    "patches": (
        [
            f"TCGA-AA-{n}-01Z-00-DX1_{x}_{y}"
            for n in (1111, 2222, 333)
            for x in (0, 256)
            for y in "08"
        ],
        3,
    ),
    "patches with letters": (
        [f"S{n}-DX1_x{x}_y{y}" for n in (1, 2, 3) for x in (0, 256) for y in (0, 256)],
        3,
    ),
    "before and after": ([f"P{n:02d}_{w}" for n in range(6) for w in ("pre", "post")], 6),
    "dates": ([f"P{n:02d}_{y}-01-02" for n in range(6) for y in (2020, 2021)], 6),
    "dates of names": ([f"{w}_{y}0102" for w in ("anna", "berta", "eva") for y in (2020, 2021)], 3),
    "mammograms": (
        [f"P_{n:05d}_{s}_{v}" for n in range(4) for s in ("LEFT", "RIGHT") for v in ("CC", "MLO")],
        4,
    ),
    "phases of the heart": ([f"A{n}S9V9_sa_{w}" for n in range(5) for w in ("ED", "ES")], 5),
    "sides in front": ([f"{s}_{n:03d}" for n in range(5) for s in ("left", "right")], 5),
    "a letter in front": ([f"{s}{n:03d}" for n in range(5) for s in "LR"], 5),
    "a side in the middle": ([f"P{n:03d}_{s}_macula" for n in range(5) for s in ("OD", "OS")], 5),
    "slices": ([f"{w}_slice_{n}" for n in range(3) for w in ("abc", "def", "ghi")], 3),
    "one a patient": ([f"scan_{n:03d}" for n in range(8)], 8),
    "names": (["anna", "berta", "carl", "doris"], 4),
}


@pytest.mark.parametrize("kind", PATIENTS)
def test_images_of_one_patient_stay_on_one_side(tmp_path, kind):
    names, patients = PATIENTS[kind]
    for seed, name in enumerate(names):
        picture(tmp_path / f"images/{name}.png", seed)
        drawing(tmp_path / f"masks/{name}.png")
    found = propose(tmp_path)
    cases = cases_of(found)
    assert len(cases) == len(names)
    assert len({case.patient for case in cases.values()}) == patients
    assert ("look like several of one patient" in said(found)) == (patients < len(names))


def test_what_may_be_of_one_patient_and_cannot_be_told_is_said(tmp_path):
    """As HRF has 01_dr, 01_g and 01_h, of three people."""
    for n in range(1, 4):
        for word in ("dr", "g", "h"):
            picture(tmp_path / f"images/{n:02d}_{word}.png", n)
            drawing(tmp_path / f"masks/{n:02d}_{word}.png")
    found = propose(tmp_path)
    assert "patient" not in found.values
    assert "01_dr, 01_g, 01_h look like several of one patient; each is taken" in said(found)


def test_channels_in_names_of_nnunet_hide_no_second_frame(tmp_path):
    for n in range(1, 5):
        for frame in ("01", "12"):
            name = f"patient{n:03d}_frame{frame}"
            volume(tmp_path / f"imagesTr/{name}_0000.nii.gz", n)
            mask(tmp_path / f"labelsTr/{name}.nii.gz")
    assert len({case.patient for case in cases_of(propose(tmp_path)).values()}) == 4


FOLDERS = {  # images, with {} for image and label, and how many patients they are of
    "numbers begin again": ([f"{p}/{{}}/{n}.png" for p in ("train", "val") for n in range(4)], 8),
    "in sorts": ([f"{p}/{{}}/{n:03d}.png" for p in ("benign", "malignant") for n in range(4)], 8),
    "numbered as a sort": ([f"covid_{p:03d}/{{}}/{n}.png" for p in range(4) for n in range(3)], 4),
    "visits of controls": ([f"control{p:02d}/v{n}/{{}}.png" for p in range(4) for n in (1, 2)], 4),
    "studies": ([f"P{p}/{100 + 9 * n + p}/{{}}.png" for p in range(1, 4) for n in range(5)], 3),
    "hospitals": ([f"{w}/{w[0]}{n}/{{}}.png" for w in ("Bonn", "Ulm") for n in range(6)], 12),
    "before and after": ([f"P{p:02d}_{w}/{{}}.png" for p in range(5) for w in ("pre", "post")], 5),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_expression_for_patients_is_right_for_folders(tmp_path, kind):
    names, patients = FOLDERS[kind]
    for seed, name in enumerate(names):
        picture(tmp_path / name.format("image"), seed)
        drawing(tmp_path / name.format("label"))
    found = propose(tmp_path)
    cases = cases_of(found)
    assert len(cases) == len(names)
    assert len({case.patient for case in cases.values()}) == patients


@pytest.mark.parametrize("name", ["", "ANON"])
def test_series_without_a_patient_id_of_their_own_are_told_by_folders(tmp_path, name):
    for n in range(4):
        for visit in ("visit1", "visit2"):
            slices, label = drawn(f"pat{n}{visit}", "seg")
            for one in (*slices, label):
                one.PatientID = name
            write_series(tmp_path / f"pat{n}/{visit}/img", slices)
            write(tmp_path / f"pat{n}/{visit}/seg/s.dcm", label)
    found = propose(tmp_path)
    assert len({case.patient for case in cases_of(found).values()}) == 4
    assert "PatientID" in said(found)
    assert ("a patient is", "a PatientID") not in found.seen


# -------------------------------------------------------------------------------- labels, classes


def test_labelled_cases_of_validation_and_test_beside_nnunet_are_said(tmp_path):
    for part, numbers in (("Tr", range(4)), ("Va", range(4, 6)), ("Ts", range(6, 9))):
        for n in numbers:
            volume(tmp_path / f"images{part}/a{n}_0000.nii.gz", n)
            mask(tmp_path / f"labels{part}/a{n}.nii.gz")
    text = said(propose(tmp_path))
    assert "2 labels in labelsVa" in text and "3 labels in labelsTs" in text


def test_a_window_for_ct_is_not_laid_on_pet(tmp_path):
    for n in range(4):
        volume(tmp_path / f"p{n}/CT.nii.gz", n, low=-1024, high=600)
        volume(tmp_path / f"p{n}/PET.nii.gz", n + 50)
        mask(tmp_path / f"p{n}/SEG.nii.gz")
    found = propose(tmp_path)
    assert found.site.intensity.rule == "percentile"
    assert "one of ct, pet is CT" in said(found)


@pytest.mark.parametrize("names", [("L1", "L2", "L3"), ("CTV 54", "CTV 70"), ("GTV-1", "GTV_2")])
def test_names_that_are_in_one_file_are_classes_of_their_own(tmp_path, names):
    for n in range(3):
        slices = series(f"p{n}", G, stored_values(n, G.shape))
        masks = {name: np.zeros(G.shape, bool) for name in names}
        for number, one in enumerate(masks.values()):
            one[2 + 3 * number : 4 + 3 * number, 2:6, 1:3] = True
        write_series(tmp_path / f"p{n}/img", slices)
        write(tmp_path / f"p{n}/seg/s.dcm", segmentation(slices, masks))
    found = propose(tmp_path)
    assert len(found.values["classes"]) == len(names)
    assert sorted(found.values["label_names"].values()) == sorted([name] for name in names)


def nnunet(root: Path, labels: dict[str, object], *values: int) -> None:
    for n in range(4):
        volume(root / f"imagesTr/p{n}_0000.nii.gz", n)
        mask(root / f"labelsTr/p{n}.nii.gz", *values)
    said = {"channel_names": {"0": "T2"}, "labels": {"background": 0, **labels}}
    (root / "dataset.json").write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ({"LN+": 1, "LN-": 2}, {"ln_plus": (1,), "ln_minus": (2,)}),
        ({"肝臓": 1, "腫瘍": 2}, {"foreground": (1,), "foreground_2": (2,)}),
        ({"Core ": [1, 2], "core": 2}, {"core": (1, 2), "core_2": (2,)}),
    ],
)
def test_classes_of_dataset_json_that_are_written_alike_stay_two(tmp_path, labels, classes):
    nnunet(tmp_path, labels, 1, 2)
    assert propose(tmp_path).values["classes"] == classes


def jpeg_masks(root: Path) -> None:
    for n in range(4):
        picture(root / f"masks/{n}.jpg", 9, colours=False)


def coloured_masks(root: Path) -> None:
    for n in range(4):
        picture(root / f"masks/{n}.png", 9)


@pytest.mark.parametrize(
    ("build", "code"), [(jpeg_masks, "lossy-labels"), (coloured_masks, "coloured-labels")]
)
def test_labels_that_cannot_be_read_are_something_that_it_needs(tmp_path, build, code):
    for n in range(4):
        picture(tmp_path / f"images/{n}.png", n)
    build(tmp_path)
    (need, *_) = propose(tmp_path).needs
    assert need.code == code and "none of 4 label files" in need.problem


def test_given_names_of_classes_are_taken_or_refused_with_a_word(tmp_path):
    nnunet(tmp_path / "n", {"liver": 1, "tumour": 2}, 1, 2)
    found = propose(tmp_path / "n", ["leber", "tumor"])
    assert found.values["classes"] == {"leber": (1,), "tumor": (2,)}
    assert "3 names of classes were given" in said(propose(tmp_path / "n", ["a", "b", "c"]))
    for n in range(4):
        volume(tmp_path / f"f/s{n}/ct.nii.gz", n)
        for at, name in enumerate(("liver", "spleen")):
            mask(tmp_path / f"f/s{n}/segmentations/{name}.nii.gz", at=1 + 8 * at)
    found = propose(tmp_path / "f", ["leber", "milz"])
    assert set(found.values["label_files"]) == {"leber", "milz"} == set(found.values["classes"])
    assert "1 name of classes were given" in said(propose(tmp_path / "f", ["leber"]))


def test_given_names_are_taken_for_labels_in_nifti_of_a_series(tmp_path):
    for n in range(3):
        write_case(tmp_path, f"p{n}", G, seed=n, label="nifti")
    found = propose(tmp_path, ["organ", "lesion"])
    assert found.values["classes"] == {"organ": (1,), "lesion": (2,)}


def test_interpolated_masks_are_one_class_and_said(tmp_path):
    for n in range(4):
        picture(tmp_path / f"images/{n}.png", n)
        drawing(tmp_path / f"masks/{n}.png", 255, 255, 255)
        soft = Image.open(tmp_path / f"masks/{n}.png")
        larger = soft.resize((54, 60), Image.Resampling.BICUBIC)
        larger.resize(soft.size, Image.Resampling.BICUBIC).save(tmp_path / f"masks/{n}.png")
    found = propose(tmp_path)
    (values,) = found.values["classes"].values()
    assert min(values) >= 128 and 255 in values
    assert "interpolated masks" in said(found)
    assert [f for f in check_data(found.site) if f.severity == "error"] == []


# -------------------------------------------------------------------------- sentences that help


def refused(root: Path) -> SiteDataError:
    with pytest.raises(SiteDataError) as error:
        propose(root)
    assert error.value.code == "layout-not-seen"
    return error.value


def test_pictures_with_labels_beside_a_series_without_one_are_named(tmp_path):
    for n in range(4):
        picture(tmp_path / f"images/{n}.png", n)
        drawing(tmp_path / f"masks/{n}.png")
    write_series(tmp_path / "raw", series("p", G, stored_values(1, G.shape)))
    error = refused(tmp_path)
    assert "4 pictures with labels (images/*.png)" in error.problem
    assert "move the DICOM files away" in error.fix


def test_a_series_that_lacks_for_a_label_is_named(tmp_path):
    for n in range(4):
        write_case(tmp_path, f"p{n}", G, seed=n, label="nifti")
    shutil.rmtree(tmp_path / "images/p3")
    (need,) = propose(tmp_path).needs
    assert need.code == "unpaired-files" and "p3.nii.gz" in need.problem


@pytest.mark.parametrize(
    "name", ["annotations/instances_train.json", "labels/{}.txt", "lesion_annotations/{}.xml"]
)
def test_outlines_in_texts_are_said(tmp_path, name):
    for n in range(4):
        picture(tmp_path / f"images/{n}.jpg", n)
        text = tmp_path / name.format(n)
        text.parent.mkdir(exist_ok=True)
        text.write_text("{}")
    error = refused(tmp_path)
    assert "outlines" in error.problem and "draw its outlines to a PNG" in error.fix


def test_brackets_in_a_name_and_a_single_case_are_said(tmp_path):
    for n in range(4):
        picture(tmp_path / f"a/Bilder [anonym]/{n}.png", n)
        drawing(tmp_path / f"a/Masken/{n}.png")
    assert "signs of globs: rename" in refused(tmp_path / "a").fix
    volume(tmp_path / "b/image.nii.gz", 1)
    mask(tmp_path / "b/mask.nii.gz")
    assert "at least two patients" in refused(tmp_path / "b").fix


def test_classes_behind_names_in_one_folder_are_said(tmp_path):
    for n in range(4):
        volume(tmp_path / f"images/p{n}.nii.gz", n)
        mask(tmp_path / f"labels/p{n}_liver.nii.gz")
        mask(tmp_path / f"labels/p{n}_tumor.nii.gz")
    error = refused(tmp_path)
    assert "p0_liver, p0_tumor" in error.fix and "a folder of its own" in error.fix


def test_capitals_that_differ_are_said(tmp_path):
    for n in range(6):
        volume(tmp_path / f"p{n}/{'Image' if n == 2 else 'image'}.nii.gz", n)
        mask(tmp_path / f"p{n}/{'Mask' if n == 2 else 'mask'}.nii.gz")
    assert "2 files differ in capitals alone" in said(propose(tmp_path))


def test_a_window_for_ct_is_not_laid_on_a_series_of_pet_beside_ct(tmp_path):
    for n in range(3):
        for kind, grid in (("CT", OTHER), ("PT", G)):
            slices = series(f"{kind}{n}", grid, stored_values(n, grid.shape))
            for one in slices:
                one.Modality = kind
                one.PatientID = f"P{n}"
            write_series(tmp_path / f"p{n}/{kind}", slices)
        labels = np.zeros(G.shape, np.uint8)
        labels[2:6, 2:5, 1:3] = 1
        nibabel.save(nibabel.Nifti1Image(labels, G.nifti_affine()), tmp_path / f"p{n}/seg.nii.gz")
    found = propose(tmp_path)
    assert found.values["images"] == "*/PT"
    assert found.site.intensity.rule == "percentile"
