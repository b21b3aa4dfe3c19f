"""Intervals and tests of a study: pure functions of numbers, nothing of runs or pages.

A difference between two ways to train comes out otherwise with other patients and with other runs.
Both are drawn here. A study has few of either, so that both parts are t intervals:

    h_patients = t(alpha / 2; d) * s_patients        over patients within sites, sites given
    h_seeds    = t(alpha / 2; R - 1) * s_seeds       over the R seeds' own means
    h          = sqrt(h_patients^2 + h_seeds^2)

which is Howe's interval of a sum of two means (1974, *Approximate confidence limits on the mean of
X + Y where X and Y are two tabled independent random variables*, JASA 69). What chance does to a
single patient in a single run is in both parts, so that h is rather too wide. How often it excludes
0 where nothing differs, and how often its rivals do: results/study-size.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
FEWEST_SEEDS = 2  # of an interval: of a single run nothing can be said about how another comes out
FEWEST_SEEDS_OF_A_TEST = 3

_LEAST_P = 1e-12  # smaller ones are given as this


@dataclass(frozen=True, slots=True)
class PatientDifference:
    """One patient's cases in a paired comparison."""

    by_seed: tuple[float, ...]  # sum over the patient's cases of the difference of scores
    cases: int  # 1 or more

    @property
    def total(self) -> float:
        """Mean over seeds of the sum over the patient's cases."""
        return math.fsum(self.by_seed) / len(self.by_seed)


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether all of it lies on one side of 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True)
class Part:
    """Standard error of a mean by what is drawn, and its degrees of freedom."""

    error: float
    freedom: float

    def half_width(self, alpha: float) -> float:
        """Of its two-sided t interval at 1 - alpha."""
        return float(stats.t.isf(alpha / 2, self.freedom)) * self.error


def mean(values: Sequence[float]) -> float | None:
    """Arithmetic mean; None of nothing."""
    return math.fsum(values) / len(values) if values else None


def site_balanced_mean(sites: Mapping[str, Sequence[PatientDifference]]) -> float | None:
    """Mean over sites, each once, of the mean over a site's cases; None without a case.

    Sites without patients do not count.
    """
    means = [
        math.fsum(patient.total for patient in patients) / sum(p.cases for p in patients)
        for patients in sites.values()
        if patients
    ]
    return mean(means)


def interval(
    sites: Mapping[str, Sequence[PatientDifference]],
    *,
    fewest: int = 2,
    confidence: float = CONFIDENCE,
) -> Interval | None:
    """Interval of `site_balanced_mean` over other patients of these sites and other seeds.

    Args:
        sites: the patients of each site, all with the same seeds in the same order; sites without
            patients do not count.
        fewest: patients that each site has to have, 2 or more.
        confidence: in (0, 1).

    Returns:
        None without patients, where a site has fewer than `fewest`, or with fewer than
        FEWEST_SEEDS seeds.
    """
    middle, parts = site_balanced_mean(sites), _parts(sites, fewest)
    if middle is None or parts is None:
        return None
    half = _half_width(parts, 1 - confidence)
    return Interval(middle - half, middle + half)


def p_value(sites: Mapping[str, Sequence[PatientDifference]], *, fewest: int = 2) -> float | None:
    """Two-sided p that `site_balanced_mean` is 0: the alpha at which `interval` touches 0.

    Returns:
        at least 1e-12; None where there is no interval, or with fewer than FEWEST_SEEDS_OF_A_TEST
        seeds.
    """
    middle, parts = site_balanced_mean(sites), _parts(sites, fewest)
    if middle is None or parts is None or _seeds(sites) < FEWEST_SEEDS_OF_A_TEST:
        return None
    if middle == 0:
        return 1.0
    if abs(middle) >= _half_width(parts, _LEAST_P):
        return _LEAST_P
    touches = optimize.brentq(lambda a: _half_width(parts, a) - abs(middle), _LEAST_P, 1.0)
    return float(touches)


def _half_width(parts: tuple[Part, Part], alpha: float) -> float:
    return math.hypot(*(part.half_width(alpha) for part in parts))


def _seeds(sites: Mapping[str, Sequence[PatientDifference]]) -> int:
    return min((len(one.by_seed) for patients in sites.values() for one in patients), default=0)


def _parts(
    sites: Mapping[str, Sequence[PatientDifference]], fewest: int
) -> tuple[Part, Part] | None:
    """Of patients and of seeds."""
    strata = [patients for patients in sites.values() if patients]
    few = any(len(patients) < max(2, fewest) for patients in strata)
    if not strata or few or _seeds(sites) < FEWEST_SEEDS:
        return None
    return _of_patients(strata), _of_seeds(strata)


def _of_patients(strata: Sequence[Sequence[PatientDifference]]) -> Part:
    """Patients drawn within each site with all their cases, the sites as they are.

    A site's mean is a ratio, the sum of its patients' totals over the sum of their cases: its
    variance by the usual linearization (Cochran 1977, *Sampling Techniques*, section 6.3), the
    degrees of freedom of the sum over sites by Satterthwaite 1946.
    """
    variances, freedoms = [], []
    for patients in strata:
        totals = np.array([patient.total for patient in patients])
        cases = np.array([patient.cases for patient in patients])
        beside = totals - totals.sum() / cases.sum() * cases
        n = len(patients)
        variances.append(n / (n - 1) * float((beside**2).sum()) / int(cases.sum()) ** 2)
        freedoms.append(n - 1)
    total = math.fsum(variances)
    squares = math.fsum(v**2 / d for v, d in zip(variances, freedoms, strict=True))
    freedom = total**2 / squares if squares > 0 else sum(freedoms)
    return Part(math.sqrt(total) / len(strata), freedom)


def _of_seeds(strata: Sequence[Sequence[PatientDifference]]) -> Part:
    """Runs drawn: the spread of the seeds' own site-balanced means."""
    means = np.mean(
        [
            np.sum([patient.by_seed for patient in patients], axis=0)
            / sum(patient.cases for patient in patients)
            for patients in strata
        ],
        axis=0,
    )
    return Part(float(np.std(means, ddof=1)) / math.sqrt(len(means)), len(means) - 1)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p values that hold the chance of any false finding in the family at their level.

    Holm 1979, *A simple sequentially rejective multiple test procedure*, Scandinavian Journal of
    Statistics 6: the k-th smallest of m is multiplied by m - k + 1, is not below the one before
    it, and is at most 1. None stays None and does not count to the family.
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, place) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        adjusted[place] = highest
    return adjusted
