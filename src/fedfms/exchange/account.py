"""What a site's noise is worth: the (epsilon, delta) of all that it let out.

Differential privacy (Dwork and Roth 2014): whoever sees all that left tells whether one patient (or
one site) was there at most `exp(epsilon)` times better than by guessing, but for a chance of
`delta`. Neighbours differ by one patient, or one site, that is there or not. Sums with Gaussian
noise of Poisson-sampled parts are composed numerically (Gopi, Lee and Wutschitz 2021,
arXiv 2106.02848, as in Opacus); without sampling the exact formula of Balle and Wang 2018
(arXiv 1805.06530, theorem 8) is used.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

_LARGE = 200.0  # epsilon from which no number says anything; larger ones are this
_LITTLE = 1e-2  # noise with which no number says anything either; less of it counts as _LARGE
_MUCH = 100.0  # noise; where patients are sampled more counts as this, and would take minutes


@dataclass(frozen=True, slots=True)
class Noised:
    """Sums that were let out with Gaussian noise.

    Args:
        noise: standard deviation on each value, as a share of the largest L2 norm of what one
            patient (or one site) adds to a sum; 0: none.
        rate: probability with which each patient is in a sum, drawn anew for each; (0, 1].
        steps: how many sums.
    """

    noise: float
    rate: float = 1.0
    steps: int = 1


def epsilon(let_out: Iterable[Noised], delta: float) -> float:
    """The epsilon of all of it together, at this delta; an upper bound, less than 1 % too large.

    Returns:
        0 where nothing was let out, infinity where a sum had no noise; 200 stands for all that is
        larger.

    Raises:
        ValueError: delta is not in (0, 1).
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta}")
    counted: Counter[tuple[float, float]] = Counter()
    for one in let_out:
        if one.steps:
            counted[one.noise, one.rate] += one.steps
    if not counted:
        return 0.0
    if any(noise == 0 for noise, _ in counted):
        return math.inf
    if any(noise < _LITTLE for noise, _ in counted):
        return _LARGE
    if all(rate == 1 for _, rate in counted):
        return _of_gaussians(sum(n / noise / noise for (noise, _), n in counted.items()), delta)
    history = [(min(noise, _MUCH), rate, n) for (noise, rate), n in sorted(counted.items())]
    return max(0.0, _of_sampled(history, delta))


def _of_gaussians(inverse_square: float, delta: float) -> float:
    """Of Gaussian mechanisms together: one with noise `1 / sqrt(inverse_square)`."""
    from scipy.optimize import brentq  # both take as long to load as the rest of a trainer
    from scipy.stats import norm

    if inverse_square == 0:  # noise beyond all measure
        return 0.0
    sigma = 1 / math.sqrt(inverse_square)

    def too_much(eps: float) -> float:
        left = norm.cdf(1 / (2 * sigma) - eps * sigma)
        right = math.exp(eps + norm.logcdf(-1 / (2 * sigma) - eps * sigma))
        return float(left - right - delta)

    if too_much(0.0) <= 0:
        return 0.0
    return float(brentq(too_much, 0.0, _LARGE)) if too_much(_LARGE) < 0 else _LARGE


def _of_sampled(history: list[tuple[float, float, int]], delta: float) -> float:
    from opacus.accountants import PRVAccountant, RDPAccountant  # seconds; few sites need it

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # log(0) of what is not sampled, and the range of orders
        rough = RDPAccountant()
        rough.history = history
        bound = float(rough.get_epsilon(delta))
        if bound > _LARGE:
            return _LARGE
        exact = PRVAccountant()
        exact.history = history
        try:
            tight = float(exact.get_epsilon(delta, eps_error=max(1e-3, 2e-3 * bound)))
        except ValueError:  # a delta too small for its numbers; the bound of moments holds
            return bound
        return min(bound, tight)
