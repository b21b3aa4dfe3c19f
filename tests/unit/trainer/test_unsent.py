"""What eight bits take from a site's difference goes into its next one, whatever comes between."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from trainer_process import SITE, Place, task_runner

from fedfms.contracts.messages import Task
from fedfms.contracts.recipe import Recipe
from fedfms.control import Control
from fedfms.exchange.coding import SCALES
from fedfms.exchange.guard import check_contribution
from fedfms.exchange.tensors import (
    fingerprint,
    from_wire,
    load_tensors,
    shapes_of,
    to_precision,
    update_norm,
)
from fedfms.models.build import build_model
from fedfms.models.travelling import read_travelling
from fedfms.trainer.kept import Outcome
from fedfms.trainer.tasks import TaskRunner

JOB = "eight"


@pytest.fixture
def coded(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, transfer_precision="int8", optimizer_state="reset")


@pytest.fixture
def model(coded: Recipe, checkpoints: Path) -> dict[str, Tensor]:
    return read_travelling(build_model(coded, checkpoints / "random.safetensors"))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


def train(trainer: TaskRunner, recipe: Recipe, number: int, model: dict[str, Tensor]) -> Outcome:
    task = Task(kind="train", site=SITE, job=JOB, round=number, model="round", recipe=recipe)
    sent = to_precision({name: t + 0.001 * number for name, t in model.items()}, "int8")
    return trainer.run(task, lambda: sent, Control())


def kept(work: Path, number: int) -> Path:
    return work / "runs" / JOB / f"learnt-{number:04d}" / "unsent.safetensors"


def test_an_answer_is_the_difference_and_the_error_before_it(
    place: Place, coded: Recipe, model: dict[str, Tensor], work: Path, tmp_path: Path
) -> None:
    trainer = task_runner(place, work)
    first = train(trainer, coded, 0, model)
    assert first.tensors[SCALES].dtype == torch.float32
    got = check_contribution(
        shapes_of(model),
        coded,
        first.contribution.package_version,
        first.tensors,
        first.contribution,
    )
    assert first.contribution.update_norm == pytest.approx(update_norm(got), rel=1e-9)

    # the same round as a site computes it that sends fp32: nothing is lost, nothing is kept
    plain = dataclasses.replace(coded, transfer_precision="fp32")
    exact = task_runner(place, tmp_path / "exact")
    whole = train(exact, plain, 0, model).tensors
    unsent = load_tensors(kept(work, 0))
    for name, tensor in whole.items():
        assert torch.equal(unsent[name], tensor - got[name]), name
    second = from_wire(train(trainer, coded, 1, model).tensors)
    whole = train(exact, plain, 1, model).tensors
    expected = from_wire(
        to_precision({name: t + unsent[name] for name, t in whole.items()}, "int8")
    )
    assert all(torch.equal(second[name], expected[name]) for name in expected)
    assert not (tmp_path / "exact/runs" / JOB / "learnt-0000").exists()


def test_a_trainer_that_was_killed_and_a_round_that_comes_again_give_the_same_bytes(
    place: Place, coded: Recipe, model: dict[str, Tensor], work: Path, tmp_path: Path
) -> None:
    undisturbed = task_runner(place, tmp_path / "undisturbed")
    expected = [fingerprint(train(undisturbed, coded, n, model).tensors) for n in range(3)]
    trainer = task_runner(place, work)
    assert fingerprint(train(trainer, coded, 0, model).tensors) == expected[0]
    assert fingerprint(train(trainer, coded, 1, model).tensors) == expected[1]
    trainer = task_runner(place, work)  # killed between rounds
    assert fingerprint(train(trainer, coded, 1, model).tensors) == expected[1]  # as it was kept
    shutil.rmtree(work / "runs" / JOB / "answer-train")  # killed before it answered
    trainer = task_runner(place, work)
    assert fingerprint(train(trainer, coded, 1, model).tensors) == expected[1]
    assert fingerprint(train(trainer, coded, 2, model).tensors) == expected[2]
    shutil.rmtree(work / "runs" / JOB / "answer-train")
    assert fingerprint(train(trainer, coded, 2, model).tensors) == expected[2]  # the same process


def test_a_site_that_missed_rounds_adds_the_error_of_its_last_one(
    place: Place, coded: Recipe, model: dict[str, Tensor], work: Path, tmp_path: Path
) -> None:
    trainer = task_runner(place, work)
    train(trainer, coded, 0, model)
    late = train(trainer, coded, 2, model)  # round 1 was not asked of it
    forgetful = train(task_runner(place, tmp_path / "new"), coded, 2, model)
    assert fingerprint(late.tensors) != fingerprint(forgetful.tensors)
    again = train(task_runner(place, work), coded, 2, model)
    assert fingerprint(again.tensors) == fingerprint(late.tensors)
    trainer.forget(JOB)
    assert not (work / "runs" / JOB).exists()


def test_what_the_policy_clips_away_does_not_come_back(
    place: Place, coded: Recipe, model: dict[str, Tensor], work: Path
) -> None:
    place.set_policy(min_cases=1, clip_norm=0.01)
    trainer = task_runner(place, work)
    for number in range(3):
        sent = from_wire(train(trainer, coded, number, model).tensors)
        assert update_norm(sent) == pytest.approx(0.01, rel=1e-2)
        assert update_norm(load_tensors(kept(work, number))) < 0.02 * 0.01
