import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from site_files import recipe

from fedfms.contracts.policy import Policy
from fedfms.contracts.site import SiteConfig
from fedfms.data.check import check_data
from fedfms.data.manifest import find_cases
from fedfms.data.prepare import prepare_cases
from fedfms.data.slices import SliceDataset
from fedfms.errors import ConfigError
from fedfms.local.synthetic import (
    STYLES,
    phantom,
    write_phantom_federation,
    write_phantom_site,
)


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("format", ["nifti", "image"])
def test_a_phantom_federation_passes_its_own_check(tmp_path, format):
    names = write_phantom_federation(tmp_path, cases=10, slices=2, seed=1, format=format)
    assert names == ["site-1", "site-2", "site-3", "site-4"]
    for name in names:
        site = SiteConfig.from_yaml(tmp_path / name / "site.yml")
        assert site.data_root == tmp_path / name
        assert check_data(site, ["lesion"]) == []
        policy = Policy.from_folder(tmp_path / name / "policy")
        assert (policy.pictures, policy.min_cases) == (True, 3)


def test_the_default_size_is_the_demos(tmp_path):
    write_phantom_site(tmp_path / "s", "noisy")
    site = SiteConfig.from_yaml(tmp_path / "s" / "site.yml")
    cases = prepare_cases(find_cases(site), site)
    train = [case for case in cases if case.case.split == "train"]
    assert 48 <= len(SliceDataset(train, site, recipe())) <= 56
    assert len(cases) - len(train) >= 5


def test_a_small_lesion_is_another_object_of_the_same_picture_and_grey():
    for style in STYLES:
        for seed in range(3):
            image, large = phantom(style, slices=4, seed=seed)
            same, small = phantom(style, slices=4, seed=seed, lesion="small")
            np.testing.assert_array_equal(image, same)
            assert not (large & small).any()
            assert 0 < small.sum() < large.sum() / 2
            middle = [np.median(image[mask > 0]) for mask in (large, small)]
            whole = np.ptp(image)
            assert abs(middle[0] - middle[1]) < 0.15 * whole


def test_as_many_patients_validate_as_are_asked_for(tmp_path):
    write_phantom_site(tmp_path / "s", "bright", cases=10, slices=1, validation_fraction=0.6)
    cases = find_cases(SiteConfig.from_yaml(tmp_path / "s/site.yml"))
    assert sum(case.split == "validation" for case in cases) == 6
    assert Policy.from_folder(tmp_path / "s/policy").min_training_patients == 1


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_phantom_site(tmp_path / name, "bright", cases=2, slices=2, seed=seed, format="image")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert (
        files(tmp_path / "a")["images/phantom-001_00.png"]
        != (files(tmp_path / "c")["images/phantom-001_00.png"])
    )


def test_no_phantom_occurs_twice_in_a_federation(tmp_path):
    write_phantom_federation(tmp_path, cases=4, slices=2, seed=0)
    arrays = {
        nibabel.load(path).get_fdata().tobytes() for path in sorted(tmp_path.glob("*/labels/*"))
    }
    assert len(arrays) == 16


def test_pictures_and_volumes_of_one_seed_show_the_same(tmp_path):
    write_phantom_site(tmp_path / "n", "inverted", cases=2, slices=3, seed=5)
    write_phantom_site(tmp_path / "p", "inverted", cases=2, slices=3, seed=5, format="image")
    volumes, pictures = (
        prepare_cases(find_cases(site), site)
        for site in (SiteConfig.from_yaml(tmp_path / name / "site.yml") for name in "np")
    )
    for case in volumes:
        shown = [p for p in pictures if p.case.patient == case.case.patient]
        np.testing.assert_array_equal(case.labels, np.concatenate([p.labels for p in shown]))
    assert len(pictures) == 6


