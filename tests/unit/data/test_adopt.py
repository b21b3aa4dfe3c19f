"""`fedfms adopt`: layouts built from their specifications, read back by the code that trains."""

from __future__ import annotations

import hashlib
from pathlib import Path

import layouts
import numpy as np
import pytest
from dicom_files import (
    box,
    picture,
    segmentation,
    series,
    stored_values,
    structure_set,
    uid,
    write,
    write_case,
    write_series,
)
from PIL import Image
from test_dicom_pairs import G, drawn

from fedfms.contracts.site import SiteConfig
from fedfms.data.adopt.propose import propose
from fedfms.data.adopt.write import write_site
from fedfms.data.check import check_data
from fedfms.data.manifest import find_cases, scan
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
    assert "T2w" not in "".join(str(value) for value in found.values.values())
    assert any("T2w" in one and "on another grid" in one for one in found.unsure)


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


# ------------------------------------------------------------------------------ pictures in DICOM

SIZE = (40, 28)  # rows, columns


def view(path: Path, seed: int, patient: str | None, modality: str = "DX", **changes: object):
    """A picture of 12 bits, or of 8 in colours for ultrasound, that nobody drew."""
    rng = np.random.default_rng(seed)
    shape, high = ((*SIZE, 3), 256) if modality == "US" else (SIZE, 4096)
    values = rng.integers(0, high, shape)
    one = picture(uid(path)[-16:], values, modality, PatientID=patient or "", **changes)
    if patient is None:
        del one.PatientID
    one.SeriesInstanceUID = uid("series of", patient, path.parent)
    write(path, one)
    return one


def mask_of(seed: int, value: int = 255, where: int = 0) -> np.ndarray:
    labels = np.zeros(SIZE, np.uint8)
    labels[5 + seed % 7 : 20, 4 + 8 * where : 11 + 8 * where] = value
    return labels


def plain_mask(path: Path, seed: int, value: int = 255, where: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask_of(seed, value, where)).save(path)


def dicom_mask(path: Path, seed: int) -> None:
    changes = {"BitsStored": 16, "HighBit": 15, "PatientID": f"ID{seed}"}
    write(path, picture(uid(path)[-16:], mask_of(seed, 1), **changes))


def seg_of(path: Path, one: object, seed: int, **classes: int) -> None:
    """A SEG whose masks lie beside each other, by the names of its segments."""
    masks = {name: mask_of(seed, 1, where).T[..., None] != 0 for name, where in classes.items()}
    write(path, segmentation([one], masks))


def xrays_elsewhere(root: Path) -> dict[str, str]:
    """Images and masks of equal names in two folders, and one picture that nobody drew on."""
    pairs = {}
    for n in range(5):
        name = f"Thorax {n:03d} Größe"
        view(root / "Bilder" / f"{name}.dcm", n, f"P{n}")
        plain_mask(root / "Masken" / f"{name}.png", n)
        pairs[f"Bilder/{name}.dcm"] = f"Masken/{name}.png"
    view(root / "Bilder" / "Thorax 099 Größe.dcm", 99, "P99")
    return pairs


def xrays_beside(root: Path) -> dict[str, str]:
    """x.dcm, x_mask.tif, and x.jpg to look at."""
    pairs = {}
    for n in range(4):
        name = f"Röntgen {chr(97 + n)}"
        view(root / f"{name}.dcm", n, f"P{n}", PhotometricInterpretation="MONOCHROME1")
        layouts.picture(root / f"{name}.jpg", n, size=SIZE)
        plain_mask(root / f"{name}_mask.tif", n)
        pairs[f"{name}.dcm"] = f"{name}_mask.tif"
    return pairs


def same_names_beside(root: Path) -> dict[str, str]:
    """x.dcm and x.png, and nothing else that says which is the label."""
    for n in range(4):
        view(root / f"{chr(97 + n)}nna.dcm", n, f"P{n}")
        plain_mask(root / f"{chr(97 + n)}nna.png", n)
    return {f"{chr(97 + n)}nna.dcm": f"{chr(97 + n)}nna.png" for n in range(4)}


def mammograms(root: Path) -> dict[str, str]:
    """A folder a patient with two views and their masks, one of them not drawn on; no PatientID."""
    pairs = {}
    for n in range(4):
        folder = f"Patientin {n} é"
        for number, side in enumerate(("LCC", "RCC")):
            view(root / folder / f"{side}.dcm", 10 * n + number, None, "MG")
            if n != 2 or side == "LCC":
                plain_mask(root / folder / f"{side}_mask.png", n + number)
                pairs[f"{folder}/{side}.dcm"] = f"{folder}/{side}_mask.png"
    return pairs


