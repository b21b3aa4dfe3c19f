"""One file a strategy: what the server makes of a round's differences.

A strategy of another distribution joins by an entry point, and the recipe's `strategy` names it:

    [project.entry-points."fedfms.strategies"]
    fedavgm = "fedavgm:FedAvgM"   # a subclass of Strategy whose name is "fedavgm"

It is installed where it works: at the server.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedfms.contracts.recipe import Recipe
from fedfms.errors import FederationError
from fedfms.exchange.strategies.adaptive import ServerAdam, ServerMomentum
from fedfms.exchange.strategies.mean import Mean
from fedfms.exchange.strategies.robust import Median, TrimmedMean
from fedfms.exchange.strategies.strategy import Strategy
from fedfms.exchange.tensors import find_fault, shapes_of
from fedfms.plugins import find_part

GROUP = "fedfms.strategies"  # of entry points
_OWN: dict[str, type[Strategy]] = {
    one.name: one for one in (Mean, Median, TrimmedMean, ServerMomentum, ServerAdam)
}

__all__ = ["GROUP", "Strategy", "combine", "find_strategy"]


def find_strategy(recipe: Recipe) -> Strategy:
    """A new strategy for the rounds of a job.

    Raises:
        ConfigError: unknown-part, ambiguous-part or broken-part; see `find_part`.
    """
    return find_part(Strategy, GROUP, _OWN, "strategy", recipe.strategy)(recipe)


def combine(
    strategy: Strategy,
    round_number: int,
    slices: Mapping[str, int],
    differences: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """What to add to the global model after a round, without a judgement of the differences.

    `round_guard.close_round` is what the server and a study's loop call.

    Args:
        strategy: of this job, with what it kept of the rounds before.
        round_number: from 0.
        slices: training slices of each site whose answer counts; of a holdout any number.
        differences: site to its tensors by name, as the guard let them pass; none of a holdout.

    Returns:
        fp32 tensors by name; none where no training site answered.

    Raises:
        FederationError: bad-strategy; it gives other tensors than it was given, or NaN.
    """
    given = {site: differences[site] for site in sorted(differences) if differences[site]}
    if not given:
        return {}
    strategy.begin(round_number, slices)
    for number in range(strategy.passes):
        for site, tensors in given.items():
            strategy.add(site, tensors, number)
    result = strategy.finish()
    if fault := find_fault(shapes_of(next(iter(given.values()))), result):
        code, problem = fault
        raise FederationError(
            f"the strategy {strategy.name} gave a result that cannot be used ({code}): {problem}",
            "report this to whoever wrote the strategy, or use strategy mean in the recipe",
            code="bad-strategy",
        )
    return result
