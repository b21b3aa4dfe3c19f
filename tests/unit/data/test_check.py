"""Broken sites: one for each problem that `check_data` knows, each giving the one error meant."""

import shutil

import nibabel
import numpy as np
import pytest
from PIL import Image
from site_files import cut, disk, picture, recipe, site_config, write_case, write_site, write_volume

from fedfms.contracts.site import Intensity, SiteConfig
from fedfms.control import Control
from fedfms.data.check import check_data
from fedfms.data.classes import annotated
from fedfms.data.manifest import find_cases, scan
from fedfms.data.prepare import prepare_cases
from fedfms.errors import SiteDataError, TaskAborted


def image_of(root, name="c03", ending="nii.gz"):
    return root / "images" / f"{name}.{ending}"


def label_of(root, name="c03", ending="nii.gz"):
    return root / "labels" / f"{name}.{ending}"


def unpaired(root):
    label_of(root).unlink()


def shapes_differ(root):
    write_volume(label_of(root), np.ones((6, 8, 4), np.uint8))


def places_differ(root):
    affine = np.eye(4)
    affine[:3, 3] = (0, 0, 1)  # one voxel up
    write_volume(label_of(root), np.ones((6, 8, 3), np.uint8), affine)


def unknown_values(root):
    values = nibabel.load(label_of(root)).get_fdata().astype(np.uint8)
    values[0, 0, 0] = 4
    write_volume(label_of(root), values)


def empty_masks(root):
    for path in (root / "labels").iterdir():
        write_volume(path, np.zeros((6, 8, 3), np.uint8))


def foreground_255(root):
    shutil.rmtree(root)
    write_site(root, label_value=255)


def nan_in_image(root):
    values = picture(3, (6, 8, 3)).astype(np.float32)
    values[0, 0, 0] = np.nan
    write_volume(image_of(root), values)


def constant_image(root):
    write_volume(image_of(root), np.full((6, 8, 3), 7, np.int16))


def one_patient_twice(root):
    for name in ("c02", "c03", "c04", "c05"):  # whatever the split, c01's image is on both sides
        shutil.copy(image_of(root, "c01"), image_of(root, name))


def unreadable(root):
    image_of(root).unlink()
    image_of(root).symlink_to("/nowhere")


def truncated(root):
    cut(image_of(root))


def zero_bytes(root):
    label_of(root).write_bytes(b"")


def wrong_magic(root):
    image_of(root).write_text("<html>404</html>")


def too_few(root):
    for name in ("c02", "c03", "c04", "c05"):
        image_of(root, name).unlink()
        label_of(root, name).unlink()


BROKEN = {
    unpaired: ("unpaired-files", "c03.nii.gz"),
    shapes_differ: ("shapes-differ", "3 x 8 x 6"),
    places_differ: ("geometry-differs", "1.0 mm"),
    unknown_values: ("unknown-label-values", "does not know: 4"),
    empty_masks: ("empty-masks", "all 5 label files are empty"),
    foreground_255: ("foreground-is-255", "lesion: [1]"),
    nan_in_image: ("non-finite", "c03.nii.gz holds 1 values"),
    constant_image: ("constant-image", "every value is 7"),
    one_patient_twice: ("patient-on-both-sides", "patient c01"),
    unreadable: ("unreadable-file", "No such file"),
    truncated: ("damaged-file", "c03.nii.gz"),
    zero_bytes: ("empty-file", "0 bytes"),
    wrong_magic: ("wrong-magic", "c03.nii.gz"),
    too_few: ("too-few-patients", "1 patient"),
}


@pytest.mark.parametrize("break_it", BROKEN, ids=lambda function: function.__name__)
@pytest.mark.parametrize("folder", ["site", "data"])
def test_a_broken_site_gives_the_one_error_meant(tmp_path, break_it, folder, caplog):
    root = tmp_path / folder  # a folder called data is a folder like any other
    write_site(root)
    break_it(root)
    site = site_config(root)
    code, says = BROKEN[break_it]
    findings = check_data(site, ["lesion"])
    assert [(finding.code, finding.severity) for finding in findings] == [(code, "error")]
    assert says in findings[0].problem
    assert len(findings[0].fix) > 20
    # training stops at the same problem, and what it publishes names no file
    with pytest.raises(SiteDataError) as caught:
        prepare_cases(find_cases(site), site)
    assert caught.value.code == code
    for name in ("c0", "nii", str(tmp_path)):
        assert name not in caught.value.public
        assert name not in caplog.text


