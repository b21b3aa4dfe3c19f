from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fedfms.contracts.policy import Policy
from fedfms.errors import ConfigError
from fedfms.exchange.bounds import breaches
from fedfms_lab.study.plan import Study
from fedfms_lab.study.record import RunKey

REPOSITORY = Path(__file__).resolve().parents[4]
SITES = ["site-1", "site-2", "site-3", "site-4"]


def write_study(folder: Path, **values: object) -> Path:
    base = {"phantoms": {}, "methods": {"fedmsa": {"job": str(REPOSITORY / "jobs/fedmsa")}}}
    path = folder / "question.yml"
    path.write_text(yaml.safe_dump({**base, **values}))
    return path


def test_leaving_each_site_out_gives_every_run_once(tmp_path: Path) -> None:
    methods = {name: {"job": str(REPOSITORY / "jobs" / name)} for name in ("fedmsa", "fedsam")}
    study = Study.from_yaml(write_study(tmp_path, methods=methods, seeds=[0, 1]))
    runs = study.runs(SITES)
    names = [run.name for run in runs]
    # methods, seeds; five regimes with folds, one at each site, and one that trains nowhere
    assert len(set(names)) == len(names) == 2 * 2 * (5 * 4 + 4 + 1)
    for run in runs:
        if run.regime == "local":
            assert run.holdout is None and len(run.trained_on) == 1
        elif run.regime == "zero-shot":
            assert run.holdout is None and run.trained_on == ()
        else:
            assert {*run.trained_on, run.holdout} == set(SITES) and len(run.trained_on) == 3
    assert study.name == "question"
    assert "fedmsa-federated-without-site-2-seed-1" in names
    assert "fedsam-local-at-site-4-seed-0" in names


def test_no_holdout_trains_on_all(tmp_path: Path) -> None:
    study = Study.from_yaml(write_study(tmp_path, holdout=["none", "site-3"]))
    federated = [run for run in study.runs(SITES) if run.regime == "federated"]
    assert [run.trained_on for run in federated] == [
        ("site-1", "site-2", "site-3", "site-4"),
        ("site-1", "site-2", "site-4"),
    ]
    assert [run.name for run in federated] == [
        "fedmsa-federated-all-seed-0",
        "fedmsa-federated-without-site-3-seed-0",
    ]


def test_a_recipe_is_the_jobs_with_the_study_s_values_and_the_methods_on_top(
    tmp_path: Path,
) -> None:
    entry = {"job": str(REPOSITORY / "jobs/fedmsa"), "set": {"learning_rate": 0.5}}
    path = write_study(
        tmp_path,
        methods={"mine": entry},
        set={"rounds": 9, "learning_rate": 0.25},
        seeds=[7],
    )
    study = Study.from_yaml(path)
    by_regime = {key.regime: study.recipe_of(key) for key in study.runs(SITES)}
    federated, central = by_regime["federated"], by_regime["central"]
    assert (federated.rounds, federated.learning_rate, federated.seed) == (9, 0.5, 7)
    assert federated.loss == "dice_bce"  # the job's own
    assert len(federated.holdout) == 1
    assert (central.holdout, central.optimizer_state) == ((), "keep")
    assert federated.optimizer_state == "reset"
    matched = by_regime["central-matched"]
    assert (matched.holdout, matched.optimizer_state) == ((), "reset")
    assert matched.batch_size == 3 * federated.batch_size == 3 * central.batch_size


def test_a_strategy_is_of_federated_runs_alone(tmp_path: Path) -> None:
    study = Study.from_yaml(
        write_study(tmp_path, holdout="site-2", strategies={"prox": {"proximal_weight": 0.1}})
    )
    with_prox = [key for key in study.runs(SITES) if key.strategy]
    assert [key.name for key in with_prox] == ["fedmsa-federated-prox-without-site-2-seed-0"]
    assert with_prox[0].way == "federated prox"
    assert study.recipe_of(with_prox[0]).proximal_weight == 0.1
    others = [study.recipe_of(key) for key in study.runs(SITES) if not key.strategy]
    assert {recipe.proximal_weight for recipe in others} == {0.0}


