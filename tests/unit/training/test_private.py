"""Steps of patients: what one of them can move, and what the noise is."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from little import LittleNet, disc_case, disc_dataset, little_case, little_recipe, little_site
from torch import Tensor
from torch.utils.data import Subset, default_collate

from fedfms.control import Control
from fedfms.data.prepared import PreparedCase
from fedfms.data.slices import SliceDataset
from fedfms.errors import TrainingError
from fedfms.training.loop import train_round
from fedfms.training.losses import loss_per_class
from fedfms.training.private import PatientSteps, items_by_patient


def private(**changes: object) -> object:
    values = {"patient_rate": 1.0, "patient_clip_norm": 1e6, "patient_noise": 0.0}
    return little_recipe(**{**values, **changes})


def of_patient(case: PreparedCase, patient: str) -> PreparedCase:
    return dataclasses.replace(case, case=dataclasses.replace(case.case, patient=patient))


def cases() -> list[PreparedCase]:
    """Five cases of three patients."""
    found = [disc_case(seed, depth, key=str(seed)) for seed, depth in enumerate((2, 3, 1, 2, 2))]
    return [of_patient(case, "ABACC"[number]) for number, case in enumerate(found)]


def sum_of(recipe, chosen: list[PreparedCase], micro_batch: int = 3) -> Tensor:
    """What a step adds up, all patients drawn, as one vector; the mean times the patients."""
    model = LittleNet()
    dataset = SliceDataset(chosen, little_site(), recipe)
    PatientSteps(model, dataset, recipe, Control(), micro_batch).gradients()
    patients = len(items_by_patient(dataset))
    return torch.cat([p.grad.flatten() for p in model.parameters()]) * patients


def gradient_of(recipe, chosen: list[PreparedCase]) -> Tensor:
    """The summed gradient of their slices, without any of the code under test."""
    model = LittleNet()
    dataset = SliceDataset(chosen, little_site(), recipe)
    batch = default_collate([dataset[item] for item in range(len(dataset))])
    loss_per_class(model(batch["image"]), batch["target"], recipe).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_without_noise_and_bound_a_step_has_the_summed_gradient_of_all_slices() -> None:
    recipe = private()
    wanted = gradient_of(recipe, cases())
    for micro_batch in (1, 3, 50):
        torch.testing.assert_close(
            sum_of(recipe, cases(), micro_batch), wanted, rtol=1e-4, atol=1e-5
        )


def test_each_patient_is_scaled_down_as_a_whole() -> None:
    by_patient = [
        gradient_of(private(), [case for case in cases() if case.case.patient == patient])
        for patient in "ABC"
    ]
    norms = [float(one.norm()) for one in by_patient]
    bound = sorted(norms)[1] * 0.9  # of two patients it is less than they have
    wanted = sum(one * min(1.0, bound / norm) for one, norm in zip(by_patient, norms, strict=True))
    got = sum_of(private(patient_clip_norm=bound), cases())
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("planted", ["fifty equal slices", "fifty cases of one slice"])
def test_a_patient_of_fifty_equal_slices_moves_a_sum_by_no_more_than_the_bound(planted) -> None:
    one = disc_case(99, 1, key="planted")
    if planted == "fifty equal slices":
        images, labels = (np.repeat(part, 50, axis=0) for part in (one.images, one.labels))
        more = [of_patient(little_case(images, labels, key="planted"), "Z")]
    else:
        more = [of_patient(disc_case(99, 1, key=f"planted {n}"), "Z") for n in range(50)]
    bound = 0.05
    recipe = private(patient_clip_norm=bound)
    assert float(gradient_of(recipe, more).norm()) > 10 * bound  # it would move it by more
    moved = sum_of(recipe, [*cases(), *more]) - sum_of(recipe, cases())
    assert float(moved.norm()) == pytest.approx(bound, rel=1e-4)


def test_the_noise_has_the_spread_that_is_accounted_and_is_drawn_anew() -> None:
    recipe = private(patient_clip_norm=0.5, patient_noise=3.0)
    silent = sum_of(dataclasses.replace(recipe, patient_noise=0.0), cases())
    noise = [sum_of(recipe, cases()) - silent for _ in range(20)]
    values = torch.stack(noise)
    assert float(values.std()) == pytest.approx(3.0 * 0.5, rel=0.05)
    assert abs(float(values.mean())) < 4 * 1.5 / math.sqrt(values.numel())
    assert not torch.equal(noise[0], noise[1])


def test_patients_are_drawn_each_by_itself_with_the_recipes_rate() -> None:
    recipe = private(patient_rate=0.3, patient_clip_norm=1e-3)
    model = LittleNet()
    found = [of_patient(disc_case(n, 1, size=8, key=str(n)), str(n)) for n in range(4)]
    steps = PatientSteps(model, SliceDataset(found, little_site(), recipe), recipe, Control(), 9)
    assert isinstance(steps._draw, random.SystemRandom)  # whose draws nobody can foresee
    steps._draw = random.Random(0)  # the same each time, here
    drawn = []
    for _ in range(300):
        before = steps.pairs
        steps.gradients()
        drawn.append((steps.pairs - before) / 2)  # two classes a slice, a slice a patient
    counts = np.bincount(np.array(drawn, int), minlength=5) / 300
    wanted = [math.comb(4, k) * 0.3**k * 0.7 ** (4 - k) for k in range(5)]
    np.testing.assert_allclose(counts, wanted, atol=0.09)  # three standard deviations


def test_of_nobody_the_noise_alone_is_left() -> None:
    recipe = private(patient_rate=1e-4, patient_noise=1.0, patient_clip_norm=1.0)
    model = LittleNet()
    dataset = SliceDataset(cases(), little_site(), recipe)
    steps = PatientSteps(model, dataset, recipe, Control(), 3)
    assert any(steps.gradients() == 0 for _ in range(3))  # one in ten thousand draws somebody
    assert all(float(p.grad.abs().max()) > 0 for p in model.parameters())


def test_a_round_without_noise_is_a_plain_loop_of_full_steps() -> None:
    recipe = private(learning_rate=1e-2, local_epochs=3)
    model = LittleNet()
    dataset = SliceDataset(cases(), little_site(), recipe)
    result = train_round(
        model, dataset, recipe, little_site(), round_number=0, optimizer=None, control=Control()
    )
    plain = LittleNet()
    adam = torch.optim.Adam(plain.parameters(), lr=1e-2)
    batch = default_collate([dataset[item] for item in range(len(dataset))])
    losses = []
    for _ in range(3):
        adam.zero_grad()
        pairs = loss_per_class(plain(batch["image"]), batch["target"], recipe)
        (pairs.sum() / 3).backward()
        losses.append(float(pairs.detach().mean()))
        adam.step()
    assert result.steps == 3
    assert result.loss == pytest.approx(sum(losses) / 3, rel=1e-5)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_rate_falls_over_all_rounds_and_does_not_begin_anew_with_each() -> None:
    recipe = private(schedule="cosine", warmup_steps=0, learning_rate=1e-2, local_epochs=3)
    dataset = SliceDataset(cases(), little_site(), recipe)
    for number in (0, 2):
        result = train_round(
            *(LittleNet(), dataset, recipe, little_site()),
            round_number=number,
            optimizer=None,
            control=Control(),
        )
        (group,) = result.optimizer.param_groups
        fallen = 0.5 * (1 + math.cos(math.pi * (3 * number + 2) / 12))  # its third step of twelve
        assert group["lr"] == pytest.approx(1e-2 * fallen, rel=1e-12)


@pytest.mark.parametrize("bound", [0.05, 1e6])
def test_noise_of_zero_is_no_noise_to_the_byte(bound: float) -> None:
    """Against steps written out here, of gradients that are clipped and of such that are not."""
    recipe = private(patient_clip_norm=bound, patient_noise=0.0, local_epochs=3, batch_size=50)
    model = LittleNet()
    dataset = SliceDataset(cases(), little_site(), recipe)
    train_round(
        model, dataset, recipe, little_site(), round_number=0, optimizer=None, control=Control()
    )
    plain = LittleNet()
    parameters = list(plain.parameters())
    adam = torch.optim.Adam(parameters, lr=recipe.learning_rate, fused=True)
    clipped = 0
    for _ in range(3):
        total = [torch.zeros_like(parameter) for parameter in parameters]
        for items in ([0, 1, 5], [2, 3, 4], [6, 7, 8, 9]):  # the slices of A, B and C
            adam.zero_grad()
            batch = default_collate([dataset[item] for item in items])
            loss_per_class(plain(batch["image"]), batch["target"], recipe).sum().backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters]).item()
            clipped += norm > bound
            for summed, parameter in zip(total, parameters, strict=True):
                summed.add_(parameter.grad, alpha=min(1.0, bound / norm))
        for summed, parameter in zip(total, parameters, strict=True):
            parameter.grad = summed / 3
        adam.step()
    assert clipped == (9 if bound < 1 else 0)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_as_many_steps_as_give_each_patient_its_epochs() -> None:
    assert private(patient_rate=0.1, local_epochs=2).steps_of_patients == 20
    assert private(patient_rate=0.3).steps_of_patients == 3
    assert little_recipe().steps_of_patients == 0


def test_pooled_slices_are_refused() -> None:
    recipe = private()
    dataset = Subset(disc_dataset(recipe, little_site()), [0, 1])
    with pytest.raises(TrainingError) as caught:
        train_round(
            LittleNet(),
            dataset,
            recipe,
            little_site(),
            round_number=0,
            optimizer=None,
            control=Control(),
        )
    assert caught.value.code == "steps-of-patients"


def test_who_else_is_there_does_not_choose_among_a_patients_slices() -> None:
    """Counted over the whole site, a patient would shift which empty slices of others train."""
    site = little_site(keep_empty_every=3)
    empty = np.zeros((4, 24, 24))
    chosen = [little_case(np.full((4, 24, 24), 9), empty, key=key) for key in "abc"]

    def of_c(cases: list[PreparedCase], recipe: object) -> list[int]:
        dataset = SliceDataset(cases, site, recipe)
        return [index for number, index in dataset.slices if cases[number].case.key == "c"]

    assert of_c(chosen, private()) == of_c(chosen[1:], private()) == [0, 3]
    # without patient_rate the site's own protocol counts, whose weights were compared with others'
    assert of_c(chosen, little_recipe()) != of_c(chosen[1:], little_recipe())
