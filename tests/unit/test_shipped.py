"""A job or a recipe by name: a path goes before what the package ships."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedfms.contracts.recipe import read_job_recipe
from fedfms.shipped import JOBS, find_shipped


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("text", ["fedmsa", "jobs/fedmsa", "jobs/fedmsa/"])
def test_a_job_is_found_by_its_name_alone_or_as_in_the_repository(text: str) -> None:
    found = find_shipped(text)
    assert found == JOBS / "fedmsa"
    assert read_job_recipe(found).method == "fedmsa"


@pytest.mark.parametrize("text", ["recipes/fedsam-paper.json", "jobs/recipes/fedsam-paper.json"])
def test_so_is_a_recipe(text: str) -> None:
    assert find_shipped(text) == JOBS / "recipes/fedsam-paper.json"


@pytest.mark.parametrize("text", ["fedmsa", "jobs/fedmsa"])
def test_a_path_that_is_there_wins(text: str, tmp_path: Path) -> None:
    (tmp_path / text).mkdir(parents=True)
    assert find_shipped(text) == Path(text)


@pytest.mark.parametrize(
    "text",
    ["..", "../jobs/fedmsa", "jobs/../fedmsa", "fedmsa/../../cli", "jobs/..", "jobs", "", "."],
)
def test_what_leads_out_of_the_jobs_or_names_all_of_them_stays_what_was_typed(text: str) -> None:
    assert find_shipped(text) == Path(text)


def test_what_nobody_ships_stays_a_path_for_the_error_that_names_it() -> None:
    assert find_shipped("jobs/fedprox") == Path("jobs/fedprox")


def test_an_absolute_path_is_never_looked_for_elsewhere(tmp_path: Path) -> None:
    assert find_shipped(str(tmp_path / "fedmsa")) == tmp_path / "fedmsa"
