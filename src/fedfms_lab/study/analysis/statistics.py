"""Spread, intervals and tests of a study: pure functions of numbers, nothing of runs or pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

RESAMPLES = 10_000
CONFIDENCE = 0.95

_ENUMERATED = 12  # up to this many differences all 2^n signs are tried: exact with ties as well
_CHUNK_VALUES = 4_000_000  # drawn at once while resampling; bounds the memory


@dataclass(frozen=True, slots=True)
class PatientDifference:
    """One patient's cases in a paired comparison."""

    total: float  # sum over the patient's cases of the difference of scores
    cases: int  # 1 or more

    @property
    def mean(self) -> float:
        """Mean difference over this patient's cases."""
        return self.total / self.cases


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether all of it lies on one side of 0."""
        return self.low > 0 or self.high < 0


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


def bootstrap_interval(
    sites: Mapping[str, Sequence[PatientDifference]],
    *,
    fewest: int = 2,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval | None:
    """Percentile bootstrap interval of `site_balanced_mean`.

    Patients are drawn with replacement within each site, with all their cases, and as many as the
    site has: the sites are given, the patients are a sample (cluster bootstrap within strata;
    Davison and Hinkley 1997, *Bootstrap Methods and their Application*, sections 2.4 and 3.8;
    percentile interval: Efron and Tibshirani 1993, *An Introduction to the Bootstrap*, ch. 13).

    Args:
        sites: the patients of each site; sites without patients do not count.
        fewest: patients that each site has to have, 2 or more: of a single one nothing can be said
            about how another would have come out. With n patients a site the interval is too narrow
            by a factor of about sqrt((n - 1) / n).
        seed: of NumPy's default generator; the same patients give the same interval.

    Returns:
        None without patients, or where a site has fewer than `fewest`.
    """
    strata = [patients for _, patients in sorted(sites.items()) if patients]
    if not strata or any(len(patients) < max(2, fewest) for patients in strata):
        return None
    generator = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for patients in strata:
        means += _resampled_means(patients, resamples, generator)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(means / len(strata), [tail, 100 - tail])
    return Interval(float(low), float(high))


def _resampled_means(
    patients: Sequence[PatientDifference], resamples: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """(resamples,) mean over cases of the site, of patients drawn with replacement."""
    totals = np.array([patient.total for patient in patients])
    cases = np.array([patient.cases for patient in patients])
    rows = max(1, _CHUNK_VALUES // len(patients))
    means = []
    for start in range(0, resamples, rows):
        shape = (min(rows, resamples - start), len(patients))
        drawn = generator.integers(0, len(patients), shape)
        means.append(totals[drawn].sum(axis=1) / cases[drawn].sum(axis=1))
    return np.concatenate(means)


def signed_rank_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of Wilcoxon's signed-rank test that differences are symmetric around 0.

    Wilcoxon 1945, *Individual comparisons by ranking methods*. Differences of exactly 0 are left
    out, as Wilcoxon did. Up to 12 others: exact, all signs are tried, ties included. Up to 50
    without ties: SciPy's exact distribution. Else: the normal approximation with its correction
    for ties.

    Returns:
        1 where at most one difference is not 0; None without a difference.
    """
    if not differences:
        return None
    nonzero = np.array([value for value in differences if value != 0.0])
    if nonzero.size < 2:
        return 1.0  # of one difference both signs are equally far from the middle
    if nonzero.size <= _ENUMERATED:
        method: object = stats.PermutationMethod(n_resamples=2**_ENUMERATED)
    else:
        tied = np.unique(np.abs(nonzero)).size < nonzero.size
        method = "exact" if nonzero.size <= 50 and not tied else "asymptotic"
    found = stats.wilcoxon(nonzero, alternative="two-sided", zero_method="wilcox", method=method)
    return min(1.0, float(found.pvalue))


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
