"""A part of a network that learns at a site and never leaves it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from trainer_process import SITE, Place, task_runner

from distributions import install
from fedfms.contracts.messages import Task
from fedfms.contracts.recipe import Recipe
from fedfms.control import Control
from fedfms.errors import ConfigError
from fedfms.exchange.tensors import load_tensors
from fedfms.models.build import build_model
from fedfms.models.sam import find_checkpoint
from fedfms.models.travelling import read_travelling, shared_at_first, staying_names
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


def own_recipe(recipe: Recipe, **changes: object) -> Recipe:
    return dataclasses.replace(recipe, rounds=4, optimizer_state="reset", **changes)


def rounds_of(place: Place, recipe: Recipe, restarts: int | None = None) -> list[dict]:
    """Four rounds of one site, whose change is the whole average; what it sent in each."""
    runner, model = task_runner(place), _start(place, recipe)
    sent = []
    for number in range(recipe.rounds):
        if number == restarts:
            runner = task_runner(place)
        task = Task(kind="train", site=SITE, job="own", round=number, model="round", recipe=recipe)
        given = dict(model)
        tensors = runner.run(task, lambda given=given: given, Control()).tensors
        model = {name: model[name] + tensors[name] for name in model}
        sent.append(tensors)
    return sent


def _start(place: Place, recipe: Recipe) -> dict[str, torch.Tensor]:
    return read_travelling(build_model(recipe, find_checkpoint(recipe, place.checkpoints)))


@pytest.mark.parametrize(("personal", "part"), [("norms", "norm"), ("adapters", "adapter")])
def test_a_personal_part_stays_outlives_the_trainer_and_is_trained(
    place: Place, recipe: Recipe, tmp_path: Path, personal: str, part: str
) -> None:
    recipe = own_recipe(recipe, personal=personal)
    names = set(staying_names(build_model(recipe, None)))
    assert names and all(part in name or "upscaling.1." in name for name in names)
    sent = rounds_of(place, recipe)
    assert all(names.isdisjoint(tensors) for tensors in sent)
    first, last = (
        load_tensors(place.work / f"runs/own/learnt-{number:04d}/staying.safetensors")
        for number in (2, 3)
    )
    assert set(first) == set(last) == names
    assert any(not torch.equal(first[name], last[name]) for name in names)
    again = Place(tmp_path / "again", place.checkpoints)
    shutil.copytree(place.data, again.data, symlinks=True)
    assert [
        all(torch.equal(one[name], other[name]) for name in one)
        for one, other in zip(sent, rounds_of(again, recipe, restarts=2), strict=True)
    ] == [True] * 4


def test_a_part_that_is_shared_at_first_is_the_sites_own_from_the_round_on(
    place: Place, recipe: Recipe, tmp_path: Path
) -> None:
    recipe = own_recipe(recipe, personal="norms", personal_after=2)
    names = shared_at_first(build_model(recipe, None))
    assert names and not staying_names(build_model(recipe, None))
    sent = rounds_of(place, recipe)
    moved = [any(bool(tensors[name].any()) for name in names) for tensors in sent]
    assert moved == [True, True, False, False]
    shared = _start(place, recipe)
    for tensors in sent[:2]:
        shared = {name: shared[name] + tensors[name] for name in shared}
    own = load_tensors(place.work / "runs/own/learnt-0003/staying.safetensors")
    assert set(own) == set(names)
    assert any(not torch.equal(own[name], shared[name]) for name in names)
    again = Place(tmp_path / "again", place.checkpoints)
    shutil.copytree(place.data, again.data, symlinks=True)
    for one, other in zip(sent, rounds_of(again, recipe, restarts=3), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    place.set_policy(clip_norm=1.0, noise_std=0.1, min_cases=2)
    noised = rounds_of(Place(place.root, place.checkpoints), dataclasses.replace(recipe, seed=12))
    assert not any(bool(noised[3][name].any()) for name in names)
    assert all(bool(one.any()) for name, one in noised[3].items() if name not in names)


def test_a_method_without_such_parts_refuses(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match="personal is adapters, and of what fedsam trains") as no:
        build_model(dataclasses.replace(recipe, method="fedsam", personal="adapters"), None)
    assert no.value.code == "nothing-personal"
