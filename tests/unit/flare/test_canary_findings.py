"""What a coordinator reads of a canary's records: every site, its pace or what to do about it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from fedfms.contracts.contribution import Contribution, Rehearsal
from fedfms.contracts.recipe import JOB_RECIPE, Recipe, read_job_recipe
from fedfms.flare.canary import (
    Findings,
    Pace,
    _prepare,
    findings,
    refusal,
    trouble,
)
from fedfms.flare.session import SERVER_CONFIG, JobState, prepare_job
from fedfms.records.schema import (
    ContributionRecord,
    EvaluationRecord,
    JobDone,
    Record,
    RoundDone,
    RoundStarted,
)

JOB = Path(__file__).resolve().parents[3] / "jobs" / "fedmsa"
ENDED = JobState("FINISHED:COMPLETED", "")
SITES = ("site-1", "site-2", "site-3")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return dataclasses.replace(read_job_recipe(JOB), canary=True)


def answer(site: str, recipe: Recipe, seconds: float, at: float) -> ContributionRecord:
    said = Contribution(
        site=site,
        kind="train",
        role="train",
        round=0,
        model="round",
        recipe_sha256=recipe.sha256,
        backbone_sha256=recipe.backbone_sha256,
        package_version="0.1.0",
        training_slices=1,
        training_cases=1,
        evaluated_cases=0,
        micro_batch=4,
        rehearsal=Rehearsal(
            seconds=seconds, seconds_per_step=0.5, seconds_per_round=60.0, peak_memory_bytes=10**9
        ),
    )
    return ContributionRecord(time=at, round=0, site=site, accepted=True, contribution=said)


def refused(site: str, reason: str) -> ContributionRecord:
    return ContributionRecord(time=5.0, round=0, site=site, accepted=False, reason=reason)


def public(kind: str, code: str) -> str:
    return f"{kind} ({code}); the site's own log has the details"


def test_transfer_is_what_passed_beside_the_sites_work(recipe: Recipe) -> None:
    records = [RoundStarted(round=0, time=100.0), answer("site-1", recipe, 7.0, 110.0)]
    records += [answer("site-2", recipe, 7.0, 119.0), JobDone(status="completed", time=120.0)]
    paces, troubles = findings(records, SITES[:2], recipe, ENDED, False)
    assert troubles == []
    assert [pace.transfer_seconds for pace in paces] == [3.0, 12.0]
    found = Findings(tuple(paces), (), 20.0)
    assert found.slowest is not None and found.slowest.site == "site-2"
    assert found.slowest.seconds_per_round == 72.0


def test_all_sites_are_told_with_what_to_do_there(recipe: Recipe) -> None:
    records: list[Record] = [
        RoundStarted(round=0, time=0.0),
        refused("site-1", public("SiteDataError", "foreground-is-255")),
        refused("site-2", public("CheckpointError", "missing-checkpoint")),
        refused("site-3", public("TrainingError", "out-of-memory")),
        JobDone(status="failed", reason="round 0 has 0 usable contributions", time=9.0),
    ]
    paces, troubles = findings(records, SITES, recipe, ENDED, False)
    assert paces == []
    assert [one.site for one in troubles] == list(SITES)
    error = refusal(troubles, SITES)
    lines = error.problem.splitlines()
    assert "3 of 3 sites" in lines[0]
    assert "255" in lines[1] and "fedfms check-data" in lines[1]
    assert "vit_demo.safetensors" in lines[2] and recipe.backbone_sha256[:12] in lines[2]
    assert "ran out of memory" in lines[3] and "TRAINER_MEMORY" in lines[3]
    assert "--without" not in error.fix  # of no site is anything left


def test_one_bad_site_may_be_left_out_by_name(recipe: Recipe) -> None:
    bad = trouble("site-2", public("TrainerError", "trainer-died"), recipe)
    error = refusal([bad], SITES)
    assert error.fix.endswith("--without site-2")
    assert "memory" in error.problem


def test_a_site_without_an_answer_is_told_with_what_flare_says(recipe: Recipe) -> None:
    records = [
        RoundStarted(round=0, time=0.0),
        answer("site-1", recipe, 1.0, 3.0),
        RoundDone(round=0, sites=("site-1",), missed={"site-2": "the site is gone"}),
        JobDone(status="completed", time=9.0),
    ]
    state = dataclasses.replace(ENDED, detail="site-3: not authorized")
    _, troubles = findings(records, SITES, recipe, state, False)
    told = {one.site: one.problem for one in troubles}
    assert told["site-2"].startswith("the site is gone")
    assert told["site-3"] == "no answer; FLARE says: site-3: not authorized"


def test_who_is_late_is_told_and_who_answered_keeps_its_pace(recipe: Recipe) -> None:
    records = [RoundStarted(round=0, time=0.0), answer("site-1", recipe, 1.0, 3.0)]
    paces, troubles = findings(records, SITES[:2], recipe, JobState("FINISHED:ABORTED", ""), True)
    assert [pace.site for pace in paces] == ["site-1"]
    assert [(one.site, one.problem) for one in troubles] == [("site-2", "no answer in time")]


def test_a_site_that_trains_and_cannot_score_is_a_trouble(recipe: Recipe) -> None:
    records = [
        RoundStarted(round=0, time=0.0),
        answer("site-1", recipe, 1.0, 3.0),
        EvaluationRecord(
            site="site-1", model="final", reason=public("TrainingError", "out-of-memory")
        ),
        JobDone(status="completed", time=9.0),
    ]
    _, troubles = findings(records, SITES[:1], recipe, ENDED, False)
    assert [one.code for one in troubles] == ["out-of-memory"]


def test_what_the_server_lacks_is_the_servers(recipe: Recipe) -> None:
    records = [JobDone(status="failed", reason="there is no sam_vit_b_01ec64.pth", time=1.0)]
    _, troubles = findings(records, SITES, recipe, JobState("FINISHED:COMPLETED", ""), False)
    assert [one.site for one in troubles] == ["the server"]
    assert "no sam_vit_b_01ec64.pth" in troubles[0].problem


def test_it_is_the_job_with_one_round_in_which_everybody_is_heard(tmp_path: Path) -> None:
    job = prepare_job(JOB, tmp_path / "job", ["rounds=7", "min_clients=3"])
    canary = _prepare(job, tmp_path / "canary")
    recipe = Recipe.from_json(canary.folder / JOB_RECIPE)
    assert recipe == dataclasses.replace(job.recipe, canary=True)
    assert recipe.sha256 != job.recipe.sha256
    train = json.loads((canary.folder / SERVER_CONFIG).read_text())["workflows"][0]["args"]
    assert (train["num_rounds"], train["ignore_result_error"]) == (1, True)
    assert canary.meta["name"] == "fedmsa-canary"
    assert Recipe.from_json(job.folder / JOB_RECIPE).canary is False  # the run is as it was


def test_the_slowest_is_by_work_and_transfer_together() -> None:
    said = Rehearsal(
        seconds=1.0, seconds_per_step=None, seconds_per_round=10.0, peak_memory_bytes=1
    )
    quick = dataclasses.replace(said, seconds_per_round=2.0)
    found = Findings((Pace("a", said, 0, 1.0), Pace("b", quick, 0, 10.0)), (), 1.0)
    assert found.slowest is not None and found.slowest.site == "b"
