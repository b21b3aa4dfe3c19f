import hashlib
import os
from pathlib import Path

import pytest
from plain_user import a_plain_user
from site_files import site_config, write_site

from fedfms.data.manifest import (
    find_cases,
    scan,
    several_files_a_patient,
    untaken,
    validation_patients,
)
from fedfms.data.prepare import prepare_cases
from fedfms.errors import SiteDataError
from fedfms.local.sites import find_sites
from fedfms_lab.prepare.source import Source


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def pairs(root: Path, images: str, labels: str, **changes: object) -> dict[str, str]:
    site = site_config(root, images=images, labels=labels, **changes)
    return {
        case.image.relative_to(root).as_posix(): case.label.relative_to(root).as_posix()
        for case in find_cases(site)
    }


def test_image_and_label_are_paired_by_what_the_wildcards_match(tmp_path):
    touch(tmp_path, "i/b_t1.nii.gz", "i/a_t1.nii.gz", "l/a_seg.nii.gz", "l/b_seg.nii.gz")
    assert pairs(tmp_path, "i/*_t1.nii.gz", "l/*_seg.nii.gz") == {
        "i/a_t1.nii.gz": "l/a_seg.nii.gz",
        "i/b_t1.nii.gz": "l/b_seg.nii.gz",
    }


def test_folders_can_be_wildcards(tmp_path):
    touch(tmp_path, "p1/v1/img.nii.gz", "p1/v1/seg.nii.gz", "p2/v1/img.nii.gz", "p2/v1/seg.nii.gz")
    assert pairs(tmp_path, "*/*/img.nii.gz", "*/*/seg.nii.gz") == {
        "p1/v1/img.nii.gz": "p1/v1/seg.nii.gz",
        "p2/v1/img.nii.gz": "p2/v1/seg.nii.gz",
    }


def test_double_star_matches_folders_of_any_depth(tmp_path):
    touch(tmp_path, "i/x/y/a.png", "l/x/y/a.png", "i/b.png", "l/b.png")
    assert pairs(tmp_path, "i/**/*.png", "l/**/*.png") == {
        "i/x/y/a.png": "l/x/y/a.png",
        "i/b.png": "l/b.png",
    }


@pytest.mark.parametrize(
    "part", ["[!q]*", "[q^]*", r"[\q]*", "[9-1]*", "[[:p:]]*", "[]^]*", "p[1-2]*", "[1-2q]*", "[q*"]
)
def test_brackets_are_those_of_the_standard_library(tmp_path, part, recwarn):
    written = ["p1", "p2", "q3", "^x", "[^]y", "[q", "]z", ":]:"]
    touch(tmp_path, *(f"{folder}/{name}.png" for folder in "il" for name in written))
    taken = {path.stem for path in (tmp_path / "i").glob(f"{part}.png")}
    site = site_config(tmp_path, "image", images=f"i/{part}.png", labels=f"l/{part}.png")
    found = scan(site)
    assert {path.stem for path in found.taken} == taken
    assert {case.image.stem for case in found.cases} == taken
    assert not recwarn.list


@pytest.mark.parametrize(
    ("glob", "hint"),
    [
        ("i\\*.png", "separated by /"),
        ("i/*.{png,jpg}", "{a,b} is no wildcard"),
        ("i/**", "**/*"),
        ("“i/*.png”", "straight"),
    ],
)
def test_globs_of_other_programs_get_a_hint(tmp_path, glob, hint):
    touch(tmp_path, "i/x/a.png", "l/x/a.png")
    labels = glob.replace("i/", "l/").replace("i\\", "l\\")
    (problem,) = scan(site_config(tmp_path, "image", images=glob, labels=labels)).problems
    assert hint in problem.fix


def test_one_folder_for_images_and_labels(tmp_path):
    touch(tmp_path, "a.png", "a_seg.png", "b.png", "b_seg.png")
    assert pairs(tmp_path, "*.png", "*_seg.png") == {"a.png": "a_seg.png", "b.png": "b_seg.png"}


def test_question_marks_and_sets_are_wildcards_and_dots_are_dots(tmp_path):
    touch(tmp_path, "i/s1a.png", "i/s2b.png", "i/s1axpng", "l/s1a.png", "l/s2b.png")
    assert pairs(tmp_path, "i/s?[ab]*.png", "l/s?[ab]*.png") == {
        "i/s1a.png": "l/s1a.png",
        "i/s2b.png": "l/s2b.png",
    }


