"""What `check_data` says it read, counted by other means; what is unlikely is a warning."""

import dataclasses
import shutil
import tracemalloc

import nibabel
import numpy as np
import pytest
from PIL import Image
from site_files import disk, picture, recipe, site_config, write_case, write_site, write_volume

from fedfms.contracts.site import Intensity
from fedfms.data.check import examine
from fedfms.data.formats import read_image, read_label
from fedfms.data.manifest import find_cases
from fedfms.data.memory import DiskNeed, MemoryNeed, allowed_bytes
from fedfms.data.numbers import MaskGrid, numbers_of, percent
from fedfms.data.prepare import prepare_cases
from fedfms.data.slices import SliceDataset
from fedfms.data.unlikely import unlikely


def write_pictures(root, labels, images=None):
    """Cases c00, c01, … with these labels, (H, W) uint8 each."""
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for number, label in enumerate(labels):
        image = images[number] if images else picture(number, label.shape)
        Image.fromarray(image).save(root / "images" / f"c{number:02d}.png")
        Image.fromarray(label).save(root / "labels" / f"c{number:02d}.png")


def codes(site, **of_job):
    return [finding.code for finding in examine(site, **of_job).findings]


def one_finding(site, **of_job):
    (finding,) = examine(site, **of_job).findings
    assert finding.severity == "warning"
    assert len(finding.fix) > 20
    return finding


def shapes(number, height=40, width=50):
    """A label with a disc of value 1, in every other one with a smaller one of value 2 in it."""
    label = disk((height, width), 8 + number % 3)
    if number % 2:
        label[disk((height, width), 4) == 1] = 2
    return label


def test_pictures_in_numbers(tmp_path):
    labels = [shapes(number, 40 + number) for number in range(20)]
    write_pictures(tmp_path, labels)
    classes = {"whole": (1, 2), "part": (2,)}
    site = site_config(tmp_path, "image", classes=classes, patient=r"c(\d)")
    found = examine(site)
    summary = found.summary
    assert [f.code for f in found.findings] == ["few-validation-cases"] * (
        summary.cases.validation < 3
    )
    cases = find_cases(site)
    validation = [case for case in cases if case.split == "validation"]
    assert (summary.cases.train, summary.cases.validation) == (
        20 - len(validation),
        len(validation),
    )
    assert summary.patients.total == 2  # c0x and c1x
    assert summary.patients.validation == 1
    assert (summary.read, summary.is_volumes, summary.voxel) == (20, False, None)
    assert (summary.rows, summary.columns) == ((40, 59), (50, 50))
    assert summary.label_values == (0, 1, 2)
    assert summary.stored_values == (0, 255)
    for name, values in classes.items():
        shares = [np.isin(label, values).mean() for label in labels]
        shares = [share for share in shares if share > 0]
        numbers = summary.classes[name]
        assert numbers.cases.total == numbers.slices == len(shares)
        np.testing.assert_allclose(
            numbers.share, (min(shares), np.mean(shares), max(shares)), rtol=1e-12
        )
        drawn = {f"c{n:02d}" for n, label in enumerate(labels) if np.isin(label, values).any()}
        assert numbers.cases.validation == len(drawn & {case.key for case in validation})


def turned_volume(path, values, sizes):
    """Save a volume of these voxel sizes in the order P, S, R, so that axes have to be found."""
    image = nibabel.Nifti1Image(values, np.diag([*sizes, 1.0]))
    turned = nibabel.orientations.axcodes2ornt("PSR")
    nibabel.save(image.as_reoriented(turned), path)


def write_volumes(root, sizes, cases=16, shape=(12, 10, 8)):
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True, exist_ok=True)
    label = np.zeros(shape, np.uint8)
    label[4:8, 3:7, 2:6] = 1
    for number in range(cases):
        of_case = sizes[number % len(sizes)]
        name = f"c{number:02d}.nii.gz"
        turned_volume(root / "images" / name, picture(number, shape).astype(np.int16), of_case)
        turned_volume(root / "labels" / name, label, of_case)


