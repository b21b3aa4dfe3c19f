"""Federated averaging: each site's weight, and the weighted mean of what the sites changed.

McMahan et al. 2017, Algorithm 1, arXiv 1602.05629. The one place for this arithmetic: the FLARE
aggregator and the plain loop of a study both call it, so that they agree to the last bit.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedfms.contracts.recipe import Recipe

log = logging.getLogger(__name__)


def averaging_weights(recipe: Recipe, slices_by_site: Mapping[str, int]) -> dict[str, float]:
    """The share of each site in the average of one round.

    By default a site's share of all training slices, exact. Under `paper_compat` it is what FedFMS
    uses (arXiv 2403.05408): the share rounded to two decimals by `numpy.round`, except that the
    last training site gets 1 minus the others: last in the recipe's `site_order`, and sites that it
    does not list after those, in the order of names. So a small site can get 0.00, and a small last
    site even less than 0, where the others were rounded up.

    Args:
        recipe: its holdout sites weigh 0.
        slices_by_site: training slices of each site whose answer counts in this round; of a holdout
            any number.

    Returns:
        site to weight, by sorted name; they add up to 1, or are all 0 without a training site.

    Raises:
        ValueError: a training site has no slice; the guard refuses such a contribution before.
    """
    training = sorted(site for site in slices_by_site if site not in recipe.holdout)
    if without := [site for site in training if slices_by_site[site] < 1]:
        raise ValueError(f"{without[0]} trained on {slices_by_site[without[0]]} slices")
    weights = dict.fromkeys(sorted(slices_by_site), 0.0)
    total = sum(slices_by_site[site] for site in training)
    for site in training:
        weights[site] = slices_by_site[site] / total
    if recipe.paper_compat and training:
        place = {site: number for number, site in enumerate(recipe.site_order)}
        *others, last = sorted(training, key=lambda site: (place.get(site, len(place)), site))
        for site in others:
            weights[site] = float(np.round(weights[site], 2))
        weights[last] = 1 - sum(weights[site] for site in others)
        if small := [f"{site} {weights[site]:.2f}" for site in training if weights[site] < 0.005]:
            log.warning("weights rounded as in the paper, paper_compat: %s", ", ".join(small))
    return weights


def average(
    differences: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, float]
) -> dict[str, Tensor]:
    """The weighted sum of the sites' differences: what to add to the global model, in fp32.

    Summed in fp64 in the order of the sites' names and rounded to fp32 once, so the result depends
    neither on the order of arrival nor on the number of threads: a product and a sum are two
    operations here, since a processor may or may not fuse them into one that rounds differently.

    Args:
        differences: site to its tensors by name, fp32 or fp16 on the CPU; left as they are.
        weights: from `averaging_weights`; a site of weight 0 needs no tensors.

    Returns:
        new fp32 tensors by sorted name; none where no site has a weight.

    Raises:
        ValueError: two sites have other tensors, which the guard does not let happen.
        KeyError: a site with a weight has no difference.
    """
    counted = {site: differences[site] for site in sorted(weights) if weights[site] != 0}
    names = sorted({name for tensors in counted.values() for name in tensors})
    mean: dict[str, Tensor] = {}
    for name in names:
        total: Tensor | None = None
        for site, tensors in counted.items():
            if name not in tensors:
                raise ValueError(f"{site} has no {name}, and another site has")
            part = tensors[name].to(torch.float64, copy=True).mul_(weights[site])
            total = part if total is None else total.add_(part)
        assert total is not None  # a name comes from one of the sites
        mean[name] = total.to(torch.float32)
    return mean
