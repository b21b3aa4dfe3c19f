"""Several processes at one gradient: equal to one process, and ended with it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from fedfms.contracts.recipe import Recipe
from fedfms.contracts.site import SiteConfig
from fedfms.control import Control
from fedfms.data.manifest import find_cases
from fedfms.data.prepare import prepare_cases
from fedfms.data.slices import SliceDataset
from fedfms.models.build import build_model
from fedfms.trainer.ranks import Ranks
from fedfms.training.loop import RoundResult, train_round

CPU = torch.device("cpu")


@pytest.fixture
def two(place) -> Ranks:
    place.set_site(threads=1, device="cpu", ranks=2)
    site = SiteConfig.from_yaml(place.data / "site.yml")
    ranks = Ranks([CPU, CPU], site)
    yield ranks
    ranks.close()


def slices_of(ranks: Ranks, recipe: Recipe, place) -> SliceDataset:
    cases = find_cases(ranks.site)
    prepared = prepare_cases(cases, ranks.site, Control(), folder=place.work / "cache")
    return SliceDataset(prepared, ranks.site, recipe)


def trained(
    recipe: Recipe, dataset: SliceDataset, ranks: Ranks | None, micro_batch: int, rounds: int = 1
) -> tuple[nn.Module, list[RoundResult]]:
    """A network of random weights after some rounds, in one process or in several."""
    torch.set_num_threads(1)
    model, optimizer, results = build_model(recipe, None), None, []
    for number in range(rounds):
        options = {
            "round_number": number,
            "optimizer": optimizer,
            "control": Control(),
            "micro_batch": micro_batch,
            "secret": b"s" * 32,
        }
        if ranks is None:
            site = dataclasses.replace(dataset.site, ranks=None)
            result = train_round(model, dataset, recipe, site, **options)
        else:
            control, secret = options["control"], options["secret"]
            with ranks.round(model, dataset, recipe, number, secret, control) as beside:
                result = train_round(model, dataset, recipe, ranks.site, ranks=beside, **options)
        optimizer = result.optimizer
        results.append(result)
    return model, results


def largest(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of two networks' values, but of those that softmax cancels.

    The gradient of `k_proj.bias` is rounding noise, which Adam makes steps of.
    """
    values = dict(other.named_parameters())
    return max(
        float((tensor - values[name]).abs().max())
        for name, tensor in one.named_parameters()
        if not name.endswith("k_proj.bias")
    )


def test_two_ranks_equal_one_process_that_computes_the_shares_in_turn(recipe, place, two):
    recipe = dataclasses.replace(recipe, batch_size=4, clip_grad_norm=1.0, schedule="cosine")
    dataset = slices_of(two, recipe, place)
    assert len(dataset) == 16
    both, results = trained(recipe, dataset, two, 4, rounds=2)
    alone, expected = trained(recipe, dataset, None, 2, rounds=2)
    for got, want in zip(both.parameters(), alone.parameters(), strict=True):
        assert torch.equal(got, want)  # to the last bit, after 8 steps
    assert [one.loss for one in results] == pytest.approx([one.loss for one in expected], 1e-6)
    assert [one.steps for one in results] == [4, 4]


@pytest.mark.parametrize(
    ("method", "batch_size", "steps"), [("fedmsa", 6, 3), ("fedsam", 6, 3), ("fedmsa", 5, 4)]
)
def test_two_ranks_equal_one_process_with_the_same_batch(
    recipe, place, two, method, batch_size, steps
):
    # of 16 slices the last batch has 4, two a rank; or 1, and the second rank has none
    recipe = dataclasses.replace(
        recipe, method=method, batch_size=batch_size, learning_rate=1e-4, clip_grad_norm=1.0
    )
    dataset = slices_of(two, recipe, place)
    both, (result,) = trained(recipe, dataset, two, batch_size)
    alone, (expected,) = trained(recipe, dataset, None, batch_size)
    assert result.steps == steps
    assert result.loss == pytest.approx(expected.loss, 1e-6)
    assert largest(both, alone) < 1e-6
