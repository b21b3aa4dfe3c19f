"""The weighted mean: federated averaging (McMahan et al. 2017, arXiv 1602.05629)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from fedfms.contracts.recipe import Recipe
from fedfms.exchange.averaging import average, averaging_weights
from fedfms.exchange.strategies.strategy import Strategy


class Mean(Strategy):
    """Each site by its share of the training slices; see `averaging.averaging_weights`."""

    name: ClassVar[str] = "mean"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._weights: dict[str, float] = {}
        self._differences: dict[str, Mapping[str, Tensor]] = {}

    def begin(self, round_number: int, slices: Mapping[str, int]) -> None:
        """The weights."""
        self._weights = averaging_weights(self.recipe, slices)
        self._differences = {}

    def add(self, site: str, tensors: Mapping[str, Tensor], pass_number: int) -> None:
        """Kept as it is: `average` goes tensor by tensor, which needs no fp64 copy of a model."""
        self._differences[site] = tensors

    def finish(self) -> dict[str, Tensor]:
        """The mean; the differences are let go."""
        mean = average(self._differences, self._weights)
        self._differences = {}
        return mean
