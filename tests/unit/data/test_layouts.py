"""`fedfms adopt` on folders as public specifications describe them: right without an edit.

public_layouts.py builds them. What is written is read by the product's own reader, and each pair,
class, contrast and patient is compared by what the images themselves say.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import public_layouts as layouts
import pytest
from plain_user import a_plain_user
from public_layouts import Truth

from fedfms.contracts.site import SiteConfig
from fedfms.data.manifest import find_cases, scan
from fedfms.data.several import read_case_image, read_case_label, read_contents

Run = Callable[..., tuple[int, str, str]]
Build = Callable[[Path], Truth]


def state(folder: Path) -> dict[str, tuple[str, int]]:
    """All files below a folder: content and time of change."""
    found = {}
    for place, _, files in os.walk(folder):
        for name in files:
            path = Path(place) / name
            if path.is_symlink():
                found[str(path)] = (str(path.readlink()), 0)
            elif os.access(path, os.R_OK):
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                found[str(path)] = (digest, path.stat().st_mtime_ns)
    return found


def numbers_in(values: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Where which class lies by an image's own values, its number, and its kind."""
    values = np.rint(values).astype(int)
    if values.max() > 255:  # of a volume
        values //= 8
    drawn = values >= 50
    k = np.where(drawn, values // 50, 0)
    numbers = set(np.unique(values[drawn] % 50 // 3).tolist())
    assert len(numbers) <= 1, f"an image of several numbers: {numbers}"
    return k, numbers.pop() if numbers else 0, int(values[~drawn].min() // 10)


def adopt(run: Run, folder: Path, output: Path, *options: str) -> tuple[int, str]:
    """Exit code and what is printed; no file below the folder may change."""
    before = state(folder)
    code, out, err = run("adopt", folder, "--output", output, *options)
    assert state(folder) == before
    assert "Traceback" not in out + err
    return code, out + err


def assert_right(run: Run, site_file: Path, truth: Truth) -> None:
    """check-data passes, and cases, pairs, classes, contrasts and patients are the truth's."""
    code, out, err = run("check-data", site_file, "--json")
    assert code == 0, out + err
    codes = {finding["code"] for finding in json.loads(out)["findings"]}
    # with a handful of cases; all others say that site.yml or the files want an edit
    assert codes <= {"few-validation-cases"}, out
    site = SiteConfig.from_yaml(site_file)
    patients: dict[int, str] = {}
    sides: dict[str, set[str]] = {}
    regions = [frozenset([k]) for k in range(1, truth.count + 1)]
    regions += [*(truth.classes or {}).values(), *truth.also.values()]
    meant = {name: set(regions) for name in site.classes}  # what each class can be, in all cases
    for case in find_cases(site):
        contents = read_contents(case, site)
        image = read_case_image(case, contents[0], site)
        label = read_case_label(case, contents[1], site, image)
        where, number = what_is_seen(site, image.values, truth)
        for name, values in site.classes.items():
            mask = np.isin(label.values, values)
            meant[name] = {ks for ks in meant[name] if np.array_equal(mask, region(where, ks))}
        assert number not in patients, f"case {number} twice"
        patients[number] = case.patient
        sides.setdefault(case.patient, set()).add(case.split)
    assert set(patients) == set(truth.cases), "the cases are not those of the folder"
    assert scan(site).left_for_test == len(truth.test)
    assert site.void == truth.void
    if truth.validation:
        assert {n for n in patients if "validation" in sides[patients[n]]} == truth.validation
    assert_classes(meant, truth)
    groups = {frozenset(n for n in patients if truth.cases[n] == p) for p in truth.cases.values()}
    assert groups == {frozenset(n for n in patients if patients[n] == p) for p in patients.values()}
    assert all(len(split) == 1 for split in sides.values())


def region(where: np.ndarray, ks: frozenset[int]) -> np.ndarray:
    """Where a class lies that is these k; -1 is all of the image."""
    return np.isin(where, list(ks)) if -1 not in ks else np.ones(where.shape, bool)


def what_is_seen(site: SiteConfig, values: np.ndarray, truth: Truth) -> tuple[np.ndarray, int]:
    """Which k lies where, and the image's number; contrasts have to be those of their names."""
    kinds = {name.casefold(): kind for name, kind in truth.kinds.items()}
    channels = {"": values[..., 0] if values.ndim == 4 else values}
    if site.contrasts:
        channels = {name: values[..., place] for place, name in enumerate(site.contrasts)}
    assert {name.casefold() for name in channels} == set(kinds)
    seen = {}
    for name, one in channels.items():
        where, number, kind = numbers_in(one)
        assert kind == kinds[name.casefold()], f"{name} is another image"
        seen[number] = where
    assert len(seen) == 1, "images of several cases"
    number, where = seen.popitem()
    return where, number


def assert_classes(meant: dict[str, set[frozenset[int]]], truth: Truth) -> None:
    """Each class of site.yml is a drawn one, in all cases the same, and none is missing.

    Args:
        meant: of each class in site.yml what it can be by all labels and images.
    """
    if truth.classes is None:
        allowed = {frozenset([k]) for k in range(1, truth.count + 1)} | set(truth.also.values())
        for name, ks in meant.items():
            assert ks & allowed, f"the class {name} is none of the drawn ones"
        found = {k for ks in meant.values() for one in ks for k in one}
        assert found == set(range(1, truth.count + 1)), "a class is missing"
        return
    wanted = {plain(name): ks for name, ks in truth.classes.items()}
    also = {plain(name): ks for name, ks in truth.also.items()}
    assert set(wanted) <= {plain(name) for name in meant}, f"a class is missing in {list(meant)}"
    for name, ks in meant.items():
        known = {**also, **wanted}.get(plain(name))
        assert known is not None, f"a class that is not there: {name}"
        assert known in ks, f"{name} lies elsewhere"


def plain(name: str) -> str:
    """A class's name; capitals, blanks and underscores make no other."""
    return name.casefold().replace("_", " ").replace("-", " ")


@pytest.mark.parametrize(
    "build",
    [*layouts.LISTED, *layouts.UNLISTED, *layouts.MORE],
    ids=lambda build: build.__name__,
)
def test_a_layout_is_read_right_or_says_what_it_needs(
    build: Build, run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "Daten der Klinik"
    folder.mkdir()
    truth = build(folder)
    site_file = tmp_path / "site.yml"
    code, printed = adopt(run, folder, site_file)
    if truth.words:
        for word in truth.words:
            assert word in printed.replace("\n", ""), printed
        return
    assert code == 0, printed
    assert_right(run, site_file, truth)


# ------------------------------------------------------------------------------- odd folders


def nothing(folder: Path) -> None:
    """An empty folder."""


def only_volumes(folder: Path) -> None:
    for number in range(4):
        layouts.write_nifti(folder / f"anna {number}.nii.gz", layouts.noise(seed=number))


def only_pictures(folder: Path) -> None:
    for number in range(4):
        picture = np.random.default_rng(number).integers(0, 255, (20, 24))
        layouts.write_picture(folder / f"anna {number}.png", picture)


def two_data_sets(folder: Path) -> None:
    layouts.decathlon(folder)
    layouts.nnunet(folder)


ODD = {
    nothing: ("holds no file", "see that it is mounted"),
    only_volumes: ("holds images and no labels: 4 NIfTI", "whose labels somebody drew"),
    only_pictures: ("holds images and no labels: 4 pictures", "whose labels somebody drew"),
    two_data_sets: ("holds 2 data sets", "adopt one of these folders"),
}


@pytest.mark.parametrize("build", ODD, ids=lambda build: build.__name__)
def test_an_odd_folder_is_told_in_one_sentence(
    build: Callable[[Path], None], run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    build(folder)
    code, printed = adopt(run, folder, tmp_path / "site.yml")
    assert code == 1
    assert not (tmp_path / "site.yml").exists()
    error, fix = (" ".join(part.split()) for part in printed.split("\n  fix: "))
    says, to_do = ODD[build]
    assert says in error, printed
    assert to_do in fix, printed


NAMES = {b"new\nline": "has a line break", b"kits\xff23": "bytes that are no UTF-8"}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_no_site_yml_can_hold(name: bytes, run: Run, tmp_path: Path) -> None:
    """Of the folder itself: one sentence. Below it: right."""
    folder = tmp_path / os.fsdecode(name)
    truth = layouts.kits(folder)
    code, printed = adopt(run, folder, tmp_path / "site.yml")
    assert code == 1
    assert NAMES[name] in printed
    assert "rename that folder" in printed
    assert not (tmp_path / "site.yml").exists()
    above = tmp_path / "folder"
    above.mkdir()
    folder.rename(above / folder.name)
    code, printed = adopt(run, above, tmp_path / "site.yml")
    assert code == 0, printed
    assert_right(run, tmp_path / "site.yml", truth)


def test_a_folder_that_may_not_be_read_is_named(run: Run, open_folder: Path) -> None:
    layouts.kits(open_folder)
    closed = open_folder / "kits23" / "dataset" / "case_00003"
    closed.chmod(0)
    with a_plain_user():
        code, _, err = run("adopt", open_folder, "--output", open_folder / "site.yml")
    assert code == 1
    assert f"the folder {closed} cannot be read by user" in " ".join(err.split())
    assert "let this user or group read and enter it" in err
    closed.chmod(0o755)


def test_links_are_followed_and_loops_are_not(run: Run, tmp_path: Path) -> None:
    real, folder = tmp_path / "real", tmp_path / "folder"
    truth = layouts.kits(real)
    folder.mkdir()
    for case in (real / "kits23" / "dataset").glob("case_*"):
        (folder / case.name).symlink_to(case)
    (folder / "again").symlink_to(folder)
    (real / "kits23" / "dataset" / "case_00001" / "up").symlink_to(folder)
    code, printed = adopt(run, folder, tmp_path / "site.yml")
    assert code == 0, printed
    assert_right(run, tmp_path / "site.yml", truth)


def test_another_task_in_the_folder_is_said(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    truth = layouts.kits(folder / "CT")
    layouts.pictures_apart(folder / "skin")
    code, printed = adopt(run, folder, tmp_path / "site.yml")
    assert code == 0
    assert "8 pictures with labels, too, which are not taken" in printed
    assert_right(run, tmp_path / "site.yml", truth)


def test_a_second_mask_of_an_image_is_never_lost_in_silence(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    truth = layouts.busi(folder)
    code, printed = adopt(run, folder, tmp_path / "site.yml")
    assert code == 1
    assert "would be lost" in printed
    assert "draw all labels of an image into one file" in printed
    for name in ("benign (2).png", "benign (2)_mask.png", "benign (2)_mask_1.png"):
        (folder / "Dataset_BUSI_with_GT" / "benign" / name).unlink()
    (tmp_path / "site.yml").unlink()
    code, printed = adopt(run, folder, tmp_path / "site.yml")
    assert code == 0, printed
    cases = find_cases(SiteConfig.from_yaml(tmp_path / "site.yml"))
    assert len({case.patient for case in cases}) == len(cases) == len(truth.cases) - 1


def test_five_thousand_files_take_seconds(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    label = np.zeros((16, 16))
    label[2:9, 2:9] = 255
    layouts.write_picture(folder / "masks" / "IMG 00000_mask.png", label)
    layouts.write_picture(folder / "images" / "IMG 00000.png", layouts.noise((16, 16)) + label / 2)
    for number in range(1, 2500):
        os.link(folder / "images/IMG 00000.png", folder / f"images/IMG {number:05d}.png")
        os.link(folder / "masks/IMG 00000_mask.png", folder / f"masks/IMG {number:05d}_mask.png")
    start = time.process_time()
    code, out, err = run("adopt", folder, "--output", tmp_path / "site.yml")
    assert code == 0, out + err
    assert time.process_time() - start < 20
    assert len(find_cases(SiteConfig.from_yaml(tmp_path / "site.yml"))) == 2500
