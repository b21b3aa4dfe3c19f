"""Means that a few sites cannot carry away, value by value (Yin et al. 2018, arXiv 1803.01498).

Each site counts alike, whatever its number of slices: a site that could weigh more by what it says
of itself would be what these are against. They need more honest sites than others, and from three
sites on they differ from the plain mean of all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fedfms.contracts.recipe import Recipe
from fedfms.exchange.strategies.strategy import Strategy
from fedfms.exchange.waiting import part_of

_BLOCK_BYTES = 8 * 2**20  # of the values of all sites that are sorted at once


class _Sorted(Strategy):
    """Sorts what the sites have at each place, and takes the mean of the middle."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._differences: dict[str, Mapping[str, Tensor]] = {}

    def cut(self, sites: int) -> int:
        """How many of the lowest, and of the highest, are left out of so many."""
        raise NotImplementedError

    def begin(self, round_number: int, slices: Mapping[str, int]) -> None:
        """Nothing is there."""
        self._differences = {}

    def add(self, site: str, tensors: Mapping[str, Tensor], pass_number: int) -> None:
        """Remember where they are."""
        self._differences[site] = tensors

    def finish(self) -> dict[str, Tensor]:
        """The mean of the middle of each value, in fp64, rounded to fp32 once.

        Of each site as many values are read at a time as fit into a block with those of the others:
        memory holds the result and a few blocks, whatever the number of sites.
        """
        given, self._differences = list(self._differences.values()), {}
        block = max(1, _BLOCK_BYTES // (4 * len(given)))
        cut, result = self.cut(len(given)), {}
        for name in sorted(given[0]):
            shape = given[0][name].shape
            flat = torch.empty(math.prod(shape), dtype=torch.float32)
            for start in range(0, flat.numel(), block):
                end = start + block
                parts = [part_of(tensors, name, start, end).float() for tensors in given]
                middle = torch.stack(parts).sort(dim=0).values[cut : len(given) - cut]
                flat[start:end] = middle.double().mean(dim=0)
            result[name] = flat.reshape(shape)
        return result


class Median(_Sorted):
    """The median of the sites' values at each place; of an even number the mean of the two."""

    name: ClassVar[str] = "median"

    def cut(self, sites: int) -> int:
        """All but one or two."""
        return (sites - 1) // 2


class TrimmedMean(_Sorted):
    """The mean without the highest and the lowest fifth, of three and more sites at least one."""

    name: ClassVar[str] = "trimmed_mean"

    def cut(self, sites: int) -> int:
        """A fifth at each end."""
        return max(1, sites // 5) if sites >= 3 else 0
