"""The attacks work where nothing is bounded, and come to nothing under the default policy."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from fedfms.contracts.recipe import Recipe
from fedfms.control import Control
from fedfms.models.build import build_model
from fedfms.models.sam import find_checkpoint
from fedfms.training.loop import accumulate_gradients
from fedfms_lab.attacks.inversion import (
    attack,
    best_fits,
    mixtures,
    picture,
    settings,
)
from fedfms_lab.attacks.single_cases import (
    mean_and_spread,
    one_patient_more,
    one_training_patient,
)
from fedfms_lab.attacks.sites import OPEN, for_phantoms

REPOSITORY = Path(__file__).resolve().parents[4]


@pytest.fixture(scope="module")
def job() -> Recipe:
    recipe = Recipe.from_json(REPOSITORY / "jobs/fedsam/app/config/recipe.json")
    return for_phantoms(dataclasses.replace(recipe, image_size=64))


def test_a_picture_follows_from_the_gradient_of_its_patch_embedding(job: Recipe) -> None:
    model = build_model(job, find_checkpoint(job, None))
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 3, 64, 64, generator=generator)
    target = (image[:, :1, ::2, ::2] > 0).float()[..., : job.mask_size, : job.mask_size]
    batch = {"image": image, "target": target, "annotated": torch.ones(1, 1)}
    accumulate_gradients(model, batch, job, 1, Control())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = picture(
        gradients["image_encoder.pos_embed"].double(),
        gradients["image_encoder.patch_embed.proj.weight"].double(),
        1e-6,
    )
    fit = best_fits(found[None], image.mean(dim=1), torch.zeros(64, 64))
    assert fit[0] > 0.95


def test_mixtures_are_what_a_linear_adam_makes_of_its_steps(job: Recipe) -> None:
    recipe = dataclasses.replace(job, batch_size=2, local_epochs=2, warmup_steps=3, rounds=4)
    slices = 5
    found = mixtures(recipe, slices, 2)
    from fedfms.training.loop import ShuffledBatches, learning_rate

    gradients = torch.eye(slices, dtype=torch.float64) * 1e-14  # far below Adam's epsilon
    moved = []
    for number in range(2):
        batches = list(ShuffledBatches(slices, recipe, number))
        weights = torch.nn.Parameter(torch.zeros(slices, dtype=torch.float64))
        adam = torch.optim.Adam([weights], lr=1.0)
        for step, batch in enumerate(batches):
            rate = learning_rate(recipe, number * len(batches) + step, len(batches))
            adam.param_groups[0]["lr"] = rate
            weights.grad = gradients[batch].mean(dim=0)
            adam.step()
        moved.append(-weights.detach().numpy())
    expected = np.stack(moved)
    np.testing.assert_allclose(found, expected / expected.max(), rtol=1e-4)


def test_pictures_are_found_without_bounds_and_refused_by_the_default_policy(
    job: Recipe, tmp_path: Path
) -> None:
    without, _, under, same, *_ = settings({}, 8)
    found = attack(job, without, tmp_path / "without", others=1)
    assert found.median > 0.6 > 2 * found.median_by_chance
    assert found.shows_something
    refused = attack(job, under, tmp_path / "under", others=1)
    assert (refused.rounds, refused.shows_something) == (0, False)
    assert "batch_size is 1" in refused.refused and "(min_batch_size)" in refused.refused
    twice = attack(job, same, tmp_path / "same", others=1)
    assert twice.rounds == 1 and "(same-model)" in twice.refused


@pytest.mark.parametrize("attempt", [mean_and_spread, one_patient_more, one_training_patient])
def test_single_patients_follow_without_bounds_and_not_by_the_default_policy(
    job: Recipe, tmp_path: Path, attempt
) -> None:
    before = attempt(job, OPEN, tmp_path / "open")
    assert before.shows_something
    after = attempt(job, {}, tmp_path / "policy")
    assert after.error is None and not after.shows_something
