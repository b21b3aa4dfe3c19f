"""Which model is the best so far, and when further rounds are not worth it."""

from __future__ import annotations

import dataclasses

from fedfms.contracts.recipe import Recipe
from fedfms.exchange.selection import Reached, Selection

RECIPE = Recipe(
    method="fedmsa", backbone="vit_demo", backbone_sha256="0" * 64, classes=("blob",), rounds=30
)


def scores(**dice: float) -> dict[str, dict[str, float]]:
    return {site: {"blob": value} for site, value in dice.items()}


ROUNDS = [
    scores(a=0.5, b=0.5),
    scores(a=0.9, b=0.4),  # the better mean, and a worse site
    scores(a=0.6, b=0.6),  # the better worst site, and a lower mean than before
    scores(a=0.5),  # b is away: the mean and the lowest of whoever answered say nothing of it
    scores(a=0.7, b=0.65),
]


def best(recipe: Recipe) -> list[int]:
    selection = Selection(recipe)
    return [number for number, one in enumerate(ROUNDS) if selection.is_best(one)]


def test_the_best_model_is_that_of_the_mean_or_of_the_worst_site() -> None:
    assert best(RECIPE) == [0, 1, 4]
    assert best(dataclasses.replace(RECIPE, best_by="worst")) == [0, 2, 4]


def test_training_stops_when_the_mean_was_not_better_so_many_times_also_over_a_restart() -> None:
    recipe = dataclasses.replace(RECIPE, patience=3, best_by="worst")
    selection = Selection(recipe)
    falling = [0.5, 0.8, 0.7, 0.79, 0.81, 0.8, 0.8, 0.8]
    stops = []
    for number, value in enumerate(falling):
        selection.is_best(scores(a=value, b=0.6))
        selection.is_best({})  # a round in which nobody evaluates is no evaluation
        if number == 5:  # as kept with the run, and back
            selection = Selection(recipe, Reached(**dataclasses.asdict(selection.reached)))
        stops.append(selection.reached.stops)
    assert stops == [False] * 7 + [True]
    endless = Selection(RECIPE)
    for value in falling * 9:
        endless.is_best(scores(a=value))
    assert not endless.reached.stops
