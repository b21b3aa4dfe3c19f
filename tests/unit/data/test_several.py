"""Cases of several files: contrasts as channels, a file for each class; a site's own lists."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from site_files import recipe, write_volume

from fedfms.contracts.site import SiteConfig
from fedfms.data.check import check_data, examine
from fedfms.data.classes import planes_of_labels
from fedfms.data.left_out import LeftOut
from fedfms.data.manifest import find_cases, find_whole_cases, scan, validation_patients
from fedfms.data.prepare import prepare_cases
from fedfms.data.slices import SliceDataset
from fedfms.errors import ConfigError, SiteDataError

SHAPE = (8, 10, 4)
CONTRASTS = ("t1", "t1ce", "t2", "flair")
BASE = {"format": "nifti", "intensity": {"rule": "range", "low": 0, "high": 255}}


def site_of(root: Path, **keys: object) -> SiteConfig:
    """As from a site.yml, which is where people write these."""
    file = root.parent / f"{root.name}.yml"
    file.write_text(yaml.safe_dump({**BASE, "data_root": str(root), **keys}, sort_keys=False))
    return SiteConfig.from_yaml(file)


def values_of(seed: int) -> np.ndarray:
    """Whole numbers 0 to 255, so that a range of 0 to 255 keeps them as they are."""
    return np.random.default_rng(seed).integers(0, 256, SHAPE).astype(np.int16)


def fets(root: Path, cases: int = 4, missing: tuple[int, ...] = ()) -> SiteConfig:
    for n in range(cases):
        for number, name in enumerate(CONTRASTS):
            if not (name == "t1ce" and n in missing):
                write_volume(root / f"p{n}" / f"p{n}_{name}.nii.gz", values_of(10 * n + number))
        label = np.zeros(SHAPE, np.uint8)
        label[2:5, 3:7, 1:3] = 1
        write_volume(root / f"p{n}" / f"p{n}_seg.nii.gz", label)
    return site_of(
        root,
        contrasts={name: f"*/*_{name}.nii.gz" for name in CONTRASTS},
        labels="*/*_seg.nii.gz",
        classes={"tumour": [1]},
        **({"missing_contrast": "mean"} if missing else {}),
    )


def job(**changes: object):
    return recipe(classes=("tumour",), **changes)


def axial(values: np.ndarray, index: int) -> np.ndarray:
    """Slice `index` of an array whose affine is the identity, anterior up, right at the left."""
    return values[::-1, ::-1, index].T


def test_contrasts_are_channels_in_the_order_of_the_recipe(tmp_path):
    site = fets(tmp_path / "d")
    wanted = job(contrasts=("flair", "t1"), normalize=False, image_size=128)
    prepared = prepare_cases(find_cases(site), site)
    assert prepared[0].images.shape == (4, 10, 8, 4)
    training = [case for case in prepared if case.case.split == "train"]
    picture, _, _, _ = SliceDataset(training, site, wanted).levels(1, native=True)
    n = int(training[0].case.key[1])
    index = SliceDataset(training, site, wanted).slices[1][1]
    assert picture.shape == (2, 10, 8)
    np.testing.assert_array_equal(picture[0], axial(values_of(10 * n + 3), index))
    np.testing.assert_array_equal(picture[1], axial(values_of(10 * n), index))
    assert SliceDataset(training, site, wanted)[1]["image"].shape == (2, 128, 128)


@pytest.mark.parametrize("rule", ["mean", "black"])
def test_a_missing_contrast_is_what_site_yml_says(tmp_path, rule):
    site = fets(tmp_path / "d", missing=(2,))
    site = site_of(
        tmp_path / "d",
        contrasts=site.contrasts,
        labels=site.labels,
        classes={"tumour": [1]},
        missing_contrast=rule,
    )
    prepared = {case.case.key[:2]: case for case in prepare_cases(find_cases(site), site)}
    others = np.stack([axial(values_of(20 + n), 1) for n in (0, 2, 3)])
    expected = np.rint(others.mean(axis=0)) if rule == "mean" else np.zeros((10, 8))
    np.testing.assert_array_equal(prepared["p2"].images[1, ..., 1], expected)
    np.testing.assert_array_equal(prepared["p1"].images[1, ..., 1], axial(values_of(11), 1))
    assert [f for f in check_data(site) if f.severity == "error"] == []
    lines = dict(examine(site).summary.rows_for_print())
    assert lines["contrasts"].startswith("t1 in 4 cases, t1ce in 3 cases")


def test_what_contrasts_can_have_wrong(tmp_path):
    root = tmp_path / "d"
    site = fets(root, missing=(1,))
    plain = {"labels": site.labels, "classes": {"tumour": [1]}, "contrasts": site.contrasts}
    problem = scan(site_of(root, **plain)).problems[0]
    assert problem.code == "missing-contrast"
    assert "1 of 4 cases have no t1ce: p1/p1_t1.nii.gz" in problem.problem
    shifted = np.eye(4)
    shifted[0, 3] = 3.0
    write_volume(root / "p0" / "p0_t2.nii.gz", values_of(2), shifted)
    write_volume(root / "p1" / "p1_t1ce.nii.gz", values_of(2)[:7])
    found = {f.code: f.problem for f in check_data(site_of(root, **plain))}
    assert "p0_t2.nii.gz lie up to 3.0 mm apart" in found["contrasts-differ"]
    with pytest.raises(ConfigError, match="channels is neighbours"):
        site_of(root, **plain, channels="neighbours")
    with pytest.raises(ConfigError, match="images and contrasts are both given"):
        site_of(root, **plain, images="*/*.nii.gz")


def test_a_job_names_contrasts_that_the_site_has(tmp_path):
    site = fets(tmp_path / "d")
    prepared = prepare_cases(find_cases(site), site)
    for contrasts in ((), ("t1", "dwi")):
        with pytest.raises(SiteDataError) as refused:
            SliceDataset(prepared, site, job(contrasts=contrasts))
        assert refused.value.code == "unknown-contrast"
    assert "unknown-contrast" in {f.code for f in examine(site, recipe=job()).findings}


def test_prepared_contrasts_come_from_the_cache_until_a_file_or_the_rule_changes(tmp_path):
    root, cache = tmp_path / "d", tmp_path / "cache"
    site = fets(root, missing=(2,))

    def records() -> set[str]:
        prepare_cases(find_cases(site), site, folder=cache)
        return {path.name for path in cache.glob("*.case")}

    first = records()
    assert len(first) == 4 and records() == first
    write_volume(root / "p0" / "p0_flair.nii.gz", values_of(99))
    second = records()
    assert len(second) == 5
    write_volume(root / "p2" / "p2_t1ce.nii.gz", values_of(98))
    assert len(records()) == 6


# -------------------------------------------------------------------------------- a file a class


def organs(root: Path, cases: int = 3, meet: bool = False) -> None:
    for n in range(cases):
        write_volume(root / f"s{n}" / "ct.nii.gz", values_of(n))
        for number, name in enumerate(("liver", "spleen", "lesion")):
            drawn = np.zeros(SHAPE, np.uint8)
            drawn[1 + 2 * number : 3 + 2 * number, 2:6, 1:3] = 255 if number else 1
            if meet and name == "lesion":
                drawn[1:2, 2:4, 1] = 255
            write_volume(root / f"s{n}" / "segmentations" / f"{name}.nii.gz", drawn)


FILES = {n: f"*/segmentations/{n}.nii.gz" for n in ("liver", "spleen", "lesion")}


def test_a_file_for_each_class_becomes_one_label(tmp_path):
    organs(tmp_path / "d")
    site = site_of(tmp_path / "d", images="*/ct.nii.gz", label_files=FILES)
    assert site.classes == {"liver": (1,), "spleen": (2,), "lesion": (3,)}
    labels = prepare_cases(find_cases(site), site)[0].labels
    truth = np.zeros(SHAPE, np.uint8)
    for value in (1, 2, 3):
        truth[2 * value - 1 : 2 * value + 1, 2:6, 1:3] = value
    for index in range(4):
        np.testing.assert_array_equal(labels[index], axial(truth, index))
    assert [f for f in check_data(site) if f.severity == "error"] == []


@pytest.mark.parametrize("overlap", ["refuse", "highest", "keep"])
def test_where_two_classes_meet(tmp_path, overlap):
    organs(tmp_path / "d", meet=True)
    site = site_of(tmp_path / "d", images="*/ct.nii.gz", label_files=FILES, overlap=overlap)
    if overlap == "refuse":
        with pytest.raises(SiteDataError) as refused:
            prepare_cases(find_cases(site), site)
        assert refused.value.code == "segments-overlap"
        assert "the file of liver share 2 voxels" in refused.value.problem
        return
    prepared = prepare_cases(find_cases(site), site)[0]
    drawn = {
        name: int(np.isin(prepared.labels, values).sum()) for name, values in site.classes.items()
    }
    assert drawn == {"liver": 16 if overlap == "keep" else 14, "spleen": 16, "lesion": 18}


def test_what_files_of_classes_can_have_wrong(tmp_path):
    root = tmp_path / "d"
    organs(root)
    (root / "s1" / "segmentations" / "spleen.nii.gz").unlink()
    site = site_of(root, images="*/ct.nii.gz", label_files=FILES)
    problem = scan(site).problems[0]
    assert problem.code == "missing-label-file" and "none of spleen: s1/ct" in problem.problem
    organs(root)
    both = np.zeros(SHAPE, np.uint8)
    both[1, 1, 1], both[2, 2, 2] = 1, 2
    write_volume(root / "s1" / "segmentations" / "spleen.nii.gz", both)
    assert "several-values-of-a-class" in {f.code for f in check_data(site)}
    with pytest.raises(ConfigError, match="classes and label_files are both given"):
        site_of(root, images="*/ct.nii.gz", label_files=FILES, classes={"liver": [1]})


# -------------------------------------------------------------------------------- lists of a site


def plain(root: Path, cases: int = 6) -> None:
    for n in range(cases):
        write_volume(root / "images" / f"c{n}.nii.gz", values_of(n))
        label = np.zeros(SHAPE, np.uint8)
        label[2:5, 3:7, 1:3] = 1
        write_volume(root / "labels" / f"c{n}.nii.gz", label)


def split_of(root: Path, **split: object) -> dict[str, str]:
    site = site_of(
        root,
        images="images/*.nii.gz",
        labels="labels/*.nii.gz",
        classes={"lesion": [1]},
        split=split,
    )
    return {case.key: case.split for case in find_cases(site)}


EXPECTED = {
    **dict.fromkeys(("c0", "c1", "c2"), "train"),
    **dict.fromkeys(("c3", "c4"), "validation"),
}


def test_a_sites_own_lists_decide_who_validates_and_who_is_left_for_a_test(tmp_path):
    root = tmp_path / "d"
    plain(root)
    assert split_of(root, validation=["c[34]"], test=["c5"]) == EXPECTED
    with (root / "teilung.csv").open("w", newline="", encoding="utf-8-sig") as file:
        rows = csv.writer(file, delimiter=";")
        rows.writerow(["Case", "Split"])
        rows.writerows([f"c{n}", EXPECTED.get(f"c{n}", "Test")] for n in range(6))
    assert split_of(root, file="teilung.csv") == EXPECTED
    folds = [
        {"train": ["c3", "c4", "c5"], "val": ["c0", "c1", "c2"]},
        {"train": ["c0", "c1", "c2"], "val": ["c3", "c4", "c5"]},
    ]
    (root / "splits_final.json").write_text(json.dumps(folds))
    assert split_of(root, file="splits_final.json", fold=1) == {**EXPECTED, "c5": "validation"}
    (root / "folds.csv").write_text("case,fold\n" + "".join(f"c{n},{n % 3}\n" for n in range(6)))
    by_fold = split_of(root, file="folds.csv", fold=2)
    assert [key for key, side in by_fold.items() if side == "validation"] == ["c2", "c5"]


def test_where_lists_say_only_who_is_left_for_a_test_the_others_are_dealt(tmp_path):
    plain(tmp_path)
    sides = split_of(tmp_path, test=["c5"])
    assert sorted(sides) == ["c0", "c1", "c2", "c3", "c4"]
    validating = {key for key, side in sides.items() if side == "validation"}
    assert validating == validation_patients(sides, 0.2, 0)
    assert len(validating) == 1
    with pytest.raises(SiteDataError, match="no patient is on the side validation"):
        split_of(tmp_path, test=["c[1-5]"])


def test_lists_that_do_not_fit_the_cases_are_refused_by_name(tmp_path):
    root = tmp_path / "d"
    plain(root)
    (root / "half.csv").write_text("case,split\nc0,train\nc1,val\n")
    (root / "odd.csv").write_text("case,split\nc0,whatever\n")
    (root / "folds.json").write_text(json.dumps([{"train": ["c0"], "val": ["c1"]}] * 2))
    for split, code, text in (
        ({"validation": ["c9"]}, "case-not-in-split", "names c9"),
        ({"file": "half.csv"}, "case-not-in-split", "4 of 6 cases are not in"),
        ({"file": "odd.csv"}, "split-file", "line 2 says 'whatever'"),
        ({"file": "folds.json"}, "split-file", "it has 2 folds"),
        ({"file": "absent.csv"}, "split-file", "cannot be read"),
        ({"validation": ["*"]}, "too-few-patients", "side train"),
    ):
        with pytest.raises(SiteDataError) as refused:
            split_of(root, **split)
        assert refused.value.code == code
        assert text in refused.value.problem
    with pytest.raises(ConfigError, match="names a file and lists too"):
        split_of(root, file="half.csv", test=["c0"])


def test_a_patient_is_never_on_two_sides_of_a_list(tmp_path):
    root = tmp_path / "d"
    for name in ("p1_a", "p1_b", "p2_a"):
        write_volume(root / "images" / f"{name}.nii.gz", values_of(1))
        write_volume(root / "labels" / f"{name}.nii.gz", np.ones(SHAPE, np.uint8))
    site = site_of(
        root,
        images="images/*.nii.gz",
        labels="labels/*.nii.gz",
        classes={"lesion": [1]},
        patient="(p\\d)_",
        split={"validation": ["p1_b"]},
    )
    assert [problem.code for problem in scan(site).problems] == ["patient-on-both-sides"]


def test_images_without_a_label_are_no_cases_where_site_yml_says_so(tmp_path):
    root = tmp_path / "d"
    plain(root)
    (root / "labels" / "c5.nii.gz").unlink()
    keys = {
        "images": "images/*.nii.gz",
        "labels": "labels/*.nii.gz",
        "classes": {"lesion": [1]},
    }
    assert [p.code for p in scan(site_of(root, **keys)).problems] == ["unpaired-files"]
    found = scan(site_of(root, **keys, unlabelled="pass_over"))
    assert (found.problems, len(found.cases), found.unlabelled) == ([], 5, 1)
    # what a label lacks is an error all the same
    (root / "images" / "c0.nii.gz").unlink()
    found = scan(site_of(root, **keys, unlabelled="pass_over"))
    assert "1 of 5 labels have no image: c0.nii.gz" in found.problems[0].problem


# ---------------------------------------------------------------- left out, void, empty


def whole(site: SiteConfig) -> tuple[list[str], LeftOut]:
    """Cases that a job prepares, by their folder, and what it goes on without."""
    cases, left_out = find_whole_cases(site)
    prepared = prepare_cases(cases, site, left_out=left_out)
    return [one.case.key.partition("/")[0] for one in prepared], left_out


def test_a_case_that_lacks_contrasts_is_left_out_once(tmp_path):
    root = tmp_path / "d"
    site = fets(root, cases=10)
    for name in ("t1", "flair"):
        (root / "p3" / f"p3_{name}.nii.gz").unlink()
    write_volume(root / "p4" / "p4_t2.nii.gz", values_of(2)[:7])
    keys = {"labels": site.labels, "classes": {"tumour": [1]}, "contrasts": site.contrasts}
    there, left_out = whole(site_of(root, **keys, leave_out="20 %"))
    assert there == [f"p{n}" for n in (0, 1, 2, 5, 6, 7, 8, 9)]
    assert {(one.name, one.reason, one.error.code) for one in left_out.found} == {
        ("p3/p3_t1ce.nii.gz", "unfit", "missing-contrast"),
        ("p4/p4_t1.nii.gz", "unfit", "contrasts-differ"),
    }
    assert left_out.total == 10 and len(left_out.found) == 2
    findings = check_data(site_of(root, **keys, leave_out="20 %"))
    assert {f.severity for f in findings} == {"warning"}
    assert {"left-out", "missing-contrast", "contrasts-differ"} <= {f.code for f in findings}
    with pytest.raises(SiteDataError) as refused:
        whole(site_of(root, **keys, leave_out="10 %"))
    assert refused.value.code == "too-many-left-out"
    assert "2 of 10 cases cannot be used (2 unfit)" in refused.value.problem
    with pytest.raises(SiteDataError) as refused:
        whole(site_of(root, **keys, leave_out=0))
    assert refused.value.code == "missing-contrast"


def test_a_case_that_lacks_the_file_of_a_class_is_left_out_and_an_empty_one_may_be(tmp_path):
    root = tmp_path / "d"
    organs(root, cases=10)
    for name in ("liver", "spleen"):
        (root / "s1" / "segmentations" / f"{name}.nii.gz").unlink()
    for name in FILES:
        write_volume(root / "s2" / "segmentations" / f"{name}.nii.gz", np.zeros(SHAPE, np.uint8))
    keys = {"images": "*/ct.nii.gz", "label_files": FILES, "leave_out": "20 %"}
    there, left_out = whole(site_of(root, **keys))
    assert (len(there), left_out.by_reason()) == (9, {"unlabelled": 1})
    there, left_out = whole(site_of(root, **keys, may_be_empty=False))
    assert (len(there), left_out.by_reason()) == (8, {"empty": 1, "unlabelled": 1})
    empty = next(one for one in left_out.found if one.reason == "empty")
    assert "lesion" not in str(left_out) and " and 2 beside it shows no class" in str(empty.error)


def test_what_is_passed_over_or_left_for_a_test_is_not_counted_as_left_out(tmp_path):
    root = tmp_path / "d"
    plain(root, 11)
    for name in ("c8", "c9"):
        (root / "labels" / f"{name}.nii.gz").unlink()
    keys = {
        "images": "images/*.nii.gz",
        "labels": "labels/*.nii.gz",
        "classes": {"lesion": [1]},
        "split": {"validation": ["c3", "c9"], "test": ["c5", "c6"]},
        "leave_out": 0.25,
    }
    with pytest.raises(SiteDataError) as refused:  # a list may name what has no label, and no other
        whole(site_of(root, **{**keys, "split": {"validation": ["c3", "c99"]}}))
    assert refused.value.code == "case-not-in-split"
    cases, left_out = find_whole_cases(site_of(root, **keys))
    assert {case.key for case in cases if case.split == "validation"} == {"c3"}
    assert (left_out.total, left_out.by_reason()) == (9, {"unlabelled": 2})
    cases, left_out = find_whole_cases(site_of(root, **keys, unlabelled="pass_over"))
    assert (len(cases), left_out.total, left_out.found) == (7, 7, [])


@pytest.mark.parametrize("overlap", ["highest", "keep"])
def test_what_one_file_of_a_class_calls_void_is_void_for_all(tmp_path, overlap):
    root, cache = tmp_path / "d", tmp_path / "cache"
    organs(root, meet=True)
    path = root / "s0" / "segmentations" / "spleen.nii.gz"
    drawn = np.zeros(SHAPE, np.uint8)
    drawn[3:5, 2:6, 1:3] = 1
    drawn[1:4, 2:4, 1] = 2  # on the liver, the lesion and the spleen's own place
    write_volume(path, drawn)
    keys = {"images": "*/ct.nii.gz", "label_files": FILES, "overlap": overlap}
    with pytest.raises(SiteDataError) as refused:
        prepare_cases(find_cases(site_of(root, **keys)), site_of(root, **keys), folder=cache)
    assert refused.value.code == "several-values-of-a-class"
    site = site_of(root, **keys, void=[2])  # 2 is the spleen's own value, which no file knows of
    assert [f for f in check_data(site) if f.severity == "error"] == []
    wanted = recipe(classes=tuple(FILES), exclusive_classes=False)
    labels = prepare_cases(find_cases(site), site, folder=cache)[0].labels
    liver, spleen, lesion, void = planes_of_labels(labels, site, wanted, with_void=True).numpy()
    stripe = drawn == 2
    for index in range(SHAPE[2]):
        np.testing.assert_array_equal(void[index], axial(stripe, index))
        np.testing.assert_array_equal(spleen[index], axial(drawn == 1, index))
    assert not (void & (liver | spleen | lesion)).any() and liver.sum() and lesion.sum()
    with pytest.raises(ConfigError, match="void, and class or background"):
        site_of(root, **keys, void=[0])


def test_void_values_of_files_are_part_of_what_is_kept(tmp_path):
    root, cache = tmp_path / "d", tmp_path / "cache"
    organs(root)
    keys = {"images": "*/ct.nii.gz", "label_files": FILES, "overlap": "highest"}
    for void in ([], [255], [1]):
        site = site_of(root, **keys, void=void)
        values = {
            value
            for one in prepare_cases(find_cases(site), site, folder=cache)
            for values in one.slice_values()
            for value in values
        }
        # the liver is drawn as 1, all others as 255
        assert values - {0} == {(): {1, 2, 3}, (255,): {1, 4}, (1,): {2, 3, 4}}[tuple(void)]


def test_contrasts_have_void_pixels_and_classes_that_a_case_lacks(tmp_path):
    root = tmp_path / "d"
    site = fets(root)
    label = np.zeros(SHAPE, np.uint8)
    label[2:5, 3:7, 1:3], label[:2] = 1, 255
    for n in range(4):
        write_volume(root / f"p{n}" / f"p{n}_seg.nii.gz", label)
    site = site_of(
        root,
        contrasts=site.contrasts,
        labels=site.labels,
        classes={"tumour": [1]},
        void=[255],
        not_annotated_in={"tumour": ["p1*"]},
    )
    prepared = prepare_cases(find_cases(site), site)
    slices = SliceDataset(prepared, site, job(contrasts=("flair", "t1")))
    item = slices[0]
    assert item["image"].shape[0] == 2 and item["target"].shape[0] == 2
    assert item["target"][1].any() and item["annotated"].tolist() == [1.0]
    drawn = {
        prepared[number].case.key[:2]: slices[at]["annotated"].item()
        for at, (number, _) in enumerate(slices.slices)
    }
    assert drawn == {"p0": 1.0, "p1": 0.0, "p2": 1.0, "p3": 1.0}
