"""Which global model is the best so far, and whether further rounds are worth it.

Models are compared over what two of them have scores of: sites that answered both times, and of
each the classes that it scored both times. So a round that the weakest site missed is not the best
one for it. In a round training sites score the model that they received.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedfms.contracts.recipe import Recipe

Scores = dict[str, dict[str, float]]  # Dice by site and class


@dataclass(slots=True)
class Reached:
    """What a run has come to; kept with its state."""

    best: Scores = field(default_factory=dict)  # of the best model by the recipe's best_by
    best_mean: Scores = field(default_factory=dict)  # of the one with the best mean of the sites
    worse: int = 0  # evaluations since then
    stops: bool = False  # the recipe's patience is over


class Selection:
    """Follows the scores of one run.

    Args:
        recipe: its `best_by` and `patience` count.
        reached: to go on from.
    """

    def __init__(self, recipe: Recipe, reached: Reached | None = None) -> None:
        self._recipe = recipe
        self.reached = reached or Reached()

    def is_best(self, scores: Mapping[str, Mapping[str, float]]) -> bool:
        """Whether the model with these scores is better than the best one so far.

        Args:
            scores: Dice by training site and class, of those that scored it.
        """
        given = {site: dict(of) for site, of in scores.items() if of}
        if not given:
            return False
        reached, found = self.reached, False
        by_worst = self._recipe.best_by == "worst"
        if _is_better(given, reached.best, by_worst=by_worst):
            reached.best, found = given, True
        if _is_better(given, reached.best_mean, by_worst=False):
            reached.best_mean, reached.worse = given, 0
        else:
            reached.worse += 1
        patience = self._recipe.patience
        reached.stops = reached.stops or 0 < patience <= reached.worse
        return found


def _is_better(new: Scores, best: Scores, *, by_worst: bool) -> bool:
    """Whether the mean, or the lowest, of the sites that have a score of both is higher.

    The first is the best. A site counts by its mean over the classes that it has both times.
    """
    if not best:
        return True
    now, before = [], []
    for site in new.keys() & best.keys():
        if both := sorted(new[site].keys() & best[site].keys()):
            now.append(math.fsum(new[site][name] for name in both) / len(both))
            before.append(math.fsum(best[site][name] for name in both) / len(both))
    if not now:
        return False
    if by_worst:
        return min(now) > min(before)
    # the same in whatever order sites answered
    return math.fsum(a - b for a, b in zip(now, before, strict=True)) > 0


def why_it_stops(recipe: Recipe, round_number: int) -> str:
    """The sentence of a run that ends early.

    Args:
        round_number: of the last round, from 0.
    """
    return (
        f"training ends with round {round_number} of {recipe.rounds} (numbered from 0): "
        f"{recipe.patience} evaluations in a row gave no better mean Dice of the training sites "
        "(patience)"
    )
