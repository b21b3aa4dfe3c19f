"""The weighted mean: federated averaging (McMahan et al. 2017, arXiv 1602.05629)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from fedfms.contracts.recipe import Recipe
from fedfms.exchange.averaging import FixedSum, averaging_weights
from fedfms.exchange.strategies.strategy import Strategy


class Mean(Strategy):
    """Each site by its share of the training slices; see `averaging.averaging_weights`."""

    name: ClassVar[str] = "mean"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._weights: dict[str, int] = {}
        self._sum = FixedSum()

    def begin(self, round_number: int, slices: Mapping[str, int]) -> None:
        """The weights."""
        self._weights = averaging_weights(self.recipe, slices)
        self._sum = FixedSum()

    def add(self, site: str, tensors: Mapping[str, Tensor], pass_number: int) -> None:
        """Added; one int64 for each value is kept, whatever the number of sites."""
        self._sum.add(tensors, self._weights[site])

    def finish(self) -> dict[str, Tensor]:
        """What `change` makes of the mean."""
        mean, self._sum = self._sum.mean(), FixedSum()
        return self.change(mean)
