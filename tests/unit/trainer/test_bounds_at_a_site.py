"""What a site's policy allows, held against the site's own cases: in a round and in a canary."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from torch import Tensor
from trainer_process import SITE, Place, task_runner

from fedfms.contracts.messages import Kind, ModelName, Task
from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.manifest import find_cases
from fedfms.errors import DoorClosed
from fedfms.trainer.kept import Outcome
from fedfms.trainer.tasks import TaskRunner


@pytest.fixture
def quick(recipe: Recipe) -> Recipe:
    """Without scores in its rounds; six training cases of two slices are twelve of them."""
    return dataclasses.replace(recipe, evaluate_first=recipe.rounds, optimizer_state="reset")


@pytest.fixture
def own(place: Place, phantoms: Path) -> Place:
    """A site with files of its own, to be changed."""
    for name in ("images", "labels"):
        (place.data / name).unlink()
        shutil.copytree(phantoms / name, place.data / name)
    return place


def ask(
    trainer: TaskRunner,
    recipe: Recipe,
    number: int,
    model: dict[str, Tensor],
    *,
    job: str = "job",
    kind: Kind = "train",
    which: ModelName = "round",
) -> Outcome:
    task = Task(kind=kind, site=SITE, job=job, round=number, model=which, recipe=recipe)
    return trainer.run(task, lambda: model, Control())


def refused(place: Place, recipe: Recipe, model: dict[str, Tensor]) -> DoorClosed:
    with pytest.raises(DoorClosed) as caught:
        ask(task_runner(place), recipe, 0, model)
    return caught.value


def training_cases(place: Place) -> list:
    site = SiteConfig.from_yaml(place.data / "site.yml")
    return [case for case in find_cases(site) if case.split == "train"]


def no_foreground(label: Path) -> None:
    image = nibabel.load(label)
    nibabel.save(nibabel.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), label)


@pytest.mark.parametrize("keep_empty_every", [0, 1])
def test_a_class_that_too_few_patients_show_is_not_trained_on(
    own: Place, quick: Recipe, global_model: dict[str, Tensor], keep_empty_every: int
) -> None:
    """Its difference would be about those few, however many patients are there."""
    own.set_policy(min_cases=1, min_training_patients=3)
    own.set_site(keep_empty_every=keep_empty_every)
    for case in training_cases(own)[2:]:
        no_foreground(case.label)
    error = refused(own, dataclasses.replace(quick, local_epochs=9), global_model)
    assert error.code == "too-few-training-patients"
    assert "at least 3 patients" in error.problem and "2 of them show a class" in error.problem
    assert "classes in the recipe" in error.fix and "min_training_patients" in error.fix
    own.set_policy(min_cases=1, min_training_patients=2)
    assert ask(
        task_runner(own), dataclasses.replace(quick, local_epochs=9), 0, global_model
    ).tensors


def test_patients_are_drawn_among_those_with_slices_to_train_on(
    own: Place, quick: Recipe, global_model: dict[str, Tensor]
) -> None:
    own.set_policy(min_cases=1)
    own.set_site(keep_empty_every=0)
    for case in training_cases(own)[3:]:
        no_foreground(case.label)
    private = dataclasses.replace(
        quick, patient_rate=0.5, patient_clip_norm=0.5, patient_noise=1.0, local_epochs=2
    )
    assert refused(own, private, global_model).code == "batch-too-small"
    own.set_policy(min_cases=1, min_batch_size=1)
    assert ask(task_runner(own), private, 0, global_model).tensors