def test_volumes_in_numbers(tmp_path):
    write_volumes(tmp_path, [(1.0, 1.2, 1.5), (0.8, 1.0, 1.5)])
    summary = examine(site_config(tmp_path)).summary
    assert summary.is_volumes
    assert summary.slices.total == 16 * 8
    assert (summary.slices_of_a_case, summary.rows, summary.columns) == ((8, 8), (10, 10), (12, 12))
    np.testing.assert_allclose(summary.voxel, [(1.5, 1.5), (1.0, 1.2), (0.8, 1.0)], rtol=1e-6)
    lesion = summary.classes["lesion"]
    assert (lesion.cases.total, lesion.slices) == (16, 16 * 4)
    np.testing.assert_allclose(lesion.share, [16 / 120] * 3)
    sagittal = examine(site_config(tmp_path, plane="sagittal")).summary
    assert (sagittal.rows, sagittal.columns, sagittal.slices.total) == ((8, 8), (10, 10), 16 * 12)
    np.testing.assert_allclose(sagittal.voxel, [(0.8, 1.0), (1.5, 1.5), (1.0, 1.2)], rtol=1e-6)


def test_numbers_are_of_what_could_be_read(tmp_path):
    write_site(tmp_path, cases=16)
    (tmp_path / "images" / "c03.nii.gz").write_bytes(b"")
    found = examine(site_config(tmp_path))
    assert (found.summary.cases.total, found.summary.read) == (16, 15)
    assert found.summary.slices.total == 15 * 3
    assert "15 of 16 cases could be read" in found.summary.line()
    assert found.summary.classes["lesion"].cases.total == 15
    nothing = examine(site_config(tmp_path, images="images/*.nii"))
    assert [finding.severity for finding in nothing.findings] == ["error"]
    assert (nothing.summary.cases.total, nothing.summary.rows) == (0, None)
    assert nothing.summary.rows_for_print()[0] == ("cases", "none")


def test_the_line_for_check_site_names_no_file_and_no_patient(tmp_path):
    for number in range(16):
        write_case(with_parts(tmp_path), "image", f"anna{number:02d}_1", number)
    found = examine(site_config(tmp_path, "image", patient=r"(anna\d+)_"))
    line = found.summary.line()
    assert "16 cases; 16 patients" in line
    assert "lesion in 16 cases (14.2 % of a slice)" in line  # 109 of 24 x 32 pixels
    for name in ("anna", "png", str(tmp_path)):
        assert name not in line


def with_parts(root):
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True, exist_ok=True)
    return root


# -------------------------------------------------------------------------------- unlikely masks


def inverted(label):
    return ((label == 0) * 255).astype(np.uint8)


def test_black_on_white_masks_and_the_fix_that_is_given(tmp_path):
    write_pictures(tmp_path, [inverted(shapes(number)) for number in range(16)])
    finding = one_finding(site_config(tmp_path, "image", classes={"lesion": (255,)}))
    assert finding.code == "covers-most"
    share = np.mean([np.mean(shapes(number) == 0) for number in range(16)])
    assert f"covers {100 * share:.1f} % of the picture on average" in finding.problem
    assert "in all 16 cases" in finding.problem
    assert "write lesion: [0] under classes and background: [255]" in finding.fix
    corrected = site_config(tmp_path, "image", classes={"lesion": (0,)}, background=(255,))
    assert codes(corrected) == []


def test_some_masks_the_other_way_round(tmp_path):
    labels = [(shapes(number) > 0).astype(np.uint8) for number in range(16)]
    labels[5], labels[9] = 1 - labels[5], 1 - labels[9]
    write_pictures(tmp_path, labels)
    finding = one_finding(site_config(tmp_path, "image"))
    assert finding.code == "covers-most"
    assert "in 2 of the 16 cases" in finding.problem
    assert "c05.png" in finding.problem