def ultrasound(root: Path) -> dict[str, str]:
    """Frames in colours under names without an ending, as an archive writes them."""
    pairs = {}
    for n in range(4):
        view(root / "frames" / f"IM{n:04d}", n, f"P{n}", "US")
        plain_mask(root / "seg" / f"IM{n:04d}.png", n)
        pairs[f"frames/IM{n:04d}"] = f"seg/IM{n:04d}.png"
    return pairs


def train_and_test(root: Path) -> dict[str, str]:
    pairs = {}
    for part, numbers in (("train", range(4)), ("val", range(4, 6)), ("test", range(6, 8))):
        for n in numbers:
            view(root / part / "images" / f"c{n}.dcm", n, f"P{n}")
            plain_mask(root / part / "masks" / f"c{n}.png", n)
            if part != "test":
                pairs[f"{part}/images/c{n}.dcm"] = f"{part}/masks/c{n}.png"
    return pairs


def masks_in_dicom(root: Path) -> dict[str, str]:
    """As CBIS-DDSM has them, in one folder with the image."""
    pairs = {}
    for n in range(4):
        view(root / f"case {n}" / "full.dcm", n, f"ID{n}")
        dicom_mask(root / f"case {n}" / "ROI mask.dcm", n)
        pairs[f"case {n}/full.dcm"] = f"case {n}/ROI mask.dcm"
    return pairs


def segs_in_a_folder(root: Path) -> dict[str, str]:
    """SEG under names that say nothing; a second picture of each study without one."""
    pairs = {}
    for n in range(4):
        folder = f"Müller {n}/Röntgen"
        one = view(root / folder / "a.dcm", n, f"P{n}", "DX")
        view(root / folder / "b.dcm", n + 50, f"P{n}", "DX")
        seg_of(root / "Segmentierungen" / f"x{9 - n}.dcm", one, n, Lung=0, Heart=1)
        pairs[f"{folder}/a.dcm"] = f"Segmentierungen/x{9 - n}.dcm"
    return pairs


def segs_beside(root: Path) -> dict[str, str]:
    """patient/IM0001 without endings, the SEG among the pictures; junk, and a report."""
    pairs = {}
    for n in range(4):
        folder = f"P{n} é"
        first = view(root / folder / "IM0001", n, f"P{n}", "DX")
        view(root / folder / "IM0002", n + 50, f"P{n}", "DX")
        seg_of(root / folder / "SE0001", first, n, Lung=0)
        (root / folder / "Befund.pdf").write_bytes(b"%PDF")
        pairs[f"{folder}/IM0001"] = f"{folder}/SE0001"
    return pairs


def seg_series(root: Path) -> dict[str, str]:
    """patient/study/series of UIDs; four views are one series, and all have a SEG."""
    pairs = {}
    for n in range(3):
        study = f"PID{n}/{uid('study', n)}"
        for view_number in range(4):
            image = f"{study}/{uid('views', n)}/{view_number + 1:06d}.dcm"
            one = view(root / image, 10 * n + view_number, f"PID{n}", "DX")
            label = f"{study}/{uid('seg', n)}/{9 - view_number:06d}.dcm"
            seg_of(root / label, one, n + view_number, Mass=view_number % 2)
            pairs[image] = label
    return pairs


def no_endings(root: Path) -> dict[str, str]:
    """IM0001 beside IM0001_mask.png, and texts beside them; one PatientID for all."""
    pairs = {}
    for n in range(4):
        view(root / f"IM{n:04d}", n, "ANON")
        plain_mask(root / f"IM{n:04d}_mask.png", n)
        pairs[f"IM{n:04d}"] = f"IM{n:04d}_mask.png"
    return pairs


def one_patient_id(root: Path) -> dict[str, str]:
    """A folder a patient, equal names in each, and one PatientID for all."""
    pairs = {}
    for n in range(4):
        one = view(root / f"c{n}" / "a.dcm", n, "ANON")
        seg_of(root / f"c{n}" / "s.dcm", one, n, Lung=0)
        pairs[f"c{n}/a.dcm"] = f"c{n}/s.dcm"
    return pairs


def left_and_right(root: Path) -> dict[str, str]:
    """As the Montgomery County X-ray set has them: leftMask and rightMask."""
    pairs = {}
    for n in range(4):
        view(root / "CXR" / f"x{n}.DCM", n, f"P{n}")
        for where, side in enumerate(("left", "right")):
            plain_mask(root / "ManualMask" / f"{side}Mask" / f"x{n}.png", n, 255, where)
        pairs[f"CXR/x{n}.DCM"] = f"ManualMask/leftMask/x{n}.png"
    return pairs


def beside_a_series(root: Path) -> dict[str, str]:
    """A CT of one of the patients, which is another task."""
    pairs = mammograms(root)
    write_series(root / "CT 1", series("ct", G, stored_values(1, G.shape)))
    return pairs


