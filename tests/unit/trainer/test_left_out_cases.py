"""A site of 200 cases, some of them damaged: the run goes on, or stops before it trains."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from trainer_process import SITE, Place, task_runner

from fedfms.contracts.messages import Task
from fedfms.contracts.recipe import Recipe
from fedfms.control import Control
from fedfms.data.left_out import TABLE
from fedfms.errors import SiteDataError
from fedfms.report.render import _left_out
from fedfms.trainer.kept import Outcome

CASES = 200
WAYS = ("unreadable", "empty", "unlabelled", "empty", "unfit")


def volume(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)


def damage(root: Path, number: int, way: int) -> str:
    name = f"mueller-{number:03d}.nii"
    image, label = root / "images" / name, root / "labels" / name
    if way == 0:
        image.write_bytes(image.read_bytes()[:400])
    elif way == 1:
        label.write_bytes(b"")
    elif way == 2:
        label.unlink()
    elif way == 3:
        volume(label, np.zeros((8, 8, 1), np.uint8))
    else:
        volume(label, np.ones((9, 8, 1), np.uint8))
    return name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    random = np.random.default_rng(1)
    label = np.zeros((8, 8, 1), np.uint8)
    label[2:6, 2:5] = 1
    for number in range(CASES):
        name = f"mueller-{number:03d}.nii"
        volume(root / "images" / name, random.integers(0, 200, (8, 8, 1)).astype(np.int16))
        volume(root / "labels" / name, label)
    return root


@pytest.fixture
def site(place: Place, whole: Path) -> Place:
    for name in ("images", "labels"):
        (place.data / name).unlink()
        shutil.copytree(whole / name, place.data / name)
    settings = {"classes": {"blob": [1]}, "images": "images/*.nii", "labels": "labels/*.nii"}
    settings["patient"] = r"(mueller-\d+)"
    place.set_site(**settings, min_cases=3, may_be_empty=False, leave_out="5 %")
    place.set_policy(min_cases=3)
    return place


def trained(place: Place, recipe: Recipe) -> Outcome:
    recipe = dataclasses.replace(recipe, classes=("blob",), batch_size=64, rounds=1)
    model = {}
    runner = task_runner(place)
    from fedfms.models.build import build_model
    from fedfms.models.sam import find_checkpoint
    from fedfms.models.travelling import read_travelling

    model = read_travelling(build_model(recipe, find_checkpoint(recipe, place.checkpoints)))
    task = Task(kind="train", site=SITE, job="job-1", round=0, model="round", recipe=recipe)
    return runner.run(task, lambda: model, Control())


def test_with_five_damaged_in_five_ways_the_run_goes_on_and_the_table_says_which(
    site: Place, recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    names = {damage(site.data, 7 * way, way): reason for way, reason in enumerate(WAYS)}
    outcome = trained(site, recipe)
    assert outcome.tensors
    said = outcome.contribution
    assert said.left_out == 5
    # each reason is of fewer cases than the site lets out
    assert said.left_out_by_reason == {}
    assert said.training_cases + said.evaluated_cases == CASES - 5
    rows = list(csv.DictReader((site.work / TABLE).open()))
    assert {Path(row["case"]).name: row["reason"] for row in rows} == names
    leaves = json.dumps(said.to_dict()) + caplog.text
    assert "mueller" not in leaves and "5 of 200 cases are left out" in caplog.text


def test_reasons_of_enough_cases_are_told_and_none_from_which_one_of_few_follows(
    site: Place, recipe: Recipe
) -> None:
    for number in range(4):
        damage(site.data, number, 0)
    for number in range(4, 8):
        damage(site.data, number, 2)
    damage(site.data, 8, 4)
    said = trained(site, recipe).contribution
    # of nine, four and four would leave one: with four alone, five are of any kind
    assert (said.left_out, said.left_out_by_reason) == (9, {"unreadable": 4})


def test_with_twenty_damaged_it_stops_before_training_with_the_table(
    site: Place, recipe: Recipe
) -> None:
    names = [damage(site.data, 9 * number, number % 5) for number in range(20)]
    with pytest.raises(SiteDataError) as caught:
        trained(site, recipe)
    assert caught.value.code == "too-many-left-out"
    assert "20 of 200 cases cannot be used" in caught.value.problem
    assert all(name in caught.value.problem for name in names)
    assert "mueller" not in caught.value.public
    assert not list(site.work.glob("runs/*/answer-*"))


def test_the_report_says_how_many_and_no_more_than_was_told() -> None:
    from types import SimpleNamespace as Of

    sites = {
        "site-1": Of(left_out=5, left_out_by_reason={"unreadable": 5}),
        "site-2": Of(left_out=0, left_out_by_reason={}),
        "site-3": Of(left_out=4, left_out_by_reason={}),
    }
    (text,) = _left_out(Of(sites=sites))
    assert "site-1 left out 5 cases (5 unreadable) and site-3 left out 4 cases" in text
    assert "site-2" not in text
