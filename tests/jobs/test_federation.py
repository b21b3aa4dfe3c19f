"""FedMSA and FedSAM through FLARE: real provisioning, mutual TLS, two processes a site."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from averaging import federated_average, largest_difference
from federations import JOBS, of_kind, processes_below, read_records, write_sites
from strace import traced, traced_processes

from fedfms.contracts.recipe import Recipe
from fedfms.flare.progress import JobProgress
from fedfms.flare.session import prepare_job
from fedfms.flare.simulate import ADMIN, SERVER, Federation, simulate
from fedfms.local.sites import Site, find_sites
from fedfms.report.verify import verify_run
from fedfms.trainer.egress import read_egress

pytestmark = pytest.mark.timeout(400)

HELPERS = Path(__file__).parent


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sites that train with unequal numbers of images, and one that only evaluates."""
    return write_sites(tmp_path_factory.mktemp("sites"), ("site-1", "site-2", "site-3"))


@pytest.fixture(scope="module")
def fedmsa(sites: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two rounds of FedMSA with site-3 as holdout, every process under strace."""
    folder = tmp_path_factory.mktemp("fedmsa")
    command = [
        sys.executable,
        *(str(HELPERS / "run_simulation.py"), str(JOBS / "fedmsa"), str(sites)),
        *(str(folder / "results"), str(folder / "workspace")),
        *("rounds=2", "batch_size=4", "holdout=site-3"),
    ]
    traced(command, folder / "trace")
    return {
        "results": folder / "results",
        "trace": folder / "trace",
        "workspace": folder / "workspace",
    }


def test_fedmsa_equals_plain_averaging_with_unequal_sites(
    fedmsa: dict[str, Path], sites: Path
) -> None:
    recipe = Recipe.from_json(fedmsa["results"] / "recipe.json")
    expected, slices = federated_average(recipe, sites, ("site-1", "site-2"))
    assert slices["site-1"] != slices["site-2"]
    assert largest_difference(fedmsa["results"] / "global_model.safetensors", expected) == 0.0


def test_a_holdout_evaluates_and_never_enters_the_average(fedmsa: dict[str, Path]) -> None:
    records = read_records(fedmsa["results"])
    answers = [r for r in of_kind(records, "contribution") if r["site"] == "site-3"]
    assert [(r["round"], r["accepted"], r["bytes_up"]) for r in answers] == [
        (0, True, 0),
        (1, True, 0),
    ]
    said = answers[0]["contribution"]
    assert (said["role"], said["training_slices"]) == ("holdout", 0)
    assert said["evaluated_cases"] == 5  # all its cases, not only the validation split
    assert any(metric["metric"] == "dice" and metric["mean"] > 0 for metric in said["metrics"])


def test_the_best_model_is_chosen_by_the_training_sites(fedmsa: dict[str, Path]) -> None:
    """With two rounds only the model received in round 1 can be the best one before the end."""
    evaluations = of_kind(read_records(fedmsa["results"]), "evaluation")
    found = {(r["site"], r["model"]): r["contribution"]["round"] for r in evaluations}
    names = ("site-1", "site-2", "site-3")
    assert found == {(s, "final"): 2 for s in names} | {(s, "best"): 1 for s in names}
    assert (fedmsa["results"] / "best_model.safetensors").is_file()


def test_records_count_the_bytes_of_the_tensors(fedmsa: dict[str, Path]) -> None:
    from safetensors.numpy import load_file

    values = sum(a.size for a in load_file(fedmsa["results"] / "global_model.safetensors").values())
    for record in of_kind(read_records(fedmsa["results"]), "contribution"):
        assert record["bytes_down"] == 2 * values  # the job travels as fp16
        assert record["bytes_up"] == (0 if record["site"] == "site-3" else 2 * values)


def test_the_result_is_a_report_with_pictures(fedmsa: dict[str, Path]) -> None:
    folder = fedmsa["results"]
    assert (folder / "report.html").stat().st_size > 10_000
    assert {path.name.rsplit("-", 2)[0] for path in (folder / "pictures").glob("*.png")} == {
        "site-1",
        "site-2",
        "site-3",
    }


def test_the_trainer_opens_unix_sockets_only(fedmsa: dict[str, Path]) -> None:
    programs = traced_processes(fedmsa["trace"])
    trainers = [p for p in programs if '"fedfms.trainer"' in p.program]
    assert len(trainers) == 3
    for trainer in trainers:
        sockets = [call for call in trainer.calls if call.startswith("socket(")]
        assert sockets
        assert [call for call in sockets if not call.startswith("socket(AF_UNIX,")] == []
    # the same trace sees network sockets where there are some
    clients = [p for p in programs if "client.client_train" in p.program]
    assert any("socket(AF_INET" in call for p in clients for call in p.calls)


def test_the_flare_client_opens_no_file_of_the_site(fedmsa: dict[str, Path], sites: Path) -> None:
    programs = traced_processes(fedmsa["trace"])
    clients = [p for p in programs if "nvflare.private.fed.app.client" in p.program]
    assert sum("client.client_train" in p.program for p in clients) == 3
    assert len(clients) == 6  # and a job process for each of them
    assert [call for p in clients for call in p.calls if str(sites) in call] == []
    # the same trace sees the trainers open images
    trainers = [p for p in programs if '"fedfms.trainer"' in p.program]
    opened = [call for p in trainers for call in p.calls if f"{sites}/site-1/images/" in call]
    assert any(call.startswith("openat(") for call in opened)


def test_nothing_is_left_behind_but_logs_and_results(fedmsa: dict[str, Path]) -> None:
    assert processes_below(fedmsa["workspace"]) == []
    left = {path.name for path in fedmsa["workspace"].glob("*/*")}
    assert left == {"logs", "sites", "fedmsa"}
    assert list(fedmsa["workspace"].rglob("*.key")) == []


def test_what_left_each_site_by_its_own_log_is_what_the_server_has(
    fedmsa: dict[str, Path],
) -> None:
    checks = verify_run(fedmsa["results"])
    assert [problem for check in checks for problem in check.problems] == []
    records = read_records(fedmsa["results"])
    for name in ("site-1", "site-2", "site-3"):
        (work,) = fedmsa["workspace"].glob(f"*/sites/{name}")
        found = read_egress(work)
        assert found.problems == []
        logged = [dataclasses.asdict(one) for one in found.receipts]
        kept = [
            record["receipt"]["signed"]
            for record in [*of_kind(records, "contribution"), *of_kind(records, "evaluation")]
            if record["site"] == name
        ]
        assert json.loads(json.dumps(logged)) == kept
        assert len(kept) == 4  # two rounds, two models
        assert {one["receipt"]["submitter"] for one in kept} == {ADMIN}
        trained = [one["receipt"]["values"] > 0 for one in kept]
        assert trained == [name != "site-3"] * 2 + [False] * 2


# ------------------------------------------------------------------------------------- the guard


class WithRogue(Federation):
    """site-3's trainer is replaced by one that sends something else in each round."""

    def trainer_command(self, site: Site, exchange: Path) -> list[str]:
        if site.name != "site-3":
            return super().trainer_command(site, exchange)
        work, kit = self.run / "sites" / site.name, self.kit(site.name)
        script = HELPERS / "rogue_trainer.py"
        return [sys.executable, *map(str, (script, site.name, site.folder, exchange, work, kit))]


@pytest.fixture(scope="module")
def fedsam(sites: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rounds of FedSAM, to which site-3 contributes nothing that can be used.

    With the paper's averaging weights, scores of every second model only, and in eight bits.
    """
    folder = tmp_path_factory.mktemp("fedsam")
    overrides = ["rounds=4", "batch_size=4", "local_epochs=1"]
    overrides += [
        "paper_compat=true",
        "augment=false",
        "evaluate_every=2",
        "transfer_precision=int8",
    ]
    job = prepare_job(JOBS / "fedsam", folder / "fedsam", overrides)
    federation = WithRogue(folder / "run", find_sites(sites, None), job.recipe, None, print)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDFMS_KEEP_ANSWERS", "1")
        with federation.running() as coordinator:
            job_id = federation.submit(coordinator, job.folder)
            federation.wait_for_end(coordinator, job_id)
            results = coordinator.download(job_id, folder / "download")
            kept = federation.kit(SERVER) / "answers" / job_id
            shutil.copytree(kept, folder / "answers")
            coordinator.forget(job_id)
            assert not kept.exists()
            return results


def test_contributions_that_cannot_be_used_are_refused_with_site_and_reason(fedsam: Path) -> None:
    records = read_records(fedsam)
    refused = [r for r in of_kind(records, "contribution") if r["site"] == "site-3"]
    codes = {r["round"]: re.search(r"\(([a-z-]+)\)", r["reason"])[1] for r in refused}
    assert codes == {0: "non-finite", 1: "missing-tensor", 2: "other-recipe", 3: "other-backbone"}
    assert all("site-3" in r["reason"] and not r["accepted"] for r in refused)
    for done in of_kind(records, "round_done"):
        assert done["sites"] == ["site-1", "site-2"]
        assert list(done["missed"]) == ["site-3"]
    assert of_kind(records, "job_done")[0]["status"] == "completed"
    (answers,) = [folder / "answers" for folder in fedsam.parents if (folder / "answers").is_dir()]
    checks = verify_run(fedsam, None, answers)
    assert [problem for check in checks for problem in check.problems] == []
    assert "8 answers of 4 rounds" in [check.note for check in checks]
    round_2 = answers / "round-0002" / "site-2.safetensors"
    shutil.copyfile(answers / "round-0001" / "site-2.safetensors", round_2)
    problems = [
        problem for check in verify_run(fedsam, None, answers) for problem in check.problems
    ]
    assert problems[0] == "round 2, site-2: what was kept is not the answer of its receipt"


def test_fedsam_equals_plain_averaging_of_those_who_were_not_refused(
    fedsam: Path, sites: Path
) -> None:
    recipe = Recipe.from_json(fedsam / "recipe.json")
    expected, _ = federated_average(recipe, sites, ("site-1", "site-2"))
    assert largest_difference(fedsam / "global_model.safetensors", expected) == 0.0
    exact = dataclasses.replace(recipe, rounds=1, paper_compat=False)
    rounded = dataclasses.replace(recipe, rounds=1)
    one, other = (federated_average(r, sites, ("site-1", "site-2"))[0] for r in (exact, rounded))
    assert any(not np.array_equal(one[name], other[name]) for name in one)  # 10/14 is not 0.71


def test_between_the_evaluated_rounds_sites_train_and_say_nothing_of_scores(fedsam: Path) -> None:
    records = read_records(fedsam)
    for record in of_kind(records, "contribution"):
        said, due = record["contribution"], record["round"] in (0, 2)
        if record["site"] != "site-3":
            assert record["accepted"] and said["loss"] > 0
            assert (bool(said["metrics"]), said["evaluated_cases"] > 0) == (due, due)
    # the best model is one that was scored: the one that sites received in round 2
    evaluations = {(r["site"], r["model"]): r for r in of_kind(records, "evaluation")}
    rounds = {key: r["contribution"]["round"] for key, r in evaluations.items()}
    names = ("site-1", "site-2", "site-3")
    assert rounds == {(s, "final"): 4 for s in names} | {(s, "best"): 2 for s in names}
    assert all(r["contribution"]["metrics"] for r in evaluations.values())
    reader = JobProgress(fedsam / "records.jsonl", rounds=4)
    reader.read_new()
    finished = reader.event().finished
    assert [one.evaluated for one in finished] == [True, False, True, False]
    assert [one.dice is not None for one in finished] == [True, False, True, False]


# ----------------------------------------------------------------------------------- evaluation


def test_evaluate_scores_a_given_model_at_every_site(
    fedsam: Path, sites: Path, tmp_path: Path
) -> None:
    simulate(
        JOBS / "evaluate",
        find_sites(sites, None),
        model=fedsam / "global_model.safetensors",
        results=tmp_path / "results",
        workspace=tmp_path / "workspace",
    )
    again = of_kind(read_records(tmp_path / "results"), "evaluation")
    before = [r for r in of_kind(read_records(fedsam), "evaluation") if r["model"] == "final"]
    assert {r["site"] for r in again} == {"site-1", "site-2", "site-3"}
    dice = {r["site"]: r["contribution"]["metrics"] for r in again}
    honest = {r["site"]: r["contribution"]["metrics"] for r in before}
    assert dice == honest
    recipe = json.loads((tmp_path / "results/recipe.json").read_text())
    assert recipe["method"] == "fedsam"
