"""What a site counts for in the average: by slices, by cases, or as any other."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fedfms.contracts.contribution import Contribution
from fedfms.contracts.recipe import Recipe
from fedfms.exchange.averaging import weight_of
from fedfms.exchange.round_guard import RoundGuard, close_round
from fedfms.exchange.strategies import find_strategy
from fedfms.records.schema import Judged
from fedfms.records.verdicts import findings

RECIPE = Recipe(
    method="fedmsa", backbone="vit_demo", backbone_sha256="0" * 64, classes=("blob",), rounds=3
)


def said(site: str, slices: int, cases: int, role: str = "train") -> Contribution:
    return Contribution(
        site=site,
        kind="train",
        role=role,
        round=0,
        model="round",
        recipe_sha256="0" * 64,
        backbone_sha256="0" * 64,
        package_version="1",
        training_slices=slices,
        training_cases=cases,
        evaluated_cases=0,
    )


# volumes at two sites, pictures at the third
SAID = {"site-1": (400, 10), "site-2": (600, 12), "site-3": (30, 30)}


def closed(recipe: Recipe, counts: dict[str, tuple[int, int]]):
    reports = {site: said(site, *of) for site, of in counts.items()}
    random = torch.Generator().manual_seed(3)
    given = {site: {"w": torch.rand(40, generator=random) + 1} for site in reports}
    slices = {site: one.training_slices for site, one in reports.items()}
    weights = {site: weight_of(recipe, one) for site, one in reports.items()}
    done = close_round(RoundGuard(recipe), find_strategy(recipe), 0, slices, given, weights)
    return done, {site: tensors["w"].numpy().astype(float) for site, tensors in given.items()}


@pytest.mark.parametrize(
    ("weigh_by", "weights"),
    [("slices", (400, 600, 30)), ("cases", (10, 12, 30)), ("equal", (1, 1, 1))],
)
def test_the_average_weighs_by_what_the_recipe_counts(weigh_by, weights) -> None:
    done, given = closed(dataclasses.replace(RECIPE, weigh_by=weigh_by), SAID)
    expected = np.average(list(given.values()), axis=0, weights=weights)
    np.testing.assert_allclose(done.change["w"].numpy(), expected, rtol=0, atol=1e-6)
    assert [one.counts_for for one in done.verdicts] == list(weights)


def test_a_site_that_says_it_has_far_more_cases_counts_for_the_median() -> None:
    recipe = dataclasses.replace(RECIPE, weigh_by="cases")
    liar = {**SAID, "site-2": (600, 500)}
    done, given = closed(recipe, liar)
    expected = np.average(list(given.values()), axis=0, weights=(10, 30, 30))
    np.testing.assert_allclose(done.change["w"].numpy(), expected, rtol=0, atol=1e-6)
    ((site, text),) = findings(Judged(round=0, acts=True, sites=done.verdicts))
    assert site == "site-2" and "of 500 cases, far more" in text and "it counts for 30" in text
    confirmed = dataclasses.replace(recipe, confirmed_weights=("site-2",))
    done, given = closed(confirmed, liar)
    expected = np.average(list(given.values()), axis=0, weights=(10, 500, 30))
    np.testing.assert_allclose(done.change["w"].numpy(), expected, rtol=0, atol=1e-6)


def test_where_all_count_alike_nobody_gains_by_what_it_says() -> None:
    recipe = dataclasses.replace(RECIPE, weigh_by="equal")
    done, given = closed(recipe, {**SAID, "site-3": (10**6, 10**6)})
    np.testing.assert_allclose(
        done.change["w"].numpy(), np.mean(list(given.values()), axis=0), rtol=0, atol=1e-6
    )
    assert not findings(Judged(round=0, acts=True, sites=done.verdicts))


def test_a_site_whose_number_of_cases_stays_counts_as_one_case_and_a_holdout_as_none() -> None:
    recipe = dataclasses.replace(RECIPE, weigh_by="cases")
    assert weight_of(recipe, said("site-1", 40, 0)) == 1
    assert weight_of(recipe, said("site-1", 0, 0, role="holdout")) == 0