def test_labels_that_are_the_whole_picture(tmp_path):
    write_pictures(
        tmp_path,
        [np.full((40, 50), 255, np.uint8)] * 16,
        [picture(number, (40, 50)) for number in range(16)],
    )
    finding = one_finding(site_config(tmp_path, "image", classes={"lesion": (255,)}))
    assert finding.code == "covers-most"
    assert "the whole picture in all 16 cases" in finding.problem
    assert "alpha" in finding.fix


def test_inverted_volumes(tmp_path):
    write_volumes(tmp_path, [(1.0, 1.0, 1.0)])
    for path in (tmp_path / "labels").iterdir():
        label = nibabel.load(path)
        values = 1 - np.asanyarray(label.dataobj)
        nibabel.save(nibabel.Nifti1Image(values.astype(np.uint8), label.affine), path)
    assert one_finding(site_config(tmp_path)).code == "covers-most"


def test_a_large_organ_in_a_cropped_picture_is_nothing_unlikely(tmp_path):
    """Half of the picture and a whole edge of it, as a liver may be."""
    label = np.zeros((40, 50), np.uint8)
    label[:, :28] = 1
    write_pictures(tmp_path, [label] * 16)
    assert codes(site_config(tmp_path, "image")) == []


def test_a_class_in_few_cases(tmp_path):
    labels = [shapes(2 * number) for number in range(24)]
    labels[7] = shapes(7)
    write_pictures(tmp_path, labels)
    both = {"lesion": (1,), "oedema": (2,)}
    site = site_config(tmp_path, "image", classes=both)
    found = {finding.code: finding for finding in examine(site).findings}
    assert set(found) == {"class-rare", "class-on-one-side"}
    assert "oedema is drawn in 1 of 24 cases" in found["class-rare"].problem
    assert "not_annotated" in found["class-rare"].fix


def test_a_click_is_no_drawing(tmp_path):
    labels = [disk((40, 50), 9) for _ in range(16)]
    for label in labels:
        label[3, 4] = 2
    write_pictures(tmp_path, labels)
    both = {"lesion": (1,), "oedema": (2,)}
    finding = one_finding(site_config(tmp_path, "image", classes=both))
    assert finding.code == "hardly-drawn"
    assert "oedema never has more than 1 pixel" in finding.problem


@pytest.mark.parametrize("side", ["train", "validation"])
def test_a_class_on_one_side_of_the_split(tmp_path, side):
    write_site(tmp_path, "image", cases=16)
    both = {"lesion": (1,), "oedema": (2,)}
    site = site_config(tmp_path, "image", classes=both)
    for case in find_cases(site):
        if case.split == side:
            label = disk((24, 32), 6)
            label[disk((24, 32), 3) == 1] = 2
            Image.fromarray(label).save(case.label)
    finding = one_finding(site)
    assert finding.code == "class-on-one-side"
    lacks = {"train": "none of those to validate", "validation": "none of those to train"}
    assert lacks[side] in finding.problem
    assert "validation_seed" in finding.fix


def test_objects_that_a_mask_pixel_swallows(tmp_path):
    """12 dots of 3 x 3 pixels in 512 x 640: a mask of 64 has pixels of 10 x 10, one of 256 less."""
    label = np.zeros((512, 640), np.uint8)
    for row in range(3):
        for column in range(4):
            label[100 * row + 50 :, 100 * column + 50 :][:3, :3] = 1
    write_pictures(tmp_path, [label] * 6)
    site = site_config(tmp_path, "image", min_cases=1)
    assert codes(site) == []  # SAM's own: 2.5 x 2.5 pixels
    finding = one_finding(site, recipe=recipe(image_size=128))
    assert finding.code == "objects-too-small"
    assert "72 of the 72 outlines" in finding.problem
    assert "10.0 x 10.0 pixels of a picture of 512 x 640" in finding.problem
    assert "image_size 128" in finding.problem
    label[400:500, 400:600] = 1  # a large one does not hide the small ones
    write_pictures(tmp_path, [label] * 6)
    assert codes(site, recipe=recipe(image_size=128)) == ["objects-too-small"]
    label = disk((512, 640), 60)
    label[3, 3] = 1  # nor does a dot beside a large one count for much, if they are few
    labels = [label, *[disk((512, 640), 60) for _ in range(5)]]
    write_pictures(tmp_path, labels)
    assert codes(site, recipe=recipe(image_size=128)) == []


