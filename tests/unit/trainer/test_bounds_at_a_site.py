"""What a site's policy allows, held against the site's own cases: in a round and in a canary."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from torch import Tensor
from trainer_process import SITE, Place, ask, task_runner

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.data.manifest import find_cases
from fedfms.errors import DoorClosed


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


# ---------------------------------------------------------------------------------- in a canary


@pytest.fixture
def canary(quick: Recipe) -> Recipe:
    return dataclasses.replace(quick, canary=True)


def test_a_canary_knows_that_a_round_has_too_few_steps(
    place: Place, quick: Recipe, canary: Recipe, global_model: dict[str, Tensor]
) -> None:
    place.set_policy(min_cases=1, min_steps=4)  # twelve slices, four a step
    for recipe in (canary, quick):
        error = refused(place, recipe, global_model)
        assert error.code == "too-few-steps"
        assert "a round has 3 with local_epochs 1 and batch_size 4" in error.problem
    place.set_policy(min_cases=1, min_steps=3)
    assert ask(task_runner(place), canary, 0, global_model).tensors


def test_a_canary_knows_that_too_few_patients_show_a_class_or_are_drawn(
    own: Place, canary: Recipe, global_model: dict[str, Tensor]
) -> None:
    own.set_policy(min_cases=1, min_training_patients=6)
    drawn = dataclasses.replace(canary, patient_rate=0.1, patient_clip_norm=1.0, patient_noise=1.0)
    error = refused(own, drawn, global_model)
    assert error.code == "batch-too-small" and "patient_rate 0.1" in error.problem
    no_foreground(training_cases(own)[0].label)
    assert refused(own, canary, global_model).code == "too-few-training-patients"


def test_a_canary_knows_that_the_counts_of_the_site_do_not_hold_its_run(
    place: Place, quick: Recipe, canary: Recipe, global_model: dict[str, Tensor]
) -> None:
    ask(task_runner(place), quick, 0, global_model)
    place.set_policy(min_cases=1, max_total_rounds=3)
    error = refused(place, canary, global_model)
    assert error.code == "rounds-used-up"
    assert "at most 3 rounds in all" in error.problem and "too long after 1" in error.problem
    place.set_policy(min_cases=1, max_total_rounds=4)
    assert ask(task_runner(place), canary, 0, global_model).tensors
    place.set_policy(min_cases=1, max_total_evaluations=1)
    scores = dataclasses.replace(canary, evaluate_first=0)
    assert refused(place, scores, global_model).code == "evaluations-used-up"


# -------------------------------------------------------------------------- scores, by patient


ALL_FOUND = 0.1  # at which a model of random numbers finds something in everybody


def test_a_mean_over_many_scans_of_few_patients_does_not_leave(
    own: Place, recipe: Recipe, global_model: dict[str, Tensor]
) -> None:
    """Eight scans of four patients."""
    for folder in ("images", "labels"):
        for number in range(1, 9):
            path = own.data / folder / f"phantom-{number:03d}.nii.gz"
            path.rename(path.with_name(f"p{(number - 1) % 4}-scan{number}.nii.gz"))
    own.set_site(patient="(p[0-9])")
    held_out = dataclasses.replace(recipe, holdout=(SITE,), probability_threshold=ALL_FOUND)

    def told(number: int) -> list[bool]:
        said = ask(task_runner(own), held_out, number, global_model).contribution
        return [one.mean is not None for one in said.metrics if one.metric == "dice"]

    own.set_policy(min_cases=5)
    assert told(0) == [False]
    own.set_policy(min_cases=4)
    assert told(1) == [True]


def test_a_label_that_was_mended_is_in_no_mean_until_three_are(
    own: Place, recipe: Recipe, global_model: dict[str, Tensor]
) -> None:
    own.set_policy(min_cases=3)
    held_out = dataclasses.replace(recipe, holdout=(SITE,), probability_threshold=ALL_FOUND)

    def mean(number: int) -> float | None:
        said = ask(task_runner(own), held_out, number, global_model).contribution
        return next(one.mean for one in said.metrics if one.metric == "dice")

    assert mean(0) is not None
    labels = sorted((own.data / "labels").iterdir())
    no_foreground(labels[0])
    assert mean(1) is None
    no_foreground(labels[1])
    no_foreground(labels[2])
    assert mean(2) is not None