def test_the_path_before_data_root_does_not_matter(tmp_path):
    # FedFMS replaced "data" by "label" in the whole path, which broke any mount named /data
    root = tmp_path / "data" / "images" / "val_data" / "data"
    write_site(root)
    cases = find_cases(site_config(root))
    assert [c.image.relative_to(root).as_posix() for c in cases] == [
        f"images/c0{n}.nii.gz" for n in range(1, 6)
    ]
    assert [c.label.relative_to(root).as_posix() for c in cases] == [
        f"labels/c0{n}.nii.gz" for n in range(1, 6)
    ]


def test_folders_called_data_and_glob_characters_before_data_root_are_plain_names(tmp_path):
    root = tmp_path / "data[1]*" / "study?"
    touch(root, "data/a_data.png", "data/b_data.png", "label/a_data.png", "label/b_data.png")
    assert pairs(root, "data/*_data.png", "label/*_data.png") == {
        "data/a_data.png": "label/a_data.png",
        "data/b_data.png": "label/b_data.png",
    }


def test_hidden_files_and_folders_are_no_cases(tmp_path):
    touch(tmp_path, "i/a.png", "i/b.png", "i/._a.png", "l/a.png", "l/b.png", "l/.DS_Store.png")
    (tmp_path / "i" / "folder.png").mkdir()
    assert set(pairs(tmp_path, "i/*.png", "l/*.png")) == {"i/a.png", "i/b.png"}


def test_what_systems_leave_in_folders_is_no_case_and_no_unreadable_folder(tmp_path):
    touch(tmp_path, "i/1.png", "i/2.png", "i/Thumbs.db", "i/desktop.ini", "i/.DS_Store")
    touch(tmp_path, "l/1.png", "l/2.png", "l/Thumbs.db", "i/@eaDir/1.png/thumb.jpg", "l/@eaDir/x")
    assert pairs(tmp_path, "i/*", "l/*", format="image") == {
        "i/1.png": "l/1.png",
        "i/2.png": "l/2.png",
    }
    (tmp_path / "lost+found").mkdir(mode=0o000)
    assert len(pairs(tmp_path, "**/i/*.png", "**/l/*.png")) == 2


def test_a_link_to_a_folder_above_is_not_followed_in_circles(tmp_path):
    touch(tmp_path, "i/p1/a.png", "i/p2/b.png", "l/p1/a.png", "l/p2/b.png", "m/c.png", "n/c.png")
    (tmp_path / "i" / "p1" / "again").symlink_to(tmp_path / "i")
    (tmp_path / "i" / "p3").symlink_to(tmp_path / "m")
    (tmp_path / "l" / "p3").symlink_to(tmp_path / "n")
    assert pairs(tmp_path, "i/**/*.png", "l/**/*.png") == {
        "i/p1/a.png": "l/p1/a.png",
        "i/p2/b.png": "l/p2/b.png",
        "i/p3/c.png": "l/p3/c.png",
    }


# ---------------------------------------------------------------------------------------- endings


@pytest.mark.parametrize(
    ("format", "endings", "glob"),
    [
        ("nifti", (".nii.gz", ".nii"), "*.nii*"),
        ("nifti", (".nii.gz", ".NII.GZ", ".nii"), "*"),
        ("nifti", (".nii", ".Nii"), "*.*"),
        ("image", (".tif", ".tiff"), "*.tif*"),
        ("image", (".png", ".PNG"), "*.[pP][nN][gG]"),
        ("image", (".jpg", ".jpeg", ".JPG", ".tif", ".png"), "*"),
    ],
)
def test_an_ending_is_no_part_of_a_name_and_moves_nobody(tmp_path, format, endings, glob):
    names = [f"case.{n}" for n in range(12)]
    fixed = {".nii.gz": "*.nii.gz"}.get(endings[0], f"*{endings[0]}")
    touch(tmp_path, *[f"plain/{part}/{name}{endings[0]}" for part in "il" for name in names])
    plain = site_config(
        tmp_path / "plain",
        format,
        images=f"i/{fixed}",
        labels=f"l/{fixed}",
        validation_fraction=0.4,
    )
    expected = {case.key: (case.patient, case.split) for case in find_cases(plain)}
    assert set(expected) == set(names)
    for shift in range(len(endings)):  # image and label may end differently
        root = tmp_path / f"mixed{shift}"
        for n, name in enumerate(names):
            touch(root, f"i/{name}{endings[n % len(endings)]}")
            touch(root, f"l/{name}{endings[(n + shift) % len(endings)]}")
        site = site_config(
            root, format, images=f"i/{glob}", labels=f"l/{glob}", validation_fraction=0.4
        )
        assert {case.key: (case.patient, case.split) for case in find_cases(site)} == expected


