"""Cases that cannot be used: left out up to the site's limit, with a table; beyond it, the end."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from site_files import picture, site_config, write_case, write_site, write_volume

from fedfms.data.check import check_data
from fedfms.data.left_out import LeftOut
from fedfms.data.manifest import find_cases, find_whole_cases
from fedfms.data.prepare import prepare_cases
from fedfms.errors import SiteDataError

WAYS = {
    "cut off": ("unreadable", "damaged-file"),
    "nothing in it": ("empty", "empty-file"),
    "no label": ("unlabelled", "unpaired-files"),
    "empty label": ("empty", "empty-label"),
    "another shape": ("unfit", "shapes-differ"),
}


def damage(root: Path, name: str, way: str) -> None:
    image, label = (root / part / f"{name}.nii.gz" for part in ("images", "labels"))
    if way == "cut off":
        image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    elif way == "nothing in it":
        image.write_bytes(b"")
    elif way == "no label":
        label.unlink()
    elif way == "empty label":
        write_volume(label, np.zeros((6, 8, 3), np.uint8))
    else:
        write_volume(label, np.ones((6, 8, 4), np.uint8))


def damaged(root: Path, cases: int, bad: int) -> dict[str, str]:
    """A site of so many cases; of the damaged ones the way, in turn."""
    write_site(root, cases=cases)
    ways = {f"c{1 + 3 * number:02d}": [*WAYS][number % 5] for number in range(bad)}
    for name, way in ways.items():
        damage(root, name, way)
    return ways


def prepared(root: Path, **settings: object) -> tuple[list[str], LeftOut]:
    site = site_config(root, may_be_empty=False, **settings)
    cases, left_out = find_whole_cases(site)
    return [one.case.key for one in prepare_cases(cases, site, left_out=left_out)], left_out


def test_each_way_has_its_reason_and_the_others_go_on(tmp_path: Path) -> None:
    ways = damaged(tmp_path, 40, 5)
    there, left_out = prepared(tmp_path, leave_out=0.125)
    assert there == sorted({f"c{n:02d}" for n in range(1, 41)} - {*ways})
    found = {
        Path(one.name).name.split(".")[0]: (one.reason, one.error.code) for one in left_out.found
    }
    assert found == {name: WAYS[way] for name, way in ways.items()}
    assert left_out.by_reason() == {"empty": 2, "unfit": 1, "unlabelled": 1, "unreadable": 1}
    assert "c01" not in str(left_out) and "5 of 40 cases are left out" in str(left_out)
    left_out.write(tmp_path)
    rows = list(csv.DictReader((tmp_path / "left-out.csv").open()))
    assert {row["case"]: row["reason"] for row in rows} == {
        one.name: one.reason for one in left_out.found
    }
    assert all(row["problem"] and row["fix"] for row in rows)


def test_beyond_the_limit_nothing_is_prepared_and_the_table_says_all(tmp_path: Path) -> None:
    ways = damaged(tmp_path, 40, 5)
    with pytest.raises(SiteDataError) as caught:
        prepared(tmp_path, leave_out=0.1)
    assert caught.value.code == "too-many-left-out"
    assert "5 of 40 cases cannot be used" in caught.value.problem
    assert "leave_out allows 4" in caught.value.problem
    assert all(f"{name}.nii.gz: " in caught.value.problem for name in ways)
    assert "c01" not in caught.value.public


def test_a_job_goes_on_without_a_twentieth_where_the_site_says_nothing(tmp_path: Path) -> None:
    write_site(tmp_path, cases=40)
    for name in ("c01", "c02"):
        damage(tmp_path, name, "cut off")
    assert len(prepared(tmp_path)[0]) == 38
    damage(tmp_path, "c03", "no label")
    with pytest.raises(SiteDataError, match="3 of 40 cases"):
        prepared(tmp_path)


def test_a_site_that_leaves_nothing_out_is_told_its_first_problem(tmp_path: Path) -> None:
    damaged(tmp_path, 12, 1)
    with pytest.raises(SiteDataError, match="c01") as caught:
        prepared(tmp_path, leave_out=0.0)
    assert caught.value.code == "damaged-file"
    with pytest.raises(SiteDataError):  # and a small site by default
        prepared(tmp_path)
    with pytest.raises(SiteDataError):
        prepare_cases(find_cases(site_config(tmp_path)), site_config(tmp_path))


def test_where_all_is_wrong_the_site_stops_before_all_is_read(tmp_path: Path) -> None:
    write_site(tmp_path, cases=60)
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(SiteDataError, match="41 of 60 cases cannot be used"):
        prepared(tmp_path)


def test_check_data_counts_each_unless_the_site_has_a_limit(tmp_path: Path) -> None:
    damaged(tmp_path, 40, 5)
    plain = check_data(site_config(tmp_path, may_be_empty=False))
    codes = {"damaged-file", "empty-file", "unpaired-files", "empty-label", "shapes-differ"}
    assert {one.code for one in plain if one.severity == "error"} == codes
    allowed = check_data(site_config(tmp_path, may_be_empty=False, leave_out=0.125))
    assert not [one for one in allowed if one.severity == "error"]
    (told,) = [one for one in allowed if one.code == "left-out"]
    assert (
        "5 of 40 cases are left out: 1 unreadable, 1 unlabelled, 2 empty, 1 unfit" in told.problem
    )
    beyond = check_data(site_config(tmp_path, may_be_empty=False, leave_out=0.1))
    assert {one.code for one in beyond if one.severity == "error"} == codes | {"too-many-left-out"}


def test_a_case_without_a_finding_is_a_case_unless_the_site_says_otherwise(tmp_path: Path) -> None:
    write_site(tmp_path, cases=4)
    write_case(tmp_path, "nifti", "c05", 5, label_value=0)
    assert not [one for one in check_data(site_config(tmp_path)) if one.severity == "error"]
    (found,) = check_data(site_config(tmp_path, may_be_empty=False))
    assert found.code == "empty-label" and "c05" in found.problem
    assert picture(1).any()
