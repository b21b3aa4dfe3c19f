"""FedProx: the term's gradient, what it holds, and that nothing is held without it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from little import (
    LittleNet,
    disc_dataset,
    largest_difference,
    little_recipe,
    little_site,
    values_of,
)

from fedfms.control import Control
from fedfms.models.build import build_model
from fedfms.models.travelling import read_staying, read_travelling, staying_names
from fedfms.training.loop import train_round
from fedfms.training.proximal import Proximal


def trained(model: torch.nn.Module, **changes: object) -> torch.nn.Module:
    recipe, site = little_recipe(**changes), little_site()
    dataset = disc_dataset(recipe, site)
    train_round(
        model, dataset, recipe, site, round_number=0, optimizer=None, control=Control()
    )  # fmt: skip
    return model


def test_the_gradient_is_that_of_half_mu_times_the_squared_distance() -> None:
    model, mu = LittleNet(frozen=True), 0.3
    received = values_of(model)
    term = Proximal(model, mu)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    distance = sum(
        ((p - received[name]) ** 2).sum() for name, p in model.second.named_parameters("second")
    )
    expected = torch.autograd.grad(mu / 2 * distance, list(model.second.parameters()))
    model.second.weight.grad = torch.ones_like(model.second.weight)  # of the loss, already there
    term.add()
    torch.testing.assert_close(model.second.weight.grad, expected[0] + 1)
    torch.testing.assert_close(model.second.bias.grad, expected[1])
    assert model.first.weight.grad is None  # it does not learn


def test_a_round_ends_the_nearer_to_what_was_received_the_larger_mu_is() -> None:
    start = values_of(LittleNet())
    way = [
        largest_difference(
            start, values_of(trained(LittleNet(), local_epochs=8, proximal_weight=mu))
        )
        for mu in (0.0, 1.0, 1000.0)
    ]
    assert way[0] > way[1] > way[2] > 0
    plain = values_of(trained(LittleNet(), local_epochs=8))
    assert largest_difference(start, plain) == way[0]


def test_what_stays_at_the_site_is_not_held() -> None:
    recipe = little_recipe(
        method="fedmsa", classes=("disc",), personal="norms", proximal_weight=1.0
    )
    model = build_model(recipe, None)
    before = {**read_travelling(model), **read_staying(model)}
    term = Proximal(model, recipe.proximal_weight)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    term.add()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert staying_names(model) and moved == set(before) - set(staying_names(model))


@pytest.mark.parametrize("steps", ["patients", "slices"])
def test_steps_of_patients_are_held_too(steps: str) -> None:
    of_patients = {"patient_rate": 1.0, "patient_clip_norm": 1.0, "local_epochs": 8}
    more = of_patients if steps == "patients" else {"local_epochs": 8}
    start = values_of(LittleNet())
    free, held = (
        largest_difference(start, values_of(trained(LittleNet(), proximal_weight=mu, **more)))
        for mu in (0.0, 1000.0)
    )
    assert held < free


def test_a_recipe_without_the_term_keeps_no_copy() -> None:
    assert Proximal.of(LittleNet(), little_recipe()) is None
    assert (
        dataclasses.replace(little_recipe(), proximal_weight=0.5).sha256 != little_recipe().sha256
    )