@pytest.mark.parametrize(
    ("images", "labels"),
    [("i/*.nii", "l/*.nii.gz"), ("i/*.nii*", "l/*.nii.gz"), ("i/*.nii", "l/*"), ("i/*.*", "l/*")],
)
def test_the_two_globs_may_differ_in_their_endings(tmp_path, images, labels):
    touch(tmp_path, "i/a.nii", "i/b.nii", "l/a.nii.gz", "l/b.nii.gz")
    assert pairs(tmp_path, images, labels) == {"i/a.nii": "l/a.nii.gz", "i/b.nii": "l/b.nii.gz"}


def test_one_name_with_two_endings_is_an_error_that_names_both(tmp_path):
    touch(tmp_path, "i/a.nii", "i/a.nii.gz", "i/b.nii", "l/a.nii.gz", "l/b.nii.gz")
    error = problem(tmp_path, format="nifti", images="i/*.nii*", labels="l/*.nii*")
    assert error.code == "several-images"
    assert "i/a.nii, i/a.nii.gz" in error.problem


def test_one_name_in_two_spellings_of_an_accent_is_an_error(tmp_path):
    touch(tmp_path, "i/caf\u00e9.png", "i/cafe\u0301.png", "i/b.png", "l/b.png", "l/caf\u00e9.png")
    assert problem(tmp_path).code == "several-images"


def test_no_image_of_this_name_says_which_lie_there(tmp_path):
    touch(tmp_path, "i/a.PNG", "i/b.PNG", "l/a.png", "l/b.png")
    error = problem(tmp_path)
    assert error.code == "no-images"
    assert "a.PNG" in error.problem and "capitals" in error.fix


def test_an_empty_folder_is_called_empty(tmp_path):
    error = problem(tmp_path)
    assert "is empty" in error.problem and "mounted" in error.fix


# ------------------------------------------------------------------------- names of other kinds


def test_names_that_are_no_utf_8_work_and_are_dealt_by_their_bytes(tmp_path):
    names = [b"m\xfcller_%d.png" % n for n in range(6)]
    for name in names:
        for part in "il":
            touch(tmp_path, os.fsdecode(part.encode() + b"/" + name))
    site = site_config(
        tmp_path, "image", images="i/*.png", labels="l/*.png", validation_fraction=0.34
    )
    cases = find_cases(site)
    assert {os.fsencode(case.image.name) for case in cases} == set(names)
    digests = {
        name: hashlib.sha256(b"0:" + name.removesuffix(b".png")).hexdigest() for name in names
    }
    first = set(sorted(names, key=digests.get)[:2])
    assert {os.fsencode(c.image.name) for c in cases if c.split == "validation"} == first


# ------------------------------------------------------------------------------------ pair_by


def test_one_image_and_one_label_in_a_folder_are_a_pair(tmp_path):
    touch(tmp_path, "Pat 0001/T1w_2024-03-01.nii.gz", "Pat 0001/mask.nii.gz")
    touch(tmp_path, "Pat 0002/T1w_2023-12-24.nii.gz", "Pat 0002/mask.nii.gz")
    globs = {"images": "*/T1w_*.nii.gz", "labels": "*/mask.nii.gz"}
    site = site_config(tmp_path, **globs, pair_by="folder")
    assert [(case.key, case.patient) for case in find_cases(site)] == [
        *(("Pat 0001", "Pat 0001"), ("Pat 0002", "Pat 0002"))
    ]
    error = scan(site_config(tmp_path, **globs)).problems[0]
    assert error.code == "globs-differ" and "pair_by: folder" in error.fix


