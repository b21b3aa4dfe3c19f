from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from federations import JOBS
from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST

from fedfms.contracts.recipe import BACKBONES, Recipe
from fedfms.errors import ConfigError
from fedfms.exchange.tensors import save_tensors
from fedfms.flare.internals.settings import stream_settings
from fedfms.flare.kit import CLASSES
from fedfms.flare.lint import check_sites
from fedfms.flare.session import deploy, prepare_job

ALL = ("fedsam", "fedmsa", "lora", "unet", "evaluate")
TRAINING = ("fedsam", "fedmsa", "lora", "unet")
SAG = "nvflare.app_common.workflows.scatter_and_gather.ScatterAndGather"


def config(job: str, name: str) -> dict[str, Any]:
    return json.loads((JOBS / job / "app" / "config" / name).read_text())


def workflow(job: Path) -> dict[str, Any]:
    server = json.loads((job / "app/config/config_fed_server.json").read_text())
    return next(w["args"] for w in server["workflows"] if w["path"] == SAG)


def guard(job: Path) -> dict[str, Any]:
    server = json.loads((job / "app/config/config_fed_server.json").read_text())
    return server["task_result_filters"][0]["filters"][0]["args"]


def paths(values: Any) -> Iterator[str]:
    """Every class that a configuration names, however deep."""
    if isinstance(values, dict):
        if "path" in values:
            yield values["path"]
        for value in values.values():
            yield from paths(value)
    elif isinstance(values, list):
        for value in values:
            yield from paths(value)


@pytest.mark.parametrize("job", ALL)
def test_jobs_hold_settings_and_no_code(job: str) -> None:
    files = {path.relative_to(JOBS / job).as_posix() for path in (JOBS / job).rglob("*")}
    assert files == {
        "meta.json",
        "app",
        "app/config",
        "app/config/config_fed_server.json",
        "app/config/config_fed_client.json",
        "app/config/recipe.json",
    }


@pytest.mark.parametrize("job", ALL)
def test_sites_allow_every_class_that_a_job_names(job: str) -> None:
    named = {*paths(config(job, "config_fed_server.json"))}
    named |= {*paths(config(job, "config_fed_client.json"))}
    assert named <= {*DEFAULT_CLASS_ALLOW_LIST, *CLASSES}


def test_the_allow_list_holds_nothing_that_no_job_needs() -> None:
    named = {p for job in ALL for p in paths(config(job, "config_fed_server.json"))}
    named |= {p for job in ALL for p in paths(config(job, "config_fed_client.json"))}
    of_any_method = "fedfms.flare.executor.TrainingExecutor"  # for jobs of methods to come
    assert set(CLASSES) == {of_any_method, *(p for p in named if p.startswith("fedfms."))}


def test_fedsam_and_fedmsa_differ_in_the_executor_and_the_recipe_only() -> None:
    assert config("fedsam", "config_fed_server.json") == config("fedmsa", "config_fed_server.json")
    client = config("fedsam", "config_fed_client.json")
    assert client["executors"][0]["executor"]["path"].endswith(".FedSAMExecutor")
    client["executors"][0]["executor"]["path"] = "fedfms.flare.executor.FedMSAExecutor"
    assert client == config("fedmsa", "config_fed_client.json")


def test_evaluate_is_wired_like_the_end_of_the_training_jobs() -> None:
    evaluate = config("evaluate", "config_fed_server.json")
    training = config("fedmsa", "config_fed_server.json")
    assert evaluate["workflows"] == training["workflows"][1:]
    assert all(component in training["components"] for component in evaluate["components"])
    assert evaluate["server"] == training["server"]
    client = config("evaluate", "config_fed_client.json")
    del client["executors"]
    of_training = config("fedmsa", "config_fed_client.json")
    del of_training["executors"]
    assert client == of_training


@pytest.mark.parametrize("job", ALL)
def test_a_job_says_nothing_of_a_sites_line(job: str) -> None:
    """FLARE would take a job's word before that of the site's environment."""
    for side in ("client", "server"):
        content = config(job, f"config_fed_{side}.json")
        of_lines = {name.removeprefix("NVFLARE_").lower() for name in stream_settings(None)}
        assert not of_lines & set(content)


@pytest.mark.parametrize("job", TRAINING)
def test_flare_and_the_recipe_agree_on_rounds_and_sites(job: str) -> None:
    recipe = Recipe.from_json(JOBS / job / "app" / "config" / "recipe.json")
    meta = json.loads((JOBS / job / "meta.json").read_text())
    assert recipe.method == job
    assert workflow(JOBS / job)["num_rounds"] == recipe.rounds
    assert workflow(JOBS / job)["min_clients"] == meta["min_clients"]
    assert guard(JOBS / job)["min_contributions"] == meta["min_clients"]


