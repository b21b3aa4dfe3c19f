import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from site_files import site_config, write_site

from fedfms.data.manifest import (
    find_cases,
    scan,
    several_files_a_patient,
    untaken,
    validation_patients,
)
from fedfms.errors import SiteDataError


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


@contextlib.contextmanager
def a_plain_user() -> Iterator[None]:
    """No file's mode stops root; in here it stops this process too."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """As tmp_path, but any user can come to it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        folder.chmod(0o755)
        with a_plain_user():
            try:
                list(folder.iterdir())
            except OSError:
                pytest.skip("the folder for temporary files is not open to other users")
        yield folder
        for place, folders, _ in os.walk(folder):
            for one in folders:
                (Path(place) / one).chmod(0o755)


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


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"images": "j/*.png"}, "no-images"),
        ({"labels": "j/*.png"}, "no-labels"),
        ({"images": "*/*.png"}, "globs-differ"),
        ({"data_root": Path("/nowhere/at/all")}, "no-data-root"),
        ({"format": "dicom"}, "no-images"),  # a glob of files, and DICOM has folders
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