def test_every_way_that_trains_tries_the_same_rates_with_the_first_seed(tmp_path: Path) -> None:
    rates = [0.001, 0.003]
    path = write_study(tmp_path, holdout="site-2", seeds=[5, 6], learning_rates=rates)
    study = Study.from_yaml(path)
    tries = study.tries(SITES)
    trained = [
        key
        for key in study.runs(SITES)
        if key.seed == 5 and key.regime not in ("zero-shot", "ensemble")
    ]
    assert len(trained) == 4 + 4  # federated, two centralized, from scratch; four sites alone
    assert len(tries) == len({key.name for key in tries}) == 2 * len(trained)
    for key in tries:
        assert key.seed == 5 and study.recipe_of(key).learning_rate == key.rate
    assert study.recipe_of(trained[0], 0.01).learning_rate == 0.01


def test_a_network_of_its_own_has_neither_zero_shot_nor_from_scratch(tmp_path: Path) -> None:
    methods = {name: {"job": str(REPOSITORY / "jobs" / name)} for name in ("fedmsa", "unet")}
    study = Study.from_yaml(write_study(tmp_path, methods=methods))
    ways = {name: {k.regime for k in study.runs(SITES) if k.method == name} for name in methods}
    assert ways["fedmsa"] - ways["unet"] == {"zero-shot", "scratch"}
    study.find_sites(tmp_path / "sites")
    policy = (tmp_path / "sites" / "site-1" / "policy" / "privacy.json").read_text()
    assert '"unet"' in policy  # phantoms allow what the study trains


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"holdout": ["site-9"]}, "site-9"),
        ({"regimes": ["federate"]}, "one of federated, central-matched, central, local"),
        ({"engine": "magic"}, "one of flare, loop"),
        ({"phantoms": None}, "set sites to a folder"),
        ({"sites": "somewhere"}, "either sites or phantoms"),
        ({"seeds": []}, "asks for nothing"),
        ({"seeds": [1, 1]}, "one seed twice"),
        ({"seeds": "0"}, "write a list"),
        ({"methods": {}}, "names no method"),
        ({"methods": ["fedmsa"]}, "methods is"),
        ({"methods": {"a": {"job": "nowhere"}}}, "is no job folder"),
        ({"sets": {}}, "did you mean set"),
        ({"methods": None, "method": {}}, "did you mean methods"),
        ({"threads": 0}, "threads is 0"),
        ({"regimes": ["federated", "ensemble"]}, "add local to regimes"),
        ({"regimes": ["central"], "strategies": {"prox": {}}}, "add federated to regimes"),
        ({"strategies": {"a b": {}}}, "strategy name 'a b' cannot be used"),
        ({"strategies": {"prox": {"proximal_wait": 1}}}, "did you mean proximal_weight"),
        ({"learning_rates": [0.001]}, "name two or more different rates"),
        ({"learning_rates": [0.001, 0.001]}, "name two or more different rates"),
        ({"set": {"round": 3}}, "did you mean rounds"),
    ],
)
def test_a_study_that_cannot_be_used_is_refused_before_anything_runs(
    tmp_path: Path, values: dict[str, object], told: str
) -> None:
    with pytest.raises(ConfigError) as error:
        study = Study.from_yaml(write_study(tmp_path, **values))
        for key in study.runs(SITES):
            study.recipe_of(key)
    assert told in str(error.value)


def test_a_federation_needs_two_sites_that_train(tmp_path: Path) -> None:
    study = Study.from_yaml(write_study(tmp_path))
    with pytest.raises(ConfigError, match="one more where one is held out"):
        study.runs(["a", "b"])


def test_the_files_in_studies_can_be_used_at_sites_with_the_shipped_policy() -> None:
    files = sorted((REPOSITORY / "studies").glob("*.yml"))
    assert files
    for path in files:
        study = Study.from_yaml(path)
        for key in study.runs(SITES):
            recipe = study.recipe_of(key)
            assert recipe.method in ("fedmsa", "fedsam", "lora", "unet")
            if key.regime == "federated":  # at a door; the rest is training where all images are
                assert breaches(Policy(), recipe) == [], path.name


def test_names_of_runs_differ_where_the_runs_differ() -> None:
    one = RunKey(method="m", regime="central", holdout="a", trained_on=("b", "c"), seed=0)
    assert one.name == "m-central-without-a-seed-0"