@pytest.mark.parametrize("job", [job for job in ALL if job != "unet"])
def test_recipes_mean_the_backbone_that_the_package_knows(job: str) -> None:
    recipe = Recipe.from_json(JOBS / job / "app" / "config" / "recipe.json")
    assert recipe.backbone_sha256 == BACKBONES[recipe.backbone].sha256


def test_overrides_reach_the_recipe_and_flare_in_a_copy(tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in JOBS.rglob("*.json")}
    prepared = prepare_job(
        JOBS / "fedmsa", tmp_path / "fedmsa", ["rounds=3", "classes=disc,cup", "min_clients=1"]
    )
    assert (prepared.recipe.rounds, prepared.recipe.classes) == (3, ("disc", "cup"))
    assert Recipe.from_json(prepared.folder / "app/config/recipe.json") == prepared.recipe
    assert workflow(prepared.folder)["num_rounds"] == 3
    assert workflow(prepared.folder)["min_clients"] == 1
    assert guard(prepared.folder)["min_contributions"] == 1
    assert json.loads((prepared.folder / "meta.json").read_text())["min_clients"] == 1
    assert {path: path.read_bytes() for path in JOBS.rglob("*.json")} == before


def test_a_given_model_brings_its_recipe_and_goes_to_the_server_only(tmp_path: Path) -> None:
    save_tensors(tmp_path / "global_model.safetensors", {"w": torch.zeros(1)}, None)
    own = Recipe.from_json(JOBS / "fedsam/app/config/recipe.json")
    (tmp_path / "recipe.json").write_text(own.to_json())
    prepared = prepare_job(
        JOBS / "evaluate", tmp_path / "evaluate", model=tmp_path / "global_model.safetensors"
    )
    assert prepared.recipe == own
    deploy(prepared, ["site-1", "site-2"])
    apps = json.loads((prepared.folder / "meta.json").read_text())["deploy_map"]
    assert apps == {"app": ["server"], "app_site": ["site-1", "site-2"]}
    assert (prepared.folder / "app/config/model.safetensors").read_bytes() == (
        tmp_path / "global_model.safetensors"
    ).read_bytes()
    assert not (prepared.folder / "app_site/config/model.safetensors").exists()
    assert (prepared.folder / "app_site/config/recipe.json").is_file()


def test_a_recipe_takes_the_place_of_the_jobs_own_and_overrides_apply_on_top(
    tmp_path: Path,
) -> None:
    paper = JOBS / "recipes" / "fedmsa-paper.json"
    prepared = prepare_job(
        JOBS / "fedmsa", tmp_path / "a", ["seed=3", "min_clients=1"], None, paper
    )
    assert prepared.recipe == Recipe.from_json(paper).with_overrides(["seed=3"])
    assert Recipe.from_json(prepared.folder / "app/config/recipe.json") == prepared.recipe
    assert workflow(prepared.folder)["num_rounds"] == 100
    with pytest.raises(ConfigError, match=r"fedmsa-paper\.json is a recipe of fedmsa") as error:
        prepare_job(JOBS / "fedsam", tmp_path / "b", recipe=paper)
    assert error.value.code == "other-method"
    # it also goes before the recipe beside a model, and a job that only evaluates takes any method
    save_tensors(tmp_path / "global_model.safetensors", {"w": torch.zeros(1)}, None)
    (tmp_path / "recipe.json").write_text((JOBS / "fedmsa/app/config/recipe.json").read_text())
    model = tmp_path / "global_model.safetensors"
    given = JOBS / "recipes" / "fedsam-paper.json"
    evaluated = prepare_job(JOBS / "evaluate", tmp_path / "c", model=model, recipe=given)
    assert evaluated.recipe == Recipe.from_json(given)


def test_a_job_that_flare_would_never_start_is_refused_with_the_reason(tmp_path: Path) -> None:
    prepared = prepare_job(JOBS / "fedmsa", tmp_path / "a", ["holdout=site-4"])
    with pytest.raises(ConfigError, match="site-4, which is not connected") as error:
        check_sites(prepared, ["site-1", "site-2", "site-3"])
    assert "site-1, site-2, site-3" in error.value.fix
    with pytest.raises(ConfigError, match="needs 2 training sites, and 1 can take part") as error:
        check_sites(prepared, ["site-1", "site-4"])
    assert "--set min_clients=1" in error.value.fix


def test_a_job_with_code_is_refused(tmp_path: Path) -> None:
    prepare_job(JOBS / "fedmsa", tmp_path / "job")
    (tmp_path / "job/app/custom").mkdir()
    with pytest.raises(ConfigError, match="custom folder"):
        prepare_job(tmp_path / "job", tmp_path / "copy")


@pytest.mark.parametrize("text", ["min_clients=0", "min_clients=two"])
def test_min_clients_must_be_a_number_of_sites(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="min_clients"):
        prepare_job(JOBS / "fedmsa", tmp_path / "job", [text])