def test_folders_beside_each_other_pair_by_the_wildcards_above(tmp_path):
    touch(tmp_path, *[f"p{n}/anat/T1_{n * 7}.nii" for n in range(3)])
    touch(tmp_path, *[f"p{n}/drawn/{n * 5}.nii.gz" for n in range(3)])
    assert pairs(tmp_path, "*/anat/T1_*.nii", "*/drawn/*.nii.gz", pair_by="folder") == {
        f"p{n}/anat/T1_{n * 7}.nii": f"p{n}/drawn/{n * 5}.nii.gz" for n in range(3)
    }


@pytest.mark.parametrize(
    ("more", "globs", "code", "words"),
    [
        ("p1/T1_b.nii", {}, "several-images", "p1/T1_a.nii, p1/T1_b.nii"),
        ("p1/mask2.nii", {}, "several-labels", "p1/mask.nii, p1/mask2.nii"),
        ("p3/T1_a.nii", {}, "unpaired-files", "p3/T1_a.nii"),
        ("p3/mask.nii", {}, "unpaired-files", "p3/mask.nii"),
        ("T1_a.nii", {"images": "T1_*.nii"}, "globs-differ", "different wildcards"),
    ],
)
def test_a_folder_that_does_not_pair_says_why(tmp_path, more, globs, code, words):
    touch(tmp_path, more, *[f"p{n}/{name}.nii" for n in (1, 2) for name in ("T1_a", "mask")])
    given = {"images": "*/T1_*.nii", "labels": "*/mask*.nii", **globs}
    error = problem(tmp_path, **given, format="nifti", pair_by="folder")
    assert error.code == code and words in error.problem and error.fix


def test_images_and_labels_of_a_patient_are_a_pair(tmp_path):
    touch(tmp_path, *[f"scans/2024/P{n}-T1-{n * 3}.nii" for n in range(4)])
    touch(tmp_path, *[f"masks/final_P{n}_v2.nii.gz" for n in range(4)])
    given = {"images": "scans/*/*.nii", "labels": "masks/*.nii.gz", "patient": r"(P\d+)"}
    site = site_config(tmp_path, **given, pair_by="patient")
    assert [(c.key, c.patient, c.label.name) for c in find_cases(site)] == [
        (f"P{n}", f"P{n}", f"final_P{n}_v2.nii.gz") for n in range(4)
    ]
    touch(tmp_path, "masks/draft_P2.nii.gz")
    error = problem(tmp_path, **given, format="nifti", pair_by="patient")
    assert error.code == "several-labels" and "draft_P2.nii.gz" in error.problem


# ----------------------------------------------------------------------------- what no glob takes


def left(root: Path, format: str, images: str, labels: str) -> list[str]:
    site = site_config(root, format, images=images, labels=labels)
    return [path.relative_to(root).as_posix() for path in untaken(site, scan(site))]


def test_files_that_no_glob_takes_are_told_by_ending(tmp_path):
    touch(tmp_path, *[f"{part}/{name}" for part in "il" for name in ("1.png", "2.png", "3.PNG")])
    touch(tmp_path, "i/4.jpg", "i/notes.txt", "i/Thumbs.db", "i/.5.png", "elsewhere/6.png")
    assert left(tmp_path, "image", "i/*.png", "l/*.png") == ["i/3.PNG", "l/3.PNG", "i/4.jpg"]
    # where nothing is found the reason may be among them
    assert left(tmp_path, "image", "i/*.tif", "l/*.tif") == [
        *("i/3.PNG", "l/3.PNG", "i/4.jpg", "i/1.png", "i/2.png", "l/1.png", "l/2.png")
    ]


def test_files_of_a_series_are_taken_with_their_folder(tmp_path):
    touch(tmp_path, "p1/ct/1.dcm", "p1/ct/2.dcm", "p1/seg.dcm", "p1/other.dcm")
    touch(tmp_path, "p2/ct/1.dcm", "p2/SEG.DCM")
    found = left(tmp_path, "dicom", "*/ct", "*/seg.dcm")
    assert found == ["p2/SEG.DCM", "p1/other.dcm"]


