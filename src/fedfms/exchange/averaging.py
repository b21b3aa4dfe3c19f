"""Federated averaging: each site's weight, and the weighted mean of what the sites changed.

McMahan et al. 2017, Algorithm 1, arXiv 1602.05629. The one place for this arithmetic: the FLARE
aggregator and the plain loop of a study both call it, so that they agree to the last bit.

Sums are of integers, in fixed point: a value counts in units of 1 / `SCALE`, and a weight is an
integer too. So a sum is exact: it has the same bits in whatever order sites answer, however many
threads add, and whether sites are summed at once or in groups whose sums are summed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from fedfms.contracts.contribution import Contribution
from fedfms.contracts.recipe import Recipe

log = logging.getLogger(__name__)

SCALE = 2**36  # units of 1: a difference is rounded to 1.5e-11
LARGEST_VALUE = 64.0  # of a difference, either sign; no training of this kind comes near it
LARGEST_TOTAL = 2**21 - 1  # of the weights of a sum, all taken as positive
assert LARGEST_TOTAL * int(LARGEST_VALUE) * SCALE < 2**63  # no sum overflows an int64

# Of a secure sum in 32 bits (secure_sum.py) a value times its weight counts in units of 1 / this:
# rounded once, so that the mean of 1,000 slices is exact to 1e-8
SCALE_32 = 2**17
_SCALES = {torch.int64: SCALE, torch.int32: SCALE_32}

_BLOCK_VALUES = 2**18  # summed at a time: what stays in a processor's cache


def weight_of(recipe: Recipe, report: Contribution) -> int:
    """What an answer counts for in an average by the recipe's `weigh_by`; of a holdout 0.

    Cases are those that the report names. A site whose number of cases stays with it, since it is
    below its `min_cases`, counts as one of a single case.
    """
    if report.role == "holdout":
        return 0
    if recipe.weigh_by == "equal":
        return 1
    return max(1, report.training_cases) if recipe.weigh_by == "cases" else report.training_slices


def averaging_weights(recipe: Recipe, slices_by_site: Mapping[str, int]) -> dict[str, int]:
    """The weight of each site in the average of one round; its share is this by their sum.

    A site's training slices, or what `weigh_by` counts instead (`weight_of`). Under `paper_compat`
    what FedFMS uses (arXiv 2403.05408), in hundredths: the share rounded to two decimals by
    `numpy.round`, except that the last training site gets 1 minus the others: last in the recipe's
    `site_order`, and sites that it does not list after those, in the order of names. So a small
    site can get 0, and a small last site even less than 0, where the others were rounded up.

    Beyond `LARGEST_TOTAL` slices in all, weights are halved until they fit, and are at least 1.

    Args:
        recipe: its holdout sites weigh 0.
        slices_by_site: training slices, or what `weight_of` says, of each site whose answer counts
            in this round; of a holdout any number.

    Returns:
        site to weight, by sorted name; all 0 without a training site, else their sum is positive.

    Raises:
        ValueError: a training site has no slice; the guard refuses such a contribution before.
    """
    training = sorted(site for site in slices_by_site if site not in recipe.holdout)
    if without := [site for site in training if slices_by_site[site] < 1]:
        raise ValueError(f"{without[0]} trained on {slices_by_site[without[0]]} slices")
    weights = dict.fromkeys(sorted(slices_by_site), 0)
    weights |= {site: int(slices_by_site[site]) for site in training}
    if recipe.paper_compat and training:
        total = sum(weights.values())
        place = {site: number for number, site in enumerate(recipe.site_order)}
        *others, last = sorted(training, key=lambda site: (place.get(site, len(place)), site))
        for site in others:
            weights[site] = int(np.rint(weights[site] / total * 100))
        weights[last] = 100 - sum(weights[site] for site in others)
        if small := [f"{site} {weights[site] / 100:.2f}" for site in training if weights[site] < 1]:
            log.warning("weights rounded as in the paper, paper_compat: %s", ", ".join(small))
    while sum(map(abs, weights.values())) > LARGEST_TOTAL:
        weights = {site: max(1, weight // 2) if weight else 0 for site, weight in weights.items()}
    return weights


class FixedSum:
    """A weighted sum of differences in fixed point, one int64 for each value.

    Differences may come in any order and may lie on a disk: each tensor is looked up once. A sum
    of some sites can be added to that of others.
    """

    def __init__(self) -> None:
        self.total = 0  # of the weights
        self._magnitude = 0  # of the weights without their signs
        self._scale = SCALE
        self._sums: dict[str, Tensor] = {}

    def add(self, tensors: Mapping[str, Tensor], weight: int) -> None:
        """Add one site's difference.

        Args:
            tensors: by name, fp32 or fp16 on the CPU, at most `LARGEST_VALUE`; left as they are.
            weight: of either sign; 0 adds nothing.

        Raises:
            ValueError: other names than before, a value that is not finite or too large, or weights
                of more than `LARGEST_TOTAL`: the guard lets none of this pass.
        """
        if weight == 0:
            return
        self._weigh(weight, abs(weight))
        self._same_names(tensors)
        for name in sorted(tensors):
            tensor = tensors[name]
            if name not in self._sums:
                self._sums[name] = torch.zeros(tensor.shape, dtype=torch.int64)
            elif self._sums[name].shape != tensor.shape:
                raise ValueError(f"{name} has another shape at another site")
            for part, sum_ in zip(_blocks(tensor), _blocks(self._sums[name]), strict=True):
                sum_.add_(_units(name, part), alpha=weight)

    @classmethod
    def of(cls, sums: Mapping[str, Tensor], total: int) -> FixedSum:
        """A sum that was made elsewhere.

        Args:
            sums: int64 by name, or int32 in units of 1 / `SCALE_32`; taken as they are.
            total: of the weights, all positive.

        Raises:
            ValueError: weights of more than `LARGEST_TOTAL`.
        """
        made = cls()
        made._weigh(total, total)
        made._sums = dict(sums)
        for sum_ in made._sums.values():
            made._scale = _SCALES[sum_.dtype]
        return made

    def merge(self, other: FixedSum) -> None:
        """Add what another sum holds.

        Raises:
            ValueError: see `add`.
        """
        if not other._sums:
            return
        if other._scale != self._scale:
            raise ValueError("the two sums are in other units")
        self._weigh(other.total, other._magnitude)
        self._same_names(other._sums)
        for name, sum_ in other._sums.items():
            if name in self._sums:
                self._sums[name].add_(sum_)
            else:
                self._sums[name] = sum_.clone()

    def mean(self) -> dict[str, Tensor]:
        """The sum by the total weight: new fp32 tensors by sorted name, rounded to fp32 once.

        Raises:
            ValueError: there is something, and its weights do not add up to more than 0.
        """
        if self._sums and self.total < 1:
            raise ValueError(f"the weights add up to {self.total}")
        mean = {}
        for name in sorted(self._sums):
            mean[name] = torch.empty(self._sums[name].shape, dtype=torch.float32)
            for sum_, part in zip(_blocks(self._sums[name]), _blocks(mean[name]), strict=True):
                part.copy_(sum_.to(torch.float64).div_(self._scale * self.total))
        return mean

    def _weigh(self, total: int, magnitude: int) -> None:
        if self._magnitude + magnitude > LARGEST_TOTAL:
            raise ValueError(f"weights of {self._magnitude + magnitude}, at most {LARGEST_TOTAL}")
        self.total += total
        self._magnitude += magnitude

    def _same_names(self, tensors: Mapping[str, Tensor]) -> None:
        if self._sums and set(self._sums) != set(tensors):
            name = sorted(set(self._sums) ^ set(tensors))[0]
            raise ValueError(f"one site has no {name}, and another site has")


def weighted_units(tensors: Mapping[str, Tensor], weight: int) -> dict[str, Tensor]:
    """What `FixedSum.add` adds of one site: int64, by sorted name.

    Raises:
        ValueError: see `FixedSum.add`.
    """
    sum_ = FixedSum()
    sum_.add(tensors, weight)
    return sum_._sums


def weighted_units_32(tensors: Mapping[str, Tensor], weight: int, sites: int) -> dict[str, Tensor]:
    """What one site adds to a sum in 32 bits: int32, by sorted name.

    Args:
        tensors: by name, fp32 or fp16 on the CPU; left as they are.
        weight: a positive number.
        sites: of the sum; each may fill so large a part of the 32 bits that no sum can wrap.

    Raises:
        ValueError: a value is not finite.
        OverflowError: a value times the weight is too large for so many sites.
    """
    largest = (2**31 - 1) // sites
    units = {}
    for name in sorted(tensors):
        units[name] = torch.empty(tensors[name].shape, dtype=torch.int32)
        for part, into in zip(_blocks(tensors[name]), _blocks(units[name]), strict=True):
            weighted = part.to(torch.float64, copy=True).mul_(weight * SCALE_32).round_()
            most = float(weighted.abs().max())
            if not math.isfinite(most):
                raise ValueError(f"{name} holds a value that is not finite")
            if most > largest:
                raise OverflowError(
                    f"{name} holds {most / SCALE_32 / weight:.2g}, which times {weight} slices and "
                    f"{sites} sites is more than 32 bits hold"
                )
            into.copy_(weighted)
    return units


def average(
    differences: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, int]
) -> dict[str, Tensor]:
    """The weighted mean of the sites' differences: what to add to the global model, in fp32.

    Args:
        differences: site to its tensors by name, see `FixedSum.add`.
        weights: from `averaging_weights`; a site of weight 0 needs no tensors.

    Returns:
        new fp32 tensors by sorted name; none where no site has a weight.

    Raises:
        ValueError: two sites have other tensors, which the guard does not let happen.
        KeyError: a site with a weight has no difference.
    """
    total = FixedSum()
    for site in sorted(weights):
        if weights[site] != 0:
            total.add(differences[site], weights[site])
    return total.mean()


def _units(name: str, part: Tensor) -> Tensor:
    """Values in fixed point."""
    least, most = part.aminmax()
    if not (float(least) >= -LARGEST_VALUE and float(most) <= LARGEST_VALUE):
        raise ValueError(f"{name} holds a value beyond {LARGEST_VALUE:g}")
    return part.to(torch.float64, copy=True).mul_(SCALE).round_().to(torch.int64)


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Views of the values of a tensor, a block at a time."""
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _BLOCK_VALUES):
        yield flat[start : start + _BLOCK_VALUES]
