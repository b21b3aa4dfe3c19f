"""A part of a network that learns at a site and never leaves it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from trainer_process import SITE, Place, task_runner

from distributions import install
from fedfms.contracts.messages import Task
from fedfms.contracts.recipe import Recipe
from fedfms.control import Control
from fedfms.models.build import build_model
from fedfms.models.travelling import read_travelling
from fedfms.trainer.tasks import TaskRunner

LITTLE = Path(__file__).parents[1] / "models" / "little_methods"


def test_what_stays_does_not_leave_and_outlives_the_trainer(
    place: Place, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(LITTLE, tmp_path / "packages", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    place.set_policy(methods=["tiny"], min_cases=1)
    own = dataclasses.replace(
        recipe,
        method="tiny",
        backbone="none",
        backbone_sha256="0" * 64,
        learning_rate=0.05,
        optimizer_state="reset",
    )
    sent = read_travelling(build_model(own, None))

    def train(trainer: TaskRunner, number: int) -> dict[str, torch.Tensor]:
        task = Task(kind="train", site=SITE, job="own", round=number, model="round", recipe=own)
        model = {name: tensor + 0.001 * number for name, tensor in sent.items()}
        return trainer.run(task, lambda: model, Control()).tensors

    first = task_runner(place)
    assert set(train(first, 0)) == {"features.bias", "features.weight", "head.bias", "head.weight"}
    restarted = train(task_runner(place), 1)  # a new process, after the first round
    went_on = train(first, 1)
    forgetful = train(task_runner(place, tmp_path / "elsewhere"), 1)
    assert all(torch.equal(restarted[name], went_on[name]) for name in went_on)
    assert not torch.equal(forgetful["head.weight"], went_on["head.weight"])