# ----------------------------------------------------------------------- folders that are closed


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o311])
@pytest.mark.parametrize(
    ("closed", "images", "labels"),
    [
        ("p3", "*/i.png", "*/l.png"),
        ("p3", "**/i.png", "**/l.png"),
        ("p3/v2", "**/i.png", "**/l.png"),
        ("p3/v2", "*/*/i*.png", "*/*/l*.png"),
        (".", "*/i.png", "*/l.png"),
        (".", "**/i.png", "**/l.png"),
    ],
)
def test_a_folder_that_cannot_be_read_is_an_error_and_never_left_out(
    open_folder, mode, closed, images, labels
):
    root = open_folder / "data"
    touch(root, *[f"{p}{v}/{x}.png" for p in ("p1", "p2", "p3") for v in ("", "/v2") for x in "il"])
    (root / closed).chmod(mode)
    site = site_config(root, "image", images=images, labels=labels)
    with a_plain_user():
        is_needed = mode != 0o311 or "**" in images or "*." in images or closed == "."
        found = scan(site)
        if not is_needed:  # p3 can be entered, and the names in it are known
            assert [case.key for case in found.cases] == ["p1", "p2", "p3"]
            return
        (error,) = [one for one in found.problems if one.code == "unreadable-folder"]
        who = f"{os.geteuid()}:{os.getegid()}"
    assert f"the folder {root / closed} cannot be read by user {who}" in error.problem
    assert "SITE_DATA_GID" in error.fix and "FEDFMS_UID" in error.fix
    assert [one.code for one in found.problems] == ["unreadable-folder"]


@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_no_other_command_leaves_a_closed_folder_out(open_folder, mode):
    for number in range(3):
        write_site(open_folder / f"site-{number}")
    (open_folder / "lost+found").mkdir(mode=0o000)
    closed = open_folder / "site-1"
    closed.chmod(mode)
    calls = (
        lambda: find_sites(open_folder, None),
        lambda: Source(open_folder),
    )
    for call in calls:
        with a_plain_user(), pytest.raises(SiteDataError) as caught:
            call()
        assert caught.value.code == "unreadable-folder"
        assert f"the folder {closed} cannot be read by user" in caught.value.problem


def test_a_data_root_behind_a_closed_folder_says_which(open_folder):
    write_site(open_folder / "closed" / "data")
    (open_folder / "closed").chmod(0o000)
    with a_plain_user():
        found = scan(site_config(open_folder / "closed" / "data"))
    (error,) = found.problems
    assert error.code == "unreadable-folder" and str(open_folder / "closed") in error.problem


def test_a_folder_on_a_drive_that_is_not_mounted_is_an_error(tmp_path):
    touch(tmp_path, *[f"p{p}/{x}.png" for p in range(3) for x in "il"])
    (tmp_path / "p9").symlink_to(tmp_path / "drive" / "p9")
    (error,) = scan(site_config(tmp_path, "image", images="*/i.png", labels="*/l.png")).problems
    assert error.code == "unreadable-folder"
    assert str(tmp_path / "p9") in error.problem


# ------------------------------------------------------------------------------------------- split


def test_the_split_is_the_same_on_every_machine():
    # from: printf 0:p03 | sha256sum, and so on; a change here changes every site's validation cases
    patients = [f"p{n:02d}" for n in range(10)]
    assert validation_patients(patients, 0.2, seed=0) == {"p03", "p02"}
    assert validation_patients(patients, 0.2, seed=1) == {"p04", "p03"}
    assert validation_patients(reversed(patients), 0.5, 0) == {"p03", "p02", "p00", "p08", "p01"}


@pytest.mark.parametrize(
    ("patients", "fraction", "expected"),
    [(10, 0.2, 2), (10, 0.25, 3), (7, 0.2, 1), (2, 0.01, 1), (2, 0.99, 1), (72, 0.2, 14)],
)
def test_the_share_is_exact_with_one_patient_on_each_side_at_least(patients, fraction, expected):
    names = [f"x{n}" for n in range(patients)]
    assert len(validation_patients(names, fraction, 0)) == expected


def test_no_patient_is_on_both_sides(tmp_path):
    touch(tmp_path, *[f"{part}/p{p}_{s}.png" for part in "il" for p in range(9) for s in range(4)])
    for seed in range(5):
        site = site_config(
            tmp_path,
            "image",
            images="i/*.png",
            labels="l/*.png",
            patient=r"^(p\d+)_",
            validation_seed=seed,
            validation_fraction=0.3,
        )
        sides = {}
        for case in find_cases(site):
            sides.setdefault(case.patient, set()).add(case.split)
        assert len(sides) == 9
        assert all(len(splits) == 1 for splits in sides.values())
        assert sum(splits == {"validation"} for splits in sides.values()) == 3