def test_a_mask_pixel_in_pixels_of_the_picture():
    assert MaskGrid().mask_pixel((512, 1024), (1.0, 1.0)) == (4.0, 4.0)
    # 100 rows of 3 mm are longer than 200 columns of 1 mm: 300 mm / 64 mask pixels
    rows, columns = MaskGrid(128, 64).mask_pixel((100, 200), (3.0, 1.0))
    assert (rows, columns) == pytest.approx((300 / 64 / 3, 300 / 64))
    assert MaskGrid(128, 64, stretch=True).mask_pixel((128, 640), (3.0, 1.0)) == (2.0, 10.0)


def test_numbered_objects_are_one_class(tmp_path):
    label = np.zeros((40, 50), np.uint8)
    for number in range(15):
        label[8 * (number // 5) :, 10 * (number % 5) :][:5, :5] = number + 1
    write_pictures(tmp_path, [label] * 16)
    site = site_config(tmp_path, "image", classes={"nucleus": tuple(range(1, 32768))})
    found = examine(site)
    assert found.findings == []
    assert found.summary.classes["nucleus"].share == pytest.approx([15 * 25 / 2000] * 3)
    assert ("label values", "16, from 0 to 15") in found.summary.rows_for_print()


def test_two_classes_with_the_same_values(tmp_path):
    write_site(tmp_path, "image", cases=16)
    twins = {"disc": (1,), "cup": (1,)}
    finding = one_finding(site_config(tmp_path, "image", classes=twins))
    assert finding.code == "same-label-values"
    assert "disc and cup" in finding.problem


def test_classes_of_a_job_that_exclude_each_other_share_no_value(tmp_path):
    write_site(tmp_path, "image", cases=16)
    site = site_config(tmp_path, "image", classes={"whole": (1, 2), "part": (2,)})
    job = {"classes": ("whole", "part"), "image_size": 256}
    assert codes(site, recipe=recipe(**job)) == ["class-never-drawn"]  # part is
    excluding = recipe(**job, exclusive_classes=True)
    assert codes(site, recipe=excluding) == ["classes-share-values"]


# ----------------------------------------------------------------------------- unlikely pictures


@pytest.mark.parametrize(
    ("sizes", "plane", "code", "says"),
    [
        ((1.0, 1.0, 3.0), "sagittal", "plane-not-finest", "3 x 1 mm, axial ones of 1 mm"),
        ((1.0, 1.0, 3.0), "coronal", "plane-not-finest", "plane: axial"),
        ((3.0, 1.0, 1.0), "axial", "plane-not-finest", "plane: sagittal"),
        ((1.0, 2.0, 5.0), "axial", "pixels-not-square", "2 x 1 mm"),
        ((1.0, 1.0, 3.0), "axial", None, ""),
        ((0.7, 1.0, 1.0), "sagittal", None, ""),  # what was taken sagittally in all but name
        ((1.0, 1.0, 1.0), "coronal", None, ""),
    ],
)
def test_voxels_far_from_square(tmp_path, sizes, plane, code, says):
    write_volumes(tmp_path, [sizes])
    site = site_config(tmp_path, plane=plane)
    if code is None:
        assert codes(site) == []
        return
    finding = one_finding(site)
    assert finding.code == code
    assert says in finding.problem + finding.fix
    assert "in 16 of 16 volumes" in finding.problem


def test_a_single_slice_is_cut_as_it_was_taken(tmp_path):
    write_volumes(tmp_path, [(1.0, 1.0, 5.0)], shape=(12, 10, 1))
    for path in (tmp_path / "labels").iterdir():
        label = nibabel.load(path)
        values = np.zeros(label.shape, np.uint8)
        values[:5, :, 2:6] = 1
        nibabel.save(nibabel.Nifti1Image(values, label.affine), path)
    assert codes(site_config(tmp_path, plane="sagittal")) == []


def test_an_image_in_another_unit(tmp_path):
    write_site(tmp_path, cases=16)
    values = picture(4, (6, 8, 3)).astype(np.float32) / 255
    write_volume(tmp_path / "images" / "c04.nii.gz", values)
    finding = one_finding(site_config(tmp_path))
    assert finding.code == "other-intensities"
    assert "1 image spread" in finding.problem
    assert "c04.nii.gz with" in finding.problem


def test_a_volume_whose_lengths_are_in_another_unit(tmp_path):
    sizes = [(1.0, 1.0, 5.0)] * 15 + [(0.1, 0.1, 0.5)]
    write_volumes(tmp_path, sizes)
    finding = one_finding(site_config(tmp_path))
    assert finding.code == "other-voxel-size"
    assert "the voxels of 1 volume are over 100 times" in finding.problem
    assert "0.5 x 0.1 x 0.1 mm" in finding.problem


def test_a_volume_larger_than_any_body(tmp_path):
    write_volumes(tmp_path, [(90.0, 90.0, 90.0)] * 16, shape=(40, 40, 3))
    finding = one_finding(site_config(tmp_path))
    assert finding.code == "odd-voxel-size"
    assert "3.6 m in all" in finding.problem


def test_ct_of_which_some_is_not_in_hounsfield_units(tmp_path):
    write_site(tmp_path, cases=16)
    for number in range(1, 17):
        offset = 0 if number == 4 else -1024
        values = picture(number, (6, 8, 3)).astype(np.int16) * 8 + offset
        values[0, 0] = offset
        write_volume(tmp_path / "images" / f"c{number:02d}.nii.gz", values)
    window = Intensity(rule="window", center=40.0, width=400.0)
    finding = one_finding(site_config(tmp_path, intensity=window))
    assert finding.code == "other-intensities"
    assert "most others reach -1024" in finding.problem
    assert codes(site_config(tmp_path)) == []  # the percentiles of each case do not mind


def test_grey_pictures_among_coloured_ones(tmp_path):
    write_site(tmp_path, "image", cases=16)
    for number in range(1, 13):
        colours = picture(number, (24, 32, 3))
        Image.fromarray(colours).save(tmp_path / "images" / f"c{number:02d}.png")
    site = site_config(tmp_path, "image", channels="rgb")
    finding = one_finding(site)
    assert finding.code == "colours-differ"
    assert "4 pictures have no colour, 12 have" in finding.problem
    assert codes(site_config(tmp_path, "image")) == []
    for number in range(1, 13):
        write_case(tmp_path, "image", f"c{number:02d}", number)
    assert codes(site) == []  # all are grey


# -------------------------------------------------------------------------------- files left out


def test_files_with_another_ending_than_the_globs_have(tmp_path):
    write_site(tmp_path, "image", cases=32)
    for number in range(1, 33, 2):
        for part in ("images", "labels"):
            path = tmp_path / part / f"c{number:02d}.png"
            path.rename(path.with_suffix(".PNG"))
    found = examine(site_config(tmp_path, "image"))
    assert found.summary.cases.total == 16
    assert found.summary.not_taken == {".PNG": 32}
    (finding,) = found.findings
    assert finding.code == "files-not-taken"
    assert "(32 .PNG)" in finding.problem
    assert "rename .PNG to .png; else" in finding.fix
    assert ("not taken", "32 .PNG in the same folders, by no glob") in (
        found.summary.rows_for_print()
    )


def test_files_in_folders_below_are_counted(tmp_path):
    write_site(tmp_path, "image", cases=16)
    for part in ("images", "labels"):
        (tmp_path / part / "second half").mkdir()
        (tmp_path / part / "second half" / "notes.txt").write_text("x")
        for path in list((tmp_path / part).glob("*.png"))[:5]:
            path.rename(path.parent / "second half" / path.name)
    found = examine(site_config(tmp_path, "image"))
    assert found.summary.below == 10
    assert ("not looked at", "10 files in folders below, by no glob") in (
        found.summary.rows_for_print()
    )
    deep = site_config(tmp_path, "image", images="images/**/*.png", labels="labels/**/*.png")
    assert examine(deep).summary.below == 0


def test_they_may_explain_an_error(tmp_path):
    write_site(tmp_path, "image", cases=16)
    path = tmp_path / "labels" / "c03.png"
    path.rename(path.with_suffix(".PNG"))
    assert codes(site_config(tmp_path, "image")) == ["unpaired-files", "files-not-taken"]


def test_another_contrast_is_counted_and_no_warning(tmp_path):
    write_site(tmp_path, cases=16)
    for path in list((tmp_path / "images").iterdir()):
        shutil.copy(path, path.with_name(path.name.replace(".nii.gz", "_t2.nii.gz")))
        path.rename(path.with_name(path.name.replace(".nii.gz", "_t1.nii.gz")))
    site = site_config(tmp_path, images="images/*_t1.nii.gz")
    found = examine(site)
    assert found.summary.not_taken == {".nii.gz": 16}
    assert found.findings == []


# ------------------------------------------------------------------------- what the readers say


def test_what_the_files_were(tmp_path):
    write_site(tmp_path, "image", cases=16)
    Image.fromarray(picture(3, (24, 32, 3))).save(tmp_path / "images" / "c03.png")
    site = site_config(tmp_path, "image")
    summary = examine(site).summary
    assert summary.image_kinds == {"PNG, gray, 8 bit": 15, "PNG, RGB, 8 bit": 1}
    assert summary.label_kinds == {"PNG, gray, 8 bit": 16}
    assert ("images", "15 PNG, gray, 8 bit; 1 PNG, RGB, 8 bit") in summary.rows_for_print()


def test_a_doubt_of_the_reader_is_one_warning_for_all_files(tmp_path):
    write_site(tmp_path, cases=16)
    for name in ("c03", "c04"):
        volume = nibabel.load(tmp_path / "images" / f"{name}.nii.gz")
        values = np.asanyarray(volume.dataobj)
        without = nibabel.Nifti1Image(values, None)
        without.header["qform_code"] = without.header["sform_code"] = 0
        nibabel.save(without, tmp_path / "images" / f"{name}.nii.gz")
        label = nibabel.load(tmp_path / "labels" / f"{name}.nii.gz")
        drawn = nibabel.Nifti1Image(np.asanyarray(label.dataobj), without.affine)
        nibabel.save(drawn, tmp_path / "labels" / f"{name}.nii.gz")
    findings = examine(site_config(tmp_path)).findings
    assert {finding.severity for finding in findings} == {"warning"}
    (orientation,) = [finding for finding in findings if finding.code == "no-orientation"]
    assert "c03.nii.gz" in orientation.problem
    assert "1 more with the same problem: c04.nii.gz" in orientation.problem


# ---------------------------------------------------------------------------------------- memory


def write_large(root, format):
    """A site in which one case is much larger than the others."""
    write_site(with_parts(root), format, cases=3)
    if format == "nifti":
        values = picture(9, (60, 50, 40)).astype(np.int16)
        label = np.zeros(values.shape, np.uint8)
        label[20:40, 20:40, 20:40] = 1
        write_volume(root / "images" / "c02.nii.gz", values)
        write_volume(root / "labels" / "c02.nii.gz", label)
    else:
        Image.fromarray(picture(9, (600, 800, 3))).save(root / "images" / "c02.png")
        Image.fromarray(disk((600, 800), 90)).save(root / "labels" / "c02.png")


@pytest.mark.parametrize(("format", "channels"), [("nifti", "gray"), ("image", "rgb")])
def test_memory_and_disk_of_the_data_are_what_the_trainer_takes(tmp_path, format, channels):
    write_large(tmp_path, format)
    site = site_config(tmp_path, format, channels=channels, cache=tmp_path / "cache")
    job = recipe(image_size=256)
    summary = examine(site, recipe=job).summary
    cases = find_cases(site)
    prepare_cases(cases, site)  # what is imported on the way does not count
    shutil.rmtree(site.cache)
    tracemalloc.start()
    prepared = prepare_cases(cases, site)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # enough, and no more than a third too much
    assert 0.95 * peak < summary.memory.needed < 1.33 * peak
    assert kept < 0.05 * peak  # of three cases, one of them large
    assert summary.disk.cases == sum(c.images.nbytes + c.labels.nbytes for c in prepared)
    written = sum(path.stat().st_size for path in site.cache.iterdir())
    assert summary.disk.cases < written < summary.disk.cases + 3 * 4096
    training = [case for case in prepared if case.case.split == "train"]
    data = SliceDataset(training, site, job)
    size = (1 if channels == "gray" else 3) * 256 * 256 + 128 * 128 / 8
    assert summary.disk.slices == len(data) * size


def test_slices_that_are_made_anew_each_time_take_no_room(tmp_path):
    write_volumes(tmp_path, [(1.0, 1.0, 1.0)], cases=30)
    site = site_config(tmp_path, channels="neighbours")
    huge = recipe(image_size=2048)
    assert examine(site, recipe=huge).summary.disk.slices == 0  # 192 of 3 x 2048 x 2048
    few = dataclasses.replace(site, keep_empty_every=0)
    # 24 patients train, each with 4 slices
    size = 3 * 2048**2 + 1024**2 // 8
    assert examine(few, recipe=huge).summary.disk.slices == 24 * 4 * size


def test_more_data_than_memory_is_a_warning(tmp_path):
    write_site(tmp_path, cases=16)
    site = site_config(tmp_path)
    summary = examine(site).summary
    assert summary.memory.allowed == allowed_bytes()
    case = find_cases(site)[0]
    image = read_image(case.image, case.image.read_bytes(), site)
    label = read_label(case.label, case.label.read_bytes(), site)
    read = [numbers_of(case, image, label, site, MaskGrid())]
    huge = MemoryNeed(reading=20 * 2**30, allowed=16 * 2**30)
    (finding,) = unlikely(dataclasses.replace(summary, memory=huge), read, site, MaskGrid())
    assert finding.code == "memory-short"


def test_more_data_than_room_is_a_warning_that_names_the_disk(tmp_path):
    write_site(tmp_path, cases=16)
    site = site_config(tmp_path, cache=tmp_path / "cache")
    summary = examine(site).summary
    case = find_cases(site)[0]
    image = read_image(case.image, case.image.read_bytes(), site)
    label = read_label(case.label, case.label.read_bytes(), site)
    read = [numbers_of(case, image, label, site, MaskGrid())]
    huge = DiskNeed(cases=2**60, slices=0)
    (finding,) = unlikely(dataclasses.replace(summary, disk=huge), read, site, MaskGrid())
    assert finding.code == "disk-short"
    assert str(tmp_path) in finding.problem


def test_percent_never_says_nothing_of_something():
    assert [percent(share) for share in (0, 1e-6, 0.0016, 0.062, 0.9999, 1)] == [
        *("0 %", "<0.01 %", "0.16 %", "6.2 %", "99.9 %", "100 %")
    ]