def levels(style: str) -> dict[str, float]:
    """Median values in target, body and air, and the noise in air, as shares of the full scale."""
    found = []
    for seed in range(6):
        image, label = phantom(style, slices=4, seed=seed)
        values = image / STYLES[style].full_scale
        middle = values.shape[0] // 2
        ring = values[middle - 6 : middle + 6, :, 1:3][label[middle - 6 : middle + 6, :, 1:3] == 0]
        found.append(
            [
                np.median(values[label > 0]),
                np.median(ring),
                np.median(values[:4, :4]),
                values[:4, :4].std(),
                label[..., 1].mean(),
            ]
        )
    return dict(
        zip(("target", "body", "air", "noise", "size"), np.mean(found, axis=0), strict=True)
    )


def test_sites_differ_as_scanners_do():
    seen = {style: levels(style) for style in STYLES}
    contrast = {style: s["target"] - s["body"] for style, s in seen.items()}
    assert contrast["bright"] > contrast["noisy"] > 0.1
    assert contrast["inverted"] < -0.1
    assert seen["inverted"]["air"] > 0.9 > 0.1 > seen["bright"]["air"]
    assert seen["noisy"]["noise"] > 2 * seen["bright"]["noise"]
    assert seen["inverted"]["size"] > 1.2 * seen["noisy"]["size"]
    scales = sorted(style.full_scale for style in STYLES.values())
    assert scales[-1] / scales[0] > 1000
    assert len({style.axes for style in STYLES.values()}) == len(STYLES)
    assert len({style.dtype for style in STYLES.values()}) == len(STYLES)


def test_volumes_are_stored_in_the_styles_orientation_and_number_type(tmp_path):
    for style, look in STYLES.items():
        write_phantom_site(tmp_path / style, style, cases=2, slices=3)
        stored = nibabel.load(tmp_path / style / "images" / "phantom-001.nii.gz")
        assert "".join(nibabel.aff2axcodes(stored.affine)) == look.axes
        assert stored.get_data_dtype() == np.dtype(look.dtype)
        canonical = nibabel.as_closest_canonical(stored)
        image, _ = phantom(style, slices=3, seed=0)
        np.testing.assert_array_equal(np.asanyarray(canonical.dataobj), image)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        write_phantom_site(tmp_path, "bright", cases=2, slices=1)
    assert files(tmp_path) == {"notes.txt": b"mine"}


def test_what_an_interrupted_run_left_is_cleared_away(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedfms.local.synthetic._write_settings", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_phantom_site(tmp_path / "s", "bright", cases=2, slices=1)
    assert files(tmp_path / "s") == {}
    (tmp_path / "s" / ".phantoms-killed" / "images").mkdir(parents=True)  # of a kill -9
    write_phantom_site(tmp_path / "s", "bright", cases=2, slices=1)
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [
        "images",
        "labels",
        "policy",
        "site.yml",
    ]


@pytest.mark.parametrize(
    "wrong", [{"style": "brite"}, {"cases": 1}, {"slices": 0}], ids=["style", "cases", "slices"]
)
def test_what_cannot_be_written_is_said(tmp_path, wrong):
    values = {"style": "bright", "cases": 2, "slices": 1, **wrong}
    with pytest.raises(ConfigError):
        write_phantom_site(tmp_path / "s", values.pop("style"), **values)


def test_privacy_json_is_what_the_demo_needs(tmp_path):
    few = {"min_training_patients": 1, "min_steps": 1}  # of which a hospital would not let go
    for cases, more in ((2, few), (18, {})):
        write_phantom_site(tmp_path / str(cases), "unseen", cases=cases, slices=1)
        policy = json.loads((tmp_path / str(cases) / "policy" / "privacy.json").read_text())
        assert policy == {"min_cases": 3, "pictures": True, **more}


def test_keep_adds_the_sites_that_are_missing_and_leaves_the_others(tmp_path: Path) -> None:
    write_phantom_federation(tmp_path, cases=2, slices=1)
    marked = tmp_path / "site-2" / "site.yml"
    marked.write_text("# mine\n")
    for path in sorted((tmp_path / "site-3").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()

    write_phantom_federation(tmp_path, cases=2, slices=1, keep=True)

    assert marked.read_text() == "# mine\n"
    assert len(list((tmp_path / "site-3" / "images").iterdir())) == 2