def test_a_folder_can_name_the_patient(tmp_path):
    touch(tmp_path, *[f"{part}/p{p}/s{s}.png" for part in "il" for p in range(4) for s in range(3)])
    site = site_config(
        tmp_path, "image", images="i/*/*.png", labels="l/*/*.png", patient=r"/(p\d+)/"
    )
    assert {case.patient for case in find_cases(site)} == {"p0", "p1", "p2", "p3"}


# ---------------------------------------------------------------------------------------- problems


def problem(tmp_path: Path, **changes: object) -> SiteDataError:
    values = {"images": "i/*.png", "labels": "l/*.png", **changes}
    with pytest.raises(SiteDataError) as caught:
        find_cases(site_config(tmp_path, **{"format": "image", **values}))
    return caught.value


def test_files_without_partner_are_named_on_both_sides(tmp_path):
    touch(tmp_path, "i/a.png", "i/b.png", "i/c.png", "l/a.png", "l/c.png", "l/d.png")
    error = problem(tmp_path)
    assert error.code == "unpaired-files"
    assert "1 of 3 images have no label: b.png" in error.problem
    assert "1 of 3 labels have no image: d.png" in error.problem
    assert "png" not in error.public


def test_pictures_are_no_dicom_whatever_the_site_says(tmp_path):
    """A glob may match DICOM files, so that only reading tells."""
    for name in ("i/a.png", "i/b.png", "l/a.png", "l/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\x89PNG" + bytes(200))
    site = site_config(tmp_path, format="dicom", images="i/*.png", labels="l/*.png")
    with pytest.raises(SiteDataError, match="no DICOM file") as caught:
        prepare_cases(find_cases(site), site)
    assert caught.value.code == "not-dicom"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"images": "j/*.png"}, "no-images"),
        ({"labels": "j/*.png"}, "no-labels"),
        ({"images": "*/*.png"}, "globs-differ"),
        ({"data_root": Path("/nowhere/at/all")}, "no-data-root"),
        ({"patient": r"^(q\d+)"}, "patient-not-found"),
    ],
)
def test_a_site_that_cannot_be_read_says_why(tmp_path, changes, code):
    touch(tmp_path, "i/a.png", "i/b.png", "l/a.png", "l/b.png")
    error = problem(tmp_path, **changes)
    assert error.code == code
    assert error.fix


def test_one_patient_cannot_be_split(tmp_path):
    touch(tmp_path, "i/p1_a.png", "i/p1_b.png", "l/p1_a.png", "l/p1_b.png")
    assert problem(tmp_path, patient=r"^(p\d+)_").code == "too-few-patients"


def test_one_patient_in_two_spellings_across_the_split_is_refused(tmp_path):
    names = [f"{p}_{s}" for p in ("P01", "p1", "p02", "p03") for s in range(2)]
    touch(tmp_path, *[f"{part}/{name}.png" for part in "il" for name in names])
    codes = set()
    for seed in range(8):
        site = site_config(
            tmp_path,
            "image",
            images="i/*.png",
            labels="l/*.png",
            patient=r"^([Pp]\d+)_",
            validation_fraction=0.5,
            validation_seed=seed,
        )
        found = scan(site)
        split = {case.patient: case.split for case in found.cases}
        separated = split["P01"] != split["p1"]
        assert [p.code for p in found.problems] == ["patient-on-both-sides"] * separated
        codes.add(separated)
    assert codes == {True, False}


@pytest.mark.parametrize(
    ("keys", "several"),
    [
        (["p1_01", "p1_02", "p2_01", "p2_02"], True),
        (["sub-01_ses-1", "sub-01_ses-2", "sub-02_ses-1", "sub-02_ses-2"], True),
        (["hippocampus_001", "hippocampus_002", "hippocampus_003"], False),
        (["00ae65c1c663", "01d44a26f6680", "0280fa8f60f6"], False),
        (["case1", "case2", "case3"], False),
    ],
)
def test_names_that_look_like_slices_of_one_patient(keys, several):
    assert (several_files_a_patient(keys) is not None) == several
