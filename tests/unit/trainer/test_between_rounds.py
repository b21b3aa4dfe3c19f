"""What a trainer computes of a task, and what it keeps for the next one; without a process."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor
from trainer_process import SITE, Place, in_three_decimals, task_runner

from fedfms.contracts.messages import Task
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.manifest import find_cases
from fedfms.data.prepare import prepare_cases
from fedfms.data.slices import SliceDataset
from fedfms.exchange.tensors import difference
from fedfms.models.build import build_model
from fedfms.models.travelling import read_travelling, write_travelling
from fedfms.trainer.kept import Outcome
from fedfms.trainer.tasks import TaskRunner
from fedfms.training.evaluate import evaluate, summarize
from fedfms.training.loop import train_round


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the site's site.yml says: sums in the same order
    yield
    torch.set_num_threads(before)


def train(
    trainer: TaskRunner, recipe: Recipe, number: int, received: Mapping[str, Tensor]
) -> Outcome:
    task = Task(kind="train", site=SITE, job="job", round=number, model="round", recipe=recipe)
    return trainer.run(task, lambda: received, Control())


def unscored(recipe: Recipe, **changes: object) -> Recipe:
    """The recipe without scores, which take longer than its rounds."""
    return dataclasses.replace(recipe, evaluate_first=recipe.rounds, **changes)


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert set(one) == set(other)
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("state", ["keep", "reset"])
def test_two_rounds_equal_two_rounds_by_direct_calls(
    place: Place,
    recipe: Recipe,
    checkpoints: Path,
    global_model: dict[str, Tensor],
    state: Literal["keep", "reset"],
) -> None:
    place.set_policy(min_cases=1)  # in one of the two who validate little is found
    recipe = dataclasses.replace(recipe, optimizer_state=state)
    site = SiteConfig.from_yaml(place.data / "site.yml")
    cases = prepare_cases(find_cases(site), site)
    training = [case for case in cases if case.case.split == "train"]
    validation = [case for case in cases if case.case.split == "validation"]
    dataset = SliceDataset(training, site, recipe)
    model = build_model(recipe, checkpoints / "random.safetensors")
    trainer, optimizer, sent = task_runner(place), None, global_model
    for number in range(2):
        got = train(trainer, recipe, number, sent)

        write_travelling(model, sent)
        scores = evaluate(model, validation, recipe, site, Control())
        result = train_round(
            model,
            dataset,
            recipe,
            site,
            round_number=number,
            optimizer=optimizer,
            control=Control(),
        )
        optimizer = result.optimizer if state == "keep" else None
        assert_same(got.tensors, difference(read_travelling(model), sent))
        report = got.contribution
        assert report.metrics == in_three_decimals(summarize(scores, 1))
        assert report.loss == round(result.loss, 3)
        assert report.training_slices == len(dataset) == 12  # its weight in the average
        assert (report.training_cases, report.evaluated_cases) == (6, 2)
        sent = {name: tensor + 0.5 * got.tensors[name] for name, tensor in sent.items()}


def test_a_round_after_another_site_yml_is_that_of_a_new_trainer(
    place: Place, recipe: Recipe, global_model: dict[str, Tensor]
) -> None:
    """Its slices and cases are of the files that are there now; Adam's moments go on."""
    recipe, trainer = unscored(recipe, optimizer_state="keep"), task_runner(place)
    before = train(trainer, recipe, 0, global_model)
    shutil.copytree(place.root / "work", place.root / "elsewhere")
    place.set_site(validation_fraction=0.5)
    after, new = (
        train(one, recipe, 1, {name: tensor + 0.001 for name, tensor in global_model.items()})
        for one in (trainer, task_runner(place, place.root / "elsewhere"))
    )
    assert (before.contribution.training_slices, after.contribution.training_slices) == (12, 8)
    assert_same(after.tensors, new.tensors)


def test_a_round_of_another_recipe_is_that_of_a_new_trainer(
    place: Place, recipe: Recipe, global_model: dict[str, Tensor]
) -> None:
    """Of a later round: one that was trained already begins anew whatever its recipe is."""
    recipe, trainer = unscored(recipe, optimizer_state="reset"), task_runner(place)
    other = dataclasses.replace(recipe, normalize=False)
    first = train(trainer, recipe, 0, global_model)
    after, new = (
        train(one, other, 1, global_model)
        for one in (trainer, task_runner(place, place.root / "elsewhere"))
    )
    assert_same(after.tensors, new.tensors)
    assert any(not torch.equal(after.tensors[name], first.tensors[name]) for name in new.tensors)