ONE_CLASS = {"foreground": (255,)}
VIEWS = {  # classes, patients, and pictures without a label
    xrays_elsewhere: (ONE_CLASS, 5, 1),
    xrays_beside: (ONE_CLASS, 4, 0),
    same_names_beside: (ONE_CLASS, 4, 0),
    mammograms: (ONE_CLASS, 4, 1),
    ultrasound: (ONE_CLASS, 4, 0),
    train_and_test: (ONE_CLASS, 6, 0),
    masks_in_dicom: ({"foreground": (1,)}, 4, 0),
    segs_in_a_folder: ({"heart": (1,), "lung": (2,)}, 4, 4),
    segs_beside: ({"lung": (1,)}, 4, 4),
    seg_series: ({"mass": (1,)}, 3, 0),
    no_endings: (ONE_CLASS, 4, 0),
    one_patient_id: ({"lung": (1,)}, 4, 0),
    left_and_right: ({"left": (1,), "right": (2,)}, 4, 0),
    beside_a_series: (ONE_CLASS, 4, 1),
}


@pytest.mark.parametrize("build", VIEWS, ids=lambda build: build.__name__)
def test_pictures_in_dicom_are_read_without_an_edit(tmp_path, build):
    root = tmp_path / "Export äöü"
    root.mkdir()
    expected = build(root)
    layouts.junk(root)
    site = adopted(root, tmp_path / "site.yml")
    classes, patients, alone = VIEWS[build]
    found = scan(site)
    assert pairs_of(site) == expected
    assert dict(sorted(site.classes.items())) == classes
    assert len({case.patient for case in found.cases}) == patients
    assert found.unlabelled == alone
    assert site.channels == ("rgb" if build is ultrasound else "gray")
    assert site.intensity.rule == ("range" if build is ultrasound else "percentile")
    assert [f for f in check_data(site) if f.severity == "error"] == []
    # each label is that of its image, as the builder drew it
    for case, prepared in zip(found.cases, prepare_cases(found.cases, site), strict=True):
        drawn = np.unique(prepared.labels).tolist()
        assert set(drawn) - {0} <= {v for values in classes.values() for v in values}, case.key
        assert len(drawn) > 1


def two_masks(root: Path) -> None:
    xrays_beside(root)
    plain_mask(root / "Röntgen a_mask_1.tif", 3, 255, 2)


def masks_and_segs(root: Path) -> None:
    for n in range(5):
        one = view(root / f"p{n}/x.dcm", n, f"P{n}")
        if n < 3:
            plain_mask(root / f"p{n}/x_mask.png", n)
        else:
            seg_of(root / f"p{n}/seg.dcm", one, n, Lung=0)


def test_what_a_person_should_look_at_is_said(tmp_path):
    for build in (xrays_elsewhere, masks_and_segs, beside_a_series, one_patient_id, two_masks):
        build(tmp_path / build.__name__)
    said = {path.name: propose(path) for path in tmp_path.iterdir()}
    unsure = {name: " ".join(found.unsure) for name, found in said.items()}
    assert "the names of classes are the job's" in unsure["xrays_elsewhere"]
    assert dict(said["xrays_elsewhere"].seen)["label values"] == "0, 255"
    assert "pass_over): 1 image" in unsure["xrays_elsewhere"]
    assert "2 pictures more have a segmentation" in unsure["masks_and_segs"]
    assert "7 files of series of slices" in unsure["beside_a_series"]
    assert "all pictures have one PatientID" in unsure["one_patient_id"]
    (need,) = said["two_masks"].needs
    assert need.code == "several-labels" and "Röntgen a_mask_1.tif" in need.problem


def without_labels(root: Path) -> None:
    for n in range(3):
        view(root / f"c{n}.dcm", n, f"P{n}")


def with_structure_sets(root: Path) -> None:
    without_labels(root)
    write(root / "rs.dcm", drawn("pat0")[1])


def cine_loops(root: Path) -> None:
    for n in range(3):
        view(root / f"c{n}.dcm", n, f"P{n}", NumberOfFrames=2, Rows=SIZE[0] // 2)


@pytest.mark.parametrize(
    ("build", "problem", "fix"),
    [
        (without_labels, "3 pictures in DICOM, and no labels", "a word such as _mask"),
        (with_structure_sets, "no structure sets are read", "segmentations (SEG) that name it"),
        (cine_loops, "3 DICOM files in", "export the single frames"),
    ],
)
def test_pictures_without_labels_that_are_read_say_what_they_need(tmp_path, build, problem, fix):
    build(tmp_path)
    with pytest.raises(SiteDataError) as refused:
        propose(tmp_path)
    assert refused.value.code == "layout-not-seen"
    assert problem in refused.value.problem and fix in refused.value.fix


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