def test_a_good_site_gives_nothing(tmp_path):
    for format in ("nifti", "image", "npy"):
        root = tmp_path / "data" / "images" / format
        write_site(root, format, cases=16)
        assert check_data(site_config(root, format), ["lesion"]) == []


def test_masks_of_0_and_255_are_read_with_the_fix_that_is_given(tmp_path):
    write_site(tmp_path, "image", label_value=255, cases=16)
    site = site_config(tmp_path, "image")
    (finding,) = check_data(site)
    assert finding.fix == "write lesion: [255] under classes in site.yml"
    assert check_data(site_config(tmp_path, "image", classes={"lesion": (255,)})) == []


def test_masks_of_0_and_1_where_255_was_said(tmp_path):
    write_site(tmp_path, "image", label_value=1)
    (finding,) = check_data(site_config(tmp_path, "image", classes={"lesion": (255,)}))
    assert finding.code == "foreground-is-1"
    assert finding.fix == "write lesion: [1] under classes in site.yml"


def test_a_grey_picture_as_label_gets_a_hint(tmp_path):
    write_site(tmp_path, "image")
    Image.fromarray(picture(1)).save(label_of(tmp_path, ending="png"))
    (finding,) = check_data(site_config(tmp_path, "image"))
    assert finding.code == "unknown-label-values"
    assert "threshold" in finding.fix


def test_all_problems_are_reported_at_once_and_like_ones_together(tmp_path):
    write_site(tmp_path, cases=12)
    (tmp_path / "labels" / "c01.nii.gz").unlink()
    for name in ("c02", "c03", "c04"):
        cut(image_of(tmp_path, name))
    zero_bytes(tmp_path)  # c03: its label is bad as well
    constant = np.full((6, 8, 3), 7, np.int16)
    write_volume(image_of(tmp_path, "c05"), constant)
    write_volume(label_of(tmp_path, "c06"), np.full((6, 8, 3), 9, np.uint8))
    findings = check_data(site_config(tmp_path), ["lesion", "edema"])
    assert [finding.code for finding in findings] == [
        "unpaired-files",
        "unknown-class",
        "unknown-label-values",
        "damaged-file",
        "empty-file",
        "constant-image",
    ]
    damaged = next(finding for finding in findings if finding.code == "damaged-file")
    assert "c02.nii.gz" in damaged.problem
    assert "2 more with the same problem: c03.nii.gz, c04.nii.gz" in damaged.problem


@pytest.mark.parametrize("ending", ["nii.gz", "nii", "png", "jpg", "tif", "npy"])
@pytest.mark.parametrize("damage", ["damaged-file", "empty-file", "wrong-magic"])
def test_bad_files_of_every_format_in_a_site(tmp_path, ending, damage):
    format = {"nii": "nifti", "npy": "npy"}.get(ending.split(".")[0], "image")
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    for number in range(4):
        values = picture(number, (20, 24, 6) if format == "nifti" else (40, 48))
        image = tmp_path / "images" / f"c{number}.{ending}"
        label = tmp_path / "labels" / f"c{number}.{'png' if format == 'image' else ending}"
        if format == "nifti":
            write_volume(image, values)
            write_volume(label, (values > 128).astype(np.uint8))
        elif format == "npy":
            np.save(image, values)
            np.save(label, values > 128)
        else:
            Image.fromarray(values).save(image)
            Image.fromarray(disk((40, 48), 9)).save(label)
    bad = tmp_path / "images" / f"c2.{ending}"
    if damage == "damaged-file":
        cut(bad)
    else:
        bad.write_bytes(b"" if damage == "empty-file" else b"%PDF-1.4 " * 200)
    globs = {
        "images": f"images/*.{ending}",
        "labels": f"labels/*.{'png' if format == 'image' else ending}",
    }
    findings = check_data(site_config(tmp_path, format, **globs))
    assert [finding.code for finding in findings] == [damage]
    assert bad.name in findings[0].problem


