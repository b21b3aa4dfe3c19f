"""A path that a person types starts where they stand; one that stands in a file, at the file."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fedfms.contracts.recipe import JOB_RECIPE, Recipe
from fedfms.local.synthetic import write_phantom_site
from fedfms.preflight.site import TrainerPlaces, check_trainer_side

JOBS = Path(__file__).resolve().parents[2] / "jobs"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The person stands here: images in scans/, site.yml in conf/, where other images lie too."""
    write_phantom_site(tmp_path / "made", "bright", cases=10, slices=1, seed=3)
    (tmp_path / "conf/scans/images").mkdir(parents=True)
    (tmp_path / "conf/scans/labels").mkdir()
    shutil.copytree(tmp_path / "made/policy", tmp_path / "conf/policy")
    values = yaml.safe_load((tmp_path / "made/site.yml").read_text())
    values["data_root"] = "nowhere"
    (tmp_path / "conf/site.yml").write_text(yaml.safe_dump(values))
    (tmp_path / "made").rename(tmp_path / "scans")
    shutil.copytree(JOBS / "fedmsa", tmp_path / "job")
    for name in ("SITE_DATA", "FEDFMS_CHECKPOINTS", "FEDFMS_EXCHANGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("said", ["scans", "./scans", "../{}/scans"])
@pytest.mark.parametrize("by", ["--data", "SITE_DATA"])
def test_check_data(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch, said: str, by: str):
    said = said.format(home.name)
    if by == "SITE_DATA":
        monkeypatch.setenv(by, said)
    code, out, err = run("check-data", "conf/site.yml", *(["--data", said] * (by == "--data")))
    assert code == 0, (out, err)


def test_the_option_goes_before_the_environment_and_that_before_the_file(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run("check-data", "conf/site.yml")
    assert code == 1
    assert f"there is no folder {home}/conf/nowhere (data_root in site.yml)" in out
    monkeypatch.setenv("SITE_DATA", "elsewhere")
    assert (
        f"there is no folder {home}/elsewhere (SITE_DATA)" in run("check-data", "conf/site.yml")[1]
    )
    out = run("check-data", "conf/site.yml", "--data", "empty")[1]
    assert f"there is no folder {home}/empty (--data)" in out
    assert run("check-data", "conf/site.yml", "--data", "scans")[0] == 0


def test_training_then_prediction_and_export(run: Run, home: Path) -> None:
    code, out, err = run(
        *("train-local", "job", "--site", "conf/site.yml", "--data", "scans"),
        *("--set", "rounds=1", "--output", "model.safetensors"),
    )
    assert code == 0, (out, err)
    values = Recipe.from_json(home / "job" / JOB_RECIPE).to_dict()
    (home / "recipe.json").write_text(json.dumps(values))
    assert (home / "model.safetensors").is_file()
    source = next((home / "scans/images").iterdir()).relative_to(home)
    arguments = ("predict", "model.safetensors", source, "masks/new.nii.gz")
    code, out, err = run(*arguments, "--site", "conf/site.yml")
    assert code == 0, (out, err)
    assert (home / "masks/new.nii.gz").is_file()
    code, out, err = run("export", "model.safetensors", "given/all.safetensors", "--as", "fedfms")
    assert code == 0, (out, err)
    assert (home / "given/all.safetensors").is_file()


def test_check_site_and_the_trainers_places(home: Path) -> None:
    places = TrainerPlaces(
        config=Path("conf/site.yml"),
        policy=Path("conf/policy"),
        data=Path("scans"),
        checkpoints=None,
        exchange=Path("exchange"),
        work=Path("work"),
        classes=(),
    )
    items = {item.code: item for item in check_trainer_side(places)}
    assert items["site-yml"].status == "PASS"
    assert items["data"].status == "PASS", items["data"]
    items = {
        item.code: item
        for item in check_trainer_side(dataclasses.replace(places, data=Path("none")))
    }
    assert items["data-folder"].status == "FAIL"
    assert "there is no folder none" in items["data-folder"].text


def test_a_study_and_its_sites_and_data(run: Run, home: Path) -> None:
    for name in ("a", "b"):
        (home / "hospitals" / name).mkdir(parents=True)
        shutil.copy(home / "conf/site.yml", home / "hospitals" / name)
        (home / "all").mkdir(exist_ok=True)
        (home / "all" / name).symlink_to(home / "scans")
    (home / "studies").mkdir()
    (home / "studies/s.yml").write_text(
        "sites: ../hospitals\nmethods:\n  m: {job: ../job}\nregimes: [local]\nholdout: none\n"
    )
    for given in (["--data", "all"], ["--data", "all", "--sites", "hospitals"]):
        code, out, err = run("study", "studies/s.yml", "--plan", "--output", "out", *given)
        assert code == 0, (out, err)
        assert len(out.split()) == 2
    code, _, err = run("study", "studies/s.yml", "--plan", "--data", "nothing")
    assert code == 1 and f"there is no folder {home}/nothing/a" in err


def test_a_key_that_stands_twice_in_a_study_is_an_error(run: Run, home: Path) -> None:
    (home / "s.yml").write_text("sites: a\nmethods: {}\nsites: b\n")
    code, _, err = run("study", "s.yml", "--plan")
    assert code == 1 and "line 3: the key sites stands twice, first in line 1" in err