def test_a_class_of_the_job_that_nobody_mentioned(tmp_path):
    write_site(tmp_path)
    site = site_config(tmp_path, min_cases=1)
    findings = check_data(site, ["lesion", "leson", "oedema"])
    assert [finding.code for finding in findings] == ["unknown-class", "unknown-class"]
    assert "did you mean lesion" in findings[0].problem
    assert (
        check_data(site_config(tmp_path, min_cases=1, not_annotated=("oedema",)), ["oedema"]) == []
    )
    with pytest.raises(SiteDataError):
        annotated(site, recipe(classes=("oedema",)))


def warnings(site: SiteConfig) -> list[str]:
    findings = check_data(site)
    assert all(finding.severity == "warning" for finding in findings)
    return [finding.code for finding in findings]


def test_what_is_worth_a_look_is_a_warning(tmp_path):
    write_site(tmp_path, "image", cases=16)
    both = {"lesion": (1,), "oedema": (2,)}
    assert warnings(site_config(tmp_path, "image", classes=both)) == ["class-never-drawn"]
    assert warnings(site_config(tmp_path, "image", min_cases=4)) == ["few-validation-cases"]
    narrow = Intensity(rule="range", low=0.0, high=9.0)
    assert warnings(site_config(tmp_path, "image", intensity=narrow)) == ["intensity-clipped"]


def test_a_copy_on_the_same_side_is_a_warning(tmp_path):
    write_site(tmp_path, "image", cases=16)
    site = site_config(tmp_path, "image")
    one, other = [case for case in scan(site).cases if case.split == "train"][:2]
    shutil.copy(one.image, other.image)
    assert warnings(site) == ["same-image-twice"]


def test_an_intensity_rule_that_leaves_nothing_is_an_error(tmp_path):
    write_site(tmp_path)
    far = Intensity(rule="window", center=4000.0, width=100.0)
    (finding,) = check_data(site_config(tmp_path, intensity=far))
    assert finding.code == "intensity-flat"
    assert "values go from" in finding.problem


def test_names_that_look_like_slices_without_a_patient_expression(tmp_path):
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    for number in range(32):
        write_case(tmp_path, "image", f"p{number // 4}_{number % 4}", number)
    assert warnings(site_config(tmp_path, "image")) == ["patient-not-named"]
    named = site_config(tmp_path, "image", patient=r"^(p\d+)_", validation_fraction=0.3)
    assert warnings(named) == []


def test_the_check_reports_progress_and_can_be_stopped(tmp_path):
    write_site(tmp_path)
    seen = []
    check_data(site_config(tmp_path), control=Control(lambda *step: seen.append(step)))
    assert seen == [("prepare", n, 5) for n in range(6)]
    stopped = Control()
    stopped.abort()
    with pytest.raises(TaskAborted):
        check_data(site_config(tmp_path), control=stopped)


def test_a_small_shift_of_the_header_is_rounding_and_no_problem(tmp_path):
    write_site(tmp_path, cases=16)
    affine = np.eye(4)
    affine[:3, 3] = 0.01
    values = nibabel.load(label_of(tmp_path)).get_fdata().astype(np.uint8)
    write_volume(label_of(tmp_path), values, affine)
    assert check_data(site_config(tmp_path)) == []


def test_image_and_label_stored_in_different_orientations_fit(tmp_path):
    write_site(tmp_path, cases=16)
    turned = nibabel.load(label_of(tmp_path))
    turned = turned.as_reoriented(np.array([[1, -1], [2, 1], [0, -1]]))
    nibabel.save(turned, label_of(tmp_path))
    site = site_config(tmp_path)
    assert check_data(site) == []
    cases = {case.case.key: case for case in prepare_cases(find_cases(site), site)}
    np.testing.assert_array_equal(cases["c03"].labels, cases["c04"].labels)
